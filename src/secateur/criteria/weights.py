"""Criteria on single weights: (name of the weight, evidence) -> one score per entry, higher means keep.

Each says with which scopes it makes sense, the default first: `layer`, `global`, or `row` (the weights of one output).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from secateur.errors import InputError
from secateur.evidence import Evidence

WeightCriterion = Callable[[str, Evidence], Tensor]
WEIGHT_CRITERIA: dict[str, WeightCriterion] = {}
SCOPES = ("global", "layer", "row")
C = TypeVar("C", bound=WeightCriterion)


def _entered(*scopes: str, needs: tuple[str, ...] = (), biases: bool = False) -> Callable[[C], C]:
    def enter(function: C) -> C:
        function.needs, function.scopes, function.biases = needs, scopes, biases  # type: ignore[attr-defined]
        WEIGHT_CRITERIA[function.__name__] = function
        return function

    return enter


@_entered("layer", "global", "row", biases=True)
def random(name: str, evidence: Evidence) -> Tensor:
    """Uniform in [0, 1), drawn per tensor from the evidence's seed: the mandatory baseline.

    Source: Frankle and Carbin 2019, arXiv 1803.03635, section 2 (random masks as the control).
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{evidence.seed}:{name}".encode()))
    return torch.rand(evidence.tensors[name].shape, generator=generator)


@_entered("global", "layer", "row", biases=True)
def magnitude(name: str, evidence: Evidence) -> Tensor:
    """|w|. Scope "global" has one threshold for all layers, "layer" the same fraction in each.

    Source: Han 2015, arXiv 1506.02626, section 3.
    """
    return _wide(evidence.tensors[name]).abs()


@_entered("row")
def hybrid(name: str, evidence: Evidence) -> Tensor:
    """|w|, the same quantile in every filter: unstructured inside a fixed share of each.

    Source: Batra, Das and Xu, "Exploring Large Convolutional Network Pruning" (hybrid method).
    """
    return magnitude(name, evidence)


@_entered("row", "layer", needs=("input_norm",))
def wanda(name: str, evidence: Evidence) -> Tensor:
    """|w| times the L2 norm, over the data, of the input that meets it; compared within each output row.

    For convolutions by unfolding: the norm is that of one channel at one tap of the kernel. Transposed convolutions
    take the norm of the channel.
    Source: Sun 2023, arXiv 2306.11695, equation 1.
    """
    squares = _seen(evidence, "taps", name) / _seen(evidence, "taps_samples", name)
    return _wide(evidence.tensors[name]).abs() * squares.sqrt().to(evidence.tensors[name].device)


@_entered("global", "layer", "row", needs=("fisher",))
def obd(name: str, evidence: Evidence) -> Tensor:
    """1/2 * F * w^2, with F the mean over samples of the squared gradient (the empirical Fisher).

    Source: LeCun, Denker and Solla 1989, "Optimal Brain Damage", equation 5, with the Fisher for the Hessian.
    """
    fisher = _seen(evidence, "fisher", name) / evidence.samples
    return fisher.to(evidence.tensors[name].device) * _wide(evidence.tensors[name]).double().square() / 2


@_entered("global", "layer", "row", needs=("gradient",))
def snip(name: str, evidence: Evidence) -> Tensor:
    """|gradient x weight|, the gradient averaged over all batches: how much the loss minds the weight's scale.

    Source: Lee 2019, arXiv 1810.02340, equation 6 (without its normalising constant, which changes no ranking).
    """
    gradient = _seen(evidence, "gradient", name) / evidence.batches
    return (gradient.to(evidence.tensors[name].device) * _wide(evidence.tensors[name])).abs()


@_entered("global")
def lamp(name: str, evidence: Evidence) -> Tensor:
    """w^2 over the sum of the squares of all weights of the layer that are at least as large, ranked globally.

    The largest weight of a layer has score 1, so no layer empties. Weights already removed are zero and count nothing.
    Source: Lee 2021, arXiv 2010.07611, equation 4.
    """
    squares = _wide(evidence.tensors[name]).double().square().flatten()
    ascending, order = squares.sort(stable=True)
    total = ascending.flip(0).cumsum(0).flip(0)
    total = total[torch.searchsorted(ascending, ascending)]  # equal weights share the sum over all of them
    shares = torch.zeros_like(squares)
    shares[order] = ascending / total.clamp_min(torch.finfo(squares.dtype).tiny)
    return shares.reshape(evidence.tensors[name].shape)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _seen(evidence: Evidence, statistic: str, name: str) -> Tensor:
    found = evidence.of(statistic, name)
    if found is None:
        raise InputError(
            f"no call of {name!r} was seen in the forward passes: leave it out with ignore=, or check that the model "
            "uses it on this data."
        )
    return found
