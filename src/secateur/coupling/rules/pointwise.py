"""Pointwise ops share one rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from secateur.coupling.labels import Labels
from secateur.coupling.rules.origins import carry_elementwise
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
    carry_elementwise(state, node, refs)
    factors = []
    for j in joined:
        zero = _zero_at_zero(state, node, refs, j.zeros)
        if zero is None:
            state.algebra.atoms.lock(j.ids, f"{node.place}: not finite where channels are zero")
        else:
            factors.append(j.factor(zero))
    return [Labels(shape, tuple(factors)) for _ in node.outputs]


# What an operand may hold: small, ordinary and large numbers of both signs. Each operand gets them in another order.
_TRIALS = (0.0, 1e-3, -1e-3, 0.37, -0.6, 1.7, -2.3, 8.0, -11.0, 300.0, -400.0, 1e4, -3e4)
_ORDERS = 5


def _zero_at_zero(state: State, node: Node, refs: Sequence[int], zeros: Sequence[bool]) -> bool | None:
    """Whether the op gives 0 where the marked operands are 0, whatever the others are; None: it gives no number."""
    dtypes = [state.tape.values[ref].dtype for ref in refs]
    key = node.op, str(_map_refs(node.args)), str(_map_refs(dict(node.kwargs))), tuple(zeros), tuple(dtypes)
    if key not in state.zeros:
        numbers = [leaf for leaf in tree_leaves([list(node.args), dict(node.kwargs)]) if isinstance(leaf, (int, float))]
        trials = [_operand(number, dtype, numbers) for number, dtype in enumerate(dtypes)]
        try:
            alive = _evaluate(node, trials)
            dead = _evaluate(node, [torch.zeros_like(t) if z else t for t, z in zip(trials, zeros, strict=True)])
        except RuntimeError as error:  # an operand that must be a scalar
            raise NotCovered from error
        meaningful = torch.isfinite(alive)
        if not torch.isfinite(dead[meaningful]).all():
            state.zeros[key] = None
        else:
            state.zeros[key] = bool((dead[meaningful] == 0).all())
    return state.zeros[key]


def _operand(number: int, dtype: torch.dtype, constants: Sequence[float]) -> torch.Tensor:
    """Trial values for one operand, on both sides of every constant (a threshold) among the arguments.

    Over all orders, every value meets many values of the other operands.
    """
    near = [constant + shift for constant in constants for shift in (-1.0, 0.5 * abs(constant), 2 * abs(constant) + 1)]
    base = torch.tensor([*_TRIALS, *(value for value in near if math.isfinite(value))], dtype=torch.float64)
    values = torch.cat([base.roll(number * order) for order in range(_ORDERS)])
    return values.to(dtype) if dtype.is_floating_point or dtype.is_complex else (values > 0).to(dtype)


def _map_refs(tree: Any) -> Any:
    """The arguments with every tensor blanked out."""
    if isinstance(tree, Ref):
        return None
    if isinstance(tree, dict):
        return {name: _map_refs(entry) for name, entry in tree.items()}
    return [_map_refs(entry) for entry in tree] if isinstance(tree, (list, tuple)) else tree


def _evaluate(node: Node, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    """The op on vectors of trial values, in float64."""
    numbers = iter(operands)

    def filled(tree: Any) -> Any:
        if isinstance(tree, Ref):
            return next(numbers).clone()
        return [filled(entry) for entry in tree] if isinstance(tree, (list, tuple)) else tree

    args = [filled(entry) for entry in node.args]
    kwargs = {name: filled(entry) for name, entry in node.kwargs.items() if name != "device"}
    result = node.op(*args, **kwargs)
    result = result[0] if isinstance(result, (tuple, list)) else result
    return torch.as_tensor(result).double()


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
