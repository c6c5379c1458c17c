"""The demo: a small network on handwritten digits, pruned by four criteria, repaired, fine-tuned, measured, reported.

`run_demo` is the whole story and `run_trial` that of one trial. Every finished trial is on disk before the next one
starts, so that an interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from secateur.data import Batches, Splits, digits
from secateur.errors import ArtifactError, InputError
from secateur.files import write_bytes
from secateur.measuring import measure
from secateur.nets import digits_net
from secateur.pruning import prune
from secateur.repairing import repair
from secateur.report import Record, read_records, write_records, write_report
from secateur.report.provenance import environment
from secateur.report.records import LayerWidth, Pair
from secateur.tensorfiles import read_header, read_tensors
from secateur.training import Recipe, evaluate, fit

CRITERIA = ("l1", "l2", "bn_scale", "random")
SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.6)
TRAINING = Recipe(epochs=15, lr=0.05, warmup_epochs=1.0)
RECOVERY = Recipe(epochs=3, lr=0.02)
BATCH_SIZE = 64
TIMED_BATCH = 64
TIMED_SECONDS = 0.3  # per model; dense and pruned take turns
DECISIVE = ("secateur", "torch", "data", "settings")  # what must not differ between the records of one file


@dataclass(frozen=True)
class Trial:
    """One cell of the grid."""

    criterion: str
    sparsity: float
    seed: int

    @property
    def key(self) -> str:
        """Identifies the trial within the demo."""
        return f"digits_net-digits-{self.criterion}-layer-{self.sparsity:g}-seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.criterion}, {self.sparsity * 100:.0f} % of channels, seed {self.seed}"


@dataclass(frozen=True, eq=False)
class Baseline:
    """A trained dense model, the data it saw, and how good it is."""

    model: nn.Module
    splits: Splits
    train: float
    validation: float
    test: float


@dataclass(frozen=True)
class Outcome:
    """What a run of the demo left behind."""

    records: tuple[Record, ...]
    report: Path
    new: int  # trials run this time; the others were there already


Told = Callable[[int, str], None]  # is given how many trials are done, and a line about the last step


def grid(seeds: int) -> list[Trial]:
    """All trials, seed by seed."""
    if seeds < 1:
        raise InputError(f"the demo needs at least 1 seed, got {seeds}.")
    return [Trial(c, sparsity, seed) for seed in range(seeds) for c in CRITERIA for sparsity in SPARSITIES]


def run_demo(out: Path, trials: Sequence[Trial], told: Told = lambda done, line: None) -> Outcome:
    """Run the trials that `out` has no record of yet, and write `out/report.html`.

    Can be interrupted at any moment and called again. Raises InputError where `out` holds records of other settings
    or versions, OSError where it cannot be written to.
    """
    file = out / "records.jsonl"
    records = {record.key: record for record in read_records(file)}
    missing = [trial for trial in trials if trial.key not in records]
    origin = fingerprint()
    check_origin(list(records.values()), origin, file)
    done = len(trials) - len(missing)
    for seed in dict.fromkeys(trial.seed for trial in missing):
        dense = baseline(seed, out, origin)
        told(done, f"dense model, seed {seed}: {dense.test:.1%} on test data")
        for trial in missing:
            if trial.seed == seed:
                records[trial.key] = record = run_trial(trial, dense, origin)
                write_records(file, records.values())
                done += 1
                told(done, f"{trial}: {_stages(record)}")
    wanted = tuple(records[trial.key] for trial in trials)
    return Outcome(wanted, write_report(wanted, out / "report.html", "Demo on handwritten digits"), len(missing))


def _stages(record: Record) -> str:
    mended = "" if record.accuracy_repaired is None else f"{record.accuracy_repaired:.1%} repaired, "
    return f"{record.accuracy_pruned:.1%} pruned, {mended}{record.accuracy_finetuned:.1%} fine-tuned"


def run_trial(trial: Trial, dense: Baseline, origin: dict[str, Any]) -> Record:
    """Prune, verify, repair, fine-tune, evaluate in between, measure: everything that happens to one model."""
    start = time.perf_counter()
    data, example = dense.splits, example_batch(dense.splits, 1)
    pruned = prune(
        dense.model, example, criterion=trial.criterion, sparsity=trial.sparsity, scope="layer", seed=trial.seed
    )
    accuracy_pruned = accuracy(pruned.model, data, "test")
    repaired = repair(pruned.model, batches(data, trial.seed), dense=dense.model, plan=pruned.plan, seed=trial.seed)
    tuned = train(repaired, data, RECOVERY, trial.seed)
    timed = example_batch(data, TIMED_BATCH)
    latency = measure(tuned, timed, baseline=dense.model, seconds=TIMED_SECONDS, threads=1)["eager"]
    assert latency.baseline_ms is not None and latency.speedup is not None  # a baseline was passed
    return Record(
        key=trial.key,
        model="digits_net",
        data="digits",
        criterion=trial.criterion,
        scope="layer",
        sparsity=trial.sparsity,
        seed=trial.seed,
        accuracy_dense=dense.test,
        accuracy_pruned=accuracy_pruned,
        accuracy_repaired=accuracy(repaired, data, "test"),
        accuracy_finetuned=accuracy(tuned, data, "test"),
        params=Pair(*pruned.summary.params),
        macs=Pair(*pruned.summary.macs),
        latency_ms=Pair(latency.baseline_ms, latency.median_ms),
        speedup=latency.speedup,
        latency_noise=(latency.upper_ms - latency.lower_ms) / latency.median_ms,
        verified_difference=pruned.summary.verified_difference,
        widths=tuple(LayerWidth(row.layer, row.before, row.after) for row in pruned.plan.widths),
        seconds=time.perf_counter() - start,
        validation_dense=dense.validation,
        validation_finetuned=accuracy(tuned, data, "validation"),
        train_dense=dense.train,
        train_finetuned=accuracy(tuned, data, "train"),
        fingerprint=origin,
    )


def baseline(seed: int, out: Path, origin: dict[str, Any]) -> Baseline:
    """The dense model of that seed: from its checkpoint in `out`, or trained and written there."""
    data = digits(seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = digits_net()
    path = out / f"dense-seed{seed}.safetensors"
    if not restore_(model, path, origin):
        model = train(model, data, TRAINING, seed)
        write_bytes(path, to_safetensors(model.state_dict(), {"origin": decisive(origin)}))
    return Baseline(model.eval(), data, *(accuracy(model, data, part) for part in ("train", "validation", "test")))


def restore_(model: nn.Module, path: Path, origin: dict[str, Any]) -> bool:
    """Load a checkpoint into the model; False, and the model as it was, where there is none that fits."""
    try:
        metadata, _ = read_header(path)
        if metadata.get("origin") != decisive(origin):
            return False
        model.load_state_dict(read_tensors(path))
    except ArtifactError:  # missing or damaged: it is trained again
        return False
    return True


def train(model: nn.Module, data: Splits, recipe: Recipe, seed: int) -> nn.Module:
    """A trained copy; the last epoch is taken, so that nothing is selected."""
    return fit(model, batches(data, seed), recipe, progress=False).model


def batches(data: Splits, seed: int) -> Batches:
    """The augmented training images."""
    return Batches(data.train, BATCH_SIZE, seed=seed, augmentation=data.augmentation)


def accuracy(model: nn.Module, data: Splits, part: str) -> float:
    """The fraction of images of that part of the data that are classified right."""
    return evaluate(model, Batches(getattr(data, part), 512, shuffle=False)).accuracy


def example_batch(data: Splits, size: int) -> Tensor:
    """The first validation images, as a model sees them."""
    return data.validation.normalise(data.validation.images[:size])


def fingerprint() -> dict[str, Any]:
    """Versions, machine, data and settings that the numbers of a record depend on, as it reads from a file."""
    data = digits()
    everything = [asdict(TRAINING), asdict(RECOVERY), BATCH_SIZE, TIMED_BATCH, TIMED_SECONDS]
    return {
        **environment(),
        "data": {part: len(getattr(data, part)) for part in ("train", "validation", "test")},
        "settings": {
            "training": f"{TRAINING.epochs} epochs, SGD, lr {TRAINING.lr:g}",
            "fine-tuning": f"{RECOVERY.epochs} epochs, SGD, lr {RECOVERY.lr:g}",
            "repair": "least squares, BatchNorm statistics",
            "training batch": BATCH_SIZE,
            "latency": f"batch of {TIMED_BATCH}, 1 thread, PyTorch eager",
            "digest": hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:12],
        },
    }


def check_origin(records: Sequence[Record], origin: dict[str, Any], file: Path) -> None:
    """Raise InputError where records were made with other settings or versions; another machine is only reported."""
    for record in records:
        for name in DECISIVE:
            theirs, ours = record.fingerprint.get(name), origin[name]
            if theirs != ours:
                raise InputError(
                    f"{file} holds trials made with another {name}: {theirs}, now {ours}. "
                    "They are not mixed: choose another folder with --out, or delete this one."
                )


def decisive(origin: dict[str, Any]) -> str:
    """The part of a fingerprint that must agree within one demo, as text."""
    return json.dumps({name: origin[name] for name in DECISIVE})
