"""Writing files so that a reader sees either the old content or the whole new one, whatever happens in between."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast


@contextmanager
def replacing(path: Path | str) -> Iterator[BinaryIO]:
    """A binary file to write to, which takes the place of `path` when the block ends without an error.

    The new file is flushed to the disk before the rename. On any error (a full disk, Ctrl-C) the old file stays as it
    was and nothing is left behind. Missing parent folders are made. Raises OSError.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield cast("BinaryIO", file)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o666 & ~_umask())
        os.replace(name, target)  # noqa: PTH105 - the standard's word for an atomic rename
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise


def write_bytes(path: Path | str, content: bytes) -> None:
    """Write a whole file at once, atomically. Raises OSError; the old file then survives."""
    with replacing(path) as file:
        file.write(content)


def _umask() -> int:
    # mkstemp makes private files; the finished one should have the mode any other new file gets.
    current = os.umask(0o022)
    os.umask(current)
    return current
