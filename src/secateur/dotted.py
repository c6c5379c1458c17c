"""Dotted names of modules and tensors, and the patterns that users write for them."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase


def ancestors(name: str) -> Iterator[str]:
    """The module (or tensor) itself and those that hold it, the outermost excepted."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def is_within(name: str, pattern: str) -> bool:
    """Whether the pattern names a module or tensor, or one that holds it."""
    return any(fnmatchcase(each, pattern) for each in ancestors(name))
