"""The report as Markdown: the same sentences, warnings and tables, for a repository or a paper's appendix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.errors import InputError
from secateur.files import write_bytes
from secateur.report import format as fmt
from secateur.report.beside import HEADS, Beside, beside, beside_sentence, sources_of
from secateur.report.checks import failure_warning
from secateur.report.findings import find
from secateur.report.layers import width_table
from secateur.report.overview import Panel, panels
from secateur.report.records import Failure, Record, Reference, as_records, studies
from secateur.report.sections import Duels, blocks, duel_table
from secateur.report.statistics import Summary, summarise
from secateur.report.tables import markdown_rows, markdown_table
from secateur.report.timings import timing_table
from secateur.report.words import words_for


def write_markdown(
    records: Iterable[Record | Mapping[str, Any]],
    path: Path | str,
    title: str = "Pruning report",
    *,
    references: Sequence[Reference] = (),
    notes: Sequence[str] = (),
    failures: Sequence[Failure] = (),
) -> Path:
    """Write the report as one Markdown file, atomically; returns the path. Arguments and errors as `write_report`'s."""
    found = as_records(records)
    if not found:
        raise InputError("no records to report on: run at least one trial first.")
    results = {place: (rows, summarise(rows)) for place, rows in studies(found).items()}
    parts = [f"# {_plain(title)}\n"]
    if failures:
        parts.append(f"**{failure_warning(failures)}** They are listed at the end.\n")
    if len(results) > 1:
        parts += _overview(panels({place: summaries for place, (_, summaries) in results.items()}), duel_table(found))
    if references or notes:
        parts += _published(beside(found, references), notes)
    for (model, data), (rows, summaries) in results.items():
        parts += _section(model, data, rows, summaries)
    parts += ["## What the words mean\n", "\n".join(f"- **{word}**: {text}" for word, text in words_for(found)) + "\n"]
    if failures:
        parts += ["## Failed trials\n", markdown_rows(("trial", "error"), [(f.key, f.error) for f in failures], text=2)]
    write_bytes(path, "\n".join(parts).encode())
    return Path(path)


def _overview(found: Sequence[Panel], duels: Duels | None) -> Iterator[str]:
    yield "## What each method costs\n"
    yield "Test accuracy of the fine-tuned model minus that of its dense model, in points; means over seeds.\n"
    for panel in found:
        yield f"{panel.title} removed:\n"
        rows = [(model, data, *(cell.text if cell else "-" for cell in cells)) for model, data, cells in panel.rows]
        yield markdown_rows(("model", "data", *panel.methods), [*rows, ("mean", "", *panel.means)], text=2)
    if duels:
        yield "## Method against method, all models and data sets\n"
        yield _duels(duels)


def _published(rows: Sequence[Beside], notes: Sequence[str]) -> Iterator[str]:
    sources = sources_of(rows)
    yield "## Beside published numbers\n"
    if rows:
        yield f"{beside_sentence(rows)}\n"
        yield "\n".join(f"{place}. {_plain(source)}" for place, source in enumerate(sources, start=1)) + "\n"
        yield markdown_rows(HEADS, [row.cells(sources) for row in rows], text=3)
    if notes:
        yield "\n".join(f"- {_plain(note)}" for note in notes) + "\n"


def _section(model: str, data: str, records: Sequence[Record], summaries: Sequence[Summary]) -> Iterator[str]:
    findings = find(records, summaries)
    seeds = len({r.seed for r in records})
    yield f"## {_plain(model)} on {_plain(data)}\n"
    yield f"{fmt.several(len(records), 'trial')}, {fmt.several(seeds, 'seed')}. **{findings.headline}.**\n"
    yield "\n\n".join(findings.facts) + "\n"
    if findings.warnings:
        yield "Warnings:\n"
        yield "\n".join(f"- {warning}" for warning in findings.warnings) + "\n"
    yield markdown_table(summaries)
    duels = duel_table(records)
    if duels:
        yield "### Method against method\n"
        yield _duels(duels)
    timings = timing_table(summaries)
    if timings:
        yield "### Measured time\n"
        yield f"{timings.note}\n"
        yield markdown_rows(timings.heads, timings.rows)
    widths = width_table(summaries, findings.chosen)
    if widths:
        yield f"### Width of each layer: {_plain(widths.method)}\n"
        yield markdown_rows(widths.heads, widths.rows)
    for heading, values in blocks(records[0].fingerprint).items():
        yield f"- {heading}: {', '.join(f'{name} {value}' for name, value in values.items())}"
    yield ""


def _duels(duels: Duels) -> str:
    rows = [
        (method, *("-" if duel is None else fmt.gain(duel.gain) + (" *" if duel.clear else "") for duel in cells))
        for method, cells in duels.rows
    ]
    note = (
        "Points of fine-tuned test accuracy by which the row exceeds the column, paired by model, data, sparsity "
        "(masked models: weights left), target and seed. * = the 95 % interval over three seeds or more leaves "
        "out zero.\n"
    )
    return markdown_rows(("", *duels.methods), rows) + "\n" + note


def _plain(text: str) -> str:
    """On one line, so that it cannot begin a block of its own."""
    return " ".join(text.split())
