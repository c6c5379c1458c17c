"""The same elements in another shape or order, and new tensors like old ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import index
from typing import Any

import numpy as np

from secateur.coupling.labels import Factor, Labels, matching_blocks
from secateur.coupling.rules.creation import fresh, may_follow, new_factors
from secateur.coupling.rules.origins import carry_through_view, carry_to_the_right
from secateur.coupling.rules.state import Extent, NotCovered, Path, Requirement, State, rule
from secateur.coupling.sizes import Size
from secateur.coupling.tape import Node, Ref

# What these calls expand meets the tensor it was expanded for.
_MEETING_CALLS = ("matmul", "__matmul__", "bmm", "einsum", "normalize", "cosine_similarity", "take_along_dim")
_REPEATING_CALLS = ("repeat_interleave",)  # they expand to a number of copies, which the code has to give
_SIZED_CALLS = ("view", "reshape", "unflatten", "expand", "broadcast_to")


@rule("squeeze")
def squeeze(state: State, node: Node) -> list[Labels]:
    """Drop dimensions of length 1; without a `dim`, a width that fell to 1 would be dropped too."""
    if len(node.args) == 1:
        state.at_least_two.extend(factor.ids for factor in state.of(node.args[0]).factors)
    return view(state, node)


@rule("view", "_unsafe_view", "reshape", "unsqueeze", "unflatten", "flatten", "_reshape_alias")
def view(state: State, node: Node) -> list[Labels]:
    """Same elements in another shape; sizes in the user's code must follow."""
    data, shape = state.of(node.args[0]), state.shape(node)
    if math.prod(data.shape) != math.prod(shape):
        raise NotCovered
    _require_sizes(state, node, len(data.shape))
    carry_through_view(state, node)
    return [state.algebra.reshape(_with_one_choice(state, data, shape), shape)]


def _with_one_choice(state: State, data: Labels, shape: Sequence[int]) -> Labels:
    """Labels in which no two dimensions that become one are free independently of each other.

    Heads times positions within a head: either can go, not both ways at once. The outermost stays free, unless it is
    one that was made in forward (keys repeated for a group of queries), which then keeps its length.
    """
    labels = state.algebra.simplify(data)
    for merged, _ in matching_blocks(data.shape, shape):
        spans = [tuple(dim for dim in factor.span if dim in merged) for factor in labels.factors]
        if len(set(spans) - {()}) < 2:
            continue
        made_here = [bool((state.algebra.atoms.find(f.ids) > state.owned).all()) for f in labels.factors]
        free = min((made, span) for made, span in zip(made_here, spans, strict=True) if span)[1]
        for factor, span in zip(labels.factors, spans, strict=True):
            if span not in ((), free):
                why = "its positions become one dimension with others that can go"
                state.algebra.lock(Labels(labels.shape, (factor,)), why)
        labels = state.algebra.simplify(labels)
    return labels


def _require_sizes(state: State, node: Node, rank_before: int) -> None:
    """Tie the sizes that user code passed to a view to the live lengths of the result."""
    call = node.call
    if call is None or call.name not in _SIZED_CALLS:
        _follow_model(state, node)
        return  # sizes are computed from the live tensor
    dim = 0
    given: list[tuple[Path, Any]] = []
    given += [((place,), entry) for place, entry in enumerate(call.args)][1:]
    given += [((name,), entry) for name, entry in call.kwargs.items()]
    if call.name == "unflatten":
        dim, given = index(given[0][1]) % rank_before, given[1:]
    if len(given) == 1 and isinstance(given[0][1], (list, tuple)):
        (path, entries) = given[0]
        given = [((*path, place), entry) for place, entry in enumerate(entries)]
    sizes = [entry for _, entry in given]
    if call.name in ("view", "reshape", "expand", "broadcast_to") and len(sizes) != len(state.shape(node)):
        return  # an inner step of the call; the step with the final shape is checked
    if not all(isinstance(size, int) for size in sizes):
        raise NotCovered
    state.explained.add(id(call))
    shape, result = state.shape(node), node.outputs[0]
    for offset, (path, size) in enumerate(given):
        if index(size) != -1:
            state.require(node, size, Extent(result, dim + offset, shape[dim + offset]), path)


def _follow_model(state: State, node: Node) -> None:
    """`view_as` takes its sizes from a tensor that the op itself does not see."""
    other = _model(node, "view_as", "reshape_as")
    if other is not None:
        for dim, size in enumerate(state.shape(node)):
            extent = Extent(node.outputs[0], dim, size)
            state.requirements.append(Requirement(Size(other.value, dim), extent, node.place, size))


