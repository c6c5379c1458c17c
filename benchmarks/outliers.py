"""Repair with and without a limit on what one position may weigh in the least squares: decision 0011's figures.

    python benchmarks/outliers.py --data-dir DATA [--nets MiniLM-L6 ...]

The networks are those of the studies (CPU profiles): their dense models come from runs/dense, and are trained where
they are missing. Validation accuracy without fine-tuning. Finished cases are kept in runs/outliers.jsonl; results: one
JSON file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
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
LIMITS = (math.inf, 16.0, 4.0, 1.0, 0.1)  # times the median energy; infinite: every position weighs the same
FOLD, FIT = "fold", "least_squares"


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
    parser.add_argument("--out", type=Path, default=HERE / "results" / "outliers.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load_torchvision()
    trials = Trials(RUNS / "outliers.jsonl")
    place = Workplace(RUNS, options.data_dir and Path(options.data_dir))
    for case in CASES:
        for level in case.levels if case.net in options.nets else ():
            key = {"net": case.net, "level": level}
            if trials.find(key) is None:
                trials.add(key, measured(case, level, place))
    rows = [trials.find({"net": case.net, "level": level}) for case in CASES for level in case.levels]
    results = {"rows": [row for row in rows if row], "machine": describe()}
    write_bytes(options.out, (json.dumps(results, indent=1) + "\n").encode())


def measured(case: Case, level: float, place: Workplace) -> dict[str, Any]:
    """Validation accuracies of the network as it was cut, and repaired under each limit."""
    made = cut(case.study, case.net, case.method, level, place)
    dense, small, trial = made.dense, made.small, made.trial

    def validated(model: nn.Module) -> float:
        return accuracy(model, made.task, "validation", place.device, trial.training)

    def repaired(limit: float, step: str) -> float:
        usual, reconstruction.OUTLIERS = reconstruction.OUTLIERS, limit
        try:
            steps = (step, "batch_norm") if repairable(small.model) else (step,)
            model = sc.repair(small.model, made.data, dense=dense.model, plan=small.plan, steps=steps, seed=trial.seed)
        finally:
            reconstruction.OUTLIERS = usual
        return validated(model)

    return {
        "method": case.method,
        "data": trial.data.title,
        "calibration": trial.calibration,
        "dense": dense.scores.validation,
        "cut": validated(small.model),
        FOLD: {str(limit): repaired(limit, FOLD) for limit in (math.inf, reconstruction.OUTLIERS)},
        FIT: {str(limit): repaired(limit, FIT) for limit in LIMITS},
    }


def section_lines(results: Mapping[str, Any], file: str) -> list[str]:
    """Its part of the results page."""
    used = str(reconstruction.OUTLIERS)
    rows: Sequence[Mapping[str, Any]] = results["rows"]
    header = ["", "dense", "as cut", "fold, no limit", "fold, used", "no limit"]
    names = [f"{float(limit):g} x" + (" (used)" if limit == used else "") for limit in map(str, LIMITS[1:])]
    return [
        "## Positions with huge outputs in a repair",
        "",
        f"Command: `python benchmarks/outliers.py --data-dir DATA`. File: `benchmarks/results/{file}`. Validation "
        "accuracies in percent without fine-tuning; the columns behind the folding of constants are least squares in "
        "which a position with more than so many times the median energy weighs less. "
        "Why: [decision 0011](decisions/0011-outliers-in-the-least-squares.md).",
        "",
        *number_table(
            [*header, *names],
            [
                [
                    f"{row['net']}, {row['method']}, {row['level']:.0%} ({row['data']})",
                    *(f"{100 * value:.1f}" for value in (row["dense"], row["cut"])),
                    *(f"{100 * value:.1f}" for value in (*row[FOLD].values(), *row[FIT].values())),
                ]
                for row in rows
            ],
        ),
        "",
    ]


if __name__ == "__main__":
    sys.exit(main())
