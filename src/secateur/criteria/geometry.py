"""Criteria on how filters lie to one another."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.coupling.groups import Group
from secateur.evidence import Evidence


def fpgm(group: Group, evidence: Evidence) -> Tensor:
    """Sum of a filter's Euclidean distances to the others of its layer: the most replaceable lie in the middle.

    g_i = sum over j of ||F_i - F_j||_2, averaged over the layers that make the channel.
    Source: He 2019, arXiv 1811.00250, equation 6.
    """
    slots = group.outputs or group.slots
    distances = []
    for slot in slots:
        rows = evidence.rows(slot)
        distances.append(torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").sum(1))
    return torch.stack(distances).mean(0)
