"""Vision transformers on CIFAR-10: heads, hidden units and embedding widths removed, each alone and all together.

    python benchmarks/vision_transformers.py --data-dir DATA --levels 0.5
    python benchmarks/vision_transformers.py --data-dir DATA --levels 0.25 --no-tune
    python benchmarks/vision_transformers.py --collect

A ViT of timm and one of transformers, of one size, are trained a little, pruned, repaired and fine-tuned; latencies are
of the repaired models. Finished trials are kept in runs/vision_transformers/rows.jsonl; the same command goes on where
it stopped, and several processes may run it side by side, best one net each. `--collect` writes
benchmarks/results/vision_transformers.json. `--tiny` only shows that it works, on images drawn at random.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateur as sc
from dense import splits, training_batches
from machine import describe
from secateur.data import Batches, Dataset, Splits
from secateur.data.augmenting import NOTHING
from secateur.files import write_bytes
from secateur.training import Recipe, evaluate, fit
from trials import Trials
from zoo import load_torchvision

HERE = Path(__file__).parent
RUNS = HERE.parent / "runs" / "vision_transformers"
SIDE = 32
LEVELS = (0.25, 0.5)
BATCHES = (1, 16)  # of the latencies
RUNTIMES = ("eager", "onnxruntime")
CRITERION = "l2"
# float32: at this width the casts of autocast cost what bfloat16 saves.
TRAINING = Recipe(epochs=5, lr=1e-3, optimizer="adamw", weight_decay=0.05, warmup_epochs=1, clip_norm=1.0)
TUNING = replace(TRAINING, epochs=1, lr=3e-4, warmup_epochs=0)


@dataclass(frozen=True)
class Scale:
    """The size of the models, and of everything that is done with them."""

    width: int = 192
    depth: int = 4
    heads: int = 8
    inner: int = 768
    patch: int = 8  # 16 of them
    epochs: int = TRAINING.epochs
    tuning_epochs: int = TUNING.epochs
    calibration: int = 2000  # augmented training images
    seconds: float = 2.0  # per model and runtime


TINY = Scale(width=32, depth=2, heads=4, inner=48, patch=8, epochs=1, tuning_epochs=1, calibration=64, seconds=0.01)


def timm_vit(scale: Scale) -> nn.Module:
    """timm's VisionTransformer, one matrix for queries, keys and values."""
    load_torchvision()
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=SIDE,
        patch_size=scale.patch,
        embed_dim=scale.width,
        depth=scale.depth,
        num_heads=scale.heads,
        mlp_ratio=scale.inner / scale.width,
        num_classes=10,
    )


def transformers_vit(scale: Scale) -> nn.Module:
    """transformers' ViTForImageClassification, a matrix each."""
    load_torchvision()
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=SIDE,
        patch_size=scale.patch,
        hidden_size=scale.width,
        num_hidden_layers=scale.depth,
        num_attention_heads=scale.heads,
        intermediate_size=scale.inner,
        num_labels=10,
    )
    return ViTForImageClassification(config)


@dataclass(frozen=True)
class Net:
    """A vision transformer, and what its parts are called."""

    build: Callable[[Scale], nn.Module]
    title: str
    parts: Mapping[str, str]  # what can go -> a pattern of the layers that make it


NETS = {
    "timm": Net(
        timm_vit, "timm", {"heads": "*.attn.qkv", "hidden units": "*.mlp.fc1", "embedding": "patch_embed.proj"}
    ),
    "transformers": Net(
        transformers_vit,
        "transformers",
        {"heads": "*.attention.q_proj", "hidden units": "*.mlp.fc1", "embedding": "*.patch_embeddings.projection"},
    ),
}
WHAT = (*NETS["timm"].parts, "all")


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    if options.collect:
        collect(options)
        return
    torch.set_num_threads(options.threads)
    scale = TINY if options.tiny else Scale()
    for seed in options.seeds:
        parts = drawn_images(seed) if options.tiny else splits(options.data_dir, seed)
        for net in options.nets:
            bench = Bench(options.runs, net, seed, parts, scale)
            for what in options.what:
                for level in options.levels:
                    bench.once({"part": "pruned", "what": what, "level": level}, bench.trial(what, level, options.tune))


