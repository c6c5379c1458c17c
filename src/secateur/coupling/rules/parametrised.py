"""Weights that are computed from other parameters: weight normalisation."""

from __future__ import annotations

from dataclasses import replace

from secateur.coupling.labels import Labels
from secateur.coupling.rules.origins import carry_elementwise, readers
from secateur.coupling.rules.reductions import reduction
from secateur.coupling.rules.state import State, argument, rule
from secateur.coupling.tape import Node, Ref

_CALL = "_weight_norm"


@rule("_weight_norm_interface")
def weight_norm(state: State, node: Node) -> list[Labels | None]:
    """weight = direction * gain / (length of the direction), per position of one dimension.

    Along that dimension the gain alone is zeroed: a direction of length 0 would make 0 / 0. Along the others, entries
    of 0 do not change a length.
    """
    direction, gain = node.args[0], node.args[1]
    dim = int(argument(node, 2, "dim", 0)) % len(state.of(direction).shape)
    _keep_direction(state, direction, dim)
    carry_elementwise(state, node, [direction.value, gain.value])
    return [state.algebra.product(state.of(direction), state.of(gain), "scaled by gains of fixed number"), None]


@rule("norm")
def norm(state: State, node: Node) -> list[Labels]:
    """A reduction; inside weight normalisation the lengths of directions, which are never 0."""
    call = node.call
    if call is None or call.name != _CALL or int(call.args[2]) < 0:
        return reduction(state, node)
    _keep_direction(state, call.args[0], int(call.args[2]))
    return [labels.with_zero(False) for labels in reduction(state, node)]


def _keep_direction(state: State, direction: Ref, dim: int) -> None:
    """In the zeroed original the directions hold 1, as long as nothing but weight normalisation reads them."""
    labels, origin = state.of(direction), state.origins.get(direction.value)
    leaf = None if origin is None else origin[dim]
    if leaf is None or not _is_only_normalised(state, direction):
        state.labels[direction.value] = state.algebra.lock_dim(labels, dim, "a direction that has another use")
        return
    state.fills[leaf] = 1.0
    state.roles.setdefault(leaf, "other")  # the size of a filter is its gain
    factors = tuple(replace(factor, zero=factor.zero and not factor.spans(dim)) for factor in labels.factors)
    state.labels[direction.value] = Labels(labels.shape, factors)


def _is_only_normalised(state: State, direction: Ref) -> bool:
    calls = [node.call for node in readers(state, direction)]
    only = all(call is not None and call.name == _CALL and call.args[0] == direction for call in calls)
    return only and direction.value not in state.tape.outputs
