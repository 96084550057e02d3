"""Damaged and hostile files: bytes of every format that varpi reads are changed, and what comes of it must be read as
it is or refused in a line, within seconds and within memory.

    python tests/fuzz.py                              # 20 000 cases
    python tests/fuzz.py --cases 500 --seed 7 tar png # of two formats
    python tests/fuzz.py --show tar 1234 --seed 7     # one case, with its traceback

Exits 1 when a case ends in anything but a result or a VarpiError of one short line, when it hangs, when a process dies,
and when memory, threads or open files grow from case to case. A case depends on its seed, format and number alone.
"""

import argparse
import contextlib
import io
import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

# ruff: noqa: E402 (what the imports below look at comes first)
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path[:0] = [str(Path(__file__).parent / room) for room in ("generators", "data")]

import datasets
import hf
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shards
import tiny
import tiny_t5
import torch
from PIL import Image
from safetensors.torch import save_file

from varpi.data import open_dataset
from varpi.data.caption_features import read_features, write_features
from varpi.data.classes import read_classes
from varpi.data.prompts import read_geneval_metadata, read_prompts
from varpi.data.text_encoder import TextEncoder
from varpi.data.transforms import load_image
from varpi.errors import VarpiError
from varpi.evaluation.detections import read_detections
from varpi.evaluation.geneval import read_geneval_folder
from varpi.evaluation.reference import open_reference
from varpi.evaluation.result import Result, read_result, write_result
from varpi.methods import build_method
from varpi.play.showing import show_study
from varpi.recipe import load_recipe
from varpi.runtime.processes import World
from varpi.samples.reading import open_samples
from varpi.training.checkpoint_files import MANIFEST, seal
from varpi.training.logging import read_metrics
from varpi.training.loop import train
from varpi.training.optimizer import make_optimizer
from varpi.training.state import load_checkpoint, newest_whole
from varpi.weights import export_original, load_generator, load_tokenizer, save_generator, save_tokenizer

FORK = multiprocessing.get_context("fork")
"""Imports take seconds, cases milliseconds."""
STUDY = Path(__file__).parents[1] / "docs" / "results" / "digits.json"
CASES = 20_000
BATCH = 400
"""Cases of one process."""
SECONDS = 20
"""That a case may take."""
MEMORY = 3 << 30
"""Bytes of address space that a process may take beyond what it has after its imports."""
GROWTH = 200 << 20
"""Bytes by which a process may grow once it has seen a quarter of its cases."""
LENGTH = 2000
"""Of a message, at most."""


class Format(NamedTuple):
    make: Callable[[Path], object]
    """Fills an empty folder with a sound sample."""
    read: Callable[[Path], object]
    """Reads all of it; the folder is as `make` left it but for one file."""
    files: str = "*"
    """Glob of the files below the folder that are changed."""


