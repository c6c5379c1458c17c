"""Criteria on second derivatives: the second-order effect of removing a channel on the loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from secateur.coupling.groups import Group, Slot
from secateur.errors import InputError
from secateur.evidence import Evidence


def obd(group: Group, evidence: Evidence) -> Tensor:
    """Sum over the filter of 1/2 * F * w^2, F the mean over samples of the squared gradient (the empirical Fisher).

    Averaged over the layers that make the channel.
    Source: LeCun, Denker and Solla 1989, "Optimal Brain Damage", equation 5, with the Fisher for the Hessian.
    """

    def effect(slot: Slot, fisher: Tensor) -> Tensor:
        mean = fisher / evidence.samples
        weight = evidence.tensors[slot.tensor].detach().to(mean)
        return evidence.entries(slot, mean * weight.square() / 2).sum(1)

    return _averaged(group, evidence, "fisher", effect)


obd.needs = ("fisher",)  # type: ignore[attr-defined]  # functions take attributes


def hessian(group: Group, evidence: Evidence) -> Tensor:
    """Mean curvature of the filter's weights times its squared norm: trace(H_block) / (2 p) * ||w||^2, p weights.

    The trace is Hutchinson's estimate. Averaged over the layers that make the channel; can be negative.
    Source: Yu 2022, arXiv 2101.08940, equation 7.
    """

    def effect(slot: Slot, diagonal: Tensor) -> Tensor:
        block = evidence.entries(slot, diagonal / evidence.batches)
        return block.mean(1) / 2 * evidence.norms(slot, 2).to(block).square()

    return _averaged(group, evidence, "hessian", effect)


hessian.needs = ("hessian",)  # type: ignore[attr-defined]


def _averaged(group: Group, evidence: Evidence, statistic: str, effect: Callable[[Slot, Tensor], Tensor]) -> Tensor:
    found = []
    for slot in group.outputs:
        total = evidence.of(statistic, slot.tensor)
        if total is not None:
            found.append(effect(slot, total))
    if not found:
        raise InputError(
            f"no layer call was seen to make the channels of group {group.name!r}: choose a criterion on weights, or "
            f"pass ignore= with its layers: {', '.join(group.layers)}."
        )
    return torch.stack(found).mean(0)
