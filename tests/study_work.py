"""Work for workers of a study: functions that other processes can import, and a `secateur` that tells what it trains.

As a script it is the command line itself, but for one thing: every process writes a line to the file in
SECATEUR_TEST_EPOCHS whenever an epoch of training begins. Workers import it again, so that they do so too.
"""

import errno
import os
import signal
import time
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur.report import Pair, Record
from secateur.study.dense import Workplace
from secateur.study.executors import Ended, Job, outcome
from secateur.study.results import Point, Result
from secateur.study.spec import Study, parse
from secateur.study.trials import Trial

POSTGRES = "SECATEUR_TEST_POSTGRES"  # a URL; the tests that need a server skip without it
SMALL = {
    "name": "small",
    "models": ["digits_net"],
    "data": ["digits"],
    "sparsities": [0.5],
    "seeds": [0],
    "training": {"epochs": 1, "batch_size": 256, "lr": 0.05},
    "tuning": {"epochs": 1, "batch_size": 256, "lr": 0.02},
    "methods": [{"criterion": "l1"}],
    "calibration": 200,
    "controls": {"random": False, "magnitude": False, "unpruned": False, "smaller": False},
    "latency": {"batches": [1], "seconds": 1e-6},
}


def small(**changes: object) -> Study:
    """A study of one trial, without controls, unless something is changed."""
    return parse({**SMALL, **changes}, "here")


def found(trial: Trial) -> Record:
    """A record such as this trial could have."""
    return Record(
        key=trial.key,
        model=trial.net.title,
        data=trial.data.title,
        criterion=str(trial.method.criterion),
        scope=trial.method.scope or "",
        sparsity=trial.sparsity,
        seed=trial.seed,
        accuracy_dense=0.9,
        accuracy_pruned=0.5,
        accuracy_finetuned=0.9 - trial.sparsity / 10,
        params=Pair(100, 50),
        macs=Pair(1000, 500),
        latency_ms=Pair(2.0, 1.0),
        speedup=2.0,
        verified_difference=None,
        widths=(),
        seconds=0.01,
        method=trial.method.title,
        prunes=trial.method.prunes,
        control=trial.control,
        fingerprint={"data": {"sha256": "00"}},
    )


def finished(trial: Trial) -> Result:
    """The result of a trial in which nothing was done."""
    points = (Point("dense", 1, 0.5, 0.9, 0.1), Point("tune 1", 1, 0.25, 0.9, 0.01))
    return Result(found(trial), points)


def note(folder: Path, line: str) -> None:
    """Append a line to `calls`; lines of several processes do not mix."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / "calls", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(handle, f"{line}\n".encode())
    finally:
        os.close(handle)


def calls(folder: Path) -> list[str]:
    """The lines that `note` has written."""
    path = folder / "calls"
    return path.read_text().split() if path.exists() else []


def forever(folder: Path) -> None:
    """A job that does not end."""
    note(folder, str(os.getpid()))
    time.sleep(600)


class Here:
    """Does every job in this process, one after the other."""

    def __init__(self, slots: int = 1) -> None:
        self.slots = slots
        self.started: list[str] = []
        self.stopped = 0
        self._jobs: deque[Job] = deque()

    def start(self, job: Job) -> None:
        assert len(self._jobs) < self.slots
        self.started.append(job.name)
        self._jobs.append(job)

    def ended(self, timeout: float) -> list[Ended]:
        if not self._jobs:
            return []
        job = self._jobs.popleft()
        return [outcome(job.name, job.function, job.arguments)]

    def stop(self) -> None:
        self.stopped += 1


@contextmanager
def database(kind: str, folder: Path) -> Iterator[str]:
    """The URL of an empty database of its own: a file in a folder, or a schema of the server; skips without one."""
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'results.db'}"
        return
    import pytest
    import sqlalchemy as sa

    server = os.environ.get(POSTGRES)
    if not server:
        pytest.skip(f"{POSTGRES} is not set: .ci/postgres COMMAND runs a command with it")
    schema = f"test_{uuid.uuid4().hex}"
    engine = sa.create_engine(sa.make_url(server).set(drivername="postgresql+psycopg"))
    with engine.begin() as link:
        link.execute(sa.text(f"CREATE SCHEMA {schema}"))
    yield f"{server}?options=-csearch_path%3D{schema}"
    with engine.begin() as link:
        link.execute(sa.text(f"DROP SCHEMA {schema} CASCADE"))
    engine.dispose()


# -- work: (trial, place) -> result ----------------------------------------------------------------------------------


def nothing(trial: Trial, place: Workplace) -> Result:
    """No work, once."""
    note(place.folder, trial.key)
    return finished(trial)


def sleepy(trial: Trial, place: Workplace) -> Result:
    """A second of no work on some node of a Ray cluster."""
    import ray

    note(place.folder, f"{trial.key}@{ray.get_runtime_context().get_node_id()}")
    time.sleep(1.0)
    return finished(trial)


def eventful(trial: Trial, place: Workplace) -> Result:
    """What it does goes by the seed: 1 is killed the first time, 2 is killed always, 3 raises, others work."""
    note(place.folder, trial.key)
    tries = calls(place.folder).count(trial.key)
    if trial.seed == 2 or (trial.seed == 1 and tries == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if trial.seed == 3:
        raise RuntimeError("of no use")
    return finished(trial)


def raising(trial: Trial, place: Workplace) -> Result:
    """Raises in trials of seed 1 while there is a file `broken`."""
    note(place.folder, trial.key)
    if trial.seed == 1 and (place.folder / "broken").exists():
        raise ValueError("the loss is nan")
    return finished(trial)


def filling(trial: Trial, place: Workplace) -> Result:
    """There is no space on the disk for trials of seed 1 while there is a file `full`."""
    note(place.folder, trial.key)
    if trial.seed == 1 and (place.folder / "full").exists():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "checkpoint.pt")
    return finished(trial)


# -- the command line that tells ---------------------------------------------------------------------------------------


def _tell_epochs(log: str) -> None:
    from secateur.data import Batches

    before = Batches.set_epoch

    def telling(self: Batches, epoch: int) -> None:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(handle, f"{os.getpid()} {epoch}\n".encode())
        os.close(handle)
        before(self, epoch)
        time.sleep(0.1)  # whoever waits for an epoch must see it before the study is over

    Batches.set_epoch = telling


if __name__ in ("__main__", "__mp_main__") and os.environ.get("SECATEUR_TEST_EPOCHS"):
    _tell_epochs(os.environ["SECATEUR_TEST_EPOCHS"])

if __name__ == "__main__":
    from secateur.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal, also where a script started the tests
    main()
