"""Convolutions and matrix products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from secateur.coupling.labels import SILENT, Ids, Labels
from secateur.coupling.rules.state import (
    Extent,
    NotCovered,
    Path,
    State,
    Work,
    extra_extent,
    rule,
)
from secateur.coupling.tape import Node, Ref


@rule("convolution", "_convolution")
def convolution(state: State, node: Node) -> list[Labels]:
    """Channels of the input are summed; a grouped convolution goes by whole groups or by position within them."""
    data, weight, bias = state.of(node.args[0]), state.of(node.args[1]), node.args[2]
    transposed, groups = bool(node.args[6]), int(node.args[8])
    algebra, out_shape = state.algebra, state.shape(node)
    in_dim, out_dim = (0, 1) if transposed else (1, 0)
    if len(data.shape) != len(weight.shape):
        raise NotCovered
    for dim in range(2, len(weight.shape)):
        weight = algebra.lock_dim(weight, dim, SILENT)
    data = algebra.collapse(data, [0, *range(2, len(data.shape))], "a convolution slides over it")
    _conv_work(state, node, weight, transposed)
    state.role(node.args[1], out_dim, "output")
    state.role(node.args[1], in_dim, "input")
    channels = _channels_first(data.only(1), groups)
    weight_in, weight_out = weight.only(in_dim), weight.only(out_dim)
    if groups == 1:
        algebra.contract(data.only(1), weight_in, 0)
        out = weight_out
    else:
        out = _grouped(state, node, channels, weight_in, weight_out, groups, transposed)
    result = algebra.reshape(out, (1, out.shape[0]) + (1,) * (len(out_shape) - 2))
    if isinstance(bias, Ref):
        result = algebra.add(result, algebra.reshape(state.of(bias), result.shape))
    return [Labels(out_shape, result.factors)]


def _channels_first(vector: Labels, groups: int) -> Labels:
    """(C,) as (groups, C / groups)."""
    shape = (groups, vector.shape[0] // groups)
    return Labels(shape, tuple(factor.on(factor.ids.reshape(shape)) for factor in vector.factors))


def _grouped(
    state: State, node: Node, channels: Labels, weight_in: Labels, weight_out: Labels, groups: int, transposed: bool
) -> Labels:
    """The labels of the output channels of a grouped convolution, as a vector.

    The weight's input dimension is shared by all groups, so a channel cannot go from one group alone. Either whole
    groups go, or the same position of every group, whichever leaves the finer choice.
    """
    algebra = state.algebra
    shared, spread = (weight_out, weight_in) if transposed else (weight_in, weight_out)
    spread = _channels_first(spread, groups)
    per_group = channels.shape[1]
    out_channels = state.shape(node)[1]
    whole_groups = bool(channels.factors) and (groups >= per_group) != (node.outputs[0] in state.flipped)
    if per_group > 1 or out_channels > groups:  # else one channel in and out per group: there is no other way
        ids = (factor.ids.ravel() for factor in (*channels.factors, *spread.factors))
        state.grouped[node.outputs[0]] = np.concatenate([np.zeros(0, np.int64), *ids])
    if whole_groups:
        why = "the channels of one convolution group go together"
        inner = algebra.collapse(channels, [1], why)
        outer = algebra.collapse(spread, [1], why)
        algebra.lock(shared, "is shared by all convolution groups")
        joined = algebra.product(inner, outer, "meets a convolution of fixed groups")
        kept = [f.on(np.repeat(f.ids[:, 0], out_channels // groups)) for f in joined.factors]
        _require_groups(state, node, joined.only(0), groups)
        _note_copies(state, node, groups, joined.only(0).factors[0].ids if joined.factors else None)
        return Labels((out_channels,), tuple(kept))
    why = "the same positions of all convolution groups go together"
    inner = _row(algebra.collapse(channels, [0], why))
    rows = _row(algebra.collapse(spread, [0], why))
    _require_groups(state, node, None, groups)
    if transposed:
        algebra.contract(inner, rows, 0)
        outputs = shared
        _note_copies(state, node, groups, None)
    else:
        algebra.contract(inner, shared, 0)
        outputs = rows
    return Labels((out_channels,), tuple(f.on(np.tile(f.ids, groups)) for f in outputs.factors))


def _note_copies(state: State, node: Node, groups: int, live: Ids | None) -> None:
    """A transposed convolution makes as many channels per group as its weight says; `live`: atoms of the groups."""
    origin = state.origins.get(node.args[1].value)
    if node.args[6] and origin is not None and origin[1] is not None:
        state.copies[origin[1][0]] = groups, live


def _row(labels: Labels) -> Labels:
    """(1, n) factors as a vector."""
    return Labels(labels.shape[1:], tuple(factor.on(factor.ids[0]) for factor in labels.factors))


def _require_groups(state: State, node: Node, groups: Labels | None, count: int) -> None:
    """The `groups=` in the user's code follows the groups that stay."""
    call = node.call
    if call is None or not call.name.startswith("conv"):
        raise NotCovered
    path: Path = (6,) if len(call.args) > 6 else ("groups",)
    number = call.args[6] if len(call.args) > 6 else call.kwargs.get("groups", count)
    extent: Extent | int = count
    if groups is not None and groups.factors:
        extent = extra_extent(state, groups)
    state.require(node, number, extent, path)
    state.explained.add(id(call))