class Bench:
    """A trained vision transformer, and the data it is judged by."""

    def __init__(self, runs: Path, net: str, seed: int, parts: Splits, scale: Scale) -> None:
        self.net, self.seed, self.parts, self.scale = net, seed, parts, scale
        self.trials = Trials(runs / "rows.jsonl")
        self.unit = {"net": net, "seed": seed, "scale": asdict(scale)}
        self.example = torch.zeros(1, 3, SIDE, SIDE)
        self.model = self._trained(runs)
        drawn = Batches(parts.train, 250, seed=seed + 1000, augmentation=parts.augmentation)
        wanted = -(-scale.calibration // 250)
        self.calibration = [batch for batch, _ in zip(drawn, range(wanted), strict=False)]

    def _trained(self, runs: Path) -> nn.Module:
        """The dense model, trained from where it stopped; where another process is at it, wait for that."""
        torch.manual_seed(self.seed)
        recipe = replace(TRAINING, epochs=self.scale.epochs, seed=self.seed)
        model, key = NETS[self.net].build(self.scale), {"part": "dense", **self.unit}
        checkpoint = runs / f"{self.net}-seed{self.seed}-width{self.scale.width}-epochs{recipe.epochs}.pt"
        while True:
            with self.trials.claimed(key) as mine:
                if mine:
                    trained = fit(model, training_batches(self.parts, self.seed), recipe, checkpoint=checkpoint)
                    if self.trials.find(key) is None:
                        seconds = sum(epoch.seconds for epoch in trained.history)
                        values = {**self.scores("dense", trained.model), "train_seconds": round(seconds, 1)}
                        self.add(key, {**values, "epochs": recipe.epochs, **self.cost(trained.model)})
                    return trained.model
            time.sleep(1)

    def once(self, key: dict[str, Any], work: Callable[[], dict[str, Any]]) -> None:
        """Do the trial, unless it is finished or another process is at it."""
        key = {**key, **self.unit}
        with self.trials.claimed(key) as mine:
            if mine and self.trials.find(key) is None:
                self.add(key, work())

    def add(self, key: Mapping[str, Any], values: dict[str, Any]) -> None:
        """Write a finished trial down, and what it was measured on."""
        self.trials.add(key, {**values, "machine": describe()})
        shown = {name: round(value, 4) for name, value in values.items() if name.endswith("_test")}
        print({name: value for name, value in key.items() if name != "scale"}, shown, flush=True)

    def trial(self, what: str, level: float, tune: bool) -> Callable[[], dict[str, Any]]:
        """Cut, repaired and fine-tuned: what is found with this fraction of these parts gone."""

        def work() -> dict[str, Any]:
            start = time.perf_counter()
            pruned = self.pruned(what, level)
            seconds, start = time.perf_counter() - start, time.perf_counter()
            repaired = sc.repair(pruned.model, self.calibration, dense=self.model, plan=pruned.plan, seed=self.seed)
            values = {
                "seconds": round(seconds, 2),
                "repair_seconds": round(time.perf_counter() - start, 2),
                "verified_difference": pruned.summary.verified_difference,
                **self.scores("cut", pruned.model),
                **self.scores("repaired", repaired),
                **self.cost(repaired, baseline=self.model),
            }
            if tune:
                recipe = replace(TUNING, epochs=self.scale.tuning_epochs, seed=self.seed)
                batches = training_batches(self.parts, self.seed, first_epoch=self.scale.epochs)
                values |= self.scores("tuned", fit(repaired, batches, recipe).model)
            return values

        return work

    def pruned(self, what: str, level: float) -> sc.Pruned:
        """The model with this fraction of its heads, of its hidden units, of its embedding, or of each gone."""
        parts = NETS[self.net].parts
        wanted = {pattern: level for name, pattern in parts.items() if what in (name, "all")}
        opened = what in ("embedding", "all")  # the residual stream
        return sc.prune(self.model, self.example, criterion=CRITERION, sparsity=wanted, prune_residual=opened)

    def scores(self, stage: str, model: nn.Module) -> dict[str, float]:
        """Accuracy on the validation and on the test images."""
        named = {"validation": self.parts.validation, "test": self.parts.test}
        return {
            f"{stage}_{part}": evaluate(model, Batches(data, 500, shuffle=False)).accuracy
            for part, data in named.items()
        }

    def cost(self, model: nn.Module, baseline: nn.Module | None = None) -> dict[str, Any]:
        """MACs, parameters, and for each size of batch the milliseconds of each runtime, the dense model in turn."""
        counts = sc.count(model, self.example)
        found: dict[str, Any] = {"macs": counts.macs, "params": counts.params, "latency": []}
        for size in BATCHES if baseline is not None else ():
            images = torch.randn(size, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
            measured = sc.measure(model, images, RUNTIMES, baseline=baseline, threads=1, seconds=self.scale.seconds)
            found["latency"] += [{"batch": size, **asdict(latency)} for latency in measured.latencies]
        return found


def drawn_images(seed: int) -> Splits:
    """Ten classes of noise of their own colour, for `--tiny`."""

    def part(number: int, offset: int) -> Dataset:
        generator = torch.Generator().manual_seed(seed * 10 + offset)
        labels = torch.arange(number) % 10
        colours = torch.randint(256, (10, 3, 1, 1), generator=torch.Generator().manual_seed(0))
        noise = torch.randint(-40, 41, (number, 3, SIDE, SIDE), generator=generator)
        images: Tensor = (colours[labels] + noise).clamp(0, 255).to(torch.uint8)
        return Dataset(images, labels, tuple("abcdefghij"), (0.5,) * 3, (0.3,) * 3, "drawn")

    return Splits(part(256, 0), part(64, 1), part(64, 2), NOTHING)


def collect(options: argparse.Namespace) -> None:
    """Put what is finished into the results: trials of full size, or with `--tiny` the tiny ones."""
    scale = TINY if options.tiny else Scale()
    rows = [row for row in Trials(options.runs / "rows.jsonl").rows() if row["scale"] == asdict(scale)]
    protocol = {
        "data": "cifar10: 49,000 train, 1,000 validation (by seed), 10,000 test; last epoch",
        "scale": asdict(scale),
        "criterion": CRITERION,
        "training": asdict(TRAINING),
        "tuning": asdict(TUNING),
        "titles": {name: net.title for name, net in NETS.items()},
    }
    results: dict[str, Any] = {"protocol": protocol, "machine": describe()}
    for part in ("dense", "pruned"):
        results[part] = [
            {name: value for name, value in row.items() if name not in ("part", "scale")}
            for row in rows
            if row["part"] == part
        ]
    write_bytes(options.out, (json.dumps(results, indent=None) + "\n").encode())


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder of cifar10/*.parquet; default SECATEUR_DATA")
    parser.add_argument("--nets", nargs="+", choices=sorted(NETS), default=sorted(NETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--what", nargs="+", choices=WHAT, default=WHAT, help="what is removed")
    parser.add_argument("--levels", type=float, nargs="+", default=LEVELS, help="how much of it, as fractions")
    parser.add_argument("--tune", action=argparse.BooleanOptionalAction, default=True, help="fine-tune as well")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="models and images that only show that it works")
    parser.add_argument("--collect", action="store_true", help="write down what is finished, and do nothing else")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of models and finished trials")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "vision_transformers.json", help="of --collect")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
