"""The report as one HTML file: everything inlined, nothing fetched, readable from a folder or an e-mail."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from secateur.errors import InputError
from secateur.files import write_bytes
from secateur.report import palette
from secateur.report.beside import HEADS, Beside, beside, beside_sentence, sources_of
from secateur.report.checks import failure_warning
from secateur.report.format import gain, several, share, signed_points
from secateur.report.overview import Panel, families, family_lines, family_looks, panels
from secateur.report.records import Failure, Record, Reference, as_records, studies
from secateur.report.sections import Chart, Duels, Section, duel_table, inline, section
from secateur.report.training import Curve
from secateur.report.words import words_for


@dataclass(frozen=True)
class Overview:
    """What several models or data sets say together."""

    panels: Sequence[Panel]
    charts: Sequence[Chart]
    duels: Duels | None


@dataclass(frozen=True)
class Published:
    """Published numbers beside ours."""

    rows: Sequence[Beside]
    sources: Sequence[str]
    sentence: str
    notes: Sequence[str]


def write_report(
    records: Iterable[Record | Mapping[str, Any]],
    path: Path | str,
    title: str = "Pruning report",
    *,
    references: Sequence[Reference] = (),
    notes: Sequence[str] = (),
    failures: Sequence[Failure] = (),
    curves: Mapping[str, Curve] | None = None,
) -> Path:
    """Write the page for some records (or plain dicts with the same fields) atomically; returns the path.

    Every (model, data) pair gets its own section; several of them, an overview above. `references` stand beside our
    numbers, with `notes` below them; `failures` are listed; `curves` are the epochs of each trial, by its key. Raises
    InputError for no records, OSError where the file cannot be written; an old report then survives.
    """
    found = as_records(records)
    if not found:
        raise InputError("no records to report on: run at least one trial first.")
    sections = [section(rows, curves) for rows in studies(found).values()]
    rows = beside(found, references)
    published = Published(rows, sources_of(rows), beside_sentence(rows), notes) if rows or notes else None
    text = render(sections, title, overview=overview(found, sections), published=published, failures=failures)
    write_bytes(path, text.encode())
    return Path(path)


def overview(records: Sequence[Record], sections: Sequence[Section]) -> Overview | None:
    """What stands above the sections; None for a single one."""
    if len(sections) < 2:
        return None
    results = {(s.model, s.data): s.summaries for s in sections}
    found = families(results)
    looks = family_looks(found)
    charts = [
        Chart(
            f"family{place}",
            family.title,
            f"Mean over {', '.join(family.models)}: dashed before fine-tuning, solid after it.",
            {"": inline(family_lines(family, looks))},
        )
        for place, family in enumerate(found)
    ]
    return Overview(panels(results), charts, duel_table(records))


def render(
    sections: Sequence[Section],
    title: str,
    *,
    overview: Overview | None = None,
    published: Published | None = None,
    failures: Sequence[Failure] = (),
) -> str:
    """The page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    loader = PackageLoader("secateur", "report")
    page = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.globals.update(several=several, share=share, gain=gain, signed_points=signed_points, Markup=Markup)
    return page.get_template("page.html").render(
        title=title,
        sections=sections,
        overview=overview,
        published=published,
        heads=HEADS,
        failures=failures,
        failure_warning=failure_warning(failures),
        words=words_for([record for s in sections for record in s.records]),
        dark=Markup(inline(palette.DARK)),
        css=Markup(asset("page.css")),
        script=Markup(asset("page.js")),
        plotly=packed(get_plotlyjs()),
    )


def asset(name: str) -> str:
    """The text of a file beside this one."""
    return resources.files("secateur.report").joinpath(name).read_text(encoding="utf-8")


def packed(text: str) -> str:
    """The text, compressed, in letters that may stand in a page; the same for the same text."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()
