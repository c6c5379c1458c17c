"""The driver of a study: asks the store what is missing, has it done, and writes down what comes back."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from secateur.errors import InputError
from secateur.files import write_bytes
from secateur.report.records import Failure
from secateur.study.dense import Workplace, trained
from secateur.study.executors import Ended, Executor, Job
from secateur.study.results import Result
from secateur.study.run import run_trial
from secateur.study.store import Store
from secateur.study.trials import Dense, Trial

ATTEMPTS = 3  # of a job whose worker dies
_PATIENCE = 1.0  # seconds between looks at whether the cluster has grown

Work = Callable[[Trial, Workplace], Result]
Prepare = Callable[[Dense, Workplace], None]
Told = Callable[[int, str], None]  # is given how many trials are done, and a line about the last event


@dataclass(frozen=True)
class Outcome:
    """What a run of a study did."""

    new: int  # trials finished in this run
    known: int  # those that were there before
    failures: tuple[Failure, ...]  # of this run


def prepare_dense(dense: Dense, place: Workplace) -> None:
    """Train a dense model, unless its file is there."""
    trained(dense, place)


def run_study(
    name: str,
    trials: tuple[Trial, ...],
    store: Store,
    executor: Executor,
    place: Workplace,
    *,
    told: Told = lambda done, line: None,
    work: Work = run_trial,
    prepare: Prepare | None = prepare_dense,
) -> Outcome:
    """Do the trials that the store has not got. Killed at any moment and called again, it goes on where it was.

    A dense model is trained before the first trial that starts from it, trials of others meanwhile. A trial that raises
    is a row with its error; one whose worker dies is tried again, from its last epoch, twice.

    Raises InputError where another process runs the same study in the same folder; OSError for trouble of the machine,
    such as a full disk or a database that is gone: everything finished is kept, and the same call goes on.
    """
    place.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(place.folder / f"{name}.lock", timeout=_PATIENCE):  # `running` may hold it for a moment
            return _Run(name, trials, store, executor, place, told, work, prepare).run()
    except Timeout as error:
        raise InputError(
            f"another process runs the study {name!r} in {place.folder}: wait for it, or use another folder."
        ) from error


@dataclass
class _Run:
    name: str
    trials: tuple[Trial, ...]
    store: Store
    executor: Executor
    place: Workplace
    told: Told
    work: Work
    prepare: Prepare | None
    jobs: dict[str, Job] = field(default_factory=dict)  # under way
    attempts: dict[str, int] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    def run(self) -> Outcome:
        finished = self.store.done(self.name)
        missing = [trial for trial in self.trials if trial.key not in finished]
        known = len(self.trials) - len(missing)
        self.ready, self.waiting = self._in_order(missing)
        self.done, left = known, len(missing)
        try:
            while left:
                self._fill()
                for ended in self.executor.ended(_PATIENCE):
                    left -= self._settle(ended)
        finally:
            self.executor.stop()
            _progress_file(self.place, self.name).unlink(missing_ok=True)
        return Outcome(self.done - known, known, tuple(self.failures))

    def _in_order(self, missing: list[Trial]) -> tuple[deque[Job], dict[str, list[Job]]]:
        """Jobs that can start, in order; and those that wait for a dense model, by its key."""
        ready: deque[Job] = deque()
        waiting: dict[str, list[Job]] = {}
        for trial in missing:
            job = Job(trial.key, self.work, (trial, self.place))
            dense = trial.dense
            if self.prepare is None:
                ready.append(job)
                continue
            if dense.key not in waiting:
                ready.append(Job(dense.key, self.prepare, (dense, self.place)))
            waiting.setdefault(dense.key, []).append(job)
        return ready, waiting

    def _fill(self) -> None:
        """Give every free slot a job. Trials whose dense model is there come before the next dense model."""
        changed = False
        while self.ready and len(self.jobs) < self.executor.slots:
            job = self.ready.popleft()
            self.jobs[job.name] = job
            self.attempts[job.name] = self.attempts.get(job.name, 0) + 1
            self.executor.start(job)
            changed = True
        if changed:
            self._write_progress()

    def _settle(self, ended: Ended) -> int:
        """Write down what became of a job; how many trials that finishes."""
        job = self.jobs.pop(ended.name)
        if ended.trouble:
            raise OSError(f"{ended.trouble} (in {ended.name}). What is finished is kept; the same command goes on.")
        if ended.died and self.attempts[job.name] < ATTEMPTS:
            self.told(self.done, f"{job.name}: {ended.died}; again")
            self.ready.appendleft(job)
            return 0
        error = ended.error or (f"{ended.died}, {ATTEMPTS} times" if ended.died else "")
        if job.name in self.waiting:
            freed = self.waiting.pop(job.name)
            if not error:
                self.told(self.done, f"dense model {job.name} is trained")
                self.ready.extendleft(reversed(freed))
                return 0
            return sum(self._fail(trial.name, f"its dense model failed: {error}") for trial in freed)
        if error:
            return self._fail(job.name, error)
        result: Result = ended.value
        self.store.add(self.name, result)
        shutil.rmtree(
            self.place.folder / "trials" / job.name, ignore_errors=True
        )  # its checkpoints have done their work
        self.done += 1
        self.told(self.done, f"{job.arguments[0]}: {_accuracies(result)}")
        return 1

    def _fail(self, key: str, error: str) -> int:
        failure = Failure(key, error)
        self.store.add_failure(self.name, failure)
        self.failures.append(failure)
        self.done += 1
        self.told(self.done, f"{key} failed: {error.splitlines()[0]}")
        return 1

    def _write_progress(self) -> None:
        values = {"pid": os.getpid(), "at": time.time(), "running": sorted(self.jobs)}
        write_bytes(_progress_file(self.place, self.name), json.dumps(values).encode())


def running(place: Workplace, name: str) -> list[str]:
    """The jobs that a driver in this folder has under way; [] where there is none."""
    try:
        values: dict[str, Any] = json.loads(_progress_file(place, name).read_text(encoding="utf-8"))
        names = values["running"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    try:  # whoever can take the lock knows that no driver lives
        with FileLock(place.folder / f"{name}.lock", timeout=0):
            return []
    except Timeout:
        return [str(each) for each in names]


def _progress_file(place: Workplace, name: str) -> Path:
    return place.folder / f"{name}.running.json"


def _accuracies(result: Result) -> str:
    record = result.record
    mended = "" if record.accuracy_repaired is None else f"{record.accuracy_repaired:.1%} repaired, "
    return f"{record.accuracy_pruned:.1%} pruned, {mended}{record.accuracy_finetuned:.1%} fine-tuned"
