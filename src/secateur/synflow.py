"""SynFlow: how much of the flow from input to output goes through each weight, without data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from secateur.batches import Forward, logits_of
from secateur.errors import InputError
from secateur.inputs import copy_in
from secateur.plans import named_tensors


def synflow_scores(model: nn.Module, keep: Mapping[str, Tensor], batch: Any, forward: Forward) -> dict[str, Tensor]:
    """Synaptic flow, weight x dR/dweight: all parameters replaced by magnitudes, an input of ones, R the output's sum.

    In float64 and eval mode, 100 rounds with an exponential schedule, what is gone counting zero. BatchNorm keeps its
    scale; its running mean is 0 and its variance 1, so that flow stays positive. `batch` gives the shape of the input.
    Source: Tanaka 2020, arXiv 2006.05467, equation 2 and algorithm 1.
    """
    linear = copy_in(model, torch.float64).eval()
    tensors = named_tensors(linear)
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                tensor.abs_()
                if name in keep:
                    tensor.mul_(keep[name])
        for module in linear.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
                module.reset_running_stats()
    ones = tree_map_only(Tensor, _ones, batch)
    for parameter in linear.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    with torch.enable_grad():
        output = logits_of(forward(linear, ones))
        if output is None:
            raise InputError("synflow sums the model's output: it must be a tensor, or have logits.")
        torch.autograd.backward(output.sum())
    parameters = dict(linear.named_parameters())
    return {
        name: torch.zeros_like(parameters[name]) if (grad := parameters[name].grad) is None else grad * parameters[name]
        for name in keep
    }


def _ones(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor[:1].cpu() if tensor.dim() else tensor.cpu()
    return torch.ones(1, *tensor.shape[1:], dtype=torch.float64)
