"""CIFAR-10, ResNet-20, on two CPU cores: train it, then remove half of its MACs by two criteria.

    python benchmarks/cifar10_resnet20.py --data-dir DATA --seeds 0 1

Every seed trains on 45,000 images and takes the last epoch; the other 5,000 validate, and nothing is chosen by the
test set. Every epoch and every trial is kept: the same command goes on where it stopped. Results: one JSON file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from machine import describe
from secateur.data import Batches, Splits, load_data
from secateur.files import write_bytes
from secateur.nets import build
from secateur.training import Fitted, Recipe, evaluate, fit

HERE = Path(__file__).parent
SETTINGS = ("l2-layer", "random-layer", "l2-global")  # criterion-scope
MAX_MACS = 0.5
TRAINING = Recipe(epochs=36, lr=0.2, warmup_epochs=3, weight_decay=5e-4, bf16=True, channels_last=True)
TUNING = Recipe(epochs=3, lr=0.02, weight_decay=5e-4, bf16=True, channels_last=True)
BATCH_SIZE = 128
VALIDATION = 0.02  # of the training images: they are only reported, nothing is chosen here
REPAIR_BATCHES = 40  # about 5,000 images, augmented like those the statistics were first taken from


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    for seed in options.seeds:
        splits = load_data("cifar10", options.data_dir, seed=seed, validation=VALIDATION)
        if options.stage in ("train", "all"):
            _train(options, splits, seed)
        if options.stage in ("prune", "all"):
            for setting in options.settings:
                criterion, _, scope = setting.partition("-")
                _prune(options, splits, seed, criterion, scope)
    print(_table(_read(options.out)))


def _train(options: argparse.Namespace, splits: Splits, seed: int) -> Fitted:
    """Train the dense network of a seed, or read it back, and record it."""
    recipe = replace(_training(options.epochs), seed=seed)
    checkpoint = options.runs / f"dense-seed{seed}-epochs{recipe.epochs}.pt"
    fitted = fit(_fresh(seed), _training_batches(splits, seed), recipe, checkpoint=checkpoint, progress=True)
    found = _found(_read(options.out)["dense"], seed=seed)
    if found is None or found["epochs"] != recipe.epochs:
        seconds = [row.seconds for row in fitted.history]
        trial = {
            "seed": seed,
            "epochs": recipe.epochs,
            **_scores("dense", fitted.model, splits),
            "train_seconds": round(sum(seconds), 1),
            "seconds_per_epoch": [round(value, 1) for value in seconds],
            "loss_per_epoch": [round(row.loss, 4) for row in fitted.history],
            "machine": describe(),
        }
        _add(options, "dense", trial, replacing={"seed": seed})
    return fitted


def _prune(options: argparse.Namespace, splits: Splits, seed: int, criterion: str, scope: str) -> None:
    """Prune, repair, fine-tune and record one setting on the network of one seed."""
    setting = {"seed": seed, "criterion": criterion, "scope": scope}
    if _found(_read(options.out)["pruned"], **setting) is not None:
        return
    import secateur as sc

    dense = _train(options, splits, seed).model
    batches = _training_batches(splits, seed)
    example = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    start = time.perf_counter()
    target = sc.Target(max_macs=MAX_MACS)
    pruned = sc.prune(dense, example, criterion=criterion, scope=scope, target=target, seed=seed)
    seconds = time.perf_counter() - start
    repaired = sc.repair(pruned.model, batches, batches=REPAIR_BATCHES)
    recipe = replace(TUNING, seed=seed)
    checkpoint = options.runs / f"tuned-{criterion}-{scope}-seed{seed}-epochs{options.epochs}.pt"
    tuned = fit(repaired, _Later(batches, options.epochs), recipe, checkpoint=checkpoint, progress=True)
    summary = pruned.summary
    _add(
        options,
        "pruned",
        {
            **setting,
            **_scores("before_repair", pruned.model, splits),
            **_scores("after_repair", repaired, splits),
            **_scores("fine_tuned", tuned.model, splits),
            "macs": list(summary.macs),
            "params": list(summary.params),
            "verified_difference": summary.verified_difference,
            "widths": {row.layer: [row.before, row.after] for row in pruned.plan.widths},
            "prune_seconds": round(seconds, 2),
            "fine_tune_seconds": round(sum(row.seconds for row in tuned.history), 1),
            "machine": describe(),
        },
        replacing=setting,
    )


def _training(epochs: int) -> Recipe:
    return replace(TRAINING, epochs=epochs, warmup_epochs=min(TRAINING.warmup_epochs, epochs))


class _Later:
    """The same batches, as they come in the epochs after the first `epochs`: fine-tuning sees new crops and flips."""

    def __init__(self, batches: Batches, epochs: int) -> None:
        self.batches, self.epochs = batches, epochs

    def set_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(self.epochs + epoch)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)


def _fresh(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build("resnet20", num_classes=10)


def _training_batches(splits: Splits, seed: int) -> Batches:
    return Batches(splits.train, BATCH_SIZE, seed=seed, augmentation=splits.augmentation)


def _scores(stage: str, model: nn.Module, splits: Splits) -> dict[str, float]:
    parts = {"validation": splits.validation, "test": splits.test}
    return {
        f"{stage}_{part}_accuracy": evaluate(model, Batches(data, 500, shuffle=False)).accuracy
        for part, data in parts.items()
    }


def _protocol(recipe: Recipe) -> dict[str, Any]:
    return {
        "network": "resnet20",
        "data": "cifar10: 49,000 train, 1,000 validation (by seed), 10,000 test; last epoch",
        "batch_size": BATCH_SIZE,
        "training": {name: value for name, value in asdict(recipe).items() if name != "seed"},
        "fine_tuning": {name: value for name, value in asdict(TUNING).items() if name != "seed"},
        "max_macs": MAX_MACS,
        "repair_batches": REPAIR_BATCHES,
    }


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return {"protocol": {}, "dense": [], "pruned": [], **found}


def _add(options: argparse.Namespace, kind: str, row: dict[str, Any], *, replacing: Mapping[str, Any]) -> None:
    """Put a row into the file as it is now: another process may have added to it since this one started."""
    results = _read(options.out)
    others = [other for other in results[kind] if any(other[key] != value for key, value in replacing.items())]
    results[kind] = [*others, row]
    results["protocol"] = _protocol(_training(options.epochs))
    write_bytes(options.out, (json.dumps(results, indent=1) + "\n").encode())


def _found(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any] | None:
    return next((row for row in rows if all(row[key] == value for key, value in wanted.items())), None)


def _table(results: Mapping[str, Any]) -> str:
    lines = [f"{'':24} test accuracy"]
    for row in results["dense"]:
        accuracy, minutes = row["dense_test_accuracy"], row["train_seconds"] / 60
        lines.append(f"seed {row['seed']} {'dense':<17} {accuracy:.2%}  ({minutes:.1f} minutes)")
    for row in results["pruned"]:
        stages = ("before_repair", "after_repair", "fine_tuned")
        accuracies = " -> ".join(f"{row[f'{stage}_test_accuracy']:.2%}" for stage in stages)
        setting = f"{row['criterion']}, {row['scope']}"
        lines.append(f"seed {row['seed']} {setting:<17} {accuracies}  (cut -> repaired -> fine-tuned)")
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data-dir", type=Path, help="folder of cifar10/*.parquet; default SECATEUR_DATA, else the Hub"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cifar10_resnet20.json", help="the results")
    parser.add_argument("--runs", type=Path, default=HERE.parent / "runs" / "cifar10_resnet20", help="checkpoints")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=TRAINING.epochs, help="of the dense training")
    parser.add_argument("--stage", choices=("train", "prune", "all"), default="all")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS, help="what to prune by")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
