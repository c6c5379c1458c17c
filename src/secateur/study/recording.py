"""What is written down about a finished trial: everything counted and measured on the models that were evaluated."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.batches import move
from secateur.measuring import count, measure
from secateur.plans import named_tensors
from secateur.report.provenance import environment
from secateur.report.records import LayerWeights, LayerWidth, Pair, Record, Timing
from secateur.study.bench import Bench, Stages
from secateur.study.dense import scores_of
from secateur.study.spec import TEXTS
from secateur.weightlayers import weight_layers

MEANS = {"channels": "channels", "weights": "weights", "nothing": "channels"}  # what a plain sparsity is a fraction of


def record_of(bench: Bench, stages: Stages, start: float) -> Record:
    """Evaluate, recount and time the models of a trial that began at `start`, in `time.perf_counter`'s seconds."""
    trial, dense, method = bench.trial, bench.dense, bench.trial.method
    model = stages.tuned
    before, after = count(dense.model, bench.example), count(model, bench.example)
    timings = tuple(_timings(bench, model))
    last, layers = timings[-1], layer_weights(dense.model, model)
    scores = scores_of(model, bench.task, bench.place.device, trial.training)
    return Record(
        key=trial.key,
        model=trial.net.title,
        data=trial.data.title,
        criterion=method.criterion if isinstance(method.criterion, str) else "+".join(method.criterion),
        scope=method.scope or "",
        sparsity=trial.sparsity,
        seed=trial.seed,
        accuracy_dense=dense.scores.test,
        accuracy_pruned=bench.test(stages.cut),
        accuracy_repaired=None if stages.repaired is None else bench.test(stages.repaired),
        accuracy_finetuned=scores.test,
        params=Pair(before.params, after.params),
        macs=Pair(before.macs, after.macs),
        latency_ms=Pair(last.dense_ms, last.pruned_ms),
        speedup=last.speedup,
        latency_noise=last.noise,
        verified_difference=stages.difference,
        widths=tuple(LayerWidth(row.layer, row.before, row.after, row.block) for row in stages.plan.widths)
        if stages.plan
        else (),
        validation_dense=dense.scores.validation,
        validation_finetuned=scores.validation,
        train_dense=dense.scores.train,
        train_finetuned=scores.train,
        method=method.title,
        prunes=method.prunes,
        target=MEANS[method.prunes] if method.target == "sparsity" else method.target,
        control=trial.control,
        epochs=trial.epochs,
        epochs_before=stages.before,
        weights_left=sum(row.left for row in layers) / sum(row.before for row in layers),
        layers=layers,
        timings=timings,
        fingerprint=fingerprint(bench),
        seconds=bench.seconds_before + time.perf_counter() - start,  # after everything above
    )


def layer_weights(dense: nn.Module, model: nn.Module) -> tuple[LayerWeights, ...]:
    """Weights of convolutions and linear maps, counted in the models themselves: those that are there and not zero."""
    there = named_tensors(model)
    return tuple(
        LayerWeights(
            layer.name,
            named_tensors(dense)[layer.name].numel(),
            int(there[layer.name].count_nonzero()) if layer.name in there else 0,
        )
        for layer in weight_layers(dense)
    )


def _timings(bench: Bench, model: nn.Module) -> Iterator[Timing]:
    """By length, then batch size, then runtime; dense and pruned model in turns."""
    how = bench.trial.latency
    lengths = how.lengths if bench.trial.data.name in TEXTS else (None,)
    device, dense = torch.device(bench.place.device), bench.dense.model
    model.to(device), dense.to(device)
    for length in lengths:
        for batch in how.batches:
            inputs = move(bench.task.example(batch, length or 1), device)
            times = measure(model, inputs, how.runtimes, baseline=dense, threads=how.threads, seconds=how.seconds)
            for found in times.latencies:
                assert found.baseline_ms is not None and found.speedup is not None  # a baseline was passed
                noise = (found.upper_ms - found.lower_ms) / found.median_ms
                one = (found.baseline_ms, found.median_ms, found.speedup, noise)
                yield Timing(batch, *one, runtime=found.runtime, length=length)
    model.cpu(), dense.cpu()


def fingerprint(bench: Bench) -> dict[str, Any]:
    """What the numbers depend on: versions, machine, data, and the settings that all trials of a study share."""
    trial, place, latency = bench.trial, bench.place, bench.trial.latency
    batches = ", ".join(map(str, latency.batches))
    return {
        **environment(),
        **({"commit": commit()} if commit() else {}),
        "device": torch.cuda.get_device_name() if place.device.startswith("cuda") else place.device,
        "data": {
            **bench.task.sizes,
            "sha256": bench.task.digest,
            "split": f"validation {trial.data.validation:g} of train, by seed",
        },
        "settings": {
            "training": str(trial.training),
            "fine-tuning": str(trial.tuning),
            "evaluation": "bfloat16" if trial.training.bf16 else "float32",
            "calibration": f"{trial.calibration} training samples",
            "latency": f"batch {batches}, {', '.join(latency.runtimes)}, threads {latency.threads}",
        },
    }


@lru_cache(maxsize=1)
def commit() -> str:
    """The commit of the source tree that this package runs from, `+` where it was changed; "" elsewhere."""
    here = Path(__file__).parent.parent  # the package
    try:
        ask = partial(subprocess.run, cwd=here, capture_output=True, text=True, timeout=10, check=True)
        tracked = ask(["git", "ls-files", "__init__.py"]).stdout.strip()
        if not tracked:
            return ""
        changed = "+" if ask(["git", "status", "--porcelain", "--untracked-files=no", "."]).stdout.strip() else ""
        return ask(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip() + changed
    except (OSError, subprocess.SubprocessError):
        return ""
