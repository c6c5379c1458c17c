"""Reading safetensors and JSON files that nobody vouches for: every claim is checked before it is believed.

The safetensors format is an 8-byte little-endian header length, a JSON header (tensor name -> dtype, shape, data
offsets, and `__metadata__`, a table of texts), and the tensors' bytes, one after the other without gaps.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from secateur.errors import ArtifactError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_LENGTH_BYTES = 8
_HEADER_LIMIT = 100_000_000  # bytes; the format's own limit
_JSON_LIMIT = 10_000_000  # bytes; a config with ten thousand labels has a twentieth of it
_MESSAGE_LENGTH = 300  # characters of a file's own words in an error
_MOST_DIMS = 64  # torch's own limit
_LARGEST = 2**63  # sizes and offsets are int64 in torch


@dataclass(frozen=True)
class Entry:
    """One tensor as the header describes it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


def read_header(path: Path | str) -> tuple[dict[str, str], dict[str, Entry]]:
    """The metadata and the tensors' descriptions of a safetensors file, without reading any tensor.

    Raises ArtifactError for whatever is not a complete, consistent safetensors file.
    """
    raw, data_bytes = _parse(path)
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ArtifactError(f"{path} is damaged: the header's metadata is not a table of texts.")
    entries: dict[str, Entry] = {}
    spans: list[tuple[int, int, str]] = []
    for name, claim in raw.items():
        try:
            entries[name], start, end = _entry(claim)
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"{path} is damaged: the header says nonsense about tensor {clipped(name)!r} ({clipped(error)})."
            ) from error
        spans.append((start, end, name))
    _check_cover(path, sorted(spans), data_bytes)
    return metadata, entries


def read_tensors(path: Path | str) -> dict[str, Tensor]:
    """Every tensor of a file whose header `read_header` has accepted, on the CPU. Raises ArtifactError."""
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error


def with_metadata(content: bytes, metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """A new start for a safetensors file, with `metadata` in its header, and where in `content` its tensors begin.

    The library writes metadata in a random order; here the same model gives the same bytes.
    """
    tensors_start = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(content[_LENGTH_BYTES:tensors_start])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)  # the tensors begin aligned
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text, tensors_start


def add_tensors(digest: hashlib._Hash, tensors: Mapping[str, Tensor]) -> None:
    """Feed a hash every tensor's name, type, shape and bytes, in the order of the names."""
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)


def check_entries(actual: Mapping[str, Entry], expected: Mapping[str, Entry], path: Path | str) -> None:
    """Raise ArtifactError about the first tensor that the file lacks, describes otherwise, or holds without need."""
    for name, entry in expected.items():
        if name not in actual:
            raise ArtifactError(f"{path} has no tensor {name!r}; the model needs it as {entry}.")
        if actual[name].shape != entry.shape:
            raise ArtifactError(f"{path} holds {name!r} as {actual[name]}; its own plan makes it {entry}.")
        if actual[name].dtype != entry.dtype:
            raise ArtifactError(
                f"{path} holds {name!r} as {actual[name]}, the model has {entry}: "
                f"convert the model first, with `.to({actual[name].dtype})`."
            )
    for name in actual:
        if name not in expected:
            raise ArtifactError(f"{path} holds a tensor {clipped(name)!r} that the model does not have.")


def clipped(text: object) -> str:
    """What a file says, on one line and cut short: fit for a message."""
    line = " ".join(str(text).split())
    return line if len(line) <= _MESSAGE_LENGTH else f"{line[:_MESSAGE_LENGTH]}..."


def read_json(path: Path | str) -> dict[str, Any]:
    """The JSON object that a file holds. Raises ArtifactError for everything else, and for a file of absurd size."""
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _JSON_LIMIT:
            raise ArtifactError(f"{path} has {size:,} bytes; at most {_JSON_LIMIT:,} are read.")
        text = file.read(_JSON_LIMIT)
    return _json_object(text, f"{path} is damaged: it")