def _conv_work(state: State, node: Node, weight: Labels, transposed: bool) -> None:
    spatial = state.of(node.args[0]).shape if transposed else state.shape(node)
    constant = spatial[0] * math.prod(spatial[2:]) * math.prod(weight.shape[2:])
    add_work(state, constant, [(weight, 0), (weight, 1)])


def add_work(state: State, constant: int, dims: Sequence[tuple[Labels, int]]) -> None:
    """Count `constant` times the live lengths of the given dimensions as multiply-accumulates."""
    state.work.append(Work(constant, tuple(dims)))


@rule("mm", "bmm")
def matrix_product(state: State, node: Node) -> list[Labels]:
    """(..., M, K) by (..., K, N)."""
    left, right = state.of(node.args[0]), state.of(node.args[1])
    _note_roles(state, node, node.args[0], node.args[1])
    return [_matrix_product(state, left, right)]


def _note_roles(state: State, node: Node, left: Any, right: Any) -> None:
    """The weight is the right factor, or the left one of a product with data. Two weights make a third."""
    first, second = state.origins.get(left.value), state.origins.get(right.value)
    is_layer = node.call is not None and node.call.name == "linear"
    if first is not None and second is not None:
        state.origins[node.outputs[0]] = (*(None,) * (len(first) - 2), first[-2], second[-1])
    if first is not None and second is not None and not is_layer:
        state.role(right, -2, "output")
        state.role(left, -1, "input")
    elif second is not None:
        state.role(right, -1, "output")
        state.role(right, -2, "input")
    else:
        state.role(left, -2, "output")
        state.role(left, -1, "input")


@rule("addmm", "baddbmm")
def matrix_product_with_bias(state: State, node: Node) -> list[Labels]:
    """bias + (M, K) by (K, N)."""
    bias, left, right = (state.of(node.args[position]) for position in range(3))
    _note_roles(state, node, node.args[1], node.args[2])
    result = state.algebra.add(_matrix_product(state, left, right), bias)
    return [Labels(state.shape(node), result.factors)]


def _matrix_product(state: State, left: Labels, right: Labels) -> Labels:
    algebra, batch = state.algebra, left.shape[:-2]
    rank = len(left.shape)
    columns = algebra.reshape(left, (*left.shape, 1))
    rows = algebra.reshape(right, (*batch, 1, *right.shape[-2:]))
    dims = [*((left, dim) for dim in range(rank)), (right, len(right.shape) - 1)]
    add_work(state, 1, dims)
    result = algebra.contract(columns, rows, rank - 1)
    return algebra.reshape(result, (*left.shape[:-1], right.shape[-1]))
