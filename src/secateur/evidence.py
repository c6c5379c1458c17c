"""Evidence: what criteria may know of a model, gathered in one streaming pass over the data."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from secateur.batches import Forward, Loss, default_forward, default_loss, move
from secateur.coupling.groups import Graph, Group, Slot
from secateur.errors import DataError, InputError, UnknownNameError
from secateur.inputs import check_model, check_weights, private_copy
from secateur.plans import check_shapes, named_tensors, tensor_shapes

NEEDS = ("gradient",)


@dataclass(frozen=True, eq=False)
class Evidence:
    """Weights always; statistics of the data where they were asked for. Statistics of disjoint data can be merged."""

    tensors: Mapping[str, Tensor]  # every parameter and buffer, detached
    taylor: Mapping[str, Tensor] = field(default_factory=dict)  # group -> (channels,); see `observe`
    batches: int = 0
    seed: int = 0  # for criteria that draw

    def merge(self, other: Evidence) -> Evidence:
        """The evidence of both passes together, as if one pass had seen all batches."""
        total = self.batches + other.batches
        if self.taylor.keys() != other.taylor.keys():
            raise InputError("cannot merge evidence of different models, or gathered for different needs.")
        merged = {
            name: (mine * self.batches + other.taylor[name] * other.batches) / total
            for name, mine in self.taylor.items()
        }
        return replace(self, taylor=merged, batches=total)

    def rows(self, slot: Slot) -> Tensor:
        """(channels, k): all entries of the slot's tensor that belong to each channel, in float32 at least."""
        tensor = self.tensors[slot.tensor]
        rows = tensor.movedim(slot.dim, 0)[torch.as_tensor(slot.indices, device=tensor.device)]  # (channels, k, ...)
        rows = rows.flatten(1)  # the k positions fold in: a block of channels is judged as one
        return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows

    def norms(self, slot: Slot, order: int) -> Tensor:
        """(channels,): the norm of each row of `rows(slot)`, taken where the tensor lies."""
        tensor = self.tensors[slot.tensor]
        others = [dim for dim in range(tensor.dim()) if dim != slot.dim]
        dtype = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
        each: Tensor = torch.linalg.vector_norm(tensor, order, others, dtype=dtype) if others else tensor.to(dtype)
        rows: Tensor = each[torch.as_tensor(slot.indices, device=tensor.device)].norm(p=order, dim=1)
        return rows


@torch.inference_mode(False)
def observe(
    model: nn.Module,
    graph: Graph,
    data: Iterable[Any] | None = None,
    needs: Collection[str] = (),
    *,
    forward: Forward | None = None,
    loss: Loss | None = None,
) -> Evidence:
    """Gather what criteria need; the model is copied, run in eval mode and left as it was.

    `needs`: "gradient" fills `taylor[group]`, the mean over batches of (sum over a channel's output weights of
    gradient x weight) squared, averaged over the layers that make the channel (Molchanov 2019, arXiv 1906.10771,
    equation 8). `data`: batches, as `forward(model, batch)` and `loss(output, batch)` take them; the defaults serve
    (x, y) pairs and Mappings. Raises InputError where a need has no data, DataError for data without batches or with a
    loss that is no number.
    """
    check_model(model)
    check_shapes(tensor_shapes(model), graph.shapes, "the model", "the graph")
    for need in needs:
        if need not in NEEDS:
            raise UnknownNameError("need", need, NEEDS)
    tensors = {name: tensor.detach() for name, tensor in named_tensors(model).items()}
    check_weights(model)
    if not needs:
        return Evidence(tensors)
    if not isinstance(data, Iterable):
        raise InputError(f"evidence {', '.join(needs)} comes from data: pass data=, an iterable of batches.")
    taylor, batches = _gradient_pass(model, graph, data, forward or default_forward, loss or default_loss)
    return Evidence(tensors, taylor, batches)


def _gradient_pass(
    model: nn.Module, graph: Graph, data: Iterable[Any], forward: Forward, loss: Loss
) -> tuple[dict[str, Tensor], int]:
    private = private_copy(model).eval()
    parameters = dict(private.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(parameter.is_floating_point())
    device = next(iter(parameters.values())).device
    sums = {group.name: torch.zeros(group.channels, dtype=torch.float64, device=device) for group in graph.prunable}
    batches = 0
    for raw in data:
        batch = tree_map_only(Tensor, _usable, move(raw, device))
        with torch.enable_grad():
            value = loss(forward(private, batch), batch)
        if not isinstance(value, Tensor) or value.dim() != 0:
            got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"loss(output, batch) must return a scalar tensor; got {got}.")
        if not torch.isfinite(value):
            raise DataError(f"the loss is {value.item()} on batch {batches}: check the data for NaN or infinity.")
        if not value.requires_grad:
            raise InputError("the loss does not depend on the model's parameters: it has no gradient.")
        private.zero_grad(set_to_none=True)
        torch.autograd.backward(value)
        for group in graph.prunable:
            sums[group.name] += _taylor(group, parameters)
        batches += 1
    if batches == 0:
        raise DataError("the data holds no batch; an exhausted generator? Pass something that can be iterated.")
    return {name: (total / batches).cpu() for name, total in sums.items()}, batches


def _usable(tensor: Tensor) -> Tensor:
    """Autograd does not take part in what was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


def _taylor(group: Group, parameters: Mapping[str, Tensor]) -> Tensor | float:
    """(channels,): the squared first-order effect of removing each channel, on this batch."""
    effects = []
    for slot in group.outputs:
        weight = parameters.get(slot.tensor)
        if weight is not None and weight.grad is not None:
            products = (weight.grad * weight.detach()).movedim(slot.dim, 0)[torch.as_tensor(slot.indices)]
            effects.append(products.flatten(1).double().sum(1).square())
    return torch.stack(effects).mean(0) if effects else 0.0
