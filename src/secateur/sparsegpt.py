"""SparseGPT: weights go column by column, and those that are left make up for each of them."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

import torch
from torch import Tensor

COLUMNS = 128  # that choose their zeros together
DAMPING = 0.01  # times the mean of the Hessian's diagonal


def sparsegpt_rows(
    weight: Tensor, gram: Tensor, fraction: float, pattern: tuple[int, int] | None = None, gone: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Prune by the second-order error with true weight updates: new weights and mask, both (out, in / groups, taps).

    In a sweep from left to right, removing w_q costs w_q^2 / U_qq^2, with U the upper Cholesky factor of the inverse
    Hessian, and the weights to its right change by -w_q / U_qq * U_q. Every 128 columns choose their share of zeros
    over all outputs, or every m columns theirs per output. A convolution's columns go tap by tap; grouped ones group by
    group. Layers go in order of execution, each on inputs from the pruned ones before it.

    `gram`: (groups, in / groups * taps, the same), the mean of the input's second moments; 0.01 of its mean diagonal is
    added to the diagonal. floor(`fraction` * n) of the n weights go, or with `pattern` (n, m) all but n of every m
    consecutive inputs at each tap; weights of inputs that were always zero cost nothing. `gone`: entries that are zero
    already; they count. The result is float64, on the weight's device.
    Source: Frantar and Alistarh 2023, arXiv 2301.00774, algorithm 1.
    """
    _, inputs, taps = weight.shape
    device = weight.device
    by_tap = (
        torch.arange(inputs * taps, device=device).reshape(inputs, taps).T.flatten()
    )  # so that an n:m group is of one tap
    matrix = weight.flatten(1)[:, by_tap].double()
    old = torch.zeros_like(matrix, dtype=torch.bool) if gone is None else gone.to(device).flatten(1)[:, by_tap]
    parts = zip(
        matrix.chunk(len(gram)), gram.to(device), old.chunk(len(gram)), _counts(old, len(gram), fraction), strict=True
    )
    swept = [
        _swept(part, hessian[by_tap][:, by_tap].double(), was, counts, pattern) for part, hessian, was, counts in parts
    ]
    back = by_tap.argsort()
    new, kept = (torch.cat(found)[:, back].reshape(weight.shape) for found in zip(*swept, strict=True))
    return new, kept


def _counts(gone: Tensor, groups: int, fraction: float) -> list[list[int]]:
    """How many entries go per group and block of columns: floor(fraction * n) in all, what is gone included.

    What is still to go is shared out by what is still there, rounded down cumulatively: no entry is lost to rounding.
    """
    blocks = [block for part in gone.chunk(groups) for block in torch.split(part, COLUMNS, dim=1)]
    before = [int(block.sum()) for block in blocks]
    there = [block.numel() - lost for block, lost in zip(blocks, before, strict=True)]
    more, ends = max(math.floor(fraction * gone.numel() + 1e-9) - sum(before), 0), [0, *accumulate(there)]
    shares = [more * end // max(ends[-1], 1) for end in ends]
    counts = [lost + stop - start for lost, (start, stop) in zip(before, pairwise(shares), strict=True)]
    per = len(blocks) // groups
    return [counts[group * per : (group + 1) * per] for group in range(groups)]


def _swept(
    matrix: Tensor, hessian: Tensor, gone: Tensor, counts: list[int], pattern: tuple[int, int] | None
) -> tuple[Tensor, Tensor]:
    """New weights and mask of one group, (out, columns); `counts` per block of columns."""
    matrix, (rows, columns) = matrix.clone(), matrix.shape
    factor = _inverse_factor(hessian)
    keep = torch.ones_like(matrix, dtype=torch.bool)
    width = COLUMNS if pattern is None else max(COLUMNS // pattern[1], 1) * pattern[1]
    every = width if pattern is None else pattern[1]  # columns that choose their zeros together
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        errors = matrix.new_zeros(rows, stop - start)
        for column in range(start, stop):
            if (column - start) % every == 0:
                ahead = slice(column, min(column + every, stop))
                costs = (matrix[:, ahead] / factor.diagonal()[ahead]).square() * (hessian.diagonal()[ahead] > 0)
                costs = costs.masked_fill(gone[:, ahead], -math.inf)
                if pattern is None:
                    costs, count = costs.reshape(1, -1), counts[start // width]
                else:
                    count = pattern[1] - pattern[0]
                keep[:, ahead] = _all_but_lowest(costs, count).reshape(rows, -1)
            left = matrix[:, column] * (keep[:, column] & ~gone[:, column])
            error = (matrix[:, column] - left) / factor[column, column]
            matrix[:, column:stop] -= error[:, None] * factor[column, column:stop]
            matrix[:, column] = left
            errors[:, column - start] = error
        matrix[:, stop:] -= errors @ factor[start:stop, stop:]  # the later blocks, all at once
    keep &= ~gone
    return matrix * keep, keep


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse. Inputs that were always zero stand alone."""
    dead = hessian.diagonal() <= 0
    hessian = hessian.clone()
    hessian.diagonal()[dead] = 1
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _all_but_lowest(costs: Tensor, count: int) -> Tensor:
    keep = torch.ones_like(costs, dtype=torch.bool)
    return keep.scatter_(1, costs.argsort(dim=1, stable=True)[:, :count], False)
