"""Distillation: a loss for `fit` by which a model also learns from a teacher's answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.batches import Forward, Loss, default_forward, default_loss, first_tensor, labels_of, logits_of
from secateur.errors import InputError
from secateur.inputs import private_copy

IGNORED_LABEL = -100  # what torch's cross-entropy leaves out


def distillation(
    teacher: nn.Module,
    temperature: float = 4.0,
    weight: float = 0.9,
    loss: Loss | None = None,
    *,
    forward: Forward | None = None,
) -> Loss:
    """A loss for `fit(loss=...)` by which a model also learns from a teacher's soft answers.

    (1 - weight) * loss(output, batch) + weight * T^2 * KL(softmax(teacher / T) || softmax(student / T)), the divergence
    being a mean over samples, and over positions where there are several; positions labelled -100 do not count. Classes
    are dimension 1 of the logits for (x, y) batches, as in cross-entropy, and the last one for Mappings.

    Args:
        teacher: copied as it is now, and run in eval mode without gradients on every batch; never changed.
        temperature: T; the higher, the more the ranking of wrong classes counts.
        weight: of the teacher, in [0, 1]; at 1 batches need no labels.
        loss: the task's, (output, batch) -> scalar; default as in `fit`. Label smoothing belongs in it.
        forward: (teacher, batch) -> output; default as in `fit`.

    Raises InputError for settings out of range; when it is called, also for outputs without logits, and for logits of
    another shape than the teacher's.

    Source: Hinton 2015, arXiv 1503.02531, section 2.
    """
    if isinstance(temperature, bool) or not 0 < temperature < math.inf:
        raise InputError(f"temperature is above 0; got {temperature!r}.")
    if isinstance(weight, bool) or not 0 <= weight <= 1:
        raise InputError(f"weight is the teacher's part of the loss, in [0, 1]; got {weight!r}.")
    own, task, run = (
        private_copy(teacher).eval().requires_grad_(False),
        loss or default_loss,
        forward or default_forward,
    )

    def distilled(output: Any, batch: Any) -> Tensor:
        hard = task(output, batch) if weight < 1 else torch.zeros(())
        if weight == 0:
            return hard
        student = _logits(output, "the student")
        with torch.no_grad():
            answer = _logits(run(_moved_(own, batch), batch), "the teacher")
        if answer.shape != student.shape:
            raise InputError(
                f"the teacher's logits have shape {list(answer.shape)}, the student's {list(student.shape)}: "
                "a teacher must know the same classes."
            )
        soft = _divergence(student / temperature, answer / temperature, batch)
        return (1 - weight) * hard.to(soft.device) + weight * temperature**2 * soft

    return distilled


def _divergence(student: Tensor, teacher: Tensor, batch: Any) -> Tensor:
    """KL(teacher || student) of logits, in float32 at least, averaged over everything but the classes."""
    classes = -1 if isinstance(batch, Mapping) or student.dim() < 2 else 1
    wide = torch.promote_types(student.dtype, torch.float32)
    theirs, ours = (F.log_softmax(logits.to(wide), classes, dtype=wide) for logits in (teacher, student))
    each = F.kl_div(ours, theirs.exp(), reduction="none").sum(classes)
    labels = labels_of(batch)
    if labels is None or labels.is_floating_point() or labels.shape != each.shape:
        return each.mean()
    counted = labels != IGNORED_LABEL
    return torch.where(counted, each, 0).sum() / counted.sum().clamp(min=1)


def _logits(output: Any, whose: str) -> Tensor:
    found = logits_of(output)
    if found is None:
        raise InputError(
            f"the output of {whose} is {type(output).__name__}, not a tensor of logits and without a field `logits`: "
            "let forward= return the logits."
        )
    return found


def _moved_(model: nn.Module, batch: Any) -> nn.Module:
    """The model itself, on the batch's device."""
    tensor, parameter = first_tensor(batch), next(model.parameters(), None)
    if tensor is not None and parameter is not None and parameter.device != tensor.device:
        model.to(tensor.device)
    return model
