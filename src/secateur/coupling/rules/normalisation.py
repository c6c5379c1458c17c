"""Batch, group and layer normalisation."""

from __future__ import annotations

import math

import numpy as np

from secateur.coupling.labels import Algebra, Factor, Labels
from secateur.coupling.rules.origins import carry_elementwise
from secateur.coupling.rules.state import (
    Extent,
    NotCovered,
    Path,
    State,
    argument,
    extra_extent,
    rule,
)
from secateur.coupling.tape import Call, Node, Ref
from secateur.norms import NORMS, STATISTICS, norm_name


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
    "cudnn_batch_norm",
    "batch_norm",
)
def batch_norm(state: State, node: Node) -> list[Labels | None]:
    """Per channel; with an affine weight and bias, a dead channel is zero again after it."""
    algebra = state.algebra
    data = state.of(node.args[0])
    rank = len(data.shape)
    if not isinstance(node.args[4] if len(node.args) > 4 else None, Ref):  # batch statistics
        data = algebra.collapse(data, [dim for dim in range(rank) if dim != 1], "batch statistics run over it")
    tensors, variance = [data], -1
    affine = isinstance(node.args[1], Ref) and isinstance(node.args[2], Ref)
    for position in range(1, 5):
        leaf = node.args[position] if position < len(node.args) else None
        if isinstance(leaf, Ref):
            shape = (1, data.shape[1]) + (1,) * (rank - 2)
            tensors.append(algebra.reshape(state.of(leaf), shape))
            if position == 4:
                variance = len(tensors) - 1
                _fill_with_one(state, leaf)
    state.role(node.args[1], 0, "scale")
    carry_elementwise(state, node, node.refs())
    joined, shape = algebra.align(tensors, "normalised with statistics of fixed size")
    factors = []
    for j in joined:
        decisive = j.zeros[1:3] if affine else [zero for number, zero in enumerate(j.zeros) if number != variance]
        factors.append(j.factor(all(decisive)))
    return [Labels(shape, tuple(factors)), *[None] * (len(node.outputs) - 1)]


def _fill_with_one(state: State, variance: Ref) -> None:
    """A running variance of 0 would divide by almost nothing: removed entries hold 1 instead."""
    origin = state.origins.get(variance.value)
    if origin is None or origin[0] is None:
        raise NotCovered
    state.fills[origin[0]] = 1.0