def _model(node: Node, *calls: str) -> Ref | None:
    """The other tensor of `x.view_as(other)` and its like."""
    call = node.call
    if call is None or call.name not in calls:
        return None
    other = call.args[1] if len(call.args) > 1 else call.kwargs.get("other")
    if not isinstance(other, Ref):
        raise NotCovered
    return other


@rule("expand")
def expand(state: State, node: Node) -> list[Labels]:
    """Repeated without a copy. As `expand_as`, the new positions come and go with those of the other tensor."""
    data, shape = state.of(node.args[0]), state.shape(node)
    other = _model(node, "expand_as")
    if other is not None and state.of(other).shape == shape:
        joined, _ = state.algebra.align([data, state.of(other)], "expanded to a tensor of fixed size")
        return [Labels(shape, tuple(j.factor(j.zeros[0]) for j in joined))]
    name = node.call.name if node.call is not None else ""
    if name not in ("", *_SIZED_CALLS, *_MEETING_CALLS, *_REPEATING_CALLS) and shape != data.shape:
        raise NotCovered  # to sizes of which nothing is known
    _require_sizes(state, node, len(data.shape))
    carry_to_the_right(state, node)
    return [Labels(shape, (*_padded_factors(data, len(shape)), *_new_positions(state, node, data.shape)))]


def _new_positions(state: State, node: Node, before: Sequence[int]) -> list[Factor]:
    """Atoms for the positions that expanding makes, where the tensor they meet or a size in the code may follow."""
    call, shape = node.call, state.shape(node)
    before = (*(1,) * (len(shape) - len(before)), *before)
    wider = [dim for dim, size in enumerate(shape) if before[dim] == 1 and size > 1]
    if call is None or not wider:
        return []
    if call.name in _SIZED_CALLS:
        sizes = _sizes(call.args[1:] or tuple(call.kwargs.values()))
        wider = [dim for dim in wider if len(sizes) == len(shape) and may_follow(state, sizes[dim])]
    elif call.name not in _MEETING_CALLS:
        wider = []
    return [fresh(state, shape, dim, zero=False) for dim in wider]


def _padded_factors(labels: Labels, rank: int) -> tuple[Factor, ...]:
    extra = (1,) * (rank - len(labels.shape))
    return tuple(factor.on(factor.ids.reshape(extra + factor.ids.shape)) for factor in labels.factors)


def _sizes(given: Sequence[Any]) -> Sequence[Any]:
    """Sizes given one by one, or as one sequence."""
    return given[0] if len(given) == 1 and isinstance(given[0], (list, tuple)) else given


@rule("repeat")
def repeat(state: State, node: Node) -> list[Labels]:
    """Tiled: every copy hangs on the same channels."""
    data, times = state.of(node.args[0]), [int(count) for count in node.args[1]]
    rank = len(times)
    carry_to_the_right(state, node)
    factors = []
    for factor in _padded_factors(data, rank):
        factors.append(factor.on(np.tile(factor.ids, [times[d] if factor.spans(d) else 1 for d in range(rank)])))
    return [Labels(state.shape(node), (*factors, *_copies(state, node, data.shape)))]


def _copies(state: State, node: Node, before: Sequence[int]) -> list[Factor]:
    """Atoms for copies whose number in the code may follow channels: `x.repeat(1, width)` of a single column."""
    call, shape = node.call, state.shape(node)
    before = (*(1,) * (len(shape) - len(before)), *before)
    numbers = _sizes(call.args[1:]) if call is not None and call.name == "repeat" else ()
    if len(numbers) != len(shape) or not any(may_follow(state, number) for number in numbers):
        return []
    state.explained.add(id(call))
    single = [number if size == 1 else 0 for number, size in zip(numbers, before, strict=True)]
    for number, size, times in zip(numbers, before, node.args[1], strict=True):
        if size > 1:
            state.require(node, number, int(times))
    return list(new_factors(state, node, single, zero=False))


@rule("t", "transpose", "permute", "numpy_T")
def permute(state: State, node: Node) -> list[Labels]:
    """Dimensions in another order."""
    data = state.of(node.args[0])
    order = _order(node, len(data.shape))
    origin = state.origins.get(node.args[0].value)
    if origin is not None:
        state.origins[node.outputs[0]] = tuple(origin[dim] for dim in order)
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


@rule("as_strided")
def as_strided(state: State, node: Node) -> list[Labels]:
    """The same elements in another memory format, as pooling to a single position makes it."""
    call, data = node.call, state.of(node.args[0])
    if call is None or call.name != "adaptive_avg_pool2d" or data.shape != state.shape(node):
        raise NotCovered
    return [data]
