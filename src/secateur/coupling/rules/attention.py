"""Scaled dot-product attention as one op."""

from __future__ import annotations

from typing import Any

import numpy as np

from secateur.coupling.labels import Labels
from secateur.coupling.rules.state import Extent, NotCovered, Requirement, State, argument, rule
from secateur.coupling.rules.weights import add_work
from secateur.coupling.sizes import Attribute, Size, mentioned
from secateur.coupling.tape import Node, Ref


@rule("scaled_dot_product_attention")
def attention(state: State, node: Node) -> list[Labels]:
    """softmax(Q Kᵀ · scale + mask) V over (..., heads, positions, size of a head).

    Q (..., H, S, D), K (..., G, T, D), V (..., G, T, E). Without an explicit scale, 1 / √D is computed from the size of
    a head, which therefore stays, unless the graph form of the module writes the scale down. With `enable_gqa` each
    of the G key and value heads serves H / G query heads. That number occurs in no call: where the module has looked at
    it, it must follow, because with a mask the same code repeats the keys that often.
    """
    algebra = state.algebra
    query, key, value = (
        state.of(_given(node, position, name)) for position, name in enumerate(("query", "key", "value"))
    )
    if not len(query.shape) == len(key.shape) == len(value.shape):
        raise NotCovered
    last = len(query.shape) - 1
    if _given(node, 6, "scale") is None:
        _require_scale(state, node, last, query.shape[last])
    if _given(node, 7, "enable_gqa") and 1 == key.shape[-3] != query.shape[-3]:  # a single one is broadcast
        _require_repeats(state, node, last - 2, query.shape[-3])
    elif _given(node, 7, "enable_gqa") and key.shape[-3] != query.shape[-3]:
        repeats = query.shape[-3] // key.shape[-3]
        positions = np.repeat(np.arange(key.shape[-3]), repeats)
        key, value = (algebra.take(part, last - 2, positions) for part in (key, value))
    lead, (seen, width) = query.shape[:-2], (key.shape[-2], value.shape[-1])
    rows = algebra.reshape(query, (*query.shape[:-1], 1, query.shape[-1]))
    columns = algebra.reshape(key, (*key.shape[:-2], 1, *key.shape[-2:]))
    logits = algebra.reshape(algebra.contract(rows, columns, last + 1), (*lead, query.shape[-2], seen))
    mask = _given(node, 3, "attn_mask")
    if isinstance(mask, Ref):
        logits = algebra.add(logits, state.of(mask)).with_zero(False)
    add_work(state, 1, [*((query, dim) for dim in range(last + 1)), (key, last - 1)])
    add_work(state, 1, [*((query, dim) for dim in range(last)), (key, last - 1), (value, last)])
    weights = algebra.collapse(logits.with_zero(False), [last], "softmax runs along it")
    weights = algebra.reshape(weights, (*weights.shape, 1))
    values = algebra.reshape(value, (*value.shape[:-2], 1, *value.shape[-2:]))
    result = algebra.contract(weights, values, last)
    return [algebra.reshape(result, (*lead, query.shape[-2], width))]


def _require_scale(state: State, node: Node, dim: int, size: int) -> None:
    place = f"{node.place}: its scale is 1 / sqrt(size of a head)"
    frame = None if node.call is None else node.call.frame
    expression = Size(_given(node, 0, "query").value, dim)
    state.requirements.append(Requirement(expression, size, place, size, frame=frame, escapes=True))


def _require_repeats(state: State, node: Node, dim: int, heads: int) -> None:
    """Numbers of the module that the code under way compared, and that say how many heads share the single key."""
    if node.call is None:
        return
    place = f"{node.place}: so many heads share one of keys"
    extent = Extent(_given(node, 0, "query").value, dim, heads)
    for escape in state.tape.escaped.entries:
        for leaf in mentioned(escape.expression) if escape.frame is node.call.frame else ():
            if isinstance(leaf, Attribute) and leaf.value == heads:
                state.requirements.append(Requirement(leaf, extent, place, heads, frame=node.call.frame))


def _given(node: Node, position: int, name: str) -> Any:
    return argument(node, position, name)
