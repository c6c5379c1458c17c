"""Where a number comes from: versions and machine, without importing the packages whose versions it reads."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def environment(packages: tuple[str, ...] = ("secateur", "torch", "numpy")) -> dict[str, Any]:
    """The fingerprint of this interpreter and machine, in plain values; nothing in it names a person or a host."""
    versions = {name: _version(name) for name in packages}
    return {
        **versions,
        "python": platform.python_version(),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count() or 1,
            "system": f"{platform.system()} {platform.machine()}",
        },
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed as a package"


def _processor() -> str:
    try:  # Linux tells the model only here
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
