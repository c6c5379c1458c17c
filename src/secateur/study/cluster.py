"""Trials on a Ray cluster, of one machine or of many. Needs the extra `secateur[cluster]`."""

from __future__ import annotations

import socket
from typing import Any

from secateur.errors import InputError
from secateur.study.executors import Ended, Job, outcome

_REACH_SECONDS = 10.0


class RayExecutor:
    """Ray tasks: Ray places them, and starts them again elsewhere when a node is lost.

    Secateur must be installed on every node, and the folder for checkpoints should be one that all nodes share;
    otherwise a lost node costs its trials what they had done, and every node trains its own dense models.
    """

    def __init__(self, address: str | None = None, *, gpus: float = 0.0, max_retries: int = 3) -> None:
        """`address`: of a running cluster, "auto" for the one of this machine; None starts one that ends with this run.

        `gpus`: of each trial; 0.5 puts two on one. `max_retries`: how often Ray starts a lost task again.
        Raises InputError where Ray is missing or no cluster answers.
        """
        try:
            import ray
        except ImportError as error:
            raise InputError("executor ray needs Ray: pip install 'secateur[cluster]'.") from error
        try:
            _reach(address)
            ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, include_dashboard=False)
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"no Ray cluster at {address!r}: {error}") from error
        self._ray: Any = ray
        self._gpus = gpus
        self._run = ray.remote(outcome).options(num_cpus=1, num_gpus=gpus, max_retries=max_retries)
        self._jobs: dict[Any, str] = {}

    @property
    def slots(self) -> int:
        """As many as the cluster has room for now: nodes come and go."""
        resources = self._ray.cluster_resources()
        room = resources.get("CPU", 0)
        return max(1, int(min(room, resources.get("GPU", 0) / self._gpus) if self._gpus else room))

    def start(self, job: Job) -> None:
        """Hand the job to Ray."""
        self._jobs[self._run.remote(job.name, job.function, job.arguments)] = job.name

    def ended(self, timeout: float) -> list[Ended]:
        """Tasks that are done, and those that Ray has given up."""
        if not self._jobs:
            return []
        ready, _ = self._ray.wait(list(self._jobs), num_returns=1, timeout=timeout)
        return [self._answer(reference) for reference in ready]

    def stop(self) -> None:
        """End the tasks, and the cluster where it was started here."""
        for reference in self._jobs:
            self._ray.cancel(reference, force=True)
        self._ray.shutdown()

    def _answer(self, reference: Any) -> Ended:
        name = self._jobs.pop(reference)
        try:
            found: Ended = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            return Ended(name, died=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return found


def _reach(address: str | None) -> None:
    """Raises OSError where nobody listens at HOST:PORT, for which Ray itself would wait many minutes."""
    host, _, port = (address or "").rpartition(":")
    if port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=_REACH_SECONDS).close()
