"""The report as one HTML file: everything inlined, nothing fetched, readable from a folder or an e-mail."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from secateur.errors import InputError
from secateur.files import write_bytes
from secateur.report import charts, palette
from secateur.report.findings import Findings, find
from secateur.report.format import several
from secateur.report.records import Record, as_records, studies
from secateur.report.statistics import Summary, pareto_front, summarise
from secateur.report.tables import COLUMNS, TRIAL_COLUMNS, spread_note


@dataclass(frozen=True)
class Section:
    """What the page says about one model on one data set."""

    model: str
    data: str
    records: Sequence[Record]
    summaries: Sequence[Summary]
    findings: Findings
    front: Sequence[Summary]
    note: str
    figures: Mapping[str, str]  # name -> plotly figure as JSON
    widths: str  # JSON: one entry per setting, for the menu above the width chart
    fingerprint: Mapping[str, Mapping[str, Any]]  # heading -> name -> value


def write_report(
    records: Iterable[Record | Mapping[str, Any]], path: Path | str, title: str = "Pruning report"
) -> Path:
    """Write the page for some records (or plain dicts with the same fields) atomically; returns the path.

    Every (model, data) pair gets its own section. Raises InputError for no records, OSError where the file cannot be
    written; an old report then survives.
    """
    found = as_records(records)
    if not found:
        raise InputError("no records to report on: run at least one trial first.")
    sections = [section(rows) for rows in studies(found).values()]
    write_bytes(path, render(sections, title).encode())
    return Path(path)


def section(records: Sequence[Record]) -> Section:
    """Everything the page shows about records of one model on one data set."""
    summaries = summarise(records)
    findings = find(records, summaries)
    return Section(
        model=records[0].model,
        data=records[0].data,
        records=records,
        summaries=summaries,
        findings=findings,
        front=pareto_front(summaries),
        note=spread_note(summaries),
        figures={name: _inline(figure.to_json()) for name, figure in _figures(records, summaries, findings).items()},
        widths=_inline(json.dumps([_width_choice(s) for s in summaries])),
        fingerprint=_sections_of(records[0].fingerprint),
    )


def render(sections: Sequence[Section], title: str) -> str:
    """The page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    loader = PackageLoader("secateur", "report")
    page = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return page.get_template("page.html").render(
        title=title,
        sections=sections,
        columns=COLUMNS,
        trial_columns=TRIAL_COLUMNS,
        several=several,
        dark=Markup(_inline(json.dumps(palette.DARK))),
        css=Markup(_asset("page.css")),
        script=Markup(_asset("page.js")),
        plotly=Markup(get_plotlyjs()),
        Markup=Markup,
    )


def _figures(records: Sequence[Record], summaries: Sequence[Summary], findings: Findings) -> dict[str, Any]:
    return {
        "classic": charts.accuracy_over_sparsity(records, summaries),
        "drop": charts.drop_over_sparsity(records, summaries),
        "pareto": charts.accuracy_over_macs(records, summaries),
        "speedup": charts.speedup_over_macs(records, summaries),
        "widths": charts.layer_widths(findings.chosen),
    }


def _width_choice(summary: Summary) -> dict[str, Any]:
    return {
        "layers": [row.layer for row in summary.widths],
        "before": [row.before for row in summary.widths],
        "after": [row.after for row in summary.widths],
    }


def _sections_of(fingerprint: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A fingerprint in blocks: nested mappings become headings of their own, the rest comes first."""
    flat = {name: value for name, value in fingerprint.items() if not isinstance(value, Mapping)}
    nested = {name: dict(value) for name, value in fingerprint.items() if isinstance(value, Mapping)}
    return {**({"versions": flat} if flat else {}), **nested}


def _inline(text: str) -> str:
    """JSON that can stand inside a script element: nothing in it can close the element."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _asset(name: str) -> str:
    return resources.files("secateur.report").joinpath(name).read_text(encoding="utf-8")
