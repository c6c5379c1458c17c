"""Where trials run: the interface that the driver speaks to, and a pool of processes on this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from secateur.errors import InputError, SecateurError, StorageError

_STOP_SECONDS = 5.0


@dataclass(frozen=True)
class Job:
    """A function call that another process can make: both parts can be pickled."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Ended:
    """What became of a job."""

    name: str
    value: Any = None
    error: str = ""  # of the job itself: doing it again would give it again
    trouble: str = (
        ""  # of the machine, such as a full disk: the job is not to blame, and nothing goes on before it ends
    )
    died: str = ""  # the process is gone, and the job with it: it can be done again


class Executor(Protocol):
    """Runs jobs elsewhere. Only the driver's thread calls it."""

    @property
    def slots(self) -> int:
        """How many jobs may be under way at once, now."""

    def start(self, job: Job) -> None:
        """Begin a job; returns at once."""

    def ended(self, timeout: float) -> list[Ended]:
        """Jobs that have ended, as soon as there is one; [] after `timeout` seconds without."""

    def stop(self) -> None:
        """End everything that is under way."""


def outcome(name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Ended:
    """Do a job here and now."""
    try:
        return Ended(name, value=function(*arguments))
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, (OSError, StorageError)):
                return Ended(name, trouble=f"{type(error).__name__}: {error}")
            cause = cause.__cause__ or cause.__context__
        text = f"{type(error).__name__}: {error}"
        if not isinstance(error, SecateurError):  # nobody foresaw it: where it happened helps
            text += "\n" + "".join(traceback.format_exception(error)[-4:])
        return Ended(name, error=text)


class LocalExecutor:
    """A pool of processes on this machine, each with one torch thread, and one GPU each where there are any.

    A worker that is killed takes only its own job with it; another one takes its place. Workers end with their parent,
    whatever it dies of.
    """

    def __init__(self, workers: int, gpus: Sequence[str] = ()) -> None:
        """`gpus`: what CUDA_VISIBLE_DEVICES is for each worker; as many as workers, or none."""
        if workers < 1:
            raise InputError(f"workers is at least 1; got {workers}.")
        if gpus and len(gpus) != workers:
            raise InputError(f"{workers} workers take {workers} GPUs, one each; there are {len(gpus)}.")
        each: list[dict[str, str]] = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus] or [{} for _ in range(workers)]
        self._workers = [_Worker(environment) for environment in each]

    @property
    def slots(self) -> int:
        """One job per worker."""
        return len(self._workers)

    def start(self, job: Job) -> None:
        """Give the job to a worker without one."""
        next(worker for worker in self._workers if worker.job is None).start(job)

    def ended(self, timeout: float) -> list[Ended]:
        """Answers of workers, and the last words about those that died."""
        busy = [worker for worker in self._workers if worker.job is not None]
        if not busy:
            return []
        ready = wait([thing for worker in busy for thing in worker.things()], timeout)
        return [
            found for worker in busy if set(worker.things()) & set(ready) and (found := worker.answer()) is not None
        ]

    def stop(self) -> None:
        """Idle workers end by themselves, busy ones are killed: their jobs go on from a checkpoint another time."""
        for worker in self._workers:
            worker.dismiss()
        for worker in self._workers:
            worker.kill()


class _Worker:
    """One process, started when it gets its first job, and again after it died."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._process: BaseProcess | None = None
        self._link: Connection | None = None
        self.job: Job | None = None

    def start(self, job: Job) -> None:
        if self._process is None or not self._process.is_alive():
            self._begin()
        assert self._link is not None
        self.job = job
        try:
            self._link.send((job.name, job.function, job.arguments))
        except (BrokenPipeError, ConnectionResetError):  # it died just now; `answer` will say so
            return

    def things(self) -> list[Any]:
        """What becomes ready when there is an answer, or none can come any more."""
        assert self._link is not None and self._process is not None
        return [self._link, self._process.sentinel]

    def answer(self) -> Ended | None:
        assert self._link is not None and self._process is not None and self.job is not None
        name = self.job.name
        try:
            if self._link.poll():
                found: Ended = self._link.recv()
                self.job = None
                return found
        except (EOFError, OSError):
            pass
        self._process.join(_STOP_SECONDS)
        if self._process.is_alive():
            return None
        code, self.job = self._process.exitcode, None
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        return Ended(name, died=f"its worker died ({how})")

    def dismiss(self) -> None:
        """Nothing more will come: without a job, the process ends now, and cleans up what its libraries have opened."""
        if self._link is not None:
            self._link.close()

    def kill(self) -> None:
        if self._process is not None:
            if self.job is None:
                self._process.join(_STOP_SECONDS)
            self._process.kill()
            self._process.join(_STOP_SECONDS)

    def _begin(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, dict(self._environment)), daemon=True)
        self._process.start()
        theirs.close()
        self._link = ours


def _serve(link: Connection, environment: Mapping[str, str]) -> None:
    """A worker's life: jobs in, answers out, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver, which ends its workers
    os.environ.update({"OMP_NUM_THREADS": "1", **environment})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            name, function, arguments = link.recv()
        except EOFError:
            return
        link.send(outcome(name, function, arguments))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
