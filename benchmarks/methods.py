"""Every method on CIFAR-10: channels at five levels, weights at five levels, our default against Torch-Pruning.

    python benchmarks/methods.py channels --nets resnet20 --seeds 0 1 --data-dir DATA
    python benchmarks/methods.py weights | contest | iterative | collect

Finished trials are kept in runs/methods/*.jsonl; the same command goes on where it stopped, and several processes may
run it side by side. `collect` writes benchmarks/results/methods.json. Everything is decided by the validation images;
the test images are only reported.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateur as sc
from dense import BATCH_SIZE, NETS, RUNS, TUNING, accuracy, dense, splits, training_batches
from machine import describe
from secateur.coupling.groups import Graph
from secateur.criteria.sequential import Greedy
from secateur.criteria.table import CRITERIA, is_raw, needs_of, resolve
from secateur.data import Batches, Splits
from secateur.evidence import Evidence
from secateur.files import write_bytes
from secateur.ordering import select_in_order
from secateur.training import fit
from trials import Trials

HERE = Path(__file__).parent
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5)  # of the channels of every group
TUNED_LEVELS = (0.3, 0.5)
CALIBRATION = 2000  # augmented training images, for criteria and repair
WEIGHT_LEVELS = (0.5, 0.75, 0.875, 0.9375, 0.96875)
MAX_MACS = 0.5
DENSE_EPOCHS = 36
SLIMMING_EPOCHS = 4
SLIMMING_STRENGTH = 1e-4
EXAMPLE = (1, 3, 32, 32)


def main() -> None:
    options = _options()
    if options.part == "collect":
        collect()
        return
    torch.set_num_threads(options.threads)
    for seed in options.seeds:
        parts = splits(options.data_dir, seed)
        for net in options.nets:
            PARTS[options.part](options, Bench(net, seed, parts))


class Bench:
    """A dense network, and the data it is judged by."""

    def __init__(self, net: str, seed: int, parts: Splits) -> None:
        self.net, self.checkpoint, self.seed, self.parts = net, seed, seed, parts
        self.model = dense(net, parts, seed).model
        known = Trials(RUNS / "methods" / "dense.jsonl")
        if known.find({"net": net, "seed": seed}) is None:
            known.add({"net": net, "seed": seed}, self.scores("dense", self.model))
        self.example = torch.zeros(EXAMPLE)
        drawn = Batches(parts.train, 250, seed=seed + 1000, augmentation=parts.augmentation)
        self.calibration = [batch for batch, _ in zip(drawn, range(CALIBRATION // 250), strict=False)]

    def scores(self, stage: str, model: nn.Module) -> dict[str, float]:
        """Accuracy on the validation and on the test images."""
        named = {"validation": self.parts.validation, "test": self.parts.test}
        return {f"{stage}_{part}": accuracy(model, Batches(data, 500, shuffle=False)) for part, data in named.items()}

    def tuned(self, model: nn.Module, epochs: int, hooks: tuple[object, ...] = (), **changes: Any) -> nn.Module:
        """The model after a few more epochs of training, on crops and flips that it has not seen."""
        batches = training_batches(self.parts, self.seed, first_epoch=DENSE_EPOCHS)
        return fit(model, batches, replace(TUNING, epochs=epochs, seed=self.seed, **changes), hooks=hooks).model

    def slimmed(self) -> Bench:
        """The same after a few epochs with the penalty on BatchNorm scales, which network slimming asks for."""
        other = copy.copy(self)
        recipe = replace(TUNING, epochs=SLIMMING_EPOCHS, seed=self.seed)
        batches = training_batches(self.parts, self.seed, first_epoch=DENSE_EPOCHS)
        checkpoint = RUNS / "methods" / f"slimmed-{self.net}-seed{self.seed}.pt"
        hooks = (sc.GammaPenalty(SLIMMING_STRENGTH),)
        other.model = fit(self.model, batches, recipe, hooks=hooks, checkpoint=checkpoint).model
        return other

    def repaired(self, small: nn.Module, plan: sc.Plan) -> nn.Module:
        """The model after repair without gradients."""
        return sc.repair(small, self.calibration, dense=self.model, plan=plan, forward=in_bf16, seed=self.seed)


def in_bf16(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The logits, under bfloat16 autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits: Tensor = model(batch[0].contiguous(memory_format=torch.channels_last))
    return logits.float()


def channels(options: argparse.Namespace, bench: Bench) -> None:
    """Every channel criterion at every level: just cut, repaired, and fine-tuned at two of the levels."""
    trials = Trials(RUNS / "methods" / "channels.jsonl")
    graph = sc.trace(bench.model, bench.example)
    for name in options.criteria or sorted(CRITERIA):
        for scope in options.scopes:
            unit = {"net": bench.net, "seed": bench.seed, "criterion": name, "scope": scope}
            with trials.claimed(unit) as mine:
                if mine:
                    subject = bench.slimmed() if name == "slimming" else bench
                    _levels(options, subject, graph, trials, unit)


def _levels(options: argparse.Namespace, bench: Bench, graph: Graph, trials: Trials, unit: Mapping[str, Any]) -> None:
    facts: Evidence | None = None
    for level in LEVELS:
        key = {**unit, "level": level}
        found = trials.find(key)
        tune = level in TUNED_LEVELS and options.tune
        if found is not None and (not tune or trials.find({**key, "stage": "tuned"}) is not None):
            continue
        start = time.perf_counter()
        if facts is None:  # greedy ones look for themselves
            facts = sc.observe(bench.model, graph, bench.calibration, needs_of(unit["criterion"]), seed=bench.seed)
        plan = _plan(bench, graph, facts, unit["criterion"], unit["scope"], level)
        small = sc.shrink(bench.model, plan)
        seconds, start = time.perf_counter() - start, time.perf_counter()
        repaired = bench.repaired(small, plan)
        repair_seconds = time.perf_counter() - start
        if found is None:
            values = {
                **bench.scores("cut", small),
                **bench.scores("repaired", repaired),
                "verified_difference": sc.verify(bench.model, plan, small, bench.example),
                "macs": list(plan.macs),
                "params": list(plan.params),
                "seconds": round(seconds, 2),
                "repair_seconds": round(repair_seconds, 2),
            }
            trials.add({**key, "stage": "direct"}, values)
            print(key, {name: value for name, value in values.items() if name.endswith("_test")}, flush=True)
        if tune:
            values = bench.scores("tuned", bench.tuned(repaired, 2))
            trials.add({**key, "stage": "tuned"}, values)
            print(key, values, flush=True)


def _plan(bench: Bench, graph: Graph, facts: Evidence, criterion: str, scope: str, level: float) -> sc.Plan:
    found, target = resolve(criterion), sc.Target(sparsity=level)
    if isinstance(found, Greedy):
        return select_in_order(bench.model, graph, found, target, bench.calibration, seed=bench.seed)
    scores = sc.score(graph, facts, criterion, seed=bench.seed)
    return sc.select(graph, scores, target, scope=scope, normalise=not is_raw(criterion))


def weights(options: argparse.Namespace, bench: Bench) -> None:
    """Every weight criterion at every level: just zeroed, BatchNorm re-estimated, and fine-tuned under its masks."""
    from secateur.masking import WEIGHT_METHODS

    trials = Trials(RUNS / "methods" / "weights.jsonl")
    for level in WEIGHT_LEVELS:
        for name in options.criteria or sorted(WEIGHT_METHODS):
            key = {"net": bench.net, "seed": bench.seed, "criterion": name, "level": level}
            with trials.claimed(key) as mine:
                if not mine or trials.find(key) is not None:
                    continue
                start = time.perf_counter()
                masks = sc.make_masks(bench.model, name, level, data=bench.calibration, seed=bench.seed)
                seconds = time.perf_counter() - start
                sparse = masks.apply(bench.model)
                normed = sc.repair(sparse, bench.calibration, forward=in_bf16)
                values = {
                    "sparsity": masks.sparsity,
                    "seconds": round(seconds, 2),
                    **bench.scores("cut", sparse),
                    **bench.scores("normed", normed),
                    **bench.scores("tuned", bench.tuned(normed, 2, hooks=(masks.hook(),))),
                }
                trials.add(key, values)
                print(key, values, flush=True)


def contest(options: argparse.Namespace, bench: Bench) -> None:
    """Half of the MACs, equal fine-tuning: our settings and Torch-Pruning's, on the same checkpoint."""
    trials = Trials(RUNS / "methods" / "contest.jsonl")
    for tuning_seed in options.tuning_seeds:
        bench.seed = tuning_seed
        for setting in options.settings:
            key = {"net": bench.net, "checkpoint": bench.checkpoint, "seed": tuning_seed, "setting": setting}
            with trials.claimed(key) as mine:
                if not mine or trials.find(key) is not None:
                    continue
                start = time.perf_counter()
                small = _contender(bench, setting)
                seconds = time.perf_counter() - start
                values = {
                    "seconds": round(seconds, 2),
                    "macs": sc.count(small, bench.example).macs,
                    "params": sc.count(small, bench.example).params,
                    **bench.scores("start", small),
                    **bench.scores("tuned", bench.tuned(small, options.epochs)),
                    "epochs": options.epochs,
                    "machine": describe(),
                }
                trials.add(key, values)
                print(key, values, flush=True)


