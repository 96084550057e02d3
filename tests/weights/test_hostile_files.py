"""Checkpoints that are made to harm: each is refused in one line, before it takes memory or time."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from varpi.errors import VarpiError
from varpi.generators import LlamaGenConfig
from varpi.runtime.tensors import read_checkpoint, write_safetensors
from varpi.tokenizers import VQConfig
from varpi.weights import export_original, load_generator, save_generator, to_original


def refused(source: Any, message: str, **settings: Any) -> None:
    with pytest.raises(VarpiError, match=message) as caught:
        load_generator(source, **settings)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_dictionaries_that_hold_themselves_or_lie_deep(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    torch.save(content, tmp_path / "loop.pt")
    for source in (content, tmp_path / "loop.pt"):
        refused(source, "its tensors lie more than 8 dictionaries deep, or it holds itself")
    content = to_original(tiny.generator())
    for _ in range(8):
        content = {"module": content}
    assert len(read_checkpoint(content).tensors) == 18
    refused({"module": content}, "more than 8 dictionaries deep")


def test_names_that_are_none() -> None:
    refused({3: torch.zeros(2)}, "has an entry called 3; the names of tensors are strings")
    refused({"x" * 10_000: 3}, r"entry 'x{79} is a int, not a tensor")
    long = "module." * 200_000 + "a"  # linear, not quadratic
    assert list(read_checkpoint({long: torch.zeros(1)}).tensors) == ["a"]


def test_tensors_that_hold_no_numbers() -> None:
    for tensor in (torch.zeros(2, device="meta"), torch.zeros(2, 2).to_sparse()):
        refused({"norm.weight": tensor}, "norm.weight is not a dense tensor with its numbers")


def test_pipes_devices_and_broken_links(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "gone")
    (tmp_path / "loop.pt").symlink_to(tmp_path / "loop.pt")
    for source in (tmp_path / "pipe.pt", Path("/dev/zero"), tmp_path / "link.safetensors", tmp_path / "loop.pt"):
        refused(source, "is a pipe, a device or a broken link; expected a checkpoint file or a directory")
    refused(tmp_path, "holds no checkpoint")
    refused("a" * 5000, "no such file or directory")
    refused("a\0b", "no such file or directory")
    refused(3, "a checkpoint is a path, a Hub id or a state dict, not of type int")
    save_generator(tiny.generator(), tmp_path / "m.safetensors")
    os.mkfifo(tmp_path / "config.json")
    refused(tmp_path / "m.safetensors", "config.json: cannot be read as JSON .*not a regular file")


def test_old_files_that_torch_itself_fails_on(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save(to_original(tiny.generator()), path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for place in range(0, 2000, 40):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            load_generator(path, architecture=tiny.GENERATOR)
        except VarpiError as error:
            assert "\n" not in str(error)  # noqa: PT017 - some bytes matter, some do not
    head = [0x1950A86A20F9469CFC6C, 1001, {}]  # as torch writes them
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in (*head, ("a", 1), [])))
    refused(path, "holds a tuple, not a dictionary of tensors")


def test_zip_files_that_inflate_or_are_none(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\0" * 10_000_000)
    refused(tmp_path / "bomb.pt", r"bomb.pt: claims to hold more than its [\d,]+ bytes; refused")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("readme.txt", b"hello")
    refused(tmp_path / "other.pt", "other.pt: not a readable PyTorch checkpoint")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "other.pt").read_bytes()[:20])
    refused(tmp_path / "cut.pt", "cut.pt: not a readable PyTorch checkpoint")


def test_shapes_that_the_file_does_not_hold(tmp_path: Path) -> None:
    torch.save({"tok_embeddings.weight": torch.zeros(1).expand(2**40, 2**20)}, tmp_path / "wide.pt")
    refused(
        tmp_path / "wide.pt", r"tok_embeddings.weight has shape \(1099511627776, 1048576\), more than the file holds"
    )
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 64)
    refused(tmp_path / "x.safetensors", "not a readable safetensors file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 10**9}, "n_layer is 1000000000; it must be at most 1024"),
        ({"grid": 10**6}, "grid is 1000000; it must be at most 1024"),
        ({"vocab_size": 10**15}, "vocab_size is 1000000000000000; it must be at most"),
        ({"n_layer": True}, "n_layer is True; it must be a whole number"),
        ({"dim": "32"}, "dim is '32'; it must be a whole number"),
        ({"norm_eps": None}, "norm_eps is None; it must be a number above 0"),
        ({"rope_base": float("nan")}, "rope_base is nan; it must be a number above 0"),
        ({"dropout": "a"}, "dropout is 'a'; it must be a number"),
    ],
)
def test_configurations_out_of_reason(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "model.safetensors"
    save_generator(tiny.generator(), path)
    metadata = read_checkpoint(path).metadata
    description = json.loads(metadata["varpi"])
    description["config"] |= change
    save_file(load_file(path), path, metadata={**metadata, "varpi": json.dumps(description)})
    refused(path, f"its configuration is not valid: LlamaGenConfig: {message}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_blocks": 10**9}, "encoder_blocks is 1000000000; it must be at most"),
        ({"codebook_size": 0}, "codebook_size is 0; it must be at least 1"),
        ({"channel_multipliers": [1] * 40}, "40 channel_multipliers down-sample by"),
        ({"channel_multipliers": "112"}, "channel_multipliers is '112'; it must be a list of whole numbers"),
        ({"norm_groups": 0}, "norm_groups is 0; it must be at least 1"),
        ({"channels": 2.5}, "channels is 2.5; it must be a whole number"),
    ],
)
def test_tokenizers_out_of_reason(change: dict[str, Any], message: str) -> None:
    with pytest.raises(VarpiError, match=message):
        VQConfig(**{**dataclasses.asdict(tiny.TOKENIZER), **change})


def test_deep_json(tmp_path: Path) -> None:
    save_generator(tiny.generator(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("[" * 100_000)
    refused(tmp_path, "config.json: cannot be read as JSON .RecursionError")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map":' * 100_000)
    refused(tmp_path / "model.safetensors.index.json", "index.json: cannot be read as JSON .RecursionError")


def test_dtypes_and_devices_by_name() -> None:
    state = to_original(tiny.generator())
    loaded = load_generator(state, architecture=tiny.GENERATOR, dtype="bfloat16")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    for wrong in ("bf16", "int8", "nn", torch.int8, None):
        refused(
            state, rf"dtype is {wrong}; weights need a floating-point one", architecture=tiny.GENERATOR, dtype=wrong
        )
    refused(state, "device is 'gpu'; expected cpu, cuda or cuda:N", architecture=tiny.GENERATOR, device="gpu")
    refused(state, r"device is 'cuda:99'; torch can use \d+ CUDA", architecture=tiny.GENERATOR, device="cuda:99")


# -- equal bytes


SAVE = """
import sys, tiny
from varpi.weights import save_generator
save_generator(tiny.generator(), sys.argv[1], extra={name: name for name in "abcdefghij"})
"""


def test_every_process_writes_the_same_bytes(tmp_path: Path) -> None:
    written = []
    for seed in ("1", "2"):
        path = tmp_path / f"{seed}.safetensors"
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", SAVE, str(path)], env=environment, check=True)
        written.append(path.read_bytes())
    assert written[0] == written[1]


def test_what_is_written_is_what_the_package_reads(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.randn(7).bfloat16(),
        "é": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
        "half": torch.randn(2, 1, 2).half(),
    }
    write_safetensors(tensors, tmp_path / "x.safetensors", {"z": "1", "a": 'quo"te'})
    read = load_file(tmp_path / "x.safetensors")
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"z": "1", "a": 'quo"te'}
    with pytest.raises(VarpiError, match=r"a is torch.complex64, which cannot be written"):
        write_safetensors({"a": torch.zeros(1, dtype=torch.complex64)}, tmp_path / "y.safetensors", {})


def test_exports_too(tmp_path: Path) -> None:
    export_original(tiny.generator(), tmp_path / "x.safetensors")
    for name, tensor in load_file(tmp_path / "x.safetensors").items():
        assert torch.equal(tensor, to_original(tiny.generator())[name])


def test_sizes_that_have_no_name_are_still_free() -> None:
    assert LlamaGenConfig(dim=8192, n_layer=200, n_head=64, grid=64).ffn_dim == 22016