def formats() -> dict[str, Format]:
    """By name."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)

    def picture(kind: str, mode: str = "RGB", **settings: Any) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(file, kind, **settings)
        return file.getvalue()

    def image(suffix: str, kind: str, mode: str = "RGB", **settings: Any) -> Format:
        return Format(
            lambda folder: (folder / f"image.{suffix}").write_bytes(picture(kind, mode, **settings)),
            lambda folder: load_image(folder / f"image.{suffix}", "image", 16),
        )

    def all_of(*reads: Callable[[], object]) -> None:
        """Carry all out; what they refuse is refused together."""
        refused: list[str] = []
        for read in reads:
            try:
                read()
            except VarpiError as error:
                refused += error.args
        if refused:
            raise VarpiError(*refused)

    def items(source: Path, **settings: Any) -> None:
        dataset = open_dataset(source, image_size=16, **settings)
        all_of(*(lambda i=index: dataset[i] for index in range(min(len(dataset), 8))))

    def legacy(folder: Path) -> None:
        state = tiny.generator().state_dict()
        torch.save({"model": state}, folder / "model.pt", _use_new_zipfile_serialization=False)

    def sharded(folder: Path) -> None:
        state = tiny.generator().state_dict()
        names = sorted(state)
        index = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
        for file in set(index.values()):
            save_file({name: state[name].clone() for name in names if index[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))

    def janus(folder: Path) -> None:
        hf.save(hf.janus(), folder)

    def caption_table(folder: Path) -> None:
        rows: dict[str, Any] = {"image": [{"bytes": picture("PNG"), "path": f"{i}.png"} for i in range(3)]}
        rows |= {"caption": ["a dog", "a cat", "a fish"], "label": [0, 1, 2]}
        pq.write_table(pa.table(rows), folder / "a.parquet")

    def table(folder: Path) -> None:
        datasets.config.HF_DATASETS_CACHE = folder.parent / "cache"
        try:
            all_of(
                lambda: items(folder / "a.parquet"),
                lambda: items(folder / "a.parquet", caption_column="caption"),
            )
        finally:
            shutil.rmtree(folder.parent / "cache", ignore_errors=True)

    def tar(folder: Path) -> None:
        members = {"a/0.png": picture("PNG"), "a/0.txt": b"a dog", "1.jpg": picture("JPEG"), "1.json": b'{"text": "a"}'}
        shards.write_tar(folder / "0.tar", members)

    def jsonl(folder: Path) -> None:
        (folder / "0.png").write_bytes(picture("PNG"))
        rows = [{"image_path": "0.png", "text": ["a dog", "b"]}, {"image_path": "0.png", "text": "ein Hund ä"}]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def samples(folder: Path) -> None:
        for i in range(3):
            (folder / f"{i}.png").write_bytes(picture("PNG"))
        (folder / "sample.json").write_text(json.dumps({"classes": [0, 1, 2], "seed": 3, "sampling": {"top_k": 4}}))

    def measured(folder: Path) -> None:
        opened = open_samples(folder)
        for batch in opened.batches([range(opened.count)]):
            _ = batch

    def batch(folder: Path) -> None:
        statistics = {"mu": np.zeros(4), "sigma": np.eye(4), "mu_s": np.zeros(3), "sigma_s": np.eye(3)}
        np.savez(folder / "batch.npz", arr_0=np.stack([pixels[:16, :16]] * 3), **statistics)

    def reference(folder: Path) -> None:
        opened = open_reference(folder / "batch.npz")
        if opened.images is not None:
            for part in opened.images.batches([range(opened.images.count)]):
                _ = part

    def result(folder: Path) -> None:
        found = Result("text", {"clip": 0.5}, {"source": "a"}, {"seed": 1}, None, {"network": "b"}, ["c"])
        write_result(folder / "result.json", found)

    dog = {"class": "dog", "count": 1}
    record = {"tag": "position", "include": [dog, dog | {"position": ["above", 0]}], "prompt": "a dog"}

    def geneval(folder: Path) -> None:
        (folder / "metadata.jsonl").write_text(json.dumps(record) + "\n")
        (folder / "00000" / "samples").mkdir(parents=True)
        (folder / "00000" / "metadata.jsonl").write_text(json.dumps(record))
        (folder / "00000" / "samples" / "0000.png").write_bytes(picture("PNG"))
        found = {"00000/samples/0000.png": {"detections": {"dog": [[0, 0, 9, 9, 0.9]]}, "colors": {"dog": ["red"]}}}
        (folder / "detections.json").write_text(json.dumps(found))

    def read_geneval(folder: Path) -> None:
        all_of(
            lambda: read_geneval_metadata(folder / "metadata.jsonl"),
            lambda: read_detections(folder / "detections.json"),
            lambda: read_geneval_folder(folder),
        )

    def prompts(folder: Path) -> None:
        (folder / "a.txt").write_text("a red dog\n\na cat\n")
        (folder / "a.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
        (folder / "a.json").write_text('["a cat", {"prompt": "a dog"}]')
        (folder / "a.tsv").write_text("Prompt\tCategory\na bond\tAbstract\n")

    def read_all_prompts(folder: Path) -> None:
        all_of(*(lambda path=path: read_prompts(path) for path in sorted(folder.iterdir())))

    def run(folder: Path) -> None:
        pair = tiny.make(folder / "pair")
        recipe = tiny.recipe(pair, "training.steps=2", "training.save_every=1", "data.workers=0")
        train(recipe, folder / "run", device="cpu", show=False)

    def read_run(folder: Path) -> None:
        all_of(
            lambda: load_recipe(folder / "run" / "recipe.yaml"),
            lambda: newest_whole(folder / "run", lambda _: None),
            lambda: read_metrics(folder / "run"),
        )

    def resume(folder: Path) -> None:
        """As if the damage had been there when the checkpoint was sealed."""
        recipe = tiny.recipe(folder / "pair")
        method = build_method(recipe, 3, "cpu")
        checkpoint = folder / "run" / "checkpoints" / "step-00000002"
        with contextlib.suppress(OSError):
            (checkpoint / MANIFEST).unlink(missing_ok=True)
            seal(checkpoint)
        if newest_whole(folder / "run", lambda _: None) == checkpoint:
            load_checkpoint(
                checkpoint, method.model, make_optimizer(method.model, recipe.optimizer), World(0, 1, "cpu")
            )

    architecture = tiny.GENERATOR
    t5_words = ("a", "red", "dog")
    return {
        "safetensors generator": Format(
            lambda folder: save_generator(tiny.generator(), folder / "model.safetensors"),
            lambda folder: load_generator(folder / "model.safetensors"),
        ),
        "safetensors tokenizer": Format(
            lambda folder: save_tokenizer(tiny.tokenizer(), folder / "model.safetensors"),
            lambda folder: load_tokenizer(folder / "model.safetensors"),
        ),
        "sharded safetensors": Format(sharded, lambda folder: load_generator(folder, architecture=architecture)),
        "pt": Format(
            lambda folder: export_original(tiny.generator(), folder / "model.pt"),
            lambda folder: load_generator(folder / "model.pt", architecture=architecture),
        ),
        "legacy pt": Format(legacy, lambda folder: load_generator(folder / "model.pt", architecture=architecture)),
        "transformers": Format(janus, load_generator, "*.json"),
        "t5": Format(lambda folder: tiny_t5.make(folder, t5_words), lambda folder: TextEncoder(folder)(["a red dog"])),
        "recipe": Format(
            lambda folder: shutil.copy(tiny.make(folder / "pair") / "va_pi.yaml", folder / "recipe.yaml"),
            lambda folder: load_recipe(folder / "recipe.yaml"),
            "recipe.yaml",
        ),
        "parquet": Format(caption_table, table),
        "tar": Format(tar, lambda folder: items(folder / "0.tar")),
        "jsonl": Format(jsonl, lambda folder: items(folder / "rows.jsonl"), "rows.jsonl"),
        "classes": Format(
            lambda folder: (folder / "classes.txt").write_text("dog\ncat\nfish\n"),
            lambda folder: read_classes(folder / "classes.txt"),
        ),
        "png": image("png", "PNG"),
        "palette png": image("png", "PNG", "P", transparency=b"\x00\x80"),
        "jpg": image("jpg", "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"),
        "webp": image("webp", "WEBP"),
        "gif": image("gif", "GIF"),
        "tiff": image("tiff", "TIFF", compression="tiff_lzw"),
        "bmp": image("bmp", "BMP"),
        "ppm": image("ppm", "PPM"),
        "npy features": Format(
            lambda folder: write_features(folder / "a.npy", torch.ones(3, 4), "npy"),
            lambda folder: read_features(folder / "a.npy"),
        ),
        "safetensors features": Format(
            lambda folder: write_features(folder / "a.safetensors", torch.ones(3, 4), "safetensors"),
            lambda folder: read_features(folder / "a.safetensors"),
        ),
        "samples": Format(samples, measured),
        "sample npz": Format(
            lambda folder: np.savez(folder / "samples.npz", np.stack([pixels] * 3)),
            measured,
        ),
        "reference npz": Format(batch, reference),
        "result": Format(result, lambda folder: read_result(folder / "result.json")),
        "study": Format(
            lambda folder: shutil.copyfile(STUDY, folder / "study.json"),
            lambda folder: show_study(folder / "study.json"),
        ),
        "geneval": Format(geneval, read_geneval, "**/*.json*"),
        "prompts": Format(prompts, read_all_prompts),
        "run": Format(run, read_run, "run/**/*"),
        "checkpoint": Format(run, resume, "run/checkpoints/step-00000002/*"),
    }


FORMATS = formats()

# -- changing bytes

WORDS = (
    *rb'null|true|-1|0|1e999|NaN|-Infinity|99999999999999999999|0x7fffffff|[]|{}|[[]]|""|"|\|\u0000|\ud800|,|:'.split(
        b"|"
    ),
    *rb"- |&a|*a|&a [*a, *a]|<<: *a|!!python/object/apply:os.system|2024-99-99|~|---|a.b.c|..".split(b"|"),
    *rb"../../etc/passwd|file:///etc/passwd|/dev/zero|\n|\r|\0|\t".split(b"|"),
    *(b"\n", b"\r", b"\0", b"\t", b"\xff\xfe", b"\xef\xbb\xbf", "ä\u202e漢".encode()),
    *(b"[" * 3000, b'{"a":' * 3000, b"9" * 5000),
)
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF)


def changed(data: bytes, draws: random.Random) -> bytes:
    """The bytes with a few random changes."""
    if data.startswith(b"PK\x03\x04") and draws.random() < 0.5:
        return _with_changed_member(data, draws)
    work = bytearray(data)
    for _ in range(draws.choice((1, 1, 1, 2, 4, 16))):
        _change(work, draws)
    return bytes(work)


def _change(work: bytearray, draws: random.Random) -> None:
    reach = draws.choice((64, 1024, len(work), len(work)))  # headers matter more than pixels
    start = draws.randrange(max(1, min(reach, len(work))))
    if draws.random() < 0.15:
        start = max(0, len(work) - 1 - start)
    length = min(draws.choice((1, 1, 2, 4, 8, 64, 1024)), max(1, len(work) - start))
    kind = draws.randrange(8)
    if kind == 0 and work:
        work[start] ^= 1 << draws.randrange(8)
    elif kind == 1:
        work[start : start + length] = draws.randbytes(length)
    elif kind == 2:
        del work[start : start + length]
    elif kind == 3:
        work[start:start] = work[start : start + length] * draws.choice((1, 2, 100))
    elif kind == 4:
        del work[start:]
    elif kind == 5:
        size = draws.choice((1, 2, 4, 8))
        number = draws.choice(NUMBERS) & (256**size - 1)
        work[start : start + size] = number.to_bytes(size, draws.choice(("little", "big")))
    elif kind == 6:
        work[start:start] = draws.choice(WORDS)
    else:
        end = start
        while end < len(work) and end - start < 64 and chr(work[end]).isalnum():
            end += 1
        work[start:end] = draws.choice(WORDS)


def _with_changed_member(data: bytes, draws: random.Random) -> bytes:
    """An archive whose checksums are right, though one of its members is not."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    chosen = draws.choice(sorted(members))
    work = bytearray(members[chosen])
    _change(work, draws)
    members[chosen] = bytes(work)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", draws.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


