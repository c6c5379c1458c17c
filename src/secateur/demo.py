"""The demo: a small study on handwritten digits, from the store to the report, in one call."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from secateur.errors import InputError
from secateur.report import Record
from secateur.study.dense import Workplace
from secateur.study.driver import Told, run_study
from secateur.study.executors import LocalExecutor
from secateur.study.reading import Results, write_reports
from secateur.study.spec import Study, read_study
from secateur.study.store import Store
from secateur.study.trials import trials_of


@dataclass(frozen=True)
class Demo:
    """What a run of the demo left behind."""

    records: tuple[Record, ...]
    report: Path
    new: int  # trials run this time; the others were there already
    failed: int


def study_file() -> Path:
    """The study that the demo runs."""
    return Path(str(resources.files("secateur.study").joinpath("digits.toml")))


def demo_study(seeds: int) -> Study:
    """That study, for so many seeds."""
    if seeds < 1:
        raise InputError(f"the demo needs at least 1 seed, got {seeds}.")
    return read_study(study_file()).model_copy(update={"seeds": tuple(range(seeds))})


def run_demo(out: Path, study: Study, told: Told = lambda done, line: None, workers: int | None = None) -> Demo:
    """Run the trials that `out/results.db` has not got yet, and write `out/report.html` and `out/report.md`.

    Can be interrupted at any moment and called again. Raises OSError where `out` cannot be written to.
    """
    store, trials = Store(str(out / "results.db")), trials_of(study)
    executor = LocalExecutor(min(workers or os.cpu_count() or 1, len(trials)))
    outcome = run_study(study.name, trials, store, executor, Workplace(out), told=told)
    results = Results.of(study, store)
    page, _ = write_reports(results, store, study_file().parent, out, figures=False)
    return Demo(tuple(results.records), page, outcome.new, len(results.failures))