def _contender(bench: Bench, setting: str) -> nn.Module:
    """`default`, `torch_pruning:IMPORTANCE`, or `CRITERION:SCOPE[:STEP of the repair]`."""
    library, _, rest = setting.partition(":")
    target = sc.Target(max_macs=MAX_MACS)
    if library == "torch_pruning":
        return _torch_pruning(bench, rest)
    if library == "default":
        return sc.prune(
            bench.model, bench.example, target=target, data=bench.calibration, seed=bench.seed, forward=in_bf16
        ).model
    scope, _, steps = rest.partition(":")
    return sc.prune(
        bench.model,
        bench.example,
        criterion=library,
        scope=scope,
        target=target,
        data=bench.calibration,
        repair=tuple(steps.split("+")) if steps else None,
        seed=bench.seed,
        forward=in_bf16,
    ).model


def _torch_pruning(bench: Bench, importance: str) -> nn.Module:
    """Its group importances, ranked globally, in many small steps until the MACs are met, as its README does it."""
    import torch_pruning as tp

    model = copy.deepcopy(bench.model)
    if importance == "taylor":
        for x, y in bench.calibration:
            torch.nn.functional.cross_entropy(model(x), y).backward()
    pruner = tp.pruner.BasePruner(
        model,
        bench.example,
        importance={"magnitude": tp.importance.GroupMagnitudeImportance, "taylor": tp.importance.GroupTaylorImportance}[
            importance
        ](),
        global_pruning=True,
        pruning_ratio=1.0,
        iterative_steps=200,
        ignored_layers=[model.fc],
    )
    limit = MAX_MACS * sc.count(bench.model, bench.example).macs
    while sc.count(model, bench.example).macs > limit:
        pruner.step()
    model.zero_grad(set_to_none=True)
    return model


