"""Networks of the studies as their trials cut them, before anything is repaired or fine-tuned."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import secateur as sc
from secateur.study import Trial, read_study, trials_of
from secateur.study.dense import Trained, Workplace, trained
from secateur.study.run import cuts
from secateur.study.tasks import Task

HERE = Path(__file__).parent
RUNS = HERE.parent / "runs"


@dataclass(frozen=True, eq=False)
class Cut:
    """A dense model, what it learned from, and the smaller one that a trial begins with."""

    trial: Trial
    task: Task
    dense: Trained
    data: list[Any]
    example: Any
    small: sc.Step


def cut(study: str, net: str, method: str, level: float, place: Workplace) -> Cut:
    """The network and the method as the CPU profile has them; the dense model is trained where its file is missing."""
    trials = trials_of(read_study(HERE.parent / "studies" / f"{study}.toml", profile="cpu"))
    trial = next(trial for trial in trials if (trial.net.title, trial.method.title) == (net, method))
    trial = trial.model_copy(update={"sparsity": level})
    task, dense = place.task(trial.dense), trained(trial.dense, place)
    data, example = task.calibration(trial.calibration, trial.seed), task.example(1, trial.latency.lengths[-1])
    (small,) = cuts(trial, dense.model, example, data)  # these methods prune at once
    return Cut(trial, task, dense, data, example, small)
