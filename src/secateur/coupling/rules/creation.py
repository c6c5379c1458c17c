"""New tensors: of a size given in the code, and like old ones.

A new tensor whose size is computed from channel counts (`torch.zeros(n, self.hidden_size)`) can follow them: along such
a dimension it gets atoms of its own, tied to channels by whatever it meets, and the size in the code must follow them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from secateur.coupling.labels import Factor, Labels
from secateur.coupling.rules.state import Extent, State, argument, rule
from secateur.coupling.sizes import Attribute, Size, TracedInt, expression_of, mentioned
from secateur.coupling.tape import Call, Node, Ref

_FACTORIES = ("zeros", "ones", "full", "empty")
# Calls that gather their result piece by piece in a buffer: its channels are those of the first argument.
_BUFFERED_CALLS = ("pad", "_pad_packed_sequence")


@rule(*_FACTORIES, *(f"new_{kind}" for kind in _FACTORIES))
def create(state: State, node: Node) -> list[Labels]:
    """A new tensor of a size given in the code."""
    shape = state.shape(node)
    call = node.call
    if call is not None and call.name in _BUFFERED_CALLS:
        return [_buffer(state, node, call)]
    if call is None or call.name.removeprefix("new_") not in _FACTORIES:
        return [Labels(shape)]  # inside another call, whose own arguments say what follows
    sizes = _sizes_in(call)
    floating = state.tape.values[node.outputs[0]].dtype.is_floating_point
    if not floating or len(sizes) != len(shape) or _traced_fill(call):
        return [Labels(shape)]
    state.explained.add(id(call))
    return [Labels(shape, new_factors(state, node, sizes, zero=_is_zero(node)))]


def new_factors(state: State, node: Node, sizes: Sequence[Any], *, zero: bool) -> tuple[Factor, ...]:
    """Fresh atoms along every dimension of the result whose size in the code may follow channels."""
    shape, factors = state.shape(node), []
    for dim, (number, size) in enumerate(zip(sizes, shape, strict=True)):
        if not isinstance(number, TracedInt):
            continue
        if size == 1 or not may_follow(state, number):
            state.require(node, number, size)
            continue
        state.require(node, number, Extent(node.outputs[0], dim, size))
        factors.append(fresh(state, shape, dim, zero=zero))
    return tuple(factors)


def fresh(state: State, shape: Sequence[int], dim: int, *, zero: bool) -> Factor:
    """A factor of new atoms along one dimension."""
    ids = state.algebra.atoms.new(shape[dim])
    return Factor(ids.reshape([shape[dim] if d == dim else 1 for d in range(len(shape))]), zero)


def may_follow(state: State, number: Any) -> bool:
    """Whether a number in the code depends on anything that may change."""
    for leaf in mentioned(expression_of(number)):
        if isinstance(leaf, Attribute):
            return True
        if isinstance(leaf, Size) and state.labels[leaf.value].covered(leaf.dim):
            return True
    return False


def _sizes_in(call: Call) -> Sequence[Any]:
    """The sizes as the code gave them, numbers or tensors of one; nothing where they were not given in a known way."""
    given = call.args[1:] if call.name.startswith("new_") else call.args
    sizes = call.kwargs.get("size", given)
    if isinstance(sizes, (list, tuple)) and sizes and isinstance(sizes[0], (list, tuple)):
        sizes = sizes[0]
    known = isinstance(sizes, (list, tuple)) and all(isinstance(size, (int, Ref)) for size in sizes)
    return sizes if known else ()


def _traced_fill(call: Call) -> bool:
    """Whether a size is also what the tensor is filled with."""
    entries = [*call.args[1:], call.kwargs.get("fill_value")] if call.name.endswith("full") else []
    return any(isinstance(entry, TracedInt) for entry in entries)


def _is_zero(node: Node) -> bool:
    if node.name.endswith("full"):
        return bool(argument(node, 2 if node.name == "aten.new_full" else 1, "fill_value") == 0)
    return node.name.endswith("zeros")


def _buffer(state: State, node: Node, call: Call) -> Labels:
    """The channels of the call's first tensor, along the trailing dimensions that both have."""
    shape = state.shape(node)
    source = next((entry for entry in call.args if isinstance(entry, Ref)), None)
    if source is None:
        return Labels(shape)
    data, factors = state.of(source), []
    shift = len(shape) - len(data.shape)
    for factor in data.factors:
        dims = [dim + shift for dim in factor.span]
        if len(dims) == 1 and dims[0] > shift and shape[dims[0]] == factor.ids.size:
            ids = factor.ids.reshape([shape[d] if d in dims else 1 for d in range(len(shape))])
            factors.append(Factor(ids, _is_zero(node)))
    return Labels(shape, tuple(factors))


@rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like")
def like(state: State, node: Node) -> list[Labels]:
    """A new tensor of the same size."""
    return [state.of(node.args[0]).with_zero(node.name == "aten.zeros_like")]


@rule("fill", "zero")
def fill(state: State, node: Node) -> list[Labels]:
    """The same tensor, all of one value."""
    value = 0 if node.name == "aten.zero" else argument(node, 1, "value")
    return [state.of(node.args[0]).with_zero(not isinstance(value, Ref) and value == 0)]
