"""The reference for made-up nets, and comparisons, without a line of the package's own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from drawn_blocks import OwnLayerNorm, OwnRMSNorm, ResponseNorm
from nets_for_tests import outputs_of, zeroed_by_hand
from secateur.plans import Plan

# The norms of the nets, with the parameter that has the normalised width.
NORMS: dict[type[nn.Module], str] = {
    nn.LayerNorm: "weight",
    nn.RMSNorm: "weight",
    nn.GroupNorm: "weight",
    OwnRMSNorm: "weight",
    OwnLayerNorm: "gain",
    ResponseNorm: "gamma",
}


def zeroed(model: nn.Module, plan: Plan) -> nn.Module:
    """`model` with what the plan cuts set to zero; norms over a width that shrinks see its live channels alone."""
    result = zeroed_by_hand(model, plan)
    cuts = {cut.tensor: cut for cut in plan.cuts}
    for name, module in list(result.named_modules()):
        cut = cuts.get(f"{name}.{NORMS.get(type(module), '')}")
        if cut is not None:
            owner, _, own_name = name.rpartition(".")
            setattr(result.get_submodule(owner), own_name, LiveNorm(module, cut.kept))
    return result


class LiveNorm(nn.Module):
    """A norm over live channels alone, one part per group of a GroupNorm; zero in the place of the others."""

    def __init__(self, norm: nn.Module, live: tuple[int, ...]) -> None:
        super().__init__()
        self.eps = float("nan")  # equal to no other: the library's layers take no short cut past this module
        self.dim = 1 if isinstance(norm, (nn.GroupNorm, ResponseNorm)) else -1
        size = norm.num_channels // norm.num_groups if isinstance(norm, nn.GroupNorm) else live[-1] + 1
        groups = {place // size: [p for p in live if p // size == place // size] for place in live}
        self.parts = [(torch.tensor(places), narrowed(norm, torch.tensor(places))) for places in groups.values()]

    def forward(self, x: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        for places, norm in self.parts:
            result = result.index_copy(self.dim, places, norm(x.index_select(self.dim, places)))
        return result


def narrowed(norm: nn.Module, places: Tensor) -> nn.Module:
    """The norm of these channels, as one group."""
    norm = copy.deepcopy(norm)
    for name, tensor in list(norm.named_parameters()):
        dim = 1 if tensor.dim() > 1 else 0
        setattr(norm, name, nn.Parameter(tensor.detach().index_select(dim, places)))
    if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)):
        norm.normalized_shape = (len(places),)
    if isinstance(norm, nn.GroupNorm):
        norm.num_groups, norm.num_channels = 1, len(places)
    return norm


def outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    """All tensors of the output, in dicts, tuples, lists and dataclasses."""
    return list(_tensors(outputs_of(model, batch)))


def _tensors(part: Any) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        yield part
        return
    if isinstance(part, dict):
        part = list(part.values())
    for entry in part if isinstance(part, (list, tuple)) else vars(part).values():
        if entry is not None:
            yield from _tensors(entry)


def distance(left: list[Tensor], right: list[Tensor]) -> float:
    """The largest difference, relative to the largest entry of each output."""
    assert left and [a.shape for a in left] == [b.shape for b in right]
    assert all(torch.isfinite(a).all() for a in [*left, *right])
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-300)) for a, b in zip(left, right, strict=True))


def weights(model: nn.Module) -> list[tuple[str, tuple[int, ...], bytes, bool]]:
    """Every parameter and buffer, bit for bit."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [(name, tuple(t.shape), t.detach().numpy().tobytes(), t.requires_grad) for name, t in tensors]


def snapshot(model: nn.Module) -> list[Any]:
    """Everything of a model that could have been changed."""
    rest = [
        (name, key, repr(value))
        for name, module in model.named_modules()
        for key, value in sorted(vars(module).items())
        if key not in ("_parameters", "_buffers", "_modules", "_flat_weights", "_flat_weight_refs")
    ]
    return [*weights(model), *rest]


def shifted(kept: tuple[int, ...], size: int) -> tuple[int, ...] | None:
    """The same number of positions, one of them exchanged for a neighbour that was removed."""
    free = set(range(size)) - set(kept)
    for place in kept:
        for other in (place + 1, place - 1):
            if other in free:
                return tuple(sorted({*kept, other} - {place}))
    return None
