"""Tape: one forward pass, as ATen ops over named leaves, and as the calls of Python code that led to them.

The ops (`Node`) are what the labels run through. The calls (`Call`), nested in the calls of modules (`Frame`), are what
a module's graph form is written from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from secateur.coupling.sizes import Escapes


@dataclass(frozen=True)
class Ref:
    """A recorded tensor, by number."""

    value: int


@dataclass(frozen=True)
class Leaf:
    """A tensor that no recorded op made: a parameter, a buffer, an input, or a constant."""

    kind: str
    name: str


@dataclass
class Value:
    """What is known of a recorded tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    leaf: Leaf | None = None


@dataclass(eq=False)
class Call:
    """A call in Python code: arguments with Ref for tensors and traced integers left as they are."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    where: str
    frame: Frame
    output: Any = None


@dataclass(eq=False)
class Frame:
    """One call of a module, and what its code called in turn."""

    module: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    events: list[Call | Frame] = field(default_factory=list)
    output: Any = None


@dataclass
class Node:
    """One ATen op."""

    op: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    module: str  # name of the innermost module whose forward was running
    call: Call | None
    outputs: list[int] = field(default_factory=list)

    @cached_property
    def name(self) -> str:
        """`aten.relu` for the in-place and out-of-place overloads alike; other libraries keep their namespace."""
        space, _, op = self.op._schema.name.partition("::")
        return f"{space}.{op.rstrip('_')}"

    @cached_property
    def place(self) -> str:
        """Where this op stands, for messages."""
        inside = f" in {self.module!r}" if self.module else ""
        return f"{self.name}{inside}" + (f" ({self.call.where})" if self.call and self.call.where else "")

    @cached_property
    def _refs(self) -> tuple[int, ...]:
        return tuple(_values_in((*self.args, *self.kwargs.values())))

    def refs(self) -> tuple[int, ...]:
        """Every value among the arguments."""
        return self._refs


def _values_in(entries: Iterable[Any]) -> Iterator[int]:
    for entry in entries:
        if isinstance(entry, Ref):
            yield entry.value
        elif isinstance(entry, (list, tuple)):
            yield from _values_in(entry)
        elif isinstance(entry, dict):
            yield from _values_in(entry.values())


@dataclass
class Tape:
    """The record of one forward pass."""

    values: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    exported: list[int] = field(default_factory=list)  # values that left torch, as NumPy arrays or lists
    stale: dict[int, list[int]] = field(default_factory=dict)  # node that wrote -> values that it made stale
    sized: set[int] = field(default_factory=set)  # values whose lengths were read
    overwritten: dict[int, list[int]] = field(default_factory=dict)  # node -> other views of the memory it wrote to
    escaped: Escapes = field(default_factory=Escapes)
    frames: dict[str, list[Frame]] = field(default_factory=dict)  # module -> its calls, in order

    @cached_property
    def readers(self) -> dict[int, list[Node]]:
        """Value -> the nodes that read it. To be asked for when the tape is complete."""
        found: dict[int, list[Node]] = {}
        for node in self.nodes:
            for value in dict.fromkeys(node.refs()):
                found.setdefault(value, []).append(node)
        return found


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """`function` of every tensor in nested lists, tuples and dicts. Slices and traced integers stay as they are."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        mapped = [map_tensors(function, value) for value in tree]
        if isinstance(tree, list):
            return mapped
        return tree._make(mapped) if hasattr(tree, "_make") else tuple(mapped)  # a named tuple stays one
    return tree
