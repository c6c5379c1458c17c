"""What each step of a repair brings before any fine-tuning, and what a limit on single positions does to it.

    python benchmarks/repairs.py --data-dir DATA [--nets MiniLM-L6 ...]

The networks are those of the studies (CPU profiles): their dense models come from runs/dense, and are trained where
they are missing. Validation accuracies. What is finished is kept in runs/repairs.jsonl; results: one JSON file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import secateur as sc
from machine import describe
from secateur import reconstruction
from secateur.files import write_bytes
from secateur.repairing import repairable
from secateur.study.dense import Workplace, accuracy
from study_cuts import RUNS, cut
from tables import number_table
from trials import Trials
from zoo import load_torchvision

HERE = Path(__file__).parent
LITTLE, MUCH = 100, 2000  # samples
USED = reconstruction.OUTLIERS


@dataclass(frozen=True)
class Repair:
    """A column of the table. `limit`: times the median energy, what a position may weigh; inf: all weigh the same."""

    title: str
    step: str
    samples: int = MUCH
    limit: float = USED


REPAIRS = (
    Repair("BatchNorm only", "batch_norm"),
    Repair("fold, no limit", "fold", limit=math.inf),
    Repair("fold", "fold"),
    Repair(f"scale, {LITTLE} samples", "scale", LITTLE),
    Repair("scale", "scale"),
    Repair("least squares, no limit", "least_squares", limit=math.inf),
    Repair("16 x", "least_squares", limit=16.0),
    Repair(f"{USED:g} x (used)", "least_squares"),
    Repair("1 x", "least_squares", limit=1.0),
    Repair("0.1 x", "least_squares", limit=0.1),
)


@dataclass(frozen=True)
class Case:
    """A network and a method of one of the studies, at levels of sparsity."""

    net: str
    study: str
    method: str
    levels: tuple[float, ...]


CASES = (
    Case("MiniLM-L6", "sst2_structured", "Taylor", (0.4, 0.6, 0.8)),
    Case("ResNet-18 (width 16)", "s1", "L1", (0.2, 0.4)),
    Case("VGG-13 (width 24)", "s1", "L1", (0.2, 0.4)),
    Case("AlexNet (512 hidden units)", "s5", "removed channels", (0.2, 0.4)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("SECATEUR_DATA"))
    parser.add_argument("--nets", nargs="+", choices=[case.net for case in CASES], default=[case.net for case in CASES])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "repairs.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load_torchvision()
    trials = Trials(RUNS / "repairs.jsonl")
    place = Workplace(RUNS, options.data_dir and Path(options.data_dir))
    nets = [(case, level) for case in CASES for level in case.levels]
    for case, level in nets:
        if case.net in options.nets:
            measure(case, level, place, trials)
    results = {"rows": [row for case, level in nets for row in rows_of(case, level, trials)], "machine": describe()}
    write_bytes(options.out, (json.dumps(results, indent=1) + "\n").encode())


def keys(case: Case, level: float) -> Iterator[tuple[Repair, dict[str, Any]]]:
    """What is measured of a network, and by what it is found again."""
    for repair in REPAIRS:
        asked = {"step": repair.step, "samples": repair.samples, "limit": str(repair.limit)}
        yield repair, {"net": case.net, "method": case.method, "level": level, **asked}


def rows_of(case: Case, level: float, trials: Trials) -> list[dict[str, Any]]:
    """Those that are finished."""
    return [row for _, key in keys(case, level) if (row := trials.find(key)) is not None]


def measure(case: Case, level: float, place: Workplace, trials: Trials) -> None:
    """Whatever is missing of this network at this level."""
    missing = [(repair, key) for repair, key in keys(case, level) if trials.find(key) is None]
    if not missing:
        return
    made = cut(case.study, case.net, case.method, level, place)
    dense, small = made.dense, made.small

    def validated(model: nn.Module) -> float:
        return accuracy(model, made.task, "validation", place.device, made.trial.training)

    facts = {"data": made.trial.data.title, "dense": dense.scores.validation, "cut": validated(small.model)}
    for repair, key in missing:
        steps = {repair.step, "batch_norm"} if repairable(small.model) else {repair.step} - {"batch_norm"}
        model = small.model
        if steps:
            reconstruction.OUTLIERS = repair.limit
            towards = {"dense": dense.model, "plan": small.plan, "steps": steps, "seed": made.trial.seed}
            model = sc.repair(small.model, made.data, samples=repair.samples, **towards)
        trials.add(key, {**facts, "accuracy": validated(model)})
        print(key, trials.find(key), flush=True)


def section_lines(results: Mapping[str, Any], file: str) -> list[str]:
    """Its part of the results page."""
    nets: dict[tuple[str, float], dict[tuple[str, int, str], Mapping[str, Any]]] = {}
    for row in results["rows"]:
        nets.setdefault((row["net"], row["level"]), {})[row["step"], row["samples"], row["limit"]] = row
    lines = []
    for (net, level), rows in nets.items():
        one = next(iter(rows.values()))
        found = [rows.get((repair.step, repair.samples, str(repair.limit)), {}).get("accuracy") for repair in REPAIRS]
        cells = ["" if value is None else f"{100 * value:.1f}" for value in (one["dense"], one["cut"], *found)]
        lines.append([f"{net}, {one['method']}, {level:.0%} ({one['data']})", *cells])
    return [
        "## What each step of a repair brings",
        "",
        f"Command: `python benchmarks/repairs.py --data-dir DATA`. File: `benchmarks/results/{file}`. Validation "
        f"accuracies in percent without fine-tuning, up to {MUCH:,} samples; BatchNorm statistics are measured anew in "
        "every column behind the second, where there are any. The last five columns are the least squares: without a "
        "limit, and with a position weighing less that has more than so many times the median energy "
        "([decision 0011](decisions/0011-outliers-in-the-least-squares.md)); what is used for little data: "
        "[decision 0012](decisions/0012-outputs-are-scaled-where-data-is-short.md).",
        "",
        *number_table(["", "dense", "as cut", *(repair.title for repair in REPAIRS)], lines),
        "",
    ]


if __name__ == "__main__":
    sys.exit(main())
