"""Carry an optimizer over from a model to its shrunk copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import InputError
from secateur.plans import Cut, Plan, check_shapes, tensor_shapes
from secateur.shrinking import sliced


def rebind_optimizer_(optimizer: torch.optim.Optimizer, model: nn.Module, small: nn.Module, plan: Plan) -> None:
    """Make `optimizer`, which trains `model`, train `small` instead; its state loses the same channels.

    State tensors of a parameter's own shape (momentum, Adam moments) are sliced like the parameter; everything else
    (step counts) is carried over as it is. The optimizer is changed in place. Raises InputError when it holds
    parameters that are not of `model`, PlanMismatchError when `small` is not what `plan` makes of `model`.
    """
    plan.check(tensor_shapes(model))
    check_shapes(tensor_shapes(small), plan.shapes_after(), "the shrunk model", "the plan")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    new = dict(small.named_parameters())
    cuts: dict[str, list[Cut]] = {}
    for cut in plan.cuts:
        cuts.setdefault(cut.tensor, []).append(cut)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names:
                shape = list(parameter.shape)
                raise InputError(f"the optimizer holds a parameter of shape {shape} that is not one of the model's.")
    state: dict[Tensor, Any] = {}
    for group in optimizer.param_groups:
        olds = group["params"]
        group["params"] = [new[names[id(old)]] for old in olds]
        for old, parameter in zip(olds, group["params"], strict=True):
            if old in optimizer.state:
                its_cuts = cuts.get(names[id(old)], [])
                entries = optimizer.state[old].items()
                state[parameter] = {key: _carried(value, old, its_cuts) for key, value in entries}
    optimizer.state.clear()
    optimizer.state.update(state)


def _carried(value: Any, parameter: Tensor, cuts: list[Cut]) -> Any:
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return sliced(value, cuts)
