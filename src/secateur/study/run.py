"""What one trial is, from top to bottom: prune, repair, fine-tune, evaluate in between, recount, measure."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import nn

from secateur.coupling.groups import trace
from secateur.criteria.wrappers import ensemble
from secateur.errors import ArtifactError
from secateur.files import write_bytes
from secateur.masking import make_masks
from secateur.masks import Masks
from secateur.measuring.latency import with_threads
from secateur.plans import named_tensors
from secateur.pruning import Step, prune, prune_steps
from secateur.recovery import rewound
from secateur.regularising import GammaPenalty, GroupPenalty, WeightPenalty
from secateur.repairing import DEFAULT_STEPS, repair, repairable
from secateur.schedules import resolve as resolve_schedule
from secateur.study.bench import Bench, Stages
from secateur.study.dense import Workplace, trained
from secateur.study.recording import record_of
from secateur.study.results import Result, points
from secateur.study.trials import Trial
from secateur.targets import Target


def run_trial(trial: Trial, place: Workplace) -> Result:
    """Everything that happens to one model. Killed at any moment, it loses at most the epoch in progress.

    Called again it goes on where it was; once finished, it returns what it returned before.
    """
    start = time.perf_counter()
    folder = place.folder / "trials" / trial.key
    done = folder / "result.json"
    with suppress(FileNotFoundError, UnicodeDecodeError, ArtifactError):  # a damaged file is made anew
        return Result.from_json(done.read_text(encoding="utf-8"))
    with with_threads(trial.latency.threads):
        task, dense = place.task(trial.dense), trained(trial.dense, place)
        bench = Bench(trial, place, task, dense, folder, task.calibration(trial.calibration, trial.seed))
        stages = METHODS[trial.method.prunes](bench)
        record = record_of(bench, stages, start)
    result = Result(record, (*points("dense", dense.history), *bench.curve))
    write_bytes(done, result.to_json().encode())
    return result


# -- three ways to prune ---------------------------------------------------------------------------------------------


def prune_channels(bench: Bench) -> Stages:
    """Channels go, at once or step by step with training in between."""
    trial = bench.trial
    model, epochs = _penalised(bench)
    difference = 0.0
    for step in cuts(trial, model, bench.example, bench.calibration):
        difference = max(difference, step.summary.verified_difference)
        how = _repairs(bench)
        mended = step.model
        if how:
            mended = repair(
                step.model, bench.calibration, dense=step.previous, plan=step.plan, steps=how, seed=trial.seed
            )
        part = _share(epochs, step.number, step.steps)
        tuned = bench.train(mended, f"tune {step.number}", part)
        if step.number < step.steps:
            step.model.load_state_dict(tuned.state_dict())  # the next step goes on from there
            continue
        return Stages(step.model, mended if how else None, tuned, step.total, difference, trial.epochs - part)
    raise AssertionError("a schedule has at least one step")


def cuts(trial: Trial, model: nn.Module, example: Any, data: list[Any]) -> Iterator[Step]:
    """The steps in which this trial removes channels, nothing repaired; what is trained in between is the caller's."""
    method = trial.method
    return prune_steps(
        model,
        example,
        target_of(trial),
        criterion=method.criterion if isinstance(method.criterion, str) else ensemble(*method.criterion),
        schedule=method.schedule,
        steps=trial.steps,
        data=data,
        scope=method.scope,
        ignore=method.ignore,
        round_to=method.round_to,
        keep_at_least=method.keep_at_least,
        prune_residual=method.prune_residual,
        repair=(),
        seed=trial.seed,
    )


def mask_weights(bench: Bench) -> Stages:
    """Weights are set to zero and held there; nothing gets smaller."""
    trial, method = bench.trial, bench.trial.method
    model, epochs = _penalised(bench)
    steps = trial.steps or 1
    due = resolve_schedule(method.schedule, trial.sparsity)
    masks: Masks | None = None
    for number in range(1, steps + 1):
        masks = make_masks(
            model,
            str(method.criterion),
            trial.sparsity * due(number / steps),
            scope=method.scope,
            pattern=method.pattern,
            data=bench.calibration,
            within=method.within,
            ignore=method.ignore,
            biases=method.biases,
            propagate=method.propagate,
            masks=masks,
            seed=trial.seed,
        )
        cut = masks.apply(model)
        if method.rewind == "weights":
            initial = bench.task.fresh(trial.net, trial.seed)
            cut = rewound(model, masks, named_tensors(initial))
        mended = repair(cut, bench.calibration, steps=("batch_norm",)) if _repairs(bench) and repairable(cut) else None
        part = _share(epochs, number, steps)
        model = bench.train(mended or cut, f"tune {number}", part, [masks.hook(method.hold)])
        masks = replace(masks, values={})  # the model has them now
    return Stages(cut, mended, model, before=trial.epochs - part)


def prune_nothing(bench: Bench) -> Stages:
    """The controls: the dense model fine-tuned as long, and a narrower one trained from scratch as long.

    The narrower one is a random part of a network fresh from its constructor: whatever that draws, it has drawn.
    """
    trial, epochs = bench.trial, bench.trial.epochs
    if trial.method.criterion == "unpruned":
        return Stages(bench.dense.model, None, bench.train(bench.dense.model, "tune 1", epochs))
    wide = bench.task.fresh(trial.net, trial.seed)
    narrow = prune(wide, bench.example, criterion="random", target=target_of(trial), scope="layer", seed=trial.seed)
    tuned = bench.train(narrow.model, "from scratch", epochs, own=True)
    return Stages(narrow.model, None, tuned, narrow.plan)


METHODS = {"channels": prune_channels, "weights": mask_weights, "nothing": prune_nothing}


def target_of(trial: Trial) -> Target:
    """What a sparsity means for this method."""
    kept = 1 - trial.sparsity
    if trial.method.target == "macs":
        return Target(max_macs=kept)
    if trial.method.target == "params":
        return Target(max_params=kept, of=trial.method.of)
    return Target(sparsity=trial.sparsity)


def _penalised(bench: Bench) -> tuple[nn.Module, int]:
    """Where pruning starts, and the epochs that are left for fine-tuning: a penalty takes its own first."""
    penalty, model = bench.trial.method.penalty, bench.dense.model
    if penalty is None:
        return model, bench.trial.epochs
    if penalty.kind == "gamma":
        hook: object = GammaPenalty(penalty.strength)
    elif penalty.kind == "group":
        hook = GroupPenalty(trace(model, bench.example), penalty.strength)
    else:
        hook = WeightPenalty(penalty.strength, 1 if penalty.kind == "l1" else 2)
    return bench.train(model, "penalty", penalty.epochs, [hook]), bench.trial.epochs - penalty.epochs


def _repairs(bench: Bench) -> tuple[str, ...]:
    asked = bench.trial.method.repair
    return asked if isinstance(asked, tuple) else DEFAULT_STEPS if asked else ()


def _share(epochs: int, number: int, steps: int) -> int:
    """The epochs of step `number` of `steps`: equal parts, what is over to the last ones."""
    return epochs * number // steps - epochs * (number - 1) // steps
