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
    OwnRMSNorm: "weight",
    OwnLayerNorm: "gain",
    ResponseNorm: "gamma",
}


def zeroed(model: nn.Module, plan: Plan) -> nn.Module:
    """`model` with what the plan cuts set to zero; norms over a width that shrinks see its live channels alone."""
    result = zeroed_by_hand(model, plan)
    weights = {cut.tensor: cut for cut in plan.cuts}
    for name, module in list(result.named_modules()):
        cut = weights.get(f"{name}.{NORMS.get(type(module), '')}")
        if cut is not None:
            owner, _, own_name = name.rpartition(".")
            setattr(result.get_submodule(owner), own_name, LiveNorm(module, torch.tensor(cut.kept)))
    return result


class LiveNorm(nn.Module):
    """A norm over the live channels alone; zero in the place of the others."""

    def __init__(self, norm: nn.Module, live: Tensor) -> None:
        super().__init__()
        self.norm, self.live = copy.deepcopy(norm), live
        self.eps = float("nan")  # equal to no other: the library's layers take no short cut past this module
        self.dim = 1 if isinstance(norm, ResponseNorm) else -1
        for name, tensor in list(self.norm.named_parameters()):
            setattr(self.norm, name, nn.Parameter(tensor.detach().index_select(self.dim, live)))
        if isinstance(self.norm, (nn.LayerNorm, nn.RMSNorm)):
            self.norm.normalized_shape = (len(live),)

    def forward(self, x: Tensor) -> Tensor:
        narrow = self.norm(x.index_select(self.dim, self.live))
        return torch.zeros_like(x).index_copy(self.dim, self.live, narrow)


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