def iterative(options: argparse.Namespace, bench: Bench) -> None:
    """15 of 16 weights removed: at once, by halves with an epoch after each, or along a cubic; epochs are equal."""
    from secateur.masking import Gradual

    trials = Trials(RUNS / "methods" / "iterative.jsonl")
    rounds = 4  # 1/2, 3/4, 7/8, 15/16
    final = 1 - 0.5**rounds
    for setting in ("direct", "iterative", "gradual"):
        key = {"net": bench.net, "seed": bench.seed, "setting": setting, "epochs": rounds}
        with trials.claimed(key) as mine:
            if not mine or trials.find(key) is not None:
                continue
            model, values = bench.model, {}
            if setting == "gradual":
                steps = len(training_batches(bench.parts, bench.seed))
                hook = Gradual("magnitude", final, schedule="cubic", scope="global", end=2 * steps)
                model = bench.tuned(model, rounds, hooks=(hook,))
            for number in range(1, rounds + 1) if setting == "iterative" else [rounds] if setting == "direct" else []:
                masks = sc.make_masks(model, "magnitude", 1 - 0.5**number, scope="global")
                model = sc.repair(masks.apply(model), bench.calibration, forward=in_bf16)
                if number == rounds:
                    values = bench.scores("before_last", model)
                epochs = rounds if setting == "direct" else 1
                model = bench.tuned(model, epochs, hooks=(masks.hook(),))
            values = {**values, **bench.scores("tuned", model)}
            trials.add(key, values)
            print(key, values, flush=True)


def collect() -> None:
    """Put what is finished into the results."""
    names = ("channels", "contest", "iterative", "weights", "dense")
    rows = {name: Trials(RUNS / "methods" / f"{name}.jsonl").rows() for name in names}
    tuning = {name: value for name, value in asdict(TUNING).items() if name not in ("seed", "epochs")}
    protocol = {
        "data": "cifar10: 49,000 train, 1,000 validation (by seed), 10,000 test; last epoch",
        "calibration": f"{CALIBRATION:,} augmented training images, for criteria and repair",
        "tuning": {**tuning, "batch_size": BATCH_SIZE},
        "titles": {name: net.title for name, net in NETS.items()},
        "slimming": f"{SLIMMING_EPOCHS} more epochs with the penalty {SLIMMING_STRENGTH:g} on BatchNorm scales",
        "max_macs": MAX_MACS,
    }
    results = {"protocol": protocol, "machine": describe(), **rows}
    write_bytes(HERE / "results" / "methods.json", (json.dumps(results, indent=None) + "\n").encode())


PARTS = {"channels": channels, "contest": contest, "iterative": iterative, "weights": weights}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*sorted(PARTS), "collect"])
    parser.add_argument("--data-dir", type=Path, help="folder of cifar10/*.parquet; default SECATEUR_DATA")
    parser.add_argument("--nets", nargs="+", default=["resnet20"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--criteria", nargs="+", help="default: all")
    parser.add_argument("--scopes", nargs="+", default=["layer"])
    parser.add_argument("--tune", action=argparse.BooleanOptionalAction, default=True, help="fine-tune as well")
    parser.add_argument("--settings", nargs="+", default=["default", "torch_pruning:magnitude", "torch_pruning:taylor"])
    parser.add_argument("--tuning-seeds", type=int, nargs="+", default=list(range(5)), help="of the contest")
    parser.add_argument("--epochs", type=int, default=2, help="of fine-tuning in the contest")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
