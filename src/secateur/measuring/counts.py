"""Parameters, multiply-accumulates and bytes of a model, counted without changing it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from secateur.inputs import Inputs, as_inputs, check_model
from secateur.plans import human


@dataclass(frozen=True)
class Counts:
    """What one model costs, whatever the machine."""

    params: int  # elements of the parameters; a tied one counts once
    macs: int  # multiply-accumulates of one forward pass on the example inputs, all samples of the batch together
    size_bytes: int  # parameters and buffers in memory, tied ones once

    def __str__(self) -> str:
        size = f"{self.size_bytes / 1e6:.2f} MB"
        return f"{human(self.params)} params, {human(self.macs)} MACs, {size}"


def count(model: nn.Module, example_inputs: Any) -> Counts:
    """Count the parameters, MACs and bytes of `model` in eval mode; `model` itself is neither run nor changed.

    MACs are those of matrix products and convolutions (half of torch's FLOP count); pointwise ops, norms and pooling
    count nothing, which is the field's convention. The pass runs on a copy on the meta device: no arithmetic, no
    memory for weights, and attention is counted, which torch's counter skips on the CPU.
    Raises ModelError for a wrapped model, ExampleInputsError for unusable inputs; an error of the model's own forward
    comes through as it is.
    """
    check_model(model)
    inputs = as_inputs(example_inputs)
    parameters, buffers = list(model.parameters()), list(model.buffers())
    return Counts(
        params=sum(parameter.numel() for parameter in parameters),
        macs=_macs(model, inputs),
        size_bytes=sum(tensor.numel() * tensor.element_size() for tensor in parameters + buffers),
    )


def _macs(model: nn.Module, inputs: Inputs) -> int:
    try:
        return _counted(_copy(model, _to_meta), inputs.map(_to_meta))
    except Exception:
        # The forward pass looks at values (a data-dependent branch, a mask turned into indices), which meta tensors
        # do not have. A real pass answers the same question; if the model itself is broken, its own error comes out.
        return _counted(_copy(model, torch.clone), inputs)


def _counted(model: nn.Module, inputs: Inputs) -> int:
    model.requires_grad_(False)  # the counter hooks into gradients, and stumbles over parameters that are inputs
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), _plain_attention(), counter:
        inputs.call(model.eval())
    return int(counter.get_total_flops()) // 2


def _copy(model: nn.Module, convert: Callable[[Tensor], Tensor]) -> nn.Module:
    """A deep copy whose tensors went through `convert`, without a second set of weights first; tied ones stay tied."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for leaf in tree_leaves(vars(module)):  # parameters, buffers, and tensors cached as plain attributes
            if isinstance(leaf, nn.Parameter):
                memo[id(leaf)] = nn.Parameter(convert(leaf.detach()), requires_grad=leaf.requires_grad)
            elif isinstance(leaf, Tensor):
                memo[id(leaf)] = convert(leaf.detach())
    return copy.deepcopy(model, memo)


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


@contextmanager
def _plain_attention() -> Iterator[None]:
    # Fused transformer layers and fused attention hide their products from the counter.
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
