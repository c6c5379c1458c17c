"""What LSTM, GRU and simple recurrent layers have of their own: gates in one tensor, packed sequences.

Everything else about them is recorded as products, sums and pointwise ops, step by step.
"""

from __future__ import annotations

from collections.abc import Sequence

from secateur.coupling.labels import Labels
from secateur.coupling.rules.creation import fresh
from secateur.coupling.rules.origins import readers
from secateur.coupling.rules.state import Extent, Requirement, State, rule
from secateur.coupling.sizes import Size
from secateur.coupling.tape import Node, Ref

_LAYERS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_CALLS = (*_LAYERS, *(f"{name}_cell" for name in _LAYERS))


def is_recurrent(node: Node) -> bool:
    """Whether an op runs inside a recurrent layer of the framework, which takes its sizes from live tensors."""
    return node.call is not None and node.call.name in _CALLS


def tied_gates(state: State, data: Labels, dim: int, gates: int) -> Labels:
    """All gates of a unit go together: the layer splits them into parts of equal length."""
    shape = (*data.shape[:dim], gates, data.shape[dim] // gates, *data.shape[dim + 1 :])
    rows = state.algebra.collapse(state.algebra.reshape(data, shape), [dim], "all gates of a unit go together")
    return state.algebra.simplify(data) if rows.factors else Labels(data.shape)


def separate_states(state: State, node: Node, parts: Sequence[Labels]) -> list[Labels]:
    """Initial states taken apart. Zeros for all layers and directions ask for equal widths, not for equal units."""
    if not is_recurrent(node) or not _is_new_zeros(state, node.args[0].value):
        return list(parts)
    separate = list(parts[:1])
    for number, part in enumerate(parts[1:], 1):
        dims = [factor.span[0] for factor in part.factors if len(factor.span) == 1]
        separate.append(Labels(part.shape, tuple(fresh(state, part.shape, dim, zero=True) for dim in dims)))
        for dim in dims:
            _require_equal(state, node, Size(node.args[0].value, dim + 1), node.outputs[number], dim)
    return separate


def unread_states(state: State, node: Node, parts: Sequence[Ref]) -> Labels | None:
    """Final states stacked, where nobody reads them: again the widths must be equal, and no more."""
    value = node.outputs[0]
    if not is_recurrent(node) or value in (*state.tape.outputs, *state.tape.exported):
        return None
    if any(True for _ in readers(state, Ref(value))):
        return None
    for part in parts[1:]:
        for dim in range(len(state.of(part).shape)):
            _require_equal(state, node, Size(parts[0].value, dim), part.value, dim)
    first = state.of(parts[0])
    factors = tuple(factor.on(factor.ids[None]) for factor in first.factors)
    return Labels(state.shape(node), factors).with_zero(False)


def _require_equal(state: State, node: Node, size: Size, value: int, dim: int) -> None:
    length = state.tape.values[value].shape[dim]
    state.requirements.append(Requirement(size, Extent(value, dim, length), node.place, length))


def _is_new_zeros(state: State, value: int) -> bool:
    for node in reversed(state.tape.nodes):
        if value not in node.outputs:
            continue
        if node.name in ("aten.zeros", "aten.new_zeros"):
            return True
        if node.name != "aten.detach":
            return False
        value = node.args[0].value
    return False


@rule("_pack_padded_sequence")
def pack(state: State, node: Node) -> list[Labels | None]:
    """(T, N, *) or (N, T, *) -> (steps, *): the first two dimensions become one."""
    data = state.algebra.collapse(state.of(node.args[0]), [0, 1], "packed with sequences of other lengths")
    factors = tuple(factor.on(factor.ids[0]) for factor in data.factors)
    return [Labels(state.shape(node), factors), None]
