"""Small tar shards and images for the tests of captioned data."""

import io
import json
import tarfile
from pathlib import Path

from PIL import Image


def png(red: int, size: tuple[int, int] = (20, 24)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (red, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_shard(path: Path, reds: range) -> Path:
    """A shard as img2dataset writes it: image `red` is called "0000<red>" and its caption "red <red>"."""
    members = {}
    for red in reds:
        members[f"{red:05}.png"] = png(red)
        members[f"{red:05}.json"] = json.dumps({"caption": f"red {red}", "key": f"{red:05}"}).encode()
        members[f"{red:05}.txt"] = f"text {red}".encode()
    return write_tar(path, members)


def red_of(image) -> int:
    return round((float(image[0, 8, 8]) + 1) * 127.5)