# -- one process


class Hang(BaseException):
    """A case took too long; no code handles it."""


class Worker:
    """Carries out cases of one format in a folder of its own."""

    def __init__(self, name: str, sample: Path, folder: Path, seed: int) -> None:
        self.name = name
        self.seed = seed
        self.format = FORMATS[name]
        self.folder = folder / "sample"
        shutil.copytree(sample, self.folder)
        self.files = sorted(path for path in self.folder.glob(self.format.files) if path.is_file())
        assert self.files, f"{name}: nothing to change"

    def case(self, number: int) -> str:
        """ "read" or "refused", or else what is wrong."""
        draws = random.Random(f"{self.seed} {self.name} {number}")
        path = draws.choice(self.files)
        sound = {file: file.read_bytes() for file in self.files}
        try:
            _replace(path, changed(sound[path], draws))
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                self.format.read(self.folder)
            except VarpiError as error:
                return wrong_message(error) or "refused"
            except Hang:
                return f"hangs\n{traceback.format_exc()}"
            except BaseException:
                return traceback.format_exc()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            return "read"
        finally:
            for file, content in sound.items():
                if not file.is_file() or file.read_bytes() != content:
                    _replace(file, content)


def wrong_message(error: Exception) -> str | None:
    for line in map(str, error.args):
        if not line or "\n" in line or len(line) > LENGTH:
            return f"a message that is not one short line: {line[:LENGTH]!r}"
    return None


