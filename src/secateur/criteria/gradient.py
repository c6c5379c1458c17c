"""Criteria on gradients: the first-order effect of removing a channel on the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.coupling.groups import Group
from secateur.errors import InputError
from secateur.evidence import Evidence


def taylor(group: Group, evidence: Evidence) -> Tensor:
    """|gradient x activation|, its mean over positions taken first, averaged over samples, L2-normalised per group.

    Theta_k = mean over samples of |mean over positions of dL/da * a|, then Theta / sqrt(sum Theta^2): without that
    layers do not compare. a is read where the next layers read it.
    Source: Molchanov 2017, arXiv 1611.06440, equation 8 and section 2.2 (normalisation).
    """
    effect = evidence.activations(group, "taylor", per="taylor_samples")
    length: Tensor = torch.linalg.vector_norm(effect)
    return effect / length.clamp_min(torch.finfo(effect.dtype).tiny)


taylor.needs = ("activation_gradient",)  # type: ignore[attr-defined]  # functions take attributes
taylor.raw = True  # type: ignore[attr-defined]


def taylor_fo(group: Group, evidence: Evidence) -> Tensor:
    """Squared first-order change of the loss when a filter goes, per batch, then averaged.

    Raises InputError for evidence that was gathered without the group's graph.
    Source: Molchanov 2019, arXiv 1906.10771, equation 8: (sum over the filter of gradient x weight) squared.
    """
    total = evidence.of("taylor_fo", group.name)
    if total is None:
        raise InputError(f"this evidence knows no group {group.name!r}: pass `observe` the graph that is scored.")
    return total / evidence.batches


taylor_fo.needs = ("gradient",)  # type: ignore[attr-defined]
