"""Distillation: a loss for `fit` by which a model also learns from a teacher's answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
    hidden: float = 0.0,
    forward: Forward | None = None,
) -> Loss:
    """A loss for `fit(loss=...)` by which a model also learns from a teacher's soft answers and its hidden states.

    (1 - weight) * loss(output, batch) + weight * T^2 * KL(softmax(teacher / T) || softmax(student / T)), the divergence
    being a mean over samples, and over positions where there are several; positions labelled -100 do not count. Classes
    are dimension 1 of the logits for (x, y) batches, as in cross-entropy, and the last one for Mappings. To this comes,
    with `hidden`, hidden * mean over layers of ||h_student - h_teacher||^2 / ||h_teacher||^2, norms over all
    that the batch's attention mask leaves in.

    Args:
        teacher: copied as it is now, and run in eval mode without gradients on every batch; never changed.
        temperature: T; the higher, the more the ranking of wrong classes counts.
        weight: of the teacher, in [0, 1]; at 1 batches need no labels.
        loss: the task's, (output, batch) -> scalar; default as in `fit`. Label smoothing belongs in it.
        hidden: of the hidden states, which both outputs must carry: pass `forward=with_hidden_states`, here and to
            `fit`. Widths must be the teacher's, so residual streams must not have shrunk.
        forward: (teacher, batch) -> output; default as in `fit`.

    Raises InputError for settings out of range; when it is called, also for outputs without logits or hidden states,
    and for some of another shape than the teacher's.

    Sources: Hinton 2015, arXiv 1503.02531, section 2; hidden states: Jiao 2020, arXiv 1909.10351, eq. 8, without a map
    in between and relative to the teacher's.
    """
    if isinstance(temperature, bool) or not 0 < temperature < math.inf:
        raise InputError(f"temperature is above 0; got {temperature!r}.")
    if isinstance(weight, bool) or not 0 <= weight <= 1:
        raise InputError(f"weight is the teacher's part of the loss, in [0, 1]; got {weight!r}.")
    if isinstance(hidden, bool) or not 0 <= hidden < math.inf:
        raise InputError(f"hidden multiplies the part of the hidden states, at least 0; got {hidden!r}.")
    own, task, run = (
        private_copy(teacher).eval().requires_grad_(False),
        loss or default_loss,
        forward or default_forward,
    )

    def distilled(output: Any, batch: Any) -> Tensor:
        hard = task(output, batch) if weight < 1 else torch.zeros(())
        if not weight and not hidden:
            return hard
        student = _logits(output, "the student")
        with torch.no_grad():
            taught = run(_moved_(own, batch), batch)
        answer = _logits(taught, "the teacher")
        if answer.shape != student.shape:
            raise InputError(
                f"the teacher's logits have shape {list(answer.shape)}, the student's {list(student.shape)}: "
                "a teacher must know the same classes."
            )
        soft = _divergence(student / temperature, answer / temperature, batch)
        total = (1 - weight) * hard.to(soft.device) + weight * temperature**2 * soft
        if not hidden:
            return total
        states = (_hidden(output, "the student"), _hidden(taught, "the teacher"))
        return total + hidden * _apart(*states, batch)

    return distilled


def with_hidden_states(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """`forward=` for models of `transformers` whose hidden states `distillation(hidden=...)` compares."""
    return model(**batch, output_hidden_states=True)


def _apart(student: Sequence[Tensor], teacher: Sequence[Tensor], batch: Any) -> Tensor:
    """How far hidden states are from the teacher's, relative to theirs: the mean over layers."""
    widths = [[list(state.shape) for state in states] for states in (student, teacher)]
    if widths[0] != widths[1]:
        raise InputError(
            f"hidden states have shapes {widths[0]}, the teacher's {widths[1]}: with hidden= the layers and the widths "
            "between them must be the teacher's, so do not prune the residual stream."
        )
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    parts = []
    for own, theirs in zip(student, teacher, strict=True):
        wide = torch.promote_types(own.dtype, torch.float32)
        gap, size = (own.to(wide) - theirs.to(wide)).square(), theirs.to(wide).square()
        if isinstance(mask, Tensor) and mask.shape == own.shape[:-1]:
            gap, size = gap * mask[..., None], size * mask[..., None]
        parts.append(gap.sum() / size.sum().clamp(min=torch.finfo(wide).tiny))
    return torch.stack(parts).mean()


def _hidden(output: Any, whose: str) -> tuple[Tensor, ...]:
    found = output.get("hidden_states") if isinstance(output, Mapping) else getattr(output, "hidden_states", None)
    if not isinstance(found, (tuple, list)) or not found:
        raise InputError(
            f"the output of {whose} carries no hidden states: pass forward=secateur.with_hidden_states here and to fit."
        )
    return tuple(found)


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
