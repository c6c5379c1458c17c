"""evaluate(): how good a model is on data, leaving it exactly as it was."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.batches import (
    Forward,
    Loss,
    default_forward,
    default_loss,
    labels_of,
    logits_of,
    move,
    size_of,
    usable_device,
)
from secateur.errors import DataError
from secateur.inputs import private_copy


@dataclass(frozen=True)
class Metrics:
    """What `evaluate` found."""

    accuracy: float  # fraction of samples whose largest logit is at their label; nan where there are none to compare
    loss: float  # mean over samples
    samples: int

    def __str__(self) -> str:
        return f"accuracy {self.accuracy:.2%}, loss {self.loss:.4f} on {self.samples:,} samples"


def evaluate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
) -> Metrics:
    """Accuracy and mean loss of a model over batches, in eval mode and without gradients.

    Args:
        model: is not changed; every submodule is in the mode it was in when the call returns or raises.
        data: batches; `(x, y)` pairs and Mappings with labels are understood, others need `forward` and `loss`.
        device: where to compute; default where the model is. Elsewhere, a copy of the model is used.
        forward: (model, batch) -> output.
        loss: (output, batch) -> scalar tensor, the mean over the batch.

    Raises:
        DataError: the data holds no batch.
    """
    where = _device_of(model) if device is None else usable_device(device)
    runner = model if where == _device_of(model) else private_copy(model).to(where)
    run, cost = forward or default_forward, loss or default_loss
    total = Tally()
    with in_eval_mode(runner), torch.no_grad():
        for batch in data:
            here = move(batch, where)
            output = run(runner, here)
            total.add(output, here, cost(output, here))
    if not total.samples:
        raise DataError("the data to evaluate on holds no batch (was it an iterator that has been read?).")
    return total.metrics()


class Tally:
    """Running sums over batches; they stay on the device, so that adding does not wait for it."""

    def __init__(self) -> None:
        self.samples = 0
        self.compared = 0
        self.loss: Tensor | float = 0.0
        self.hits: Tensor | int = 0

    def add(self, output: Any, batch: Any, loss: Tensor) -> None:
        """Count one batch and its mean loss."""
        size = size_of(batch)
        self.samples += size
        cost = loss.detach()
        # float64 sums; Apple's GPUs have none, so there the value is fetched
        self.loss = self.loss + (float(cost) if cost.device.type == "mps" else cost.double()) * size
        logits, labels = logits_of(output), labels_of(batch)
        if logits is not None and labels is not None and logits.dim() == 2 and labels.shape == logits.shape[:1]:
            self.compared += len(labels)
            self.hits = self.hits + (logits.detach().argmax(1) == labels).sum()

    def metrics(self) -> Metrics:
        """The means so far."""
        accuracy = int(self.hits) / self.compared if self.compared else math.nan
        return Metrics(accuracy, float(self.loss) / max(self.samples, 1), self.samples)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is in eval mode; afterwards every submodule is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _device_of(model: nn.Module) -> torch.device:
    tensor = next(iter([*model.parameters(), *model.buffers()]), None)
    return torch.device("cpu") if tensor is None else tensor.device
