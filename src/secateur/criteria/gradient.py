"""Criteria on gradients."""

from __future__ import annotations

from torch import Tensor

from secateur.coupling.groups import Group
from secateur.evidence import Evidence


def taylor_fo(group: Group, evidence: Evidence) -> Tensor:
    """Squared first-order change of the loss when a filter goes, per batch, then averaged.

    Source: Molchanov 2019, arXiv 1906.10771, equation 8: (sum over the filter of gradient x weight) squared.
    """
    return evidence.sums["taylor_fo"][group.name] / evidence.batches


taylor_fo.needs = ("gradient",)  # type: ignore[attr-defined]  # functions take attributes
