"""How much of the saved multiplications becomes speed: a text classifier with heads and hidden units removed.

    python benchmarks/text_latency.py --data-dir DATA [--seconds 3]

The dense MiniLM of studies/sst2_structured.toml and what Taylor leaves of it, widths as in the study, in turns, one
thread; nothing else should run on the machine. Results: one JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

import secateur as sc
from machine import describe
from secateur.files import write_bytes
from secateur.study.dense import Workplace
from study_cuts import RUNS, cut
from tables import number_table
from zoo import load_torchvision

HERE = Path(__file__).parent
NET, METHOD, LEVELS = "MiniLM-L6", "Taylor", (0.2, 0.4, 0.6, 0.8)
RUNTIMES = ("eager", "onnxruntime")
SHAPES = ((1, 16), (16, 16), (1, 128), (16, 128))  # batch size, length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("SECATEUR_DATA"))
    parser.add_argument("--seconds", type=float, default=3.0, help="per model, runtime and shape")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "text_latency.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load_torchvision()
    place = Workplace(RUNS, options.data_dir and Path(options.data_dir))
    rows = [row for level in LEVELS for row in measured(level, place, options.seconds)]
    results = {"net": NET, "method": METHOD, "seconds": options.seconds, "rows": rows, "machine": describe()}
    write_bytes(options.out, (json.dumps(results, indent=1) + "\n").encode())


def measured(level: float, place: Workplace, seconds: float) -> list[dict[str, Any]]:
    """One row per shape and runtime."""
    made = cut("sst2_structured", NET, METHOD, level, place)
    dense, small = made.dense.model, made.small.model
    rows = []
    for batch, length in SHAPES:
        example = made.task.example(batch, length)
        macs = sc.count(dense, example).macs / sc.count(small, example).macs
        times = sc.measure(small, example, RUNTIMES, baseline=dense, threads=1, seconds=seconds)
        for found in times.latencies:
            spread = (found.upper_ms - found.lower_ms) / found.median_ms
            row = {"level": level, "batch": batch, "length": length, "runtime": found.runtime, "macs_ratio": macs}
            row |= {"dense_ms": found.baseline_ms, "pruned_ms": found.median_ms, "speedup": found.speedup}
            rows.append({**row, "spread": spread})
            print(row, flush=True)
    return rows


def section_lines(results: Mapping[str, Any], file: str) -> list[str]:
    """Its part of the results page."""
    rows, machine = results["rows"], results["machine"]
    levels = sorted({row["level"] for row in rows})

    def cells(batch: int, length: int, runtime: str) -> list[str]:
        there = {
            row["level"]: row
            for row in rows
            if (row["batch"], row["length"], row["runtime"]) == (batch, length, runtime)
        }
        return [f"{there[level]['speedup']:.2f} ({_share(there[level]):.0%})" for level in levels]

    shares = [
        median(_share(row) for row in rows if (row["level"], row["runtime"]) == (at, RUNTIMES[1])) for at in levels
    ]
    ratios = [median(row["macs_ratio"] for row in rows if row["level"] == level) for level in levels]
    return [
        "## What removed heads and hidden units are worth in time",
        "",
        f"Command: `python benchmarks/text_latency.py --data-dir DATA`. File: `benchmarks/results/{file}`. "
        f"{results['net']}, {results['method']}, widths as in the study of text classifiers "
        f"([docs/studies](studies/README.md)); one thread on {machine['cpu']}, torch {machine['torch']}, "
        f"{results['seconds']:g} s per model, runtime and shape, dense and pruned in turns. Speed-up, and in brackets "
        "its part of the ratio of multiplications.",
        "",
        *number_table(
            ["removed of the encoder", *(f"{level:.0%}" for level in levels)],
            [
                ["dense MACs / pruned MACs", *(f"{ratio:.2f}" for ratio in ratios)],
                *(
                    [f"{runtime}, batch {batch}, length {length}", *cells(batch, length, runtime)]
                    for runtime in RUNTIMES
                    for batch, length in SHAPES
                ),
                [f"median part, {RUNTIMES[-1]}", *(f"{share:.0%}" for share in shares)],
            ],
        ),
        "",
    ]


def _share(row: Mapping[str, Any]) -> float:
    return row["speedup"] / row["macs_ratio"]


if __name__ == "__main__":
    sys.exit(main())