def _parse(path: Path | str) -> tuple[dict[str, Any], int]:
    """The header as JSON, and how many bytes of tensors follow it."""
    with _opened(path) as file:
        text, data_bytes = _header_text(path, file)
    return _json_object(text, f"{path} is damaged: its header"), data_bytes


@contextmanager
def _opened(path: Path | str) -> Iterator[BinaryIO]:
    """An ordinary file, open for reading. Raises ArtifactError for what is absent, unreadable or no ordinary file."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116 - accepts what Path() refuses with other errors
            raise ArtifactError(f"{path} is not a file but a folder or a device.")
        with open(path, "rb") as file:  # noqa: PTH123
            yield file
    except FileNotFoundError as error:
        raise ArtifactError(f"there is no file {path}.") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}.") from error


def _json_object(text: bytes, subject: str) -> dict[str, Any]:
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:  # ValueError covers bad UTF-8, bad JSON and absurdly long numbers
        raise ArtifactError(f"{subject} is not readable JSON ({clipped(error)}).") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{subject} is not a JSON object.")
    return value


def _header_text(path: Path | str, file: BinaryIO) -> tuple[bytes, int]:
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise ArtifactError(f"{path} is empty.")
    start = file.read(_LENGTH_BYTES + 1)
    length = int.from_bytes(start[:_LENGTH_BYTES], "little")
    # Kind before damage. A pickle's first bytes are also a legal header length (640 starts like protocol 2), so it is
    # the brace that tells: a safetensors header starts with one.
    if start[_LENGTH_BYTES:] != b"{":
        raise ArtifactError(f"{path} is no safetensors file: {_kind(start)}.")
    if length > _HEADER_LIMIT:
        raise ArtifactError(
            f"{path} is damaged: it claims a header of {length:,} bytes; at most {_HEADER_LIMIT:,} are read."
        )
    if length > size - _LENGTH_BYTES:
        raise ArtifactError(f"{path} is truncated: a header of {length:,} bytes in a file of {size:,}.")
    file.seek(_LENGTH_BYTES)
    return file.read(length), size - _LENGTH_BYTES - length


def _kind(start: bytes) -> str:
    if start.startswith(b"PK\x03\x04"):
        return "this is a pickle in a zip archive (a torch.save checkpoint), which could run code and is never opened"
    if start.startswith(b"\x80") and len(start) > 1 and start[1] <= 5:  # protocols 2 to 5
        return "this is a pickle, which could run code and is never opened"
    return "it does not start with a header"


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _entry(claim: Any) -> tuple[Entry, int, int]:
    if not isinstance(claim, dict) or set(claim) != {"dtype", "shape", "data_offsets"}:
        raise ValueError("expected dtype, shape and data_offsets")
    shape, (start, end) = claim["shape"], claim["data_offsets"]
    if not isinstance(shape, list) or len(shape) > _MOST_DIMS or not all(map(_is_size, [*shape, start, end])):
        raise ValueError("sizes must be whole numbers of a sensible magnitude")
    dtype = DTYPES.get(claim["dtype"])
    if dtype is None:
        raise ValueError(f"unknown dtype {claim['dtype']!r}")
    expected = math.prod(shape) * dtype.itemsize
    if end - start != expected:
        raise ValueError(f"shape {shape} takes {expected} bytes, the offsets span {end - start}")
    return Entry(dtype, tuple(shape)), start, end


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST


def _check_cover(path: Path | str, spans: list[tuple[int, int, str]], data_bytes: int) -> None:
    """The tensors must fill the rest of the file exactly, in any order."""
    position = 0
    for start, end, name in spans:
        if start != position:
            raise ArtifactError(
                f"{path} is damaged: tensor {clipped(name)!r} starts at byte {start:,}, expected {position:,}."
            )
        position = end
    if position > data_bytes:
        raise ArtifactError(
            f"{path} is truncated: {position:,} bytes of tensors are announced, {data_bytes:,} are there."
        )
    if position < data_bytes:
        raise ArtifactError(f"{path} is damaged: {data_bytes - position:,} bytes after the last tensor.")
