"""Criteria on weights alone."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.coupling.groups import Group
from secateur.evidence import Evidence


def l1(group: Group, evidence: Evidence) -> Tensor:
    """Sum of absolute weights of each filter, averaged over the layers that make the channel.

    Source: Li 2017, arXiv 1608.08710, section 3.1.
    """
    return _filter_norm(group, evidence, 1)


def l2(group: Group, evidence: Evidence) -> Tensor:
    """Euclidean norm of each filter, averaged over the layers that make the channel.

    Source: He 2018, arXiv 1808.06866, equation 2 with p = 2.
    """
    return _filter_norm(group, evidence, 2)


def bn_scale(group: Group, evidence: Evidence) -> Tensor:
    """Absolute BatchNorm scale, averaged over the norms of the group; the filters' L2 norm where it has none.

    Source: Liu 2017, arXiv 1708.06519, without its penalty in training.
    """
    scales = [evidence.rows(slot).abs().mean(1) for slot in group.slots if slot.role == "scale"]
    return torch.stack(scales).mean(0) if scales else l2(group, evidence)


def _filter_norm(group: Group, evidence: Evidence, order: int) -> Tensor:
    slots = group.outputs or group.slots  # a group of bare parameters has no producing layer
    return torch.stack([evidence.norms(slot, order) for slot in slots]).mean(0)
