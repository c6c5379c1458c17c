"""The table of rules: ATen op name -> how labels pass through it.

A rule gets the propagation state and the recorded node, and returns the labels of the node's outputs. Most ops are one
call of `Algebra`. An op that is not in the table, or a form of it that its rule does not cover (NotCovered), locks what
it touches and is reported in `Graph.unknown`: the engine may be conservative, it may never be wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from secateur.coupling.labels import SILENT, Algebra, Factor, Ids, Labels
from secateur.coupling.sizes import Expression, Size, expression_of
from secateur.coupling.tape import Node, Ref, Tape


class NotCovered(Exception):  # noqa: N818  # a signal between rules and the propagation, never seen outside
    """This form of the op has no rule."""


@dataclass(frozen=True)
class Extent:
    """The number of live positions along `dim` of a value, up to (not including) position `stop`."""

    value: int
    dim: int
    stop: int


@dataclass(frozen=True)
class Requirement:
    """`expression`, evaluated on the shrunk model, must equal `extent` (an int: must keep its value)."""

    expression: Expression
    extent: Extent | int
    place: str


@dataclass(frozen=True)
class Work:
    """Multiply-accumulates of one op: a constant times the live lengths of some dimensions (atom ids)."""

    constant: int
    lengths: tuple[Ids, ...]


@dataclass
class State:
    """What the rules read and add to."""

    tape: Tape
    algebra: Algebra
    labels: list[Labels]  # by value
    origins: dict[int, tuple[str, tuple[int, ...]]] = field(default_factory=dict)  # value -> leaf, its dims in order
    roles: dict[tuple[str, int], str] = field(default_factory=dict)  # (leaf, dim) -> output | input | scale
    copies: dict[str, int] = field(default_factory=dict)  # leaf -> output channels per position of its output dimension
    fills: dict[str, float] = field(default_factory=dict)  # leaves whose removed entries are not zero
    requirements: list[Requirement] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    explained: set[int] = field(default_factory=set)  # calls (by id) whose traced integers a rule has accounted for

    def of(self, argument: Any) -> Labels:
        """The labels of a tensor argument."""
        if not isinstance(argument, Ref):
            raise NotCovered
        return self.labels[argument.value]

    def shape(self, node: Node, output: int = 0) -> tuple[int, ...]:
        """The recorded shape of an output."""
        return self.tape.values[node.outputs[output]].shape

    def role(self, argument: Any, dim: int, role: str) -> None:
        """Note that `dim` of a leaf argument is an output or input dimension of a layer."""
        origin = self.origins.get(argument.value) if isinstance(argument, Ref) else None
        if origin is not None:
            self.roles.setdefault((origin[0], origin[1][dim]), role)

    def require(self, node: Node, number: Any, extent: Extent | int) -> None:
        """The number in the user's code must follow the extent."""
        self.requirements.append(Requirement(expression_of(number), extent, node.place))


Rule = Callable[[State, Node], Sequence[Labels | None]]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a function into the table under the given op names."""

    def enter(function: Rule) -> Rule:
        for name in names:
            RULES[f"aten.{name}"] = function
        return function

    return enter


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument by position or by name."""
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, default)


# -- layers with weights ---------------------------------------------------------------------------------------------


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
        weight = _lock_silently(algebra, weight, dim)
    data = algebra.collapse(data, [0, *range(2, len(data.shape))], "a convolution slides over it")
    _conv_work(state, node, weight, transposed)
    state.role(node.args[1], out_dim, "output")
    state.role(node.args[1], in_dim, "input")
    if transposed and groups > 1 and node.args[1].value in state.origins:
        state.copies[state.origins[node.args[1].value][0]] = groups
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


