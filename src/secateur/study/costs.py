"""What a study will cost, before it is run: multiply-accumulates of its trainings, and time at measured rates."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from secateur.batches import default_loss
from secateur.measuring import count
from secateur.study.dense import TRAIN_IMAGES, Workplace, fresh_net, splits_of, training_batches
from secateur.study.spec import Training
from secateur.study.trials import Dense, Trial

BACKWARD = 3  # a training step costs about three forward passes (Griewank and Walther 2008: gradients cost two to four)


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
    splits, training = splits_of(dense.data, dense.seed, place), dense.training
    model = fresh_net(dense.net, splits, dense.seed).to(place.device).train()
    x, y = next(iter(training_batches(splits, training, dense.seed)))
    one, x, y = count(model.cpu(), x[:1]).macs, x.to(place.device), y.to(place.device)
    layout = torch.channels_last if training.channels_last else torch.preserve_format
    model.to(place.device, memory_format=layout)  # type: ignore[call-overload]
    x = x.contiguous(memory_format=layout) if training.channels_last else x
    seconds = float("inf")
    for _ in range(2):  # the first warms up
        start = time.perf_counter()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=training.bf16):
            loss = default_loss(model(x), (x, y))
        loss.backward()  # type: ignore[no-untyped-call]
        float(loss.detach())  # waits for the device
        seconds = min(seconds, time.perf_counter() - start)
    return seconds / (BACKWARD * one * len(x))


def _macs(dense: Dense, place: Workplace, trained: Sequence[tuple[Training, int]]) -> float:
    """Of trainings, (recipe, epochs) each, and of the evaluations."""
    splits = splits_of(dense.data, dense.seed, place)
    model = fresh_net(dense.net, splits, dense.seed).eval()
    one = count(model, splits.train.normalise(splits.train.images[:1])).macs
    images = len(splits.validation) + 3 * len(splits.test) + min(TRAIN_IMAGES, len(splits.train))
    for training, epochs in trained:
        whole = min(len(splits.train), len(training_batches(splits, training, 0)) * training.batch_size)
        images += BACKWARD * epochs * whole
    return float(one) * images


def _trainings(trial: Trial) -> list[tuple[Training, int]]:
    if trial.method.criterion == "smaller":
        return [(trial.training, trial.training.epochs + trial.epochs)]
    return [(trial.tuning, trial.epochs)]
