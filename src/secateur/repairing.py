"""Recovery without gradients. In this version: BatchNorm statistics, measured anew on the shrunk model."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import nn

from secateur.batches import Forward, default_forward, move
from secateur.errors import DataError, InputError
from secateur.inputs import check_model, private_copy


@torch.inference_mode(False)
def repair(small: nn.Module, data: Iterable[Any], *, forward: Forward | None = None, batches: int = 100) -> nn.Module:
    """A copy of `small` whose BatchNorm statistics are the exact averages over up to `batches` batches of `data`.

    Removing channels shifts what later layers see; their old statistics no longer fit (EagleEye, arXiv 2007.02491).
    Pass training data, augmented as in training. Only BatchNorm runs in training mode; no gradient is computed. A model
    without BatchNorm comes back as an equal copy. Raises DataError for data without a batch.
    """
    check_model(small)
    if not isinstance(data, Iterable):
        raise InputError(f"data is an iterable of batches; got {type(data).__name__}.")
    if batches < 1:
        raise InputError(f"batches is how many batches to average over, at least 1; got {batches}.")
    repaired = private_copy(small)
    norms = _batch_norms(repaired)
    if not norms:
        return repaired
    modes = [(module, module.training) for module in repaired.modules()]
    momenta = [norm.momentum for norm in norms]
    repaired.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
        norm.train()
    run = forward or default_forward
    device = next(repaired.parameters()).device
    seen = 0
    with torch.no_grad():
        for batch in islice(data, batches):
            run(repaired, move(batch, device))
            seen += 1
    if seen == 0:
        raise DataError("the data holds no batch; an exhausted generator? Pass something that can be iterated.")
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for module, mode in modes:
        module.training = mode
    return repaired


def repairable(model: nn.Module) -> bool:
    """Whether there is anything that `repair` would measure anew."""
    return bool(_batch_norms(model))


def _batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    return [norm for norm in norms if norm.track_running_stats]
