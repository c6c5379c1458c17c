"""Parts of tensors: slices, splits, concatenation, padding, rearranged blocks."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

import numpy as np

from secateur.coupling.labels import Factor, Labels
from secateur.coupling.rules.origins import carry_without
from secateur.coupling.rules.recurrent import is_recurrent, separate_states, tied_gates, unread_states
from secateur.coupling.rules.state import Extent, Path, Requirement, State, argument, rule
from secateur.coupling.sizes import Size
from secateur.coupling.tape import Node


@rule("slice")
def slice_positions(state: State, node: Node) -> list[Labels]:
    """A range of positions; its bounds must follow the channels before them."""
    data = state.of(node.args[0])
    dim = int(argument(node, 1, "dim", 0)) % len(data.shape)
    size = data.shape[dim]
    start, stop = argument(node, 2, "start", None), argument(node, 3, "end", None)
    step = int(argument(node, 4, "step", 1))
    positions = np.arange(size)[slice(start, stop, step)]
    if len(positions) == 0:
        return [Labels(state.shape(node))]  # nothing of it is left to hang on anything
    if data.covered(dim) and len(positions) < size:
        data = _require_bounds(state, node, data, dim, int(positions[0]), int(positions[-1]) + 1, step)
    return [state.algebra.take(data, dim, positions)]


def _require_bounds(state: State, node: Node, data: Labels, dim: int, first: int, last: int, step: int) -> Labels:
    """Bounds as the user's code computed them, or a lock where it says nothing about them."""
    call, value = node.call, node.args[0].value
    key = _key_slices(call.args[1], len(data.shape)) if call and call.name == "__getitem__" else {}
    path, bounds = key.get(dim, ((), None))
    why = "channels are picked by fixed positions"
    if call is None or bounds is None or _counts_from_the_end(bounds):
        return state.algebra.collapse(data, [dim], why)
    if step != 1:
        whole = bounds.stop is None and first < step and data.shape[dim] % step == 0
        state.explained.add(id(call))
        return _tied_blocks(state, data, dim, step) if whole else state.algebra.collapse(data, [dim], why)
    state.explained.add(id(call))
    if first > 0:
        state.require(node, bounds.start, Extent(value, dim, first), (*path, "start"))
    if last < data.shape[dim]:
        state.require(node, bounds.stop, Extent(value, dim, last), (*path, "stop"))
    return data


