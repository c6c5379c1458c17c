"""Finished trials, one JSON line each: several processes may work on one file, and any of them may die at any time."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Trials:
    """A file of rows. A row is a trial's key (what was asked) and its values (what was found)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def rows(self) -> list[dict[str, Any]]:
        """Every finished trial. A last line that a full disk or a killed process cut short is left out."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row of a trial, if it is finished."""
        return next((row for row in self.rows() if all(row.get(name) == value for name, value in key.items())), None)

    def add(self, key: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Write a finished trial down."""
        with self.path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(json.dumps({**key, **values}) + "\n")

    @contextmanager
    def claimed(self, key: Mapping[str, Any]) -> Iterator[bool]:
        """Whether this process may do it: false while another one is at it. A claim ends with its process."""
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        folder = self.path.parent / "claims"
        folder.mkdir(exist_ok=True)
        with (folder / name).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
