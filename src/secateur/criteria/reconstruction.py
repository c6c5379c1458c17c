"""Criteria on what the next layer loses."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.coupling.groups import Group, Slot
from secateur.errors import InputError
from secateur.evidence import Evidence


def thinet(group: Group, evidence: Evidence) -> Tensor:
    """The order in which greedy removal disturbs the next layers least: the first to go has the lowest rank.

    With G[j, l] the sum over samples, positions and outputs of contribution of channel j x contribution of channel l to
    the next layer's pre-activation, the removed set T is grown by the channel that raises 1_T' G 1_T least. Several
    reading layers add up. What is left is fitted by `repair` ("least_squares"), the paper's second half.
    Source: Luo 2017, arXiv 1707.06342, equation 6 and algorithm 1, over all outputs instead of sampled ones.
    """
    shared = _contributions(group, evidence)
    ranks = torch.zeros(group.channels, dtype=torch.float64)
    cost = shared.diagonal().clone()  # what the objective grows by when a channel goes next
    for rank in range(group.channels):
        chosen = int(cost.argmin())
        ranks[chosen] = rank
        cost += 2 * shared[chosen]
        cost[chosen] = torch.inf
    ranks[shared.diagonal() <= 0] = 0  # channels that give nothing are equal, wherever they stand
    return ranks


thinet.needs = ("gram",)  # type: ignore[attr-defined]  # functions take attributes


def _contributions(group: Group, evidence: Evidence) -> Tensor:
    """(channels, channels): G, summed over the layers that read the group."""
    found = []
    for slot in group.slots:
        gram, rows = evidence.of("gram", slot.tensor), evidence.of("gram_rows", slot.tensor)
        if slot.role == "input" and gram is not None and rows is not None:
            found.append(_of_reader(slot, evidence.tensors[slot.tensor], gram / rows))
    if not found:
        raise InputError(
            f"no convolution or linear map was seen to read group {group.name!r}: choose another criterion, or pass "
            f"ignore= with its layers: {', '.join(group.layers)}."
        )
    return torch.stack(found).sum(0)


def _of_reader(slot: Slot, weight: Tensor, gram: Tensor) -> Tensor:
    matrix = (weight.T if slot.dim == 0 else weight.flatten(1)).detach().to(gram)  # (out, in * taps)
    parts = matrix.reshape(gram.shape[0], -1, gram.shape[1])  # of a grouped convolution
    products = (gram * (parts.transpose(1, 2) @ parts)).sum(0)  # (in * taps, in * taps)
    taps = products.shape[0] // slot.size
    blocks = products.reshape(slot.size, taps, slot.size, taps).sum((1, 3))
    indices = torch.as_tensor(slot.indices)  # (channels, k)
    return blocks[indices[:, :, None, None], indices[None, None]].sum((1, 3))
