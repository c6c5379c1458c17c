"""The bench: what every step of a trial needs, in one place; and the stages a model goes through on it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from secateur.batches import default_loss
from secateur.plans import Plan
from secateur.recovery import distillation, equal_budget
from secateur.study.dense import Trained, Workplace, accuracy
from secateur.study.results import Point, points
from secateur.study.tasks import Task
from secateur.study.trials import Trial
from secateur.training import fit
from secateur.training.distilling import with_hidden_states


@dataclass(eq=False)
class Bench:
    """What every step of a trial needs, and the curve that its trainings write."""

    trial: Trial
    place: Workplace
    task: Task
    dense: Trained
    folder: Path
    calibration: list[Any]
    curve: list[Point] = field(default_factory=list)
    seconds_before: float = 0.0  # of epochs that were there already, from a run that was interrupted

    @property
    def example(self) -> Any:
        """Inputs for a network: one validation sample."""
        return self.task.example(1, self.trial.latency.lengths[-1])

    def test(self, model: nn.Module) -> float:
        """Test accuracy."""
        return accuracy(model, self.task, "test", self.place.device, self.trial.training)

    def train(
        self, model: nn.Module, stage: str, epochs: int, hooks: Sequence[object] = (), own: bool = False
    ) -> nn.Module:
        """The model after so many epochs of fine-tuning, or with `own` those and the dense model's, by its recipe."""
        if not epochs:
            return model
        trial = self.trial
        recipe = trial.tuning.recipe(trial.seed, epochs)
        if own:
            recipe = equal_budget(trial.training.recipe(trial.seed), recipe)
        loss = forward = None
        if trial.method.distillation is not None and not own:
            how, task = trial.method.distillation, partial(default_loss, label_smoothing=recipe.label_smoothing)
            teacher = self.dense.model
            forward = with_hidden_states if how.hidden else None
            loss = distillation(teacher, how.temperature, how.weight, task, hidden=how.hidden, forward=forward)
            recipe = replace(recipe, label_smoothing=0.0)
        start = time.perf_counter()
        fitted = fit(
            model,
            self.task.training(trial.training if own else trial.tuning, trial.seed, self.place.device),
            recipe,
            device=self.place.device,
            forward=forward,
            loss=loss,
            hooks=hooks,
            checkpoint=self.folder / f"{stage}.pt",
            progress=False,
        )
        epochs_took = sum(epoch.seconds for epoch in fitted.history)
        self.seconds_before += max(0.0, epochs_took - (time.perf_counter() - start))
        self.curve += points(stage, fitted.history)
        return fitted.model.cpu()


@dataclass(frozen=True, eq=False)
class Stages:
    """A model on its way: straight after the last pruning, repaired, and fine-tuned."""

    cut: nn.Module
    repaired: nn.Module | None
    tuned: nn.Module
    plan: Plan | None = None  # from the dense model
    difference: float | None = None  # the worst of the verifications
    before: int = 0  # epochs before the last pruning
