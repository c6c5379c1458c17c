"""Pointwise ops share one rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from secateur.coupling.labels import Labels
from secateur.coupling.rules.state import NotCovered, State
from secateur.coupling.tape import Node, Ref


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


POINTWISE = (
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
