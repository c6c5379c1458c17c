"""Windows over positions, and elements in another order along a dimension."""

from __future__ import annotations

import numpy as np

from secateur.coupling.labels import Labels
from secateur.coupling.rules.state import State, argument, rule
from secateur.coupling.tape import Node


@rule("unfold")
def unfold(state: State, node: Node) -> list[Labels]:
    """Windows of fixed length along one dimension, as a new last dimension."""
    data = state.of(node.args[0])
    dim = int(node.args[1]) % max(1, len(data.shape))
    data = state.algebra.lock_dim(data, dim, "windows of fixed length slide over it")
    factors = tuple(factor.on(factor.ids[..., None]) for factor in data.factors)
    return [Labels(state.shape(node), factors)]


@rule("im2col")
def columns(state: State, node: Node) -> list[Labels]:
    """(*, C, H, W) -> (*, C * kernel, windows): every channel becomes a block of kernel positions."""
    data, shape, algebra = state.of(node.args[0]), state.shape(node), state.algebra
    rank = len(data.shape)
    data = algebra.collapse(data, [rank - 2, rank - 1], "windows slide over it")
    blocks = (*data.shape[:-2], shape[-2] // data.shape[-3], shape[-1])
    return [algebra.reshape(Labels(blocks, data.factors), shape)]


@rule("col2im")
def pictures(state: State, node: Node) -> list[Labels]:
    """(*, C * kernel, windows) -> (*, C, H, W): the kernel positions of a channel go together."""
    data, shape, algebra = state.of(node.args[0]), state.shape(node), state.algebra
    channels, rank = shape[-3], len(data.shape)
    blocks = (*data.shape[:-2], channels, data.shape[-2] // channels, data.shape[-1])
    data = algebra.collapse(algebra.reshape(data, blocks), [rank - 1, rank], "the positions of a window become one")
    return [Labels(shape, data.factors)]


@rule("flip")
def flip(state: State, node: Node) -> list[Labels]:
    """Backwards: what stays is still in reversed order."""
    data = state.of(node.args[0])
    for given in node.args[1]:
        dim = int(given) % max(1, len(data.shape))
        data = state.algebra.take(data, dim, np.arange(data.shape[dim])[::-1])
    return [data]


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(state: State, node: Node) -> list[Labels]:
    """(N, ways * C, ...) as (N, C * ways, ...): equal positions of all parts go together.

    The op takes its widths from the live tensor, so any count per part will do, the same in each.
    """
    data, ways, algebra = state.of(node.args[0]), int(node.args[1]), state.algebra
    shape, rest = data.shape, range(3, len(data.shape) + 1)
    parts = algebra.reshape(data, (shape[0], ways, shape[1] // ways, *shape[2:]))
    parts = algebra.collapse(parts, [1], "equal positions of all parts go together")
    full = [f.on(np.broadcast_to(f.ids, _spread(f.ids.shape, ways))) for f in parts.factors]
    moved = algebra.permute(Labels(parts.shape, tuple(full)), [0, 2, 1, *rest])
    return [algebra.reshape(moved, shape)]


def _spread(shape: tuple[int, ...], ways: int) -> tuple[int, ...]:
    return (shape[0], ways if shape[2] > 1 else 1, *shape[2:])


@rule("tril", "triu")
def triangle(state: State, node: Node) -> list[Labels]:
    """Zero on one side of the diagonal: positions count."""
    data = state.of(node.args[0])
    rank = len(data.shape)
    return [state.algebra.collapse(data, [rank - 2, rank - 1], "a triangle of positions is kept")]


@rule("diagonal")
def diagonal(state: State, node: Node) -> list[Labels]:
    """Equal positions of two dimensions, as a new last one: both keep their size."""
    data = state.of(node.args[0])
    rank = len(data.shape)
    first, second = (int(argument(node, at, f"dim{at - 1}", at - 2)) % rank for at in (2, 3))
    for dim in (first, second):
        data = state.algebra.lock_dim(data, dim, "a diagonal is taken")
    rest = [dim for dim in range(rank) if dim not in (first, second)]
    factors = [f.on(f.ids.reshape([*(f.ids.shape[dim] for dim in rest), 1])) for f in data.factors]
    return [Labels(state.shape(node), tuple(factors))]
