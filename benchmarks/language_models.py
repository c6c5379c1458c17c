"""Language models pruned in one shot: weights by three methods, widths with three repairs, and one large block.

    python benchmarks/language_models.py train --data-dir DATA
    python benchmarks/language_models.py oneshot | structured --data-dir DATA
    python benchmarks/language_models.py block --width 1024 --inner 2752 --heads 8
    python benchmarks/language_models.py collect

DATA holds text/tinyshakespeare.txt, and text/wikitext-2/valid.txt if that is to be scored too. Finished trials are kept
in runs/language_models/rows.jsonl; the same command goes on where it stopped, and several processes may run it side by
side. `collect` writes benchmarks/results/language_models.json. Calibration windows are of the training text alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import language_blocks
import language_nets as nets
import secateur as sc
from machine import describe
from secateur.files import write_bytes
from secateur.measuring.watching import watched
from trials import Trials

HERE = Path(__file__).parent
RUNS = HERE.parent / "runs" / "language_models"
METHODS = ("magnitude", "wanda", "sparsegpt")
PATTERNS: dict[str, dict[str, Any]] = {
    "unstructured": {"sparsity": 0.5},
    "2:4": {"pattern": "2:4"},
    "4:8": {"pattern": "4:8"},
}
WIDTHS = (0.25, 0.5)  # of the heads (or groups of heads) and hidden units of every layer
CRITERION = "l2"
REPAIRS: dict[str, tuple[str, ...]] = {
    "none": (),
    "fold": ("fold",),
    "scale": ("scale",),
    "least squares": ("least_squares",),
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    if options.part == "collect":
        collect(options)
        return
    if options.part == "block":
        block(options)
        return
    scale = nets.TINY if options.tiny else nets.Scale()
    texts = nets.read_texts(options.data_dir, scale, options.runs)
    for seed in options.seeds:
        for kind in options.nets:
            PARTS[options.part](options, Bench(options.runs, kind, seed, texts, scale))


class Bench:
    """A trained model, and the texts it is judged by."""

    def __init__(self, runs: Path, kind: str, seed: int, texts: nets.Texts, scale: nets.Scale) -> None:
        self.kind, self.seed, self.texts, self.scale = kind, seed, texts, scale
        self.trials = Trials(runs / "rows.jsonl")
        found = self._trained(runs)
        self.model, self.facts = found.model, found.facts
        self.unit = {"net": kind, "seed": seed, "model": found.digest}
        self.calibration = nets.calibration(texts, scale, seed)

    def _trained(self, runs: Path) -> nets.Dense:
        """The dense model; where another process is training it, wait for that."""
        while True:
            with self.trials.claimed({"train": self.kind, "seed": self.seed}) as mine:
                if mine:
                    return nets.dense(self.kind, self.texts, self.scale, self.seed, runs)
            time.sleep(1)

    def perplexities(self, model: nn.Module) -> dict[str, float]:
        """By text, in windows that move on by half of their length."""
        length = self.scale.length
        return {
            name: round(sc.perplexity(model, tokens, length=length, stride=length // 2).value, 4)
            for name, tokens in self.texts.scored.items()
        }

    def once(self, key: dict[str, Any], work: Callable[[], dict[str, Any]]) -> None:
        """Do the trial, unless it is finished or another process is at it."""
        key = {**key, **self.unit}
        with self.trials.claimed(key) as mine:
            if mine and self.trials.find(key) is None:
                values = {**work(), "threads": torch.get_num_threads()}
                self.trials.add(key, values)
                print(key, values["perplexity"], f"{values.get('seconds', 0):.1f} s", flush=True)


def train(options: argparse.Namespace, bench: Bench) -> None:
    """The dense model and its perplexity."""
    scale = asdict(bench.scale)
    sizes = {name: round(size, 3) for name, size in bench.texts.bytes_per_token.items()}
    tokens = {name: len(found) for name, found in {"train": bench.texts.train, **bench.texts.scored}.items()}
    more = {"scale": scale, "bytes_per_token": sizes, "tokens": tokens}
    bench.once({"part": "dense"}, lambda: {"perplexity": bench.perplexities(bench.model), **bench.facts, **more})


def oneshot(options: argparse.Namespace, bench: Bench) -> None:
    """Half of the weights of every layer in the blocks, by each method and in each pattern."""
    train(options, bench)
    for pattern, asked in PATTERNS.items():
        for method in METHODS:
            bench.once(
                {"part": "oneshot", "method": method, "pattern": pattern}, lambda m=method, a=asked: _shot(bench, m, a)
            )


def _shot(bench: Bench, method: str, asked: dict[str, Any]) -> dict[str, Any]:
    with watched() as cost:
        result = sc.prune_layerwise(bench.model, bench.calibration, method, **asked, seed=bench.seed, progress=False)
    peaks = [block.peak_bytes for block in result.blocks if block.peak_bytes is not None]
    return {
        "perplexity": bench.perplexities(result.model),
        "sparsity": sum(block.zeros for block in result.blocks) / sum(block.weights for block in result.blocks),
        "seconds": round(cost.seconds, 2),
        "block_seconds": [round(block.seconds, 3) for block in result.blocks],
        "peak_bytes": max(peaks, default=None),
    }


def structured(options: argparse.Namespace, bench: Bench) -> None:
    """Heads, groups of heads and hidden units removed, and what repair without gradients wins back."""
    train(options, bench)
    for sparsity in WIDTHS:
        for repair, steps in REPAIRS.items():
            key = {"part": "structured", "criterion": CRITERION, "sparsity": sparsity, "repair": repair}
            bench.once(key, lambda s=sparsity, r=steps: _narrowed(bench, s, r))


def _narrowed(bench: Bench, sparsity: float, steps: tuple[str, ...]) -> dict[str, Any]:
    example = bench.calibration[0][:2]
    with watched() as cost:
        pruned = sc.prune(bench.model, example, criterion=CRITERION, sparsity=sparsity, repair=(), seed=bench.seed)
    with watched() as mending:
        small = pruned.model
        if steps:
            small = sc.repair(
                small, bench.calibration, dense=bench.model, plan=pruned.plan, steps=steps, seed=bench.seed
            )
    summary = pruned.summary
    return {
        "perplexity": bench.perplexities(small),
        "params": list(summary.params),
        "macs": list(summary.macs),
        "channels": list(summary.channels),
        "verified_difference": summary.verified_difference,
        "seconds": round(cost.seconds, 2),
        "repair_seconds": round(mending.seconds, 2),
        "peak_bytes": max((c.peak_bytes for c in (cost, mending) if c.peak_bytes is not None), default=None),
    }


def block(options: argparse.Namespace) -> None:
    """One block of a large model's shape, in processes of its own."""
    shape = language_blocks.Shape(
        options.width, options.inner, options.heads, options.heads, windows=options.windows, length=options.length
    )
    trials = Trials(options.runs / "rows.jsonl")
    for pattern in ("unstructured", "2:4"):
        for method in METHODS:
            key = {
                "part": "block",
                "method": method,
                "pattern": pattern,
                "shape": asdict(shape),
                "threads": options.threads,
            }
            with trials.claimed(key) as mine:
                if mine and trials.find(key) is None:
                    values = language_blocks.apart(shape, method, PATTERNS[pattern], threads=options.threads)
                    trials.add(key, values)
                    print(
                        key, f"{values['block_seconds']:.1f} s, {(values['peak_bytes'] or 0) / 1e9:.2f} GB", flush=True
                    )


