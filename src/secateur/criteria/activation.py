"""Criteria on activations. They read a channel where the next layers read it, behind norm and nonlinearity.

Where no layer reads it directly, they read what its own layer makes (`Evidence.activations`).
"""

from __future__ import annotations

from torch import Tensor

from secateur.coupling.groups import Group
from secateur.evidence import Evidence


def output_norm(group: Group, evidence: Evidence) -> Tensor:
    """Mean over samples of the L2 norm of the channel's map, where the next layers read it.

    Source: Lajic, Peer and Emersic, "Exploring the differences in pruning methods for CNNs" (one-shot form).
    """
    return evidence.activations(group, "norm", per="samples")


def output_norm_pre(group: Group, evidence: Evidence) -> Tensor:
    """Mean over samples of the L2 norm of the channel's map as its layer makes it, before any norm.

    Source: Lajic, Peer and Emersic, "Exploring the differences in pruning methods for CNNs" (one-shot form).
    """
    return evidence.activations(group, "norm", per="samples", side="output")


def activation_mean(group: Group, evidence: Evidence) -> Tensor:
    """Mean absolute activation over samples and positions.

    Source: Molchanov 2017, arXiv 1611.06440, section 2.2 (activation).
    """
    return evidence.activations(group, "absolute")


def apoz(group: Group, evidence: Evidence) -> Tensor:
    """One less the average percentage of zeros: the fraction of samples and positions at which the channel is not zero.

    Source: Hu 2016, arXiv 1607.03250, equation 1.
    """
    return 1 - evidence.activations(group, "zeros")


def activation_variance(group: Group, evidence: Evidence) -> Tensor:
    """Variance of the activation over samples and positions: a channel that never changes is as good as a bias.

    Var = E[a^2] - E[a]^2 where each layer reads the channel, then averaged. The mean belongs into that layer's bias:
    `repair` puts it there ("fold", and with it "least_squares"), which is exact for a variance of zero.
    Source: Polyak and Wolf 2015, doi 10.1109/ACCESS.2015.2494536 (inbound pruning).
    """
    return evidence.activations(group, "variance")


for _criterion in (output_norm, output_norm_pre, activation_mean, apoz, activation_variance):
    _criterion.needs = ("activation",)  # type: ignore[attr-defined]  # functions take attributes
