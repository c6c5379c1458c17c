"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from pathlib import Path

import torch


def describe() -> dict[str, object]:
    """The machine, the software and the moment, as JSON-like values."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        fields = dict(line.split(":", 1) for line in listing.read_text().splitlines() if ":" in line)
        facts = {name.strip(): value.strip() for name, value in fields.items()}
        parts = (facts.get(name) for name in ("model name", "cpu family", "model"))
        name, family, model = parts
        if name:
            return f"{name} (family {family}, model {model})" if family else name
    return platform.processor() or platform.machine()
