"""Elements by number: indexing with tensors, gathering, and writing back.

The tape does not hold what an index tensor says, and code that counts channels cannot follow: along an indexed
dimension nothing goes. The other dimensions carry on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from secateur.coupling.labels import Factor, Labels
from secateur.coupling.rules.state import NotCovered, State, argument, rule
from secateur.coupling.tape import Node, Ref

_BY_NUMBER = "entries are looked up by number"


@dataclass(frozen=True)
class _Key:
    """An indexing key of tensors: which dimensions of the data it takes, and where its own come in the result."""

    dims: tuple[int, ...]  # of the data
    rank: int  # of the broadcast index
    at: int  # position of the index's dimensions in the result


def _key(state: State, indices: Sequence[Any]) -> _Key:
    """What torch's advanced indexing makes of a list of index tensors and None; a mask takes as many dimensions."""
    dims: list[int] = []
    ranks, position, shapes = [1], 0, []
    for index in indices:
        if index is None:
            position += 1
            continue
        value = state.tape.values[index.value]
        mask = value.dtype in (torch.bool, torch.uint8)
        taken = len(value.shape) if mask else 1
        dims.extend(range(position, position + taken))
        ranks.append(1 if mask else len(value.shape))
        shapes.append(index)
        position += taken
    if not dims:
        raise NotCovered
    scalar = not any(_is_mask(state, index) for index in shapes) and all(
        not state.tape.values[index.value].shape for index in shapes
    )
    together = dims == list(range(dims[0], dims[-1] + 1)) and _adjacent(indices)
    return _Key(tuple(dims), 0 if scalar else max(ranks), dims[0] if together else 0)


def _is_mask(state: State, index: Ref) -> bool:
    return state.tape.values[index.value].dtype in (torch.bool, torch.uint8)


def _adjacent(indices: Sequence[Any]) -> bool:
    used = [number for number, index in enumerate(indices) if index is not None]
    return used == list(range(used[0], used[-1] + 1))


def _locked(state: State, data: Labels, dims: Iterable[int], why: str = _BY_NUMBER) -> Labels:
    for dim in dims:
        data = state.algebra.lock_dim(data, dim, why)
    return data


def _lock_indices(state: State, indices: Iterable[Any]) -> None:
    """An index that was computed from channels: what it says is not known without them."""
    for index in indices:
        if isinstance(index, Ref):
            state.algebra.lock(state.of(index), "used as an index")


def _looked_up(data: Labels, key: _Key, shape: Sequence[int]) -> Labels:
    """The factors of the dimensions that the key leaves alone, at their places in the result."""
    rest = [dim for dim in range(len(data.shape)) if dim not in key.dims]
    before = sum(1 for dim in rest if dim < key.dims[0]) if key.at else 0
    factors = []
    for factor in data.factors:
        sizes = [factor.ids.shape[dim] for dim in rest]
        factors.append(factor.on(factor.ids.reshape([*sizes[:before], *[1] * key.rank, *sizes[before:]])))
    if any(not _fits(factor, shape) for factor in factors):
        raise NotCovered
    return Labels(tuple(shape), tuple(factors))


def _fits(factor: Factor, shape: Sequence[int]) -> bool:
    sizes = factor.ids.shape
    return len(sizes) == len(shape) and all(a in (1, b) for a, b in zip(sizes, shape, strict=True))


@rule("index", "_unsafe_index")
def index(state: State, node: Node) -> list[Labels]:
    """`data[:, numbers]` with tensors of numbers or masks."""
    _lock_indices(state, node.args[1])
    key = _key(state, node.args[1])
    data = _locked(state, state.of(node.args[0]), key.dims)
    return [_looked_up(data, key, state.shape(node))]


@rule("index_select")
def index_select(state: State, node: Node) -> list[Labels]:
    """Positions of one dimension by number."""
    data = state.of(node.args[0])
    _lock_indices(state, node.args[2:3])
    data = _locked(state, data, [int(node.args[1]) % max(1, len(data.shape))])
    return [Labels(state.shape(node), data.factors)]


@rule("gather")
def gather(state: State, node: Node) -> list[Labels]:
    """One number per element of the result: the index is as wide as the data along the other dimensions.

    Where an index was computed from channels, only elements of the same dead channel read its dead entries.
    """
    data, places = state.of(node.args[0]), state.of(node.args[2])
    dim = int(node.args[1]) % max(1, len(data.shape))
    data = _beside(state, data, places, dim)
    places = state.algebra.lock_dim(places, dim, _BY_NUMBER)
    joined, shape = state.algebra.align([data, places], "gathered by an index of fixed size")
    if shape != state.shape(node):
        raise NotCovered
    return [Labels(shape, tuple(j.factor(j.zeros[0]) for j in joined))]


