"""Decoded data sets on disk: safetensors files named after what they were decoded from."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from secateur.data.sets import Decoded
from secateur.files import write_bytes

FORMAT = 1


def cache_folder(given: Path | str | None = None) -> Path:
    """Where decoded data is kept: `given`, else SECATEUR_CACHE, else the platform's folder for caches."""
    if given is not None:
        return Path(given).expanduser()
    if os.environ.get("SECATEUR_CACHE"):
        return Path(os.environ["SECATEUR_CACHE"]).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "secateur"


def identity_of(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Path, size in bytes and time of change (ns) of every source file: what differs when a source changes."""
    found = []
    for file in sorted(files):
        facts = file.stat()
        found.append((str(file.resolve()), facts.st_size, facts.st_mtime_ns))
    return found


def cached(name: str, key: object, decode: Callable[[], Decoded], folder: Path | str | None = None) -> Decoded:
    """What `decode` returns, from the cache where an earlier call with an equal `key` left it.

    `key` is JSON-like. A damaged file is made anew. A cache that cannot be written costs time at the next call, so it
    only warns.
    """
    text = json.dumps([FORMAT, name, key], sort_keys=True, default=str)
    path = cache_folder(folder) / "data" / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"
    found = _read(path)
    if found is not None:
        return found
    decoded = decode()
    tensors = _flat(decoded)
    header = json.dumps({"classes": decoded.classes, "sha256": _digest(tensors)})
    try:
        write_bytes(path, save(tensors, metadata={"secateur": header}))
    except OSError as error:
        warnings.warn(f"could not keep the decoded {name} in {path.parent}: {error}", stacklevel=2)
    return decoded


def _flat(decoded: Decoded) -> dict[str, Tensor]:
    tensors = {}
    for part, (images, labels) in decoded.parts.items():
        tensors[f"{part}.images"], tensors[f"{part}.labels"] = images.contiguous(), labels.contiguous()
    return tensors


def _read(path: Path) -> Decoded | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["secateur"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        if _digest(tensors) != header["sha256"]:
            return None
        parts = sorted({name.split(".")[0] for name in tensors})
        return Decoded(
            {part: (tensors[f"{part}.images"], tensors[f"{part}.labels"]) for part in parts}, tuple(header["classes"])
        )
    except (SafetensorError, KeyError, ValueError, TypeError, OSError):
        return None


def _digest(tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(f"{name}{tensors[name].dtype}{tuple(tensors[name].shape)}".encode())
        total.update(tensors[name].contiguous().numpy().data)
    return total.hexdigest()
