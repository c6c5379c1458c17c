"""SparseGPT: weights go column by column, and those that are left make up for each of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

COLUMNS = 128  # that choose their zeros together
DAMPING = 0.01  # times the mean of the Hessian's diagonal


def sparsegpt_rows(
    weight: Tensor, gram: Tensor, fraction: float, pattern: tuple[int, int] | None = None, gone: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Prune by the second-order error with true weight updates: new weights and mask, both (out, in / groups, taps).

    In a sweep from left to right, removing w_q costs w_q^2 / U_qq^2, with U the upper Cholesky factor of the inverse
    Hessian, and the weights to its right change by -w_q / U_qq * U_q. Every 128 columns choose their share of zeros, or
    every group of m; layers go in order of execution, each on inputs from the pruned ones before it.

    `gram`: (groups, in / groups * taps, the same), the second moments of the inputs. `fraction` of each block of
    columns goes, or with `pattern` (n, m) all but n of m consecutive inputs. `gone`: entries that are zero already.
    Source: Frantar and Alistarh 2023, arXiv 2301.00774, algorithm 1.
    """
    outputs, inputs, taps = weight.shape
    groups = gram.shape[0]
    gone = torch.zeros(weight.shape, dtype=torch.bool) if gone is None else gone
    by_tap = torch.arange(inputs * taps).reshape(inputs, taps).T.flatten()  # so that an n:m group is of one tap
    new = torch.empty(outputs, inputs * taps, dtype=torch.float64)
    kept = torch.empty(outputs, inputs * taps, dtype=torch.bool)
    per = outputs // groups
    for group in range(groups):
        rows = slice(group * per, (group + 1) * per)
        matrix = weight[rows].flatten(1)[:, by_tap].double()
        hessian = gram[group][by_tap][:, by_tap].double()
        swept, mask = _swept(matrix, hessian, fraction, pattern, gone[rows].flatten(1)[:, by_tap])
        new[rows] = swept[:, by_tap.argsort()]
        kept[rows] = mask[:, by_tap.argsort()]
    return new.reshape(weight.shape), kept.reshape(weight.shape)


def _swept(
    matrix: Tensor, hessian: Tensor, fraction: float, pattern: tuple[int, int] | None, gone: Tensor
) -> tuple[Tensor, Tensor]:
    matrix, (rows, columns) = matrix.clone(), matrix.shape
    factor = _inverse_factor(hessian)
    keep = torch.ones_like(matrix, dtype=torch.bool)
    width = COLUMNS if pattern is None else max(COLUMNS // pattern[1], 1) * pattern[1]
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        if pattern is None:
            cost = (matrix[:, start:stop] / factor.diagonal()[start:stop]).square()
            cost = cost.masked_fill(gone[:, start:stop], -math.inf)
            # cumulative, so that rounding down happens once per layer
            count = math.floor(fraction * rows * stop + 1e-9) - math.floor(fraction * rows * start + 1e-9)
            keep[:, start:stop] = _all_but_lowest(cost.reshape(1, -1), count).reshape(rows, -1)
        errors = torch.zeros(rows, stop - start, dtype=matrix.dtype)
        for column in range(start, stop):
            if pattern is not None and column % pattern[1] == 0:
                ahead = slice(column, column + pattern[1])
                cost = (matrix[:, ahead] / factor.diagonal()[ahead]).square().masked_fill(gone[:, ahead], -math.inf)
                keep[:, ahead] = _all_but_lowest(cost, pattern[1] - pattern[0])
            left = matrix[:, column] * (keep[:, column] & ~gone[:, column])
            error = (matrix[:, column] - left) / factor[column, column]
            matrix[:, column:stop] -= error[:, None] * factor[column, column:stop]
            matrix[:, column] = left
            errors[:, column - start] = error
        matrix[:, stop:] -= errors @ factor[start:stop, stop:]
    keep &= ~gone
    return matrix * keep, keep


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse. Inputs that are always zero stand alone."""
    dead = hessian.diagonal() <= 0
    hessian = hessian.clone()
    hessian.diagonal()[dead] = 1
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _all_but_lowest(costs: Tensor, count: int) -> Tensor:
    keep = torch.ones(costs.shape, dtype=torch.bool)
    return keep.scatter_(1, costs.argsort(dim=1, stable=True)[:, :count], False)
