"""Which layer a computed weight is of: origins, carried through ops that work on parameters alone.

`State.origins` has an entry for every value that was computed from parameters and buffers only: per dimension the leaf,
and its dimension, that the positions are those of; None where no single leaf can be named.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from secateur.coupling.labels import matching_blocks
from secateur.coupling.rules.state import State
from secateur.coupling.tape import Node, Ref

Origin = tuple[tuple[str, int] | None, ...]


def carry_elementwise(state: State, node: Node, operands: Iterable[int]) -> None:
    """Each dimension is of the first operand that varies along it.

    Leaves that are marked as of no importance ("other": the directions of a normalised weight) stand back.
    """
    operands = list(operands)
    if not any(value in state.origins for value in operands) or not all(_is_fixed(state, value) for value in operands):
        return
    shape = state.shape(node)
    merged: list[tuple[str, int] | None] = [None] * len(shape)
    for value in operands:
        origin = state.origins.get(value, ())
        for back, leaf in enumerate(reversed(origin), 1):  # broadcasting aligns the last dimensions
            wide = state.tape.values[value].shape[-back] == shape[-back] > 1
            if wide and merged[-back] is None and leaf is not None and state.roles.get(leaf) != "other":
                merged[-back] = leaf
    state.origins[node.outputs[0]] = tuple(merged)


def readers(state: State, ref: Ref) -> Sequence[Node]:
    """The ops that read a value."""
    return state.tape.readers.get(ref.value, ())


def _is_fixed(state: State, value: int) -> bool:
    """Whether a value is the same for all inputs, or a mere factor."""
    recorded = state.tape.values[value]
    constant = recorded.leaf is not None and recorded.leaf.kind == "constant"
    return value in state.origins or constant or all(size == 1 for size in recorded.shape)


def carry_through_view(state: State, node: Node) -> None:
    """A view keeps the origin of the dimensions that it does not merge; the parts of a dimension are all of it."""
    origin, before = state.origins.get(node.args[0].value), state.of(node.args[0]).shape
    if origin is None or 0 in before:
        return
    after = state.shape(node)
    viewed: list[tuple[str, int] | None] = [None] * len(after)
    for old, new in matching_blocks(before, after):
        wide_old = [dim for dim in old if before[dim] > 1]
        wide_new = [dim for dim in new if after[dim] > 1]
        if len(wide_old) == 1:
            for dim in wide_new:
                viewed[dim] = origin[wide_old[0]]
    state.origins[node.outputs[0]] = tuple(viewed)


def carry_without(state: State, node: Node, dim: int) -> None:
    """A dimension is gone: picked from, or taken apart."""
    origin = state.origins.get(node.args[0].value)
    if origin is not None:
        for output in node.outputs:
            state.origins[output] = (*origin[:dim], *origin[dim + 1 :])


def carry_to_the_right(state: State, node: Node) -> None:
    """Repeated along new or other dimensions: those that were there before keep their origin where they were wide."""
    origin = state.origins.get(node.args[0].value)
    if origin is not None:
        before, rank = state.of(node.args[0]).shape, len(state.shape(node))
        kept = (leaf if size > 1 else None for leaf, size in zip(origin, before, strict=True))
        state.origins[node.outputs[0]] = (*(None,) * (rank - len(origin)), *kept)


def carry_nothing(state: State, node: Node) -> None:
    """Still computed from parameters alone, but of no single one."""
    if all(_is_fixed(state, value) for value in node.refs()) and any(value in state.origins for value in node.refs()):
        for number, output in enumerate(node.outputs):
            state.origins[output] = (None,) * len(state.shape(node, number))
