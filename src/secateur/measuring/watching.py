"""What a piece of work takes: wall time, and the most memory in use meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Effort:
    """Known once the work is done."""

    seconds: float = 0.0
    peak_bytes: int | None = None  # of the process on Linux, of the tensors on a GPU; None where it cannot be known


@contextmanager
def watched(device: torch.device | str = "cpu") -> Iterator[Effort]:
    """Measure what is done inside, on that device."""
    effort, cuda = Effort(), torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    start = time.perf_counter()
    yield effort
    if cuda:
        torch.cuda.synchronize(device)
    effort.seconds = time.perf_counter() - start
    effort.peak_bytes = torch.cuda.max_memory_allocated(device) if cuda else bytes_in("/proc/self/status", "VmHWM:")


def bytes_in(file: str, name: str) -> int | None:
    """A number of bytes that Linux tells in kilobytes in a file of /proc; None where it does not."""
    with suppress(OSError):
        found = [line.split()[1] for line in Path(file).read_text().splitlines() if line.startswith(name)]
        return int(found[0]) * 1024 if found else None
    return None
