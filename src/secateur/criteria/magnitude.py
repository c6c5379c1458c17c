"""Criteria on weights alone."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.coupling.groups import Group
from secateur.errors import InputError
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


def slimming(group: Group, evidence: Evidence) -> Tensor:
    """Absolute BatchNorm scale as it is, for a model trained with `GammaPenalty`: one threshold for all layers.

    With scope="global" and `sparsity` as the percentile of |gamma| over all channels. Averaged over the norms of the
    group. Raises InputError for a group without BatchNorm.
    Source: Liu 2017, arXiv 1708.06519, section 3.
    """
    scales = [evidence.rows(slot).abs().mean(1) for slot in group.slots if slot.role == "scale"]
    if not scales:
        raise InputError(f"group {group.name!r} has no BatchNorm scale: use 'bn_scale', which falls back to 'l2'.")
    return torch.stack(scales).mean(0)


slimming.raw = True  # type: ignore[attr-defined]  # functions take attributes
slimming.training = True  # type: ignore[attr-defined]


def group_norm(group: Group, evidence: Evidence) -> Tensor:
    """Sum of squares of all that is tied to a channel (what makes it, reads it, scales it), averaged over tensors.

    I_k = mean over the group's parameters of sum |w_k|^2; scope "global" divides by the group's mean.
    Source: Fang 2023, arXiv 2301.12900, equation 3.
    """
    slots = [slot for slot in group.slots if slot.tensor in evidence.parameters]
    return torch.stack([evidence.norms(slot, 2).square() for slot in slots]).mean(0)


def lamp(group: Group, evidence: Evidence) -> Tensor:
    """A filter's share of the squared norms of those at least as large: n_k^2 / sum of n_j^2 over n_j >= n_k.

    The largest of a group has score 1, so that no layer empties in scope "global". n is the filter's L2 norm; several
    producing layers are averaged.
    Source: Lee 2021, arXiv 2010.07611, equation 4, for channels instead of weights.
    """
    squares = _filter_norm(group, evidence, 2).square()
    ascending, order = squares.sort()
    total = ascending.flip(0).cumsum(0).flip(0)
    first = torch.searchsorted(ascending, ascending)  # of equal ones, the sum over all of them
    shares = ascending / total[first].clamp_min(torch.finfo(squares.dtype).tiny)
    return shares[order.argsort()]


lamp.raw = True  # type: ignore[attr-defined]


def _filter_norm(group: Group, evidence: Evidence, order: int) -> Tensor:
    slots = group.outputs or group.slots  # a group of bare parameters has no producing layer
    return torch.stack([evidence.norms(slot, order) for slot in slots]).mean(0)