@rule("native_group_norm")
def group_norm(state: State, node: Node) -> list[Labels | None]:
    """Statistics run over the channels of a group, so whole groups go."""
    algebra, data, groups = state.algebra, state.of(node.args[0]), int(node.args[6])
    rank, channels = len(data.shape), data.shape[1]
    data = algebra.collapse(data, [dim for dim in range(rank) if dim != 1], "group statistics run over it")
    if groups == 1 and data.covered(1) and open_norm(state, node, data, 1):
        return [_normalised_together(state, node, data), *[None] * (len(node.outputs) - 1)]
    grouped = (groups, channels // groups)
    why = "normalised over this width: group statistics run over the channels of a normalisation group"
    parts = [_group_rows(algebra, data.only(1), grouped, why)]
    for position in (1, 2):
        if isinstance(node.args[position], Ref):
            parts.append(_group_rows(algebra, state.of(node.args[position]), grouped, why))
    joined, _ = algebra.align(parts, why)
    affine = len(parts) == 3
    factors = []
    for j in joined:
        ids = np.broadcast_to(j.ids, grouped).reshape((1, channels) + (1,) * (rank - 2))
        factors.append(Factor(ids, all(j.zeros[1:] if affine else j.zeros)))
    _require_norm_groups(state, node, Labels((groups,), tuple(Factor(j.ids[:, 0], True) for j in joined)), groups)
    return [Labels(state.shape(node), tuple(factors)), *[None] * (len(node.outputs) - 1)]


def _normalised_together(state: State, node: Node, data: Labels) -> Labels:
    """A single group over all channels, of which those that live are counted."""
    leaves = [state.of(leaf) for leaf in node.args[1:3] if isinstance(leaf, Ref)]
    vectors = [data.only(1), *leaves]
    joined, _ = state.algebra.align(vectors, "normalised over this width")
    shape = (1, data.shape[1]) + (1,) * (len(data.shape) - 2)
    return Labels(state.shape(node), tuple(Factor(j.ids.reshape(shape), True) for j in joined))


def _group_rows(algebra: Algebra, vector: Labels, shape: tuple[int, int], why: str) -> Labels:
    rows = Labels(shape, tuple(factor.on(factor.ids.reshape(shape)) for factor in vector.factors))
    return algebra.collapse(rows, [1], why)


def _require_norm_groups(state: State, node: Node, groups: Labels, count: int) -> None:
    call = node.call
    if call is None or call.name != "group_norm":
        raise NotCovered
    path: Path = (1,) if len(call.args) > 1 else ("num_groups",)
    number = call.args[1] if len(call.args) > 1 else call.kwargs["num_groups"]
    state.require(node, number, extra_extent(state, groups) if groups.factors and count > 1 else count, path)
    state.explained.add(id(call))


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(state: State, node: Node) -> list[Labels | None]:
    """Statistics run over the normalised dimensions, which keep their width unless norms may run over live channels."""
    algebra, data = state.algebra, state.of(node.args[0])
    rank, count = len(data.shape), len(node.args[1])
    last = rank - 1
    given = [argument(node, 2, "weight"), argument(node, 3, "bias")]
    leaves = [state.of(leaf) for leaf in given if isinstance(leaf, Ref)]
    opened = count == 1 and data.covered(last) and open_norm(state, node, data, last)
    if opened:
        _require_normalised_shape(state, node, last)
    if not opened:
        data = algebra.collapse(data, range(rank - count, rank), "normalised over this width")
    joined, shape = algebra.align([data, *leaves], "normalised over this width")
    factors = tuple(j.factor(opened and j.ids.shape[last] > 1) for j in joined)
    return [Labels(shape, factors), *[None] * (len(node.outputs) - 1)]


def open_norm(state: State, node: Node, data: Labels, dim: int) -> bool:
    """Whether a norm or statistic may run over the live channels along `dim`; if so, it is noted for the reference."""
    call = node.call
    along = [factor for factor in data.factors if factor.spans(dim)]
    if not state.open_norms or call is None or len(along) != 1 or along[0].span != (dim,):
        return False
    if call.name not in NORMS and not (call.name in STATISTICS and _normalises(state, node.module, data.shape[dim])):
        return False
    counted = [c for c in call.frame.events if isinstance(c, Call) and c.name in (*NORMS, *STATISTICS)]
    name, ids = norm_name(call.frame.module, counted.index(call)), along[0].ids.reshape(-1)
    if name in state.norms and len(state.norms[name][1]) != len(ids):
        return False
    if name in state.norms:  # the module is called more than once
        state.algebra.atoms.unite(state.norms[name][1], ids, "normalised over this width")
    state.norms[name] = dim, ids
    return True


def _normalises(state: State, module: str, width: int) -> bool:
    """Whether a module holds nothing but scales and shifts of this width: a norm that somebody wrote in Python."""
    leaves = [value for value in state.tape.values if value.leaf is not None and value.leaf.kind == "parameter"]
    own = [value.shape for value in leaves if value.leaf is not None and value.leaf.name.rpartition(".")[0] == module]
    return bool(own) and all(math.prod(shape) == width == max(shape) for shape in own)


def _require_normalised_shape(state: State, node: Node, dim: int) -> None:
    call = node.call
    if call is None:
        return
    path: Path = (1,) if len(call.args) > 1 else ("normalized_shape",)
    given = call.args[1] if len(call.args) > 1 else call.kwargs["normalized_shape"]
    if isinstance(given, (list, tuple)):
        path, given = (*path, 0), given[0]
    state.require(node, given, Extent(node.args[0].value, dim, state.of(node.args[0]).shape[dim]), path)
    state.explained.add(id(call))
