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

ROUNDS = 100


def synflow_scores(model: nn.Module, keep: Mapping[str, Tensor], batch: Any, forward: Forward) -> dict[str, Tensor]:
    """Synaptic flow, weight x dR/dweight: all parameters replaced by magnitudes, an input of ones, R the output's sum.

    Of one round, {name: in the weight's shape} for every name in `keep`, what is gone counting zero; `make_masks` takes
    100 rounds with an exponential schedule. In float64 and eval mode. BatchNorm keeps the magnitude of its scale and
    shift; its running mean is 0 and its variance 1, so that flow stays positive. Norms that keep no statistics run as
    they are. `batch` gives the shape of the input; integers in it (tokens) stay what they are.

    Raises InputError where the output is no tensor and has no logits, or where the flow is not finite.
    Source: Tanaka 2020, arXiv 2006.05467, equation 2 and algorithm 1.
    """
    return flow(positive(model), keep, batch, forward)


def positive(model: nn.Module) -> nn.Module:
    """A copy in float64 and eval mode in which every parameter is its magnitude and BatchNorm does not normalise."""
    copied = copy_in(model, torch.float64).eval()
    with torch.no_grad():
        for parameter in copied.parameters():
            if parameter.is_floating_point():
                parameter.abs_().requires_grad_(True)
    for module in copied.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            module.reset_running_stats()
    return copied


def flow(linear: nn.Module, keep: Mapping[str, Tensor], batch: Any, forward: Forward) -> dict[str, Tensor]:
    """The scores of `synflow_scores` in a model that `positive` made, whose masked weights become zero."""
    tensors = named_tensors(linear)
    with torch.no_grad():
        for name, kept in keep.items():
            tensors[name].mul_(kept)
    linear.zero_grad(set_to_none=True)
    with torch.enable_grad():
        output = logits_of(forward(linear, tree_map_only(Tensor, _ones, batch)))
        if output is None:
            raise InputError("synflow sums the model's output: it must be a tensor, or have logits.")
        torch.autograd.backward(output.sum())
    found = {}
    for name in keep:
        gradient = tensors[name].grad
        found[name] = torch.zeros_like(tensors[name]) if gradient is None else gradient * tensors[name].detach()
        if not torch.isfinite(found[name]).all():
            raise InputError(
                f"synflow: the flow through {name!r} is not finite, even in float64; is the model too deep?"
            )
    return found


def _ones(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor[:1].cpu() if tensor.dim() else tensor.cpu()
    return torch.ones(1, *tensor.shape[1:], dtype=torch.float64)
