"""The jobs of a study: each done once, its result in a file, by this process, its pool, or another study beside it.

DIR/jobs/NAME/   begun.json (what the job depends on), result.json (the same, and what came of it), a lock

A job whose result is there is not done again, as long as it depends on the same; otherwise it is refused. The kernel
holds a job's lock, so that one which a killed process had begun is free at once, and goes on where its files say.

DIR/records.jsonl holds all results, a line each. Another machine goes on from such a file: what is recorded there, of a
job that depends on the same, counts as done, and only what a further job needs the files of is made once more. Paths of
data and of foreign weights are among what a job depends on: give them the same names there.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from varpi.errors import Stopped, VarpiError, printable
from varpi.runtime.files import read_json, write_text
from varpi.runtime.parts import difference
from varpi.runtime.processes import StopRequest, stop_request
from varpi.studies.jobs import open_pool
from varpi.training.run_directory import InUse, RunLock

T = TypeVar("T")


class Pending(Exception):
    """A job that was asked for is not done yet."""


def all_of(calls: Iterable[Callable[[], T]]) -> list[T]:
    """What each returns. All are called before `Pending` is raised, so that every job that can be done is asked for."""
    found, pending = [], False
    for call in calls:
        try:
            found.append(call())
        except Pending:
            pending = True
    if pending:
        raise Pending
    return found


RECORDS = "records.jsonl"
_RESULT = "result.json"
_NAP = 0.5
"""Seconds between two looks at a job that another process does, or for a signal."""
_LONG_NAP = 5.0
"""The same for what other processes may have done meanwhile, for whoever has work of its own."""


@dataclass(frozen=True)
class Job:
    """Something to do once, in a folder of its own."""

    name: str
    """The folder, below DIR/jobs."""
    task: Callable[..., dict[str, Any]]
    """Called with the folder and `arguments`; gives the result, as JSON."""
    arguments: tuple[Any, ...] = field(repr=False)
    inputs: Mapping[str, Any] = field(repr=False)
    """All that the result depends on, as JSON."""
    spent: str = ""
    """What in its folder only helped to get there, and goes once the result is written."""
    needs: Mapping[Path, "Job"] = field(default_factory=dict, repr=False)
    """Files that it reads, and the jobs that make them."""


class Work:
    """Does jobs as they are asked for, and remembers what came of them."""

    def __init__(self, output: Path, count: int, records: Sequence[Path] = ()) -> None:
        """count: jobs at once; a single one is done by this very process. records: files of other machines' results.

        Raises VarpiError for a file of records that is none.
        """
        self.output = output
        self.results: dict[str, dict[str, Any]] = {}
        self._count = count
        known = [path for path in (output / RECORDS,) if path.is_file()]
        self._records = {name: record for path in (*known, *records) for name, record in _read_records(path).items()}
        self._inputs: dict[str, str] = {}
        self._left_aside = False
        self._wanted: dict[str, Job] = {}
        self._failed: dict[str, VarpiError] = {}

    def __call__(self, job: Job) -> dict[str, Any]:
        """What came of a job.

        Raises Pending as long as it is not done, VarpiError when it was done, or begun, on other inputs.
        """
        inputs = _digest(job.inputs)
        if self._inputs.setdefault(job.name, inputs) != inputs:
            raise VarpiError(f"{job.name}: is the name of two jobs, which differ in what they depend on")
        if (found := self._found(job)) is not None:
            return found
        record = self._records.get(job.name)
        if record is not None and record["inputs"] == inputs:
            return record["result"]
        if record is not None and not self._left_aside:
            self._left_aside = True
            _tell(f"records of other inputs (data, paths, settings) are left aside, the first is that of {job.name}")
        return self._want(job)

    def have(self, needs: Mapping[Path, Job]) -> None:
        """Raises Pending until these files are there; a job of which only a record is known is done here."""
        missing = [job for path, job in needs.items() if not path.exists()]
        all_of(partial(self._want, job) for job in missing)

    def _want(self, job: Job) -> dict[str, Any]:
        if (found := self._found(job)) is not None:
            return found
        self.have(job.needs)
        self._wanted.setdefault(job.name, job)
        raise Pending

    def _found(self, job: Job) -> dict[str, Any] | None:
        if job.name not in self.results and (result := find_result(self.output, job)) is not None:
            self.results[job.name] = result
        return self.results.get(job.name)

    def until(self, look: Callable[[], T]) -> T:
        """What `look` finds, once all jobs that it asks for are done; it is asked again whenever one is.

        Raises:
            VarpiError: jobs have failed, one line each; all that do not need them are done first.
            Stopped: SIGTERM or SIGINT came; what was under way is saved as far as it saves itself.
        """
        threads = torch.get_num_threads()
        with stop_request() as stop:
            try:
                if self._count == 1:
                    torch.set_num_threads(1)
                return self._until(look, stop)
            finally:
                torch.set_num_threads(threads)

    def _until(self, look: Callable[[], T], stop: StopRequest) -> T:
        under_way: dict[Future[Any], Job] = {}
        busy: dict[str, float] = {}
        pool: AbstractContextManager[Executor] = nullcontext(_Here()) if self._count == 1 else open_pool(self._count)
        try:
            with pool as executor:
                while True:
                    self._wanted, self._inputs = {}, {}
                    with suppress(Pending):
                        found = look()
                        self._write_records()
                        return found
                    running = {job.name for job in under_way.values()}
                    open_jobs = [job for name, job in self._wanted.items() if name not in self._failed]
                    now = time.monotonic()
                    for job in open_jobs:
                        if stop.signal or len(under_way) >= self._count:
                            break
                        if job.name not in running and busy.get(job.name, 0.0) <= now:
                            under_way[executor.submit(carry_out, self.output, job)] = job
                    if stop.signal:
                        raise Stopped(stop.signal, self._stopped())
                    if not open_jobs and not under_way:
                        raise VarpiError(*(line for error in self._failed.values() for line in error.args))
                    if not under_way:
                        time.sleep(_NAP)
                        continue
                    again = now + _LONG_NAP
                    while not (done := wait(under_way, timeout=_NAP, return_when=FIRST_COMPLETED).done):
                        if stop.signal or time.monotonic() > again:
                            break
                    for future in done:
                        self._note(under_way.pop(future), future, busy)
        except (VarpiError, BrokenProcessPool):
            if not stop.signal:
                raise
            raise Stopped(stop.signal, self._stopped()) from None  # the pool's processes ended because they were told

    def _note(self, job: Job, future: "Future[Any]", busy: dict[str, float]) -> None:
        try:
            result = future.result()
        except Stopped as error:
            raise Stopped(error.signal, self._stopped()) from None
        except VarpiError as error:
            self._failed[job.name] = VarpiError(*(f"{job.name}: {line}" for line in error.args))
            _tell(f"failed {job.name}: {error}")
            return
        if result is None:
            if job.name not in busy:
                _tell(f"{job.name}: another process is at it")
            busy[job.name] = time.monotonic() + _NAP
            return
        self.results[job.name] = result
        self._write_records()
        _tell(f"done {job.name}")

    def _write_records(self) -> None:
        """All that is known: what the folders hold, other processes' too, and what came from elsewhere."""
        records, jobs = dict(self._records), self.output / "jobs"
        for folder, below, held in os.walk(jobs):
            below[:] = [name for name in below if name != "run"]  # where a training makes and deletes files
            if _RESULT not in held:
                continue
            record = read_json(Path(folder, _RESULT))
            name = str(Path(folder).relative_to(jobs))
            records[name] = {"inputs": _digest(record["inputs"]), "result": record["result"]}
        lines = (json.dumps({"job": name, **records[name]}) for name in sorted(records))
        write_text(self.output / RECORDS, "\n".join(lines) + "\n")

    def _stopped(self) -> str:
        return f"stopped; what is done is in {self.output}, and the same command goes on"


