"""What a piece of work takes: wall time, and the most memory in use meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


@dataclass
class Cost:
    """Known once the work is done."""

    seconds: float = 0.0
    peak_bytes: int | None = None  # of the process on Linux, of the tensors on a GPU; None where it cannot be known


@contextmanager
def watched(device: str = "cpu") -> Iterator[Cost]:
    """Measure what is done inside."""
    cost, cuda = Cost(), device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start = time.perf_counter()
    yield cost
    if cuda:
        torch.cuda.synchronize()
    cost.seconds = time.perf_counter() - start
    cost.peak_bytes = torch.cuda.max_memory_allocated() if cuda else _kilobytes(STATUS, "VmHWM:")


def available_bytes() -> int | None:
    """The memory of this machine that is free to use; None where it cannot be known."""
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable:")


def _kilobytes(file: Path, name: str) -> int | None:
    with suppress(OSError):
        found = [line.split()[1] for line in file.read_text().splitlines() if line.startswith(name)]
        return int(found[0]) * 1024 if found else None
    return None
