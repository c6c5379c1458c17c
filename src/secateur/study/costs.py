"""What a study will cost, before it is run: multiply-accumulates of its trainings, and time at measured rates."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from secateur.batches import default_forward, default_loss, move, size_of
from secateur.measuring import count
from secateur.measuring.latency import with_threads
from secateur.study.dense import Workplace
from secateur.study.spec import Training
from secateur.study.tasks import TRAIN_SAMPLES, Task
from secateur.study.trials import Dense, Trial

BACKWARD = 3  # a training step costs about three forward passes (Griewank and Walther 2008: gradients cost two to four)

TYPICAL_LENGTH = 32  # tokens of a sentence, of text


@dataclass(frozen=True)
class Cost:
    """One job: what it is, what is trained and evaluated for it, and how long that will take."""

    name: str  # its key
    text: str
    macs: float
    seconds: float | None  # None: it is done


def costs_of(trials: Sequence[Trial], place: Workplace, known: Mapping[str, float]) -> list[Cost]:
    """The dense models that these trials need and have not got, each once; then the trials.

    `known`: seconds of finished trials, by key. Where there are some of a network, they tell how long its other trials
    will take; else one training step is timed. An upper bound: pruned models are counted as if they were dense. Loads
    the data, so that missing data shows here.
    """
    wanted = {trial.dense.key: trial.dense for trial in trials if trial.key not in known}
    missing = [dense for key, dense in wanted.items() if not (place.folder / "dense" / f"{key}.safetensors").exists()]
    macs = {dense.key: _macs(dense, place, [(dense.training, dense.training.epochs)]) for dense in missing}
    macs |= {trial.key: _macs(trial.dense, place, _trainings(trial)) for trial in trials}
    rates = {dense.net.title: _rate(dense, trials, macs, known, place) for dense in wanted.values()}
    found = [
        Cost(
            dense.key,
            f"dense {dense.net.title} on {dense.data.title}, seed {dense.seed}",
            macs[dense.key],
            macs[dense.key] * rates[dense.net.title],
        )
        for dense in missing
    ]
    return found + [
        Cost(t.key, str(t), macs[t.key], None if t.key in known else macs[t.key] * rates[t.net.title]) for t in trials
    ]


def _rate(
    dense: Dense, trials: Sequence[Trial], macs: Mapping[str, float], known: Mapping[str, float], place: Workplace
) -> float:
    """Seconds per multiply-accumulate of that network on one thread."""
    alike = [trial.key for trial in trials if trial.key in known and trial.net == dense.net]
    return sum(known[key] for key in alike) / sum(macs[key] for key in alike) if alike else _timed_rate(dense, place)


def _timed_rate(dense: Dense, place: Workplace) -> float:
    """By one training step of the dense model."""
    task, training = place.task(dense), dense.training
    model = task.fresh(dense.net, dense.seed)
    one = _macs_of_one(model, task)
    batch = move(next(iter(task.training(training, dense.seed))), place.device)
    layout = torch.channels_last if training.channels_last else torch.preserve_format
    model.train().to(place.device, memory_format=layout)  # type: ignore[call-overload]
    seconds = float("inf")
    with with_threads(1):  # as in a worker
        for _ in range(3):  # the first warms up
            start = time.perf_counter()
            with torch.autocast(torch.device(place.device).type, torch.bfloat16, enabled=training.bf16):
                loss = default_loss(default_forward(model, batch), batch)
            loss.backward()  # type: ignore[no-untyped-call]
            float(loss.detach())  # waits for the device
            seconds = min(seconds, time.perf_counter() - start)
    return seconds / (BACKWARD * one * size_of(batch))


def _macs_of_one(model: nn.Module, task: Task) -> int:
    return count(model.eval(), task.example(1, TYPICAL_LENGTH)).macs


def _macs(dense: Dense, place: Workplace, trained: Sequence[tuple[Training, int]]) -> float:
    """Of trainings, (recipe, epochs) each, and of the evaluations."""
    task = place.task(dense)
    one, sizes = _macs_of_one(task.fresh(dense.net, dense.seed), task), task.sizes
    samples = sizes["validation"] + 3 * sizes["test"] + min(TRAIN_SAMPLES, sizes["train"])
    for training, epochs in trained:
        whole = min(sizes["train"], len(task.training(training, 0)) * training.batch_size)
        samples += BACKWARD * epochs * whole
    return float(one) * samples


def _trainings(trial: Trial) -> list[tuple[Training, int]]:
    if trial.method.criterion == "smaller":
        return [(trial.training, trial.training.epochs + trial.epochs)]
    return [(trial.tuning, trial.epochs)]
