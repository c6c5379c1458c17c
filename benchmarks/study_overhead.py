"""What the engine of studies costs per trial: 300 trials without any work under two workers.

    python benchmarks/study_overhead.py [--trials 300] [--workers 2] [--repeats 3]

The wall time of a whole run (store, driver, workers, until the last one is stopped) over the number of trials. Workers
have done one trial each before the clock starts, since what they take to start is the import of torch. On SQLite, and
on the PostgreSQL of SECATEUR_TEST_POSTGRES where that is set; the median of the repeats. Results: one JSON file; exit
code 1 where a trial costs more than 30 ms on SQLite.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from machine import describe
from secateur.files import write_bytes
from secateur.report import Pair, Record
from secateur.study import Store, Trial, trials_of
from secateur.study.dense import Workplace
from secateur.study.driver import run_study
from secateur.study.executors import Job, LocalExecutor
from secateur.study.results import Point, Result
from secateur.study.spec import parse

HERE = Path(__file__).parent
LIMIT_MS = 30
EPOCHS = 30  # points of a curve, as many as a real trial has
STUDY = {
    "name": "overhead",
    "models": ["digits_net"],
    "data": ["digits"],
    "sparsities": [0.5],
    "methods": [{"criterion": "l1"}],
    "training": {"epochs": 1},
    "tuning": {"epochs": 1},
    "controls": {"random": False, "magnitude": False, "unpruned": False, "smaller": False},
}


def nothing(trial: Trial, place: Workplace) -> Result:
    """A result without any work."""
    record = Record(
        key=trial.key,
        model=trial.net.title,
        data=trial.data.title,
        criterion="l1",
        scope="",
        sparsity=trial.sparsity,
        seed=trial.seed,
        accuracy_dense=0.9,
        accuracy_pruned=0.5,
        accuracy_finetuned=0.9,
        params=Pair(2, 1),
        macs=Pair(2, 1),
        latency_ms=Pair(2.0, 1.0),
        speedup=2.0,
        verified_difference=0.0,
        widths=(),
        seconds=0.0,
    )
    return Result(record, tuple(Point("tune 1", epoch, 0.5, 0.9, 0.1) for epoch in range(1, EPOCHS + 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "study_overhead.json")
    options = parser.parse_args()
    server = os.environ.get("SECATEUR_TEST_POSTGRES")
    runs: dict[str, list[float]] = {}
    for repeat in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            urls = {"sqlite": f"sqlite:///{folder}/results.db", **({"postgresql": server} if server else {})}
            for kind, url in urls.items():
                name = f"overhead-{os.getpid()}-{repeat}"
                seconds = _seconds(name, url, options.trials, options.workers, Path(folder) / kind)
                runs.setdefault(kind, []).append(round(1000 * seconds / options.trials, 2))
    results = {
        "trials": options.trials,
        "workers": options.workers,
        "repeats": options.repeats,
        "epochs_per_curve": EPOCHS,
        "ms_per_trial": {kind: median(values) for kind, values in runs.items()},
        "runs_ms_per_trial": runs,
        "limit_ms": LIMIT_MS,
        "machine": describe(),
    }
    write_bytes(options.out, (json.dumps(results, indent=1) + "\n").encode())
    print(json.dumps(results, indent=1))
    sys.exit(results["ms_per_trial"]["sqlite"] > LIMIT_MS)


def _seconds(name: str, url: str, number: int, workers: int, folder: Path) -> float:
    """Of one run of so many trials in a store, by workers that have started."""
    trials = trials_of(parse({**STUDY, "name": name, "seeds": list(range(number))}, "here"))
    executor, place = LocalExecutor(workers), Workplace(folder)
    for worker in range(workers):
        executor.start(Job(f"start {worker}", nothing, (trials[0], place)))
    started = 0
    while started < workers:
        started += len(executor.ended(1.0))
    store = Store(url)
    start = time.perf_counter()
    outcome = run_study(name, trials, store, executor, place, work=nothing, prepare=None)
    seconds = time.perf_counter() - start
    assert (outcome.new, outcome.failures) == (number, ())
    assert len(store.done(name)) == number
    store.close()
    return seconds


def section_lines(results: Mapping[str, Any], file: str) -> list[str]:
    """Its part of the results page."""
    names = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}
    costs = [f"{value:g} ms on {names[kind]}" for kind, value in results["ms_per_trial"].items()]
    machine = results["machine"]
    return [
        "## What the engine of studies costs",
        "",
        f"Command: `python benchmarks/study_overhead.py`. File: `benchmarks/results/{file}`. {results['trials']} "
        f"trials without any work, each with a curve of {results['epochs_per_curve']} epochs, under "
        f"{results['workers']} workers that had started before (which takes what it takes to import torch); wall time "
        f"per trial, median of {results['repeats']} runs, on {machine['cpu']}, {machine['cores']} cores, "
        f"load {machine['load_average_1min']}:",
        "",
        f"- **{', '.join(costs)}** (limit: {results['limit_ms']} ms)",
        "",
    ]


if __name__ == "__main__":
    main()