def _tied_blocks(state: State, data: Labels, dim: int, length: int) -> Labels:
    """Every `length` positions in a row go together: then each of them is where the strided slices look for it."""
    shape = (*data.shape[:dim], data.shape[dim] // length, length, *data.shape[dim + 1 :])
    blocks = state.algebra.collapse(state.algebra.reshape(data, shape), [dim + 1], "picked at regular distances")
    return state.algebra.reshape(blocks, data.shape)


def _counts_from_the_end(bounds: slice) -> bool:
    return any(isinstance(bound, int) and index(bound) < 0 for bound in (bounds.start, bounds.stop))


def _key_slices(key: Any, rank: int) -> dict[int, tuple[Path, slice]]:
    """The slices of an indexing key by the dimension they meet, as indexing applies them one after another.

    With each comes where it stands in the call `x[key]`.
    """
    several = isinstance(key, (tuple, list))
    entries = list(key) if several else [key]
    used = sum(1 for entry in entries if entry is not None and entry is not Ellipsis)
    slices: dict[int, tuple[Path, slice]] = {}
    dim = 0
    for place, entry in enumerate(entries):
        if isinstance(entry, slice):
            slices[dim] = ((1, place) if several else (1,)), entry
        if entry is Ellipsis:
            dim += rank - used
        elif not (isinstance(entry, int) and not isinstance(entry, bool)):
            dim += 1
    return slices


@rule("select")
def select(state: State, node: Node) -> list[Labels]:
    """One position: it must stay where it is."""
    data = state.of(node.args[0])
    dim = int(node.args[1]) % len(data.shape)
    position = int(node.args[2]) % data.shape[dim]
    if any(factor.span == (dim,) for factor in data.factors):
        data = state.algebra.lock_dim(data, dim, "a single channel is picked out")
    else:  # a packed projection: all its parts must stay
        _require_all(state, node, data, dim)
    carry_without(state, node, dim)
    return [state.algebra.reshape(state.algebra.take(data, dim, np.array([position])), state.shape(node))]


def _require_all(state: State, node: Node, data: Labels, dim: int) -> None:
    if data.covered(dim):
        state.require(node, data.shape[dim], Extent(node.args[0].value, dim, data.shape[dim]))


@rule("unbind")
def unbind(state: State, node: Node) -> list[Labels]:
    """Every position as a tensor of its own: all of them must stay."""
    data = state.of(node.args[0])
    dim = int(argument(node, 1, "dim", 0)) % len(data.shape)
    _require_all(state, node, data, dim)
    carry_without(state, node, dim)
    take = state.algebra.take
    parts = [take(data, dim, np.array([position])) for position in range(data.shape[dim])]
    parts = [state.algebra.reshape(part, state.shape(node, number)) for number, part in enumerate(parts)]
    return separate_states(state, node, parts) if dim == 0 else parts


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unsafe_chunk")
def split(state: State, node: Node) -> list[Labels]:
    """Consecutive parts; their sizes must follow."""
    data = state.of(node.args[0])
    dim = int(argument(node, 2, "dim", 0)) % len(data.shape)
    sizes = [state.shape(node, number)[dim] for number in range(len(node.outputs))]
    if data.covered(dim) and is_recurrent(node) and len(set(sizes)) == 1:
        data = tied_gates(state, data, dim, len(sizes))
    elif data.covered(dim):
        data = _require_parts(state, node, data, dim, sizes)
    parts, start = [], 0
    for size in sizes:
        parts.append(state.algebra.take(data, dim, np.arange(start, start + size)))
        start += size
    return parts


def _require_parts(state: State, node: Node, data: Labels, dim: int, sizes: Sequence[int]) -> Labels:
    call = node.call
    if call is None or call.name not in ("chunk", "split", "split_with_sizes"):
        return state.algebra.collapse(data, [dim], "split by fixed sizes")
    extents = [Extent(value, dim, size) for value, size in zip(node.outputs, sizes, strict=True)]
    if call.name == "chunk":
        if len(set(sizes)) > 1 or len(sizes) != _chunks(call.args, call.kwargs):
            return state.algebra.collapse(data, [dim], "split into unequal chunks")
        numbers: list[Any] = [None] * len(sizes)
        paths: list[Path] = [()] * len(sizes)
    else:
        place, given = (1, call.args[1]) if len(call.args) > 1 else next(iter(call.kwargs.items()))
        several = isinstance(given, (list, tuple))
        numbers = list(given) if several else [given] * len(sizes)
        paths = [(place, part) if several else (place,) for part in range(len(sizes))]
        state.explained.add(id(call))
    first = Size(node.outputs[0], dim)
    for number, extent, path in zip(numbers, extents, paths, strict=True):
        if number is None:
            state.requirements.append(Requirement(first, extent, node.place, sizes[0]))
        else:
            state.require(node, number, extent, path)
    return data


def _chunks(args: Sequence[Any], kwargs: Any) -> int:
    return index(args[1] if len(args) > 1 else kwargs["chunks"])


@rule("cat", "concat")
def concatenate(state: State, node: Node) -> list[Labels]:
    """Parts one after another."""
    parts = [state.of(part) for part in node.args[0]]
    dim = int(argument(node, 1, "dim", 0)) % len(state.shape(node))
    return [state.algebra.concatenate(parts, dim)]


@rule("stack")
def stack(state: State, node: Node) -> list[Labels]:
    """Parts along a new dimension."""
    rank = len(state.shape(node))
    dim = int(argument(node, 1, "dim", 0)) % rank
    unread = unread_states(state, node, node.args[0]) if dim == 0 else None
    if unread is not None:
        return [unread]
    parts = []
    for part in node.args[0]:
        labels = state.of(part)
        parts.append(state.algebra.reshape(labels, (*labels.shape[:dim], 1, *labels.shape[dim:])))
    return [state.algebra.concatenate(parts, dim)]


@rule("constant_pad_nd")
def pad(state: State, node: Node) -> list[Labels]:
    """Constant entries around."""
    data, widths, value = state.of(node.args[0]), node.args[1], argument(node, 2, "value", 0)
    for number in range(0, len(widths), 2):
        dim = len(data.shape) - 1 - number // 2
        before, after = int(widths[number]), int(widths[number + 1])
        if (before or after) and min(before, after) < 0:
            data = state.algebra.lock_dim(data, dim, "cropped by fixed sizes")
            data = Labels(_resized(data.shape, dim, before + after), data.factors)
        elif before or after:
            factors = tuple(_padded(state, f, dim, before, after) if f.spans(dim) else f for f in data.factors)
            data = Labels(_resized(data.shape, dim, before + after), factors)
    return [data if value == 0 else data.with_zero(False)]


def _padded(state: State, factor: Factor, dim: int, before: int, after: int) -> Factor:
    """Padded channels are fixed; a padded position of every head goes with its head, if heads are what goes."""
    new = np.zeros([1 if d == dim else size for d, size in enumerate(factor.ids.shape)], np.int64)
    if len(factor.span) > 1:
        new = state.algebra.atoms.new(new.size).reshape(new.shape)
    parts = [new.repeat(before, axis=dim), factor.ids, new.repeat(after, axis=dim)]
    return factor.on(np.concatenate(parts, axis=dim))


def _resized(shape: tuple[int, ...], dim: int, by: int) -> tuple[int, ...]:
    return tuple(size + by if d == dim else size for d, size in enumerate(shape))


@rule("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(state: State, node: Node) -> list[Labels]:
    """Channels to positions or back: r * r channels that become one go together."""
    data, factor = state.of(node.args[0]), int(node.args[1])
    *batch, channels, height, width = data.shape
    n, algebra = len(batch), state.algebra
    lead = list(range(n))
    if node.name == "aten.pixel_shuffle":
        shape = (*batch, channels // factor**2, factor, factor, height, width)
        order = [*lead, n, n + 3, n + 1, n + 4, n + 2]
        data = algebra.collapse(algebra.reshape(data, shape), [n + 1, n + 2, n + 3, n + 4], "become one channel")
    else:
        shape = (*batch, channels, height // factor, factor, width // factor, factor)
        order = [*lead, n, n + 2, n + 4, n + 1, n + 3]
        data = algebra.collapse(algebra.reshape(data, shape), [n + 1, n + 3], "positions become channels")
        data = algebra.collapse(data, [n + 2, n + 4], "positions become channels")
    moved = algebra.permute(data, order)
    if node.name == "aten.pixel_unshuffle":
        full = [
            Factor(np.broadcast_to(f.ids, (*f.ids.shape[: n + 1], factor, factor, 1, 1)), f.zero) for f in moved.factors
        ]
        moved = Labels(moved.shape, tuple(full))
    return [algebra.reshape(moved, state.shape(node))]


@rule("embedding")
def embedding(state: State, node: Node) -> list[Labels]:
    """Rows of the table by index: the columns are channels, the rows are all needed."""
    table = state.algebra.lock_dim(state.of(node.args[0]), 0, "entries are looked up by number")
    state.role(node.args[0], 1, "output")
    rank = len(state.shape(node))
    factors = [f.on(f.ids.reshape((1,) * (rank - 1) + (-1,))) for f in table.factors]
    return [Labels(state.shape(node), tuple(factors))]


@rule("glu")
def glu(state: State, node: Node) -> list[Labels]:
    """First half times the sigmoid of the second: equal positions of the halves go together."""
    data, algebra = state.of(node.args[0]), state.algebra
    dim = int(argument(node, 1, "dim", -1)) % len(data.shape)
    half = data.shape[dim] // 2
    first, second = (algebra.take(data, dim, np.arange(k * half, (k + 1) * half)) for k in (0, 1))
    joined, shape = algebra.align([first, second], "gated by a tensor of fixed size")
    return [Labels(shape, tuple(j.factor(j.zeros[0]) for j in joined))]