def _lock_silently(algebra: Algebra, labels: Labels, dim: int) -> Labels:
    for factor in labels.factors:
        if factor.spans(dim):
            algebra.atoms.lock(factor.ids, SILENT)
    return Labels(labels.shape, tuple(factor for factor in labels.factors if not factor.spans(dim)))


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
    whole_groups = bool(channels.factors) and groups >= per_group
    if whole_groups:
        why = "the channels of one convolution group go together"
        inner = algebra.collapse(channels, [1], why)
        outer = algebra.collapse(spread, [1], why)
        algebra.lock(shared, "is shared by all convolution groups")
        joined = algebra.product(inner, outer, "meets a convolution of fixed groups")
        kept = [f.on(np.repeat(f.ids[:, 0], out_channels // groups)) for f in joined.factors]
        _require_groups(state, node, joined.only(0), groups)
        return Labels((out_channels,), tuple(kept))
    why = "the same positions of all convolution groups go together"
    inner = _row(algebra.collapse(channels, [0], why))
    rows = _row(algebra.collapse(spread, [0], why))
    _require_groups(state, node, None, groups)
    if transposed:
        algebra.contract(inner, rows, 0)
        outputs = shared
    else:
        algebra.contract(inner, shared, 0)
        outputs = rows
    return Labels((out_channels,), tuple(f.on(np.tile(f.ids, groups)) for f in outputs.factors))


def _row(labels: Labels) -> Labels:
    """(1, n) factors as a vector."""
    return Labels(labels.shape[1:], tuple(factor.on(factor.ids[0]) for factor in labels.factors))


def _require_groups(state: State, node: Node, groups: Labels | None, count: int) -> None:
    """The `groups=` in the user's code follows the groups that stay."""
    call = node.call
    if call is None or not call.name.startswith("conv"):
        raise NotCovered
    position = 7 if "transpose" in call.name else 6
    number = call.args[position] if len(call.args) > position else call.kwargs.get("groups", count)
    if "transpose" in call.name and len(call.args) > 6:
        number = call.args[6]  # conv_transpose takes groups before dilation
    extent: Extent | int = count
    if groups is not None and groups.factors:
        extent = _extra_extent(state, groups)
    state.require(node, number, extent)
    state.explained.add(id(call))


def _extra_extent(state: State, labels: Labels) -> Extent:
    """The extent of labels that belong to no recorded value."""
    state.labels.append(labels)
    return Extent(len(state.labels) - 1, 0, labels.shape[0])


def _conv_work(state: State, node: Node, weight: Labels, transposed: bool) -> None:
    spatial = state.of(node.args[0]).shape if transposed else state.shape(node)
    constant = spatial[0] * math.prod(spatial[2:]) * math.prod(weight.shape[2:])
    _add_work(state, constant, [(weight, 0), (weight, 1)])


def _add_work(state: State, constant: int, dims: Sequence[tuple[Labels, int]]) -> None:
    lengths = []
    for labels, dim in dims:
        vector = labels.only(dim).factors
        if len(vector) == 1:
            lengths.append(vector[0].ids)
        else:
            constant *= labels.shape[dim]
    state.work.append(Work(constant, tuple(lengths)))


@rule("mm", "bmm")
def matrix_product(state: State, node: Node) -> list[Labels]:
    """(..., M, K) by (..., K, N)."""
    left, right = state.of(node.args[0]), state.of(node.args[1])
    state.role(node.args[1], -1, "output")
    state.role(node.args[1], -2, "input")
    return [_matrix_product(state, left, right)]


@rule("addmm", "baddbmm")
def matrix_product_with_bias(state: State, node: Node) -> list[Labels]:
    """bias + (M, K) by (K, N)."""
    bias, left, right = (state.of(node.args[position]) for position in range(3))
    state.role(node.args[2], -1, "output")
    state.role(node.args[2], -2, "input")
    result = state.algebra.add(_matrix_product(state, left, right), bias)
    return [Labels(state.shape(node), result.factors)]


def _matrix_product(state: State, left: Labels, right: Labels) -> Labels:
    algebra, batch = state.algebra, left.shape[:-2]
    rank = len(left.shape)
    columns = algebra.reshape(left, (*left.shape, 1))
    rows = algebra.reshape(right, (*batch, 1, *right.shape[-2:]))
    dims = [*((left, dim) for dim in range(rank)), (right, len(right.shape) - 1)]
    _add_work(state, 1, dims)
    result = algebra.contract(columns, rows, rank - 1)
    return algebra.reshape(result, (*left.shape[:-1], right.shape[-1]))


# -- normalisation ---------------------------------------------------------------------------------------------------


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
    joined, shape = algebra.align(tensors, "normalised with statistics of fixed size")
    factors = []
    for j in joined:
        decisive = j.zeros[1:3] if affine else [zero for number, zero in enumerate(j.zeros) if number != variance]
        zero = all(decisive)
        factors.append(j.factor(zero))
    return [Labels(shape, tuple(factors)), *[None] * (len(node.outputs) - 1)]


def _fill_with_one(state: State, variance: Ref) -> None:
    """A running variance of 0 would divide by almost nothing: removed entries hold 1 instead."""
    origin = state.origins.get(variance.value)
    if origin is None:
        raise NotCovered
    state.fills[origin[0]] = 1.0


@rule("native_group_norm")
def group_norm(state: State, node: Node) -> list[Labels | None]:
    """Statistics run over the channels of a group, so whole groups go."""
    algebra, data, groups = state.algebra, state.of(node.args[0]), int(node.args[6])
    rank, channels = len(data.shape), data.shape[1]
    data = algebra.collapse(data, [dim for dim in range(rank) if dim != 1], "group statistics run over it")
    grouped = (groups, channels // groups)
    why = "group statistics run over the channels of a normalisation group"
    parts = [_group_rows(algebra, data.only(1), grouped, why)]
    for position in (1, 2):
        if isinstance(node.args[position], Ref):
            parts.append(_group_rows(algebra, state.of(node.args[position]), grouped, why))
    joined, _ = algebra.align(parts, why)
    zero_from = parts[1:] if len(parts) == 3 else parts
    factors = []
    for j in joined:
        zero = all(j.zeros[1:]) if len(zero_from) == 2 else all(j.zeros)
        ids = np.broadcast_to(j.ids, grouped).reshape((1, channels) + (1,) * (rank - 2))
        factors.append(Factor(ids, zero))
    _require_norm_groups(state, node, Labels((groups,), tuple(Factor(j.ids[:, 0], True) for j in joined)), groups)
    return [Labels(state.shape(node), tuple(factors)), *[None] * (len(node.outputs) - 1)]


def _group_rows(algebra: Algebra, vector: Labels, shape: tuple[int, int], why: str) -> Labels:
    rows = Labels(shape, tuple(factor.on(factor.ids.reshape(shape)) for factor in vector.factors))
    return algebra.collapse(rows, [1], why)


def _require_norm_groups(state: State, node: Node, groups: Labels, count: int) -> None:
    call = node.call
    if call is None or call.name != "group_norm":
        raise NotCovered
    number = call.args[1] if len(call.args) > 1 else call.kwargs["num_groups"]
    state.require(node, number, _extra_extent(state, groups) if groups.factors and count > 1 else count)
    state.explained.add(id(call))


@rule("native_layer_norm", "_fused_rms_norm")
def layer_norm(state: State, node: Node) -> list[Labels | None]:
    """Statistics run over the normalised dimensions: they keep their width."""
    algebra, data = state.algebra, state.of(node.args[0])
    count = len(node.args[1])
    dims = list(range(len(data.shape) - count, len(data.shape)))
    for dim in dims:
        data = algebra.lock_dim(data, dim, "normalised over this width")
    parts = [data, *(state.of(leaf) for leaf in node.args[2:4] if isinstance(leaf, Ref))]
    joined, shape = algebra.align(parts, "normalised over this width")
    return [Labels(shape, tuple(j.factor(False) for j in joined)), *[None] * (len(node.outputs) - 1)]


# -- pooling and reductions ------------------------------------------------------------------------------------------


@rule(
    *(f"{kind}_pool{rank}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for rank in (1, 2, 3)),
    *(f"max_pool{rank}d_with_indices" for rank in (1, 2, 3)),
    *(f"_adaptive_avg_pool{rank}d" for rank in (2, 3)),
    *(f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "bicubic2d")),
    *(f"upsample_{kind}" for kind in ("trilinear3d", "_nearest_exact1d", "_nearest_exact2d")),
    *(f"{kind}_pad{rank}d" for kind in ("reflection", "replication") for rank in (1, 2, 3)),
)
def spatial(state: State, node: Node) -> list[Labels]:
    """Positions are mixed, channels are not; zeros give zeros."""
    data, name = state.of(node.args[0]), node.name
    dims = next(rank for rank in (1, 2, 3) if f"{rank}d" in name)
    rank = len(data.shape)
    data = state.algebra.collapse(data, range(rank - dims, rank), "positions are pooled")
    return [Labels(state.shape(node, number), data.factors) for number in range(len(node.outputs))]


_REDUCTIONS = (
    "sum",
    "mean",
    "amax",
    "amin",
    "max",
    "min",
    "var",
    "std",
    "var_mean",
    "prod",
    "argmax",
    "linalg_vector_norm",
)


@rule(*_REDUCTIONS)
def reduction(state: State, node: Node) -> list[Labels]:
    """A sum over dead zeros is free; every other reduction over channels needs them all."""
    data, kind = state.of(node.args[0]), node.name.removeprefix("aten.")
    rank = len(data.shape)
    given = argument(node, 2, "dim") if kind == "linalg_vector_norm" else argument(node, 1, "dim")
    if isinstance(given, bool):
        raise NotCovered
    dims = list(range(rank)) if given is None or given == [] else [given] if isinstance(given, int) else list(given)
    dims = [dim % rank for dim in dims]
    sums = kind == "sum" or (kind == "linalg_vector_norm" and argument(node, 1, "ord", 2) not in (0, -math.inf))
    reduced = state.algebra.reduce(data, dims, sums=sums, why=f"reduced by {kind} over channels")
    results = []
    for number in range(len(node.outputs)):
        labels = state.algebra.reshape(reduced, state.shape(node, number))
        results.append(labels.with_zero(False) if kind == "argmax" or number > 0 else labels)
    return results


@rule("_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "sort", "topk", "flip", "roll")
def along_a_dimension(state: State, node: Node) -> list[Labels]:
    """Every position along the dimension takes part in, or moves along, the result."""
    data, kind = state.of(node.args[0]), node.name.removeprefix("aten.")
    rank = len(data.shape)
    position = 2 if kind in ("topk", "roll") else 1
    dims = argument(node, position, "dims" if kind in ("flip", "roll") else "dim", -1)
    dims = [dim % rank for dim in ([dims] if isinstance(dims, int) else dims)] or list(range(rank))
    for dim in dims:
        data = state.algebra.collapse(data, [dim], f"{kind} runs along it")
    keeps_zero = kind in ("cumsum", "flip", "roll")
    factors = data.factors if keeps_zero else data.with_zero(False).factors
    return [Labels(state.shape(node, number), factors) for number in range(len(node.outputs))]


# -- moving data -----------------------------------------------------------------------------------------------------

_MEETING_CALLS = ("matmul", "__matmul__", "bmm", "einsum")  # what they expand meets the tensor it was expanded for
_SIZED_CALLS = ("view", "reshape", "unflatten", "expand", "broadcast_to")


@rule("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "unflatten", "flatten", "_reshape_alias")
def view(state: State, node: Node) -> list[Labels]:
    """Same elements in another shape; sizes in the user's code must follow."""
    data, shape = state.of(node.args[0]), state.shape(node)
    if math.prod(data.shape) != math.prod(shape):
        raise NotCovered
    _require_sizes(state, node, len(data.shape))
    return [state.algebra.reshape(data, shape)]


def _require_sizes(state: State, node: Node, rank_before: int) -> None:
    """Tie the sizes that user code passed to a view to the live lengths of the result."""
    call = node.call
    if call is None or call.name not in _SIZED_CALLS:
        _lock_models(state, node)
        return  # sizes are computed from the live tensor
    if call.name == "unflatten":
        dim, sizes = call.args[1] % rank_before, call.args[2]
    else:
        rest = call.args[1:] or tuple(call.kwargs.values())
        dim, sizes = 0, rest[0] if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else rest
    if call.name in ("view", "reshape", "expand", "broadcast_to") and len(sizes) != len(state.shape(node)):
        return  # an inner step of the call; the step with the final shape is checked
    if not all(isinstance(size, int) for size in sizes):
        raise NotCovered
    state.explained.add(id(call))
    shape, result = state.shape(node), node.outputs[0]
    for offset, size in enumerate(sizes):
        if size != -1:
            state.require(node, size, Extent(result, dim + offset, shape[dim + offset]))


def _lock_models(state: State, node: Node) -> None:
    """`expand_as` and `view_as` take their sizes from a tensor that the op itself does not see: it keeps its size."""
    call, grows = node.call, state.shape(node) != state.of(node.args[0]).shape
    if call is None or not grows or not (call.name.endswith("_as") or node.name == "aten.expand"):
        return
    if call.name in _MEETING_CALLS:
        return
    for other in tree_leaves([*call.args, *call.kwargs.values()], is_leaf=lambda x: isinstance(x, Ref)):
        if isinstance(other, Ref) and other != node.args[0]:
            state.algebra.lock(state.of(other), f"gives {call.name} its size")


@rule("expand")
def expand(state: State, node: Node) -> list[Labels]:
    """Repeated without a copy."""
    data, shape = state.of(node.args[0]), state.shape(node)
    _require_sizes(state, node, len(data.shape))
    return [Labels(shape, _padded_factors(data, len(shape)))]


def _padded_factors(labels: Labels, rank: int) -> tuple[Factor, ...]:
    extra = (1,) * (rank - len(labels.shape))
    return tuple(factor.on(factor.ids.reshape(extra + factor.ids.shape)) for factor in labels.factors)


@rule("repeat")
def repeat(state: State, node: Node) -> list[Labels]:
    """Tiled: every copy hangs on the same channels."""
    data, times = state.of(node.args[0]), [int(count) for count in node.args[1]]
    rank = len(times)
    factors = []
    for factor in _padded_factors(data, rank):
        factors.append(factor.on(np.tile(factor.ids, [times[d] if factor.spans(d) else 1 for d in range(rank)])))
    return [Labels(state.shape(node), tuple(factors))]


@rule("t", "transpose", "permute", "numpy_T")
def permute(state: State, node: Node) -> list[Labels]:
    """Dimensions in another order."""
    data = state.of(node.args[0])
    order = _order(node, len(data.shape))
    origin = state.origins.get(node.args[0].value)
    if origin is not None:
        state.origins[node.outputs[0]] = origin[0], tuple(origin[1][dim] for dim in order)
    return [state.algebra.permute(data, order)]


def _order(node: Node, rank: int) -> list[int]:
    if node.name == "aten.permute":
        return [int(dim) % rank for dim in node.args[1]]
    order = list(range(rank))
    if node.name == "aten.transpose":
        a, b = (int(dim) % rank for dim in node.args[1:3])
        order[a], order[b] = order[b], order[a]
        return order
    return order[::-1]


@rule("detach", "clone", "alias", "contiguous", "_to_copy", "to", "lift_fresh", "lift_fresh_copy", "dropout")
def same(state: State, node: Node) -> list[Labels]:
    """The same elements."""
    origin = state.origins.get(node.args[0].value)
    if origin is not None:
        state.origins[node.outputs[0]] = origin
    return [state.of(node.args[0])]


@rule("slice")
def slice_positions(state: State, node: Node) -> list[Labels]:
    """A range of positions; its bounds must follow the channels before them."""
    data = state.of(node.args[0])
    dim = int(argument(node, 1, "dim", 0)) % len(data.shape)
    size = data.shape[dim]
    start, stop = argument(node, 2, "start", None), argument(node, 3, "end", None)
    step = int(argument(node, 4, "step", 1))
    positions = np.arange(size)[slice(start, stop, step)]
    if data.covered(dim) and len(positions) < size:
        data = _require_bounds(state, node, data, dim, int(positions[0]), int(positions[-1]) + 1, step)
    return [state.algebra.take(data, dim, positions)]


def _require_bounds(state: State, node: Node, data: Labels, dim: int, first: int, last: int, step: int) -> Labels:
    """Bounds as the user's code computed them, or a lock where it says nothing about them."""
    call, value = node.call, node.args[0].value
    bounds = _key_slices(call.args[1], len(data.shape)).get(dim) if call and call.name == "__getitem__" else None
    if bounds is None or step != 1 or any(isinstance(b, int) and b < 0 for b in (bounds.start, bounds.stop)):
        return state.algebra.lock_dim(data, dim, "channels are picked by fixed positions")
    state.explained.add(id(call))
    if first > 0:
        state.require(node, bounds.start, Extent(value, dim, first))
    if last < data.shape[dim]:
        state.require(node, bounds.stop, Extent(value, dim, last))
    return data


def _key_slices(key: Any, rank: int) -> dict[int, slice]:
    """The slices of an indexing key by the dimension they meet, as indexing applies them one after another."""
    entries = list(key) if isinstance(key, (tuple, list)) else [key]
    used = sum(1 for entry in entries if entry is not None and entry is not Ellipsis)
    slices, dim = {}, 0
    for entry in entries:
        if isinstance(entry, slice):
            slices[dim] = entry
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
    take = state.algebra.take
    parts = [take(data, dim, np.array([position])) for position in range(data.shape[dim])]
    return [state.algebra.reshape(part, state.shape(node, number)) for number, part in enumerate(parts)]


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unsafe_chunk")
def split(state: State, node: Node) -> list[Labels]:
    """Consecutive parts; their sizes must follow."""
    data = state.of(node.args[0])
    dim = int(argument(node, 2, "dim", 0)) % len(data.shape)
    sizes = [state.shape(node, number)[dim] for number in range(len(node.outputs))]
    if data.covered(dim):
        data = _require_parts(state, node, data, dim, sizes)
    parts, start = [], 0
    for size in sizes:
        parts.append(state.algebra.take(data, dim, np.arange(start, start + size)))
        start += size
    return parts


def _require_parts(state: State, node: Node, data: Labels, dim: int, sizes: Sequence[int]) -> Labels:
    call = node.call
    if call is None or call.name not in ("chunk", "split", "split_with_sizes"):
        return state.algebra.lock_dim(data, dim, "split by fixed sizes")
    extents = [Extent(value, dim, size) for value, size in zip(node.outputs, sizes, strict=True)]
    if call.name == "chunk":
        if len(set(sizes)) > 1 or len(sizes) != _chunks(call.args, call.kwargs):
            return state.algebra.lock_dim(data, dim, "split into unequal chunks")
        numbers: list[Any] = [None] * len(sizes)
    else:
        given = call.args[1] if len(call.args) > 1 else next(iter(call.kwargs.values()))
        numbers = list(given) if isinstance(given, (list, tuple)) else [given] * len(sizes)
        state.explained.add(id(call))
    first = Size(node.outputs[0], dim)
    for number, extent in zip(numbers, extents, strict=True):
        if number is None:
            state.requirements.append(Requirement(first, extent, node.place))
        else:
            state.require(node, number, extent)
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
    parts = []
    for part in node.args[0]:
        labels = state.of(part)
        parts.append(state.algebra.reshape(labels, (*labels.shape[:dim], 1, *labels.shape[dim:])))
    return [state.algebra.concatenate(parts, dim)]


@rule("constant_pad_nd")
def pad(state: State, node: Node) -> list[Labels]:
    """Constant entries around: padded channels are fixed."""
    data, widths, value = state.of(node.args[0]), node.args[1], argument(node, 2, "value", 0)
    for number in range(0, len(widths), 2):
        dim = len(data.shape) - 1 - number // 2
        before, after = int(widths[number]), int(widths[number + 1])
        if (before or after) and min(before, after) < 0:
            data = state.algebra.lock_dim(data, dim, "cropped by fixed sizes")
            data = Labels(_resized(data.shape, dim, before + after), data.factors)
        elif before or after:
            factors = []
            for factor in data.factors:
                around = [(before, after) if d == dim else (0, 0) for d in range(len(data.shape))]
                factors.append(factor.on(np.pad(factor.ids, around)) if factor.spans(dim) else factor)
            data = Labels(_resized(data.shape, dim, before + after), tuple(factors))
    return [data if value == 0 else data.with_zero(False)]


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


@rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like")
def like(state: State, node: Node) -> list[Labels]:
    """A new tensor of the same size."""
    return [state.of(node.args[0]).with_zero(node.name == "aten.zeros_like")]


@rule("new_zeros", "new_ones", "new_full", "new_empty")
def new(state: State, node: Node) -> list[Labels]:
    """A new tensor of a size given in the code, fixed."""
    return [Labels(state.shape(node))]


# -- pointwise -------------------------------------------------------------------------------------------------------


def pointwise(state: State, node: Node) -> list[Labels]:
    """Align the operands; whether a dead element is still zero is found by evaluating the op itself on zeros."""
    refs = node.refs()
    if not refs:
        raise NotCovered
    joined, shape = state.algebra.align([state.labels[ref] for ref in refs], "combined with a tensor of fixed size")
    if shape != state.shape(node):
        raise NotCovered
    factors = []
    for j in joined:
        zero = _zero_at_zero(state, node, refs, j.zeros)
        if zero is None:
            state.algebra.atoms.lock(j.ids, f"{node.place}: not finite where channels are zero")
        else:
            factors.append(j.factor(zero))
    return [Labels(shape, tuple(factors)) for _ in node.outputs]


def _zero_at_zero(state: State, node: Node, refs: Sequence[int], zeros: Sequence[bool]) -> bool | None:
    """Whether the op gives 0 where the marked operands are 0, whatever the others are; None: it gives no number."""
    result = True
    for trial in (0.37, 1.7, -0.6, 0.0):
        alive = _evaluate(state, node, refs, [trial] * len(refs))
        dead = _evaluate(state, node, refs, [0.0 if zero else trial for zero in zeros])
        if not torch.isfinite(alive).all():
            continue
        if not torch.isfinite(dead).all():
            return None
        result = result and bool((dead == 0).all())
    return result


def _evaluate(state: State, node: Node, refs: Sequence[int], values: Sequence[float]) -> torch.Tensor:
    """The op on one-element tensors."""
    numbers = iter(zip(refs, values, strict=True))

    def element(tree: Any) -> Any:
        if isinstance(tree, Ref):
            ref, value = next(numbers)
            dtype = state.tape.values[ref].dtype
            return torch.full((1,), value if dtype.is_floating_point else float(value > 0)).to(dtype)
        if isinstance(tree, (list, tuple)):
            return [element(entry) for entry in tree]
        return tree

    args = [element(entry) for entry in node.args]
    kwargs = {name: element(entry) for name, entry in node.kwargs.items() if name not in ("device", "out")}
    result = node.op(*args, **kwargs)
    result = result[0] if isinstance(result, (tuple, list)) else result
    return torch.as_tensor(result, dtype=torch.float64)


_POINTWISE = (
    *(
        "add",
        "sub",
        "mul",
        "div",
        "rsub",
        "pow",
        "neg",
        "relu",
        "hardswish",
        "hardsigmoid",
        "hardtanh",
        "relu6",
        "silu",
    ),
    *("mish", "elu", "softplus", "leaky_relu", "gelu", "prelu", "_prelu_kernel", "log_sigmoid_forward", "sigmoid"),
    *("tanh", "clamp", "clamp_min", "clamp_max", "where", "masked_fill", "lerp", "copysign", "fmod", "bitwise_not"),
    *("addcmul", "addcdiv", "copy", "abs", "sqrt", "rsqrt", "exp", "log", "square", "maximum", "minimum"),
)


def rule_for(node: Node) -> Rule | None:
    """The rule of an op; ops that torch itself tags as pointwise share one."""
    name = node.name.removeprefix("aten.")
    if node.name in RULES:
        return RULES[node.name]
    if node.name.startswith("aten.") and (name in _POINTWISE or torch.Tag.pointwise in node.op.tags):
        return pointwise
    return None
