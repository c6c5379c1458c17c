"""A study's results out of its store: what the report, the tables and the status are made from."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from secateur.errors import InputError
from secateur.report.records import Failure, Record, Reference
from secateur.study.results import Point
from secateur.study.spec import Study, read_profiles, read_study
from secateur.study.store import Row, Store, flat
from secateur.study.trials import Trial, trials_of

FORMATS = ("csv", "json", "parquet")
RECENT = 20  # trials by which the rate is judged


@dataclass(frozen=True)
class Results:
    """What is finished of a study at one scale, in the order of its grid."""

    study: Study
    trials: tuple[Trial, ...]
    rows: tuple[Row, ...]

    @classmethod
    def of(cls, study: Study, store: Store) -> Results:
        """Those that the store has. Labels (of models, methods) are those of the study as it is now."""
        trials = trials_of(study)
        found = {row.key: row for row in store.rows(study.name, {trial.key for trial in trials})}
        return cls(study, trials, tuple(_labelled(found[t.key], t) for t in trials if t.key in found))

    @property
    def records(self) -> list[Record]:
        """Of the trials that did not fail."""
        return [row.record for row in self.rows if row.record is not None]

    @property
    def failures(self) -> list[Failure]:
        """Of those that did."""
        return [Failure(row.key, row.error) for row in self.rows if row.error is not None]


def results_of(path: Path | str, store: Store, profile: str | None = None) -> Results:
    """What the store has of the study in a file; without `profile`, at the scale of which it has most."""
    if profile is not None:
        return Results.of(read_study(path, profile), store)
    return max((Results.of(study, store) for study in read_profiles(path).values()), key=lambda found: len(found.rows))


def _labelled(row: Row, trial: Trial) -> Row:
    if row.record is None:
        return row
    net, data, method = trial.net.title, trial.data.title, trial.method.title
    return replace(row, record=replace(row.record, model=net, data=data, method=method, control=trial.control))


def references_of(study: Study, folder: Path) -> list[Reference]:
    """The published numbers that a study names. Raises InputError for a file outside its folder or a bad line."""
    if study.reference is None:
        return []
    path = (folder / study.reference.file).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise InputError(f"reference.file is a path inside {folder}; got {study.reference.file!r}.")
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    try:
        return [
            Reference(
                model=net.title,
                data=data.title,
                method=line["method"],
                sparsity=float(line["sparsity"]),
                stage=line["stage"],
                accuracy=float(line["accuracy"]) / 100,
                source=study.reference.source,
                note=line.get("note") or "",
            )
            for line in lines
            for net in study.models
            for data in study.data
            if (net.stands_for or net.title) == line["model"] and data.name == line["data"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: columns are model,data,method,sparsity,stage,accuracy,note; {error!r}.") from error


def as_bytes(rows: Iterable[Row], form: str) -> bytes:
    """The rows as one CSV, JSON (a list) or Parquet file."""
    plain = [flat(row) for row in rows]
    columns = list(dict.fromkeys(name for line in plain for name in line)) or ["key", "finished", "error"]
    if form == "json":
        whole = [{"key": row.key, "finished": row.finished, "error": row.error, **_record(row)} for row in rows]
        return (json.dumps(whole, indent=1) + "\n").encode()
    if form == "parquet":
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist([{name: line.get(name) for name in columns} for line in plain])
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(table, sink)
        return bytes(sink.getvalue().to_pybytes())
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(plain)
    return text.getvalue().encode()


def _record(row: Row) -> Mapping[str, Any]:
    return {} if row.record is None else json.loads(row.record.to_json())


@dataclass(frozen=True)
class Progress:
    """How far a study is."""

    total: int
    done: int  # failed ones among them
    failed: int
    per_hour: float | None  # of the last trials; None where there are fewer than two
    expected_end: datetime | None  # at that rate, local time; None where it is done or nothing is known
    last: datetime | None


def progress_of(results: Results) -> Progress:
    """From the times at which trials finished."""
    times = sorted(datetime.fromisoformat(row.finished) for row in results.rows)[-RECENT:]
    span = (times[-1] - times[0]).total_seconds() if len(times) > 1 else 0.0
    rate = (len(times) - 1) / span if span > 0 else None
    left = len(results.trials) - len(results.rows)
    end = (datetime.now(UTC) + timedelta(seconds=left / rate)).astimezone() if rate and left else None
    return Progress(
        total=len(results.trials),
        done=len(results.rows),
        failed=len(results.failures),
        per_hour=None if rate is None else rate * 3600,
        expected_end=end,
        last=times[-1].astimezone() if times else None,
    )


def curves_of(results: Results, store: Store) -> dict[str, list[Point]]:
    """The training curves of the finished trials, by key."""
    return store.curves(results.study.name, {row.key for row in results.rows})


def write_reports(results: Results, store: Store, folder: Path, out: Path, *, figures: bool) -> list[Path]:
    """Write report.html and report.md, and PNG figures where asked; returns the paths.

    `folder`: where the study file lies, beside which its reference numbers are.
    """
    from secateur.report import write_figures, write_markdown, write_report

    study = results.study
    if not results.records:
        failed = f" ({len(results.failures)} failed: see `secateur study status`)" if results.failures else ""
        raise InputError(f"no trial of {study.name!r} in {store} that could be reported{failed}: run it first.")
    references = references_of(study, folder)
    notes = study.reference.notes if study.reference else ()
    title = study.title or study.name
    told: dict[str, Any] = {"references": references, "notes": notes, "failures": results.failures}
    written = [
        write_report(results.records, out / "report.html", title, curves=curves_of(results, store), **told),
        write_markdown(results.records, out / "report.md", title, **told),
    ]
    return [*written, *(write_figures(results.records, out / "figures") if figures else [])]
