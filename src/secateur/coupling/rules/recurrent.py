"""What LSTM, GRU and simple recurrent layers have of their own: gates in one tensor, packed sequences.

Everything else about them is recorded as products, sums and pointwise ops, step by step.
"""

from __future__ import annotations

from secateur.coupling.labels import Labels
from secateur.coupling.rules.state import State, rule
from secateur.coupling.tape import Node

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


@rule("_pack_padded_sequence")
def pack(state: State, node: Node) -> list[Labels | None]:
    """(T, N, *) or (N, T, *) -> (steps, *): the first two dimensions become one."""
    data = state.algebra.collapse(state.of(node.args[0]), [0, 1], "packed with sequences of other lengths")
    factors = tuple(factor.on(factor.ids[0]) for factor in data.factors)
    return [Labels(state.shape(node), factors), None]