def collect(options: argparse.Namespace) -> None:
    """Put what is finished into the results; parts of which nothing was run here stay as they are."""
    rows = Trials(options.runs / "rows.jsonl").rows()
    recipe = asdict(nets.recipe(nets.Scale(), 0))
    protocol = {
        "titles": nets.KINDS,
        "training": {
            name: recipe[name] for name in ("lr", "optimizer", "weight_decay", "warmup_epochs", "clip_norm", "bf16")
        },
        "validation": nets.VALIDATION,
    }
    before = json.loads(options.out.read_text()) if options.out.exists() else {}
    here = {row["part"] for row in rows}
    trained = "dense" in here or "machine" not in before  # rows of blocks say themselves where they are from
    results = {"protocol": protocol, "machine": describe() if trained else before["machine"]}
    for part in ("dense", "oneshot", "structured", "block"):
        found = [{k: v for k, v in row.items() if k != "part"} for row in rows if row["part"] == part]
        results[part] = found if part in here else before.get(part, [])
    write_bytes(options.out, (json.dumps(results, indent=None) + "\n").encode())


PARTS = {"train": train, "oneshot": oneshot, "structured": structured}


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "block", "collect"])
    parser.add_argument("--data-dir", type=Path, help="folder with text/tinyshakespeare.txt; default SECATEUR_DATA")
    parser.add_argument("--nets", nargs="+", choices=sorted(nets.KINDS), default=sorted(nets.KINDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="models and texts that only show that it works")
    parser.add_argument("--width", type=int, default=4096, help="of the block, like the following")
    parser.add_argument("--inner", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of models and finished trials")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "language_models.json", help="of `collect`")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