def _beside(state: State, data: Labels, other: Labels, dim: int) -> Labels:
    """The data without its dimension `dim`, which is locked, and without those where the other is narrower."""
    narrower = [d for d, size in enumerate(other.shape) if d != dim and size != data.shape[d]]
    data = _locked(state, data, [dim, *narrower])
    shape = tuple(1 if d == dim else size for d, size in enumerate(other.shape))
    return Labels(shape, data.factors)


@rule("index_put", "_unsafe_index_put", "_index_put_impl")
def index_put(state: State, node: Node) -> list[Labels]:
    """`data[:, numbers] = values`."""
    data, values = state.of(node.args[0]), state.of(node.args[2])
    _lock_indices(state, node.args[1])
    key = _key(state, node.args[1])
    data = _locked(state, data, key.dims)
    rest = [size for dim, size in enumerate(data.shape) if dim not in key.dims]
    before = sum(1 for dim in range(len(data.shape)) if dim not in key.dims and dim < key.dims[0]) if key.at else 0
    region = _looked_up(data, key, [*rest[:before], *[1] * key.rank, *rest[before:]])
    if len(values.shape) > len(region.shape):
        raise NotCovered
    joined, _ = state.algebra.align([region, values], "written to by a tensor of fixed size")
    return [_written(data, all(all(j.zeros) for j in joined))]


def _written(data: Labels, zero: bool) -> Labels:
    """The data after a write that is zero wherever the data is dead, or is not."""
    return Labels(data.shape, tuple(Factor(f.ids, f.zero and zero) for f in data.factors))


@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(state: State, node: Node) -> list[Labels]:
    """`data[numbers] = source`, one number per element of the source."""
    data, places = state.of(node.args[0]), state.of(node.args[2])
    if not data.shape:
        raise NotCovered
    dim = int(node.args[1]) % len(data.shape)
    source = argument(node, 3, "src", argument(node, 3, "value"))
    narrower = [d for d, size in enumerate(places.shape) if size != data.shape[d]]
    data = _locked(state, data, [dim, *narrower])
    if not isinstance(source, Ref):
        return [_joined_write(state, data, [], [places], dim, zero=source == 0)]
    labels = state.of(source)
    labels = _locked(state, labels, [d for d, size in enumerate(labels.shape) if size != data.shape[d]])
    return [_joined_write(state, data, [labels], [places], dim)]


def _joined_write(
    state: State, data: Labels, sources: Sequence[Labels], places: Sequence[Labels], dim: int, *, zero: bool = True
) -> Labels:
    """The data after a write of sources to places, which are all as wide along the dimensions other than `dim`."""
    parts = []
    for part in (data, *(_locked(state, other, [dim]) for other in (*sources, *places))):
        shape = tuple(1 if d == dim else size for d, size in enumerate(part.shape))
        parts.append(Labels(shape, part.factors))
    joined, _ = state.algebra.align(parts, "written to by a tensor of fixed size")
    return _written(data, zero and all(all(j.zeros[: 1 + len(sources)]) for j in joined))


@rule("index_add", "index_copy")
def index_add(state: State, node: Node) -> list[Labels]:
    """Positions of one dimension, written by number."""
    data, source = state.of(node.args[0]), state.of(node.args[3])
    if not data.shape:
        raise NotCovered
    dim = int(node.args[1]) % len(data.shape)
    _lock_indices(state, [node.args[2]])
    return [_joined_write(state, _locked(state, data, [dim]), [source], [], dim)]


@rule("index_fill")
def index_fill(state: State, node: Node) -> list[Labels]:
    """Positions of one dimension, filled with a number."""
    data = state.of(node.args[0])
    _lock_indices(state, [node.args[2]])
    data = _locked(state, data, [int(node.args[1]) % max(1, len(data.shape))])
    return [_written(data, argument(node, 3, "value") == 0)]


@rule("_local_scalar_dense", "repeat_interleave", "nonzero", "bincount", "unique_dim", "_unique2", "histc")
def counted(state: State, node: Node) -> list[Labels]:
    """What it holds becomes a number, or numbers of places, in the code: everything it hangs on stays."""
    for ref in node.refs():
        state.algebra.lock(state.labels[ref], "its values are used as numbers")
    return [Labels(state.shape(node, number)) for number in range(len(node.outputs))]