def _replace(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)  # not in place: an earlier case may have the file mapped
    path.write_bytes(content)


def work(results: Connection, name: str, sample: Path, numbers: range, seed: int) -> None:
    """Carry out cases; of each is sent (number, None) when it begins, and (number, outcome) when it has ended."""

    def ring(_signal: int, _frame: Any) -> None:
        raise Hang

    warnings.simplefilter("ignore")
    logging.disable()
    signal.signal(signal.SIGALRM, ring)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "output.txt").open("w") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
        worker = Worker(name, sample, Path(folder), seed)
        try:
            worker.format.read(worker.folder)  # what is imported late then has taken its memory
        except BaseException:
            results.send((numbers.start, f"the sound sample is not read\n{traceback.format_exc()}"))
            return
        limit = _status("VmSize") + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        before = None
        for count, number in enumerate(numbers):
            results.send((number, None))
            results.send((number, worker.case(number)))
            if count == max(20, len(numbers) // 4):
                before = _taken()
        if before is not None:
            after = _taken()
            if after[0] - before[0] > GROWTH or after[1] > before[1] + 8 or after[2] > before[2] + 8:
                results.send((numbers[-1], f"grew: (bytes, files, threads) from {before} to {after}"))


def _taken() -> tuple[int, int, int]:
    """Resident bytes, open files and threads of this process."""
    return _status("VmRSS"), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def _status(key: str) -> int:
    """Bytes, from /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


# -- all processes


class Job:
    """A process that carries out cases."""

    def __init__(self, name: str, folder: Path, numbers: range, seed: int) -> None:
        self.name = name
        self.numbers = numbers
        self.results, end = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=work, args=(end, name, folder / name, numbers, seed))
        self.process.start()
        end.close()
        self.current: int | None = None
        self.heard = time.monotonic()


def make_samples(names: list[str], folder: Path) -> None:
    """In a process of its own, so that those of the cases are forked from one that has done nothing."""

    def make() -> None:
        torch.set_num_threads(1)
        for name in names:
            (folder / name).mkdir(parents=True)
            FORMATS[name].make(folder / name)

    process = FORK.Process(target=make)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("the sound samples could not be made")


def outcomes(tasks: list[tuple[str, range]], folder: Path, seed: int, jobs: int) -> Iterator[tuple[str, int, str]]:
    """(format, number, outcome) of every case. One that kills its process is an outcome, and the others go on."""
    waiting, running = deque(tasks), dict[Connection, Job]()
    while waiting or running:
        while waiting and len(running) < jobs:
            job = Job(waiting[0][0], folder, waiting.popleft()[1], seed)
            running[job.results] = job
        for ready in wait(list(running), 1):
            assert isinstance(ready, Connection)
            job = running[ready]
            job.heard = time.monotonic()
            try:
                number, outcome = ready.recv()
            except EOFError:
                del running[ready]
                ready.close()
                job.process.join()
                if job.current is not None:
                    yield job.name, job.current, f"the process ended with {job.process.exitcode}"
                    if rest := range(job.current + 1, job.numbers.stop):
                        waiting.append((job.name, rest))
                elif job.process.exitcode:
                    yield job.name, job.numbers.start, f"the process ended with {job.process.exitcode} outside a case"
                continue
            job.current = number if outcome is None else None
            if outcome is not None:
                yield job.name, number, outcome
        for job in running.values():
            if time.monotonic() - job.heard > 15 * SECONDS:  # it hangs where no signal is heard
                job.process.kill()


def fuzz(names: list[str], cases: int, seed: int, jobs: int) -> int:
    """Print what became of the cases; how many went wrong."""
    each = -(-cases // len(names))
    tasks = [(name, range(a, min(a + BATCH, each))) for a in range(0, each, BATCH) for name in names]
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    wrong: dict[tuple[str, ...], list[tuple[int, str]]] = {}
    with tempfile.TemporaryDirectory(prefix="varpi-fuzz-") as folder:
        make_samples(names, Path(folder))
        for name, number, outcome in outcomes(tasks, Path(folder), seed, jobs):
            counts[name][outcome if outcome in ("read", "refused") else "WRONG"] += 1
            if outcome not in ("read", "refused"):
                lines = outcome.strip().splitlines()
                alike = (name, lines[-1][:40], *[line for line in lines if "varpi/" in line][-1:])
                if alike not in wrong:
                    print(f"\n{name} {number} --seed {seed}: {outcome.strip()[-2500:]}", flush=True)
                wrong.setdefault(alike, []).append((number, outcome))
    print()
    for name, found in counts.items():
        print(f"{name:22s} {', '.join(f'{count} {kind}' for kind, count in sorted(found.items()))}")
    for (name, *_), like in wrong.items():
        print(f"{len(like)} like {name} {like[0][0]}: {like[0][1].strip().splitlines()[-1][:200]}")
    failures = sum(map(len, wrong.values()))
    print(f"{sum(found.total() for found in counts.values())} cases, {failures} wrong, seed {seed}")
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="FORMAT", help="only these (default: all)")
    parser.add_argument("--cases", type=int, default=CASES, help="in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of the cases (default: another each time)")
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument("--show", nargs=2, metavar=("FORMAT", "NUMBER"), help="one case in this process")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    if options.show:
        name, number = options.show[0], int(options.show[1])
        with tempfile.TemporaryDirectory() as folder:
            make_samples([name], Path(folder))
            for _, _, outcome in outcomes([(name, range(number, number + 1))], Path(folder), seed, 1):
                print(outcome)
        return 0
    if unknown := set(options.names) - set(FORMATS):
        parser.error(f"no format {', '.join(sorted(unknown))}; there are {', '.join(FORMATS)}")
    return min(1, fuzz(options.names or list(FORMATS), options.cases, seed, options.jobs))


if __name__ == "__main__":
    raise SystemExit(main())