def _digest(inputs: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(inputs), sort_keys=True).encode()).hexdigest()


def _read_records(path: Path) -> dict[str, dict[str, Any]]:
    """{job: {"inputs": digest, "result": ...}} of a file of records."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise VarpiError(f"{path}: cannot be read as records of a study ({error})") from error
    records = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            name, inputs, result = record["job"], record["inputs"], record["result"]
        except (ValueError, TypeError, KeyError):
            name = inputs = result = None
        if not (isinstance(name, str) and isinstance(inputs, str) and isinstance(result, dict)):
            raise VarpiError(f"{path}, line {number}: is no record of a study's job, as {RECORDS} of its --output has")
        records[name] = {"inputs": inputs, "result": result}
    return records


def find_result(output: Path, job: Job) -> dict[str, Any] | None:
    """The result of a job in its file; None where there is none yet.

    Raises VarpiError when the job was done, or begun, on other inputs.
    """
    folder = output / "jobs" / job.name
    for path in (folder / _RESULT, folder / "begun.json"):
        if not path.is_file():
            continue
        record = read_json(path)
        if not isinstance(record, dict) or not isinstance(record.get("inputs"), dict):
            raise VarpiError(f"{path}: is no record of a job; remove it, and the job is done again")
        before, now = record["inputs"], json.loads(json.dumps(dict(job.inputs)))
        if other := difference(before, now) or difference(now, before):
            raise VarpiError(
                f"{path}: {other}; it was made for another study: choose another --output, or remove {folder}"
            )
        if "result" in record:
            return record["result"]
    return None


def carry_out(output: Path, job: Job) -> dict[str, Any] | None:
    """Do a job in its folder; None when another process is at it.

    Raises VarpiError as the job does, and for a result that is not finite.
    """
    folder = output / "jobs" / job.name
    with RunLock(folder) as lock:
        try:
            lock.take()
        except InUse:
            return None
        if (found := find_result(output, job)) is not None:
            return found
        inputs = dict(job.inputs)
        write_text(folder / "begun.json", json.dumps({"inputs": inputs}, indent=1) + "\n")
        result = job.task(folder, *job.arguments)
        try:
            text = json.dumps({"inputs": inputs, "result": result}, indent=1, allow_nan=False)
        except ValueError:
            raise VarpiError(f"a result is not finite ({result!s:.200}); nothing was recorded") from None
        write_text(folder / _RESULT, text + "\n")
        if job.spent:
            shutil.rmtree(folder / job.spent, ignore_errors=True)
    return json.loads(text)["result"]


class _Here(Executor):
    """Does what is submitted at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _tell(message: str) -> None:
    print(printable(message), file=sys.stderr, flush=True)
