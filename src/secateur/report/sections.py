"""What the page says about one model on one data set, as values: texts, tables, and figures as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from secateur.report import charts
from secateur.report.comparing import Duel, duels
from secateur.report.findings import Findings, find
from secateur.report.layers import (
    WidthTable,
    layer_sparsities,
    layer_widths,
    sparsity_choices,
    width_choices,
    width_table,
)
from secateur.report.looks import hover_text, labels_of
from secateur.report.records import Record
from secateur.report.statistics import Summary, pareto_front, summarise
from secateur.report.tables import Column, setting_table, shown_columns, spread_note, trial_table
from secateur.report.timings import TimingTable, timing_table
from secateur.report.training import Curve, training_curves

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MANY_ROWS = 150  # settings, from which on the page's script writes their table
MANY_METHODS = 16  # above which a table of all against all is no longer read


@dataclass(frozen=True)
class Chart:
    """A chart with its words. Of several variants, a menu shows one; `choices` holds bars for every setting."""

    name: str
    title: str
    caption: str
    variants: Mapping[str, str]  # name -> plotly figure as JSON; a single one has the name ""
    wide: bool = False
    label: str = ""  # of the menu
    choices: str = ""  # JSON
    option: tuple[int, str] = (0, "")  # the setting shown first: its place and name


@dataclass(frozen=True)
class Duels:
    """Method against method, as a square table."""

    methods: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Duel | None]]]
    largest: float  # difference, for the strength of the colours

    def weight(self, duel: Duel) -> float:
        """How strong the colour of a cell is, from 0 to 1."""
        return round(abs(duel.gain.mean) / self.largest, 2) if self.largest else 0.0


@dataclass(frozen=True)
class Section:
    """One model on one data set."""

    model: str
    data: str
    records: Sequence[Record]
    summaries: Sequence[Summary]
    findings: Findings
    front: frozenset[int]  # places among the summaries
    chosen: int
    note: str
    charts: Sequence[Chart]
    columns: Sequence[Column]
    duels: Duels | None
    timings: TimingTable | None
    widths: WidthTable | None
    settings: str  # JSON: names, groups of the menus, texts of the hovers
    rows: str  # JSON of the table of settings, where they are many; else ""
    trials: str  # JSON of the table of single trials
    fingerprint: Mapping[str, Mapping[str, Any]]  # heading -> name -> value


def section(records: Sequence[Record], curves: Mapping[str, Curve] | None = None) -> Section:
    """Everything the page shows about records of one model on one data set."""
    summaries = summarise(records)
    findings = find(records, summaries)
    members = {id(s) for s in pareto_front(summaries)}
    front = frozenset(place for place, s in enumerate(summaries) if id(s) in members)
    chosen = next(place for place, s in enumerate(summaries) if s is findings.chosen)
    return Section(
        model=records[0].model,
        data=records[0].data,
        records=records,
        summaries=summaries,
        findings=findings,
        front=front,
        chosen=chosen,
        note=spread_note(summaries),
        charts=_charts(records, summaries, findings, curves or {}),
        columns=shown_columns(summaries),
        duels=duel_table(records),
        timings=timing_table(summaries),
        widths=width_table(summaries, findings.chosen),
        settings=inline(
            {
                "names": [s.name for s in summaries],
                "groups": labels_of(summaries),
                "hovers": [hover_text(s) for s in summaries],
            }
        ),
        rows=inline(setting_table(summaries, _marks(len(summaries), front, chosen)))
        if len(summaries) > MANY_ROWS
        else "",
        trials=inline(trial_table(records)),
        fingerprint=blocks(records[0].fingerprint),
    )


def duel_table(records: Sequence[Record]) -> Duels | None:
    """Every method against every other; None where no two of them meet."""
    found = duels(records)
    methods = list(dict.fromkeys(duel.first for duel in found))[:MANY_METHODS]
    if not methods:
        return None
    by_names = {(duel.first, duel.second): duel for duel in found}
    rows = [(one, [by_names.get((one, other)) for other in methods]) for one in methods]
    return Duels(methods, rows, max(abs(duel.gain.mean) for duel in found))


def inline(value: Any) -> str:
    """A figure or plain values as JSON that can stand inside a script element: nothing in it can close the element."""
    text = value.to_json() if hasattr(value, "to_json") else json.dumps(value, separators=(",", ":"))
    return str(text).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _charts(
    records: Sequence[Record], summaries: Sequence[Summary], findings: Findings, curves: Mapping[str, Curve]
) -> list[Chart]:
    found = [
        Chart(
            "classic",
            "What pruning costs, and what repair and fine-tuning bring back",
            f"Test accuracy over what was removed. Click a method to hide it, double-click to see it alone. "
            f"{spread_note(summaries)}",
            _single(charts.accuracy_over_sparsity(records, summaries)),
            wide=True,
        ),
        Chart(
            "drop",
            "After fine-tuning, close up",
            "Accuracy of each fine-tuned model minus that of the dense model it came from, in percentage points.",
            _single(charts.drop_over_sparsity(records, summaries)),
        ),
        Chart(
            "pareto",
            "Accuracy against cost",
            "The front joins the settings that no other beats on both. Upper left is better."
            + (" Of settings that lie on each other, only some are drawn." if len(summaries) > MANY_ROWS else ""),
            {name: inline(charts.accuracy_over_cost(records, summaries, axis)) for name, axis in charts.AXES.items()},
            label="Cost:",
        ),
        Chart(
            "speedup",
            "Is it really faster?",
            "Measured speed-up against the ratio of MACs, which a machine without overhead would reach. Below the "
            "dashed line, pruning made the model slower.",
            _single(charts.speedup_over_macs(records, summaries)),
        ),
    ]
    with_widths = _first(summaries, findings.chosen, lambda s: bool(s.widths))
    if with_widths:
        found.append(
            Chart(
                "widths",
                "Width of each layer",
                "Output channels before and after, first seed.",
                _single(layer_widths(summaries[with_widths[0]])),
                label="Setting:",
                option=with_widths,
                choices=inline(width_choices(summaries)),
            )
        )
    with_layers = _first(summaries, findings.chosen, lambda s: bool(s.layers))
    if with_layers:
        found.append(
            Chart(
                "sparsity",
                "Sparsity of each layer",
                "Weights that are gone or zero, recounted in the evaluated model, first seed.",
                _single(layer_sparsities(summaries[with_layers[0]])),
                label="Setting:",
                option=with_layers,
                choices=inline({**sparsity_choices(summaries), "scale": 10}),
            )
        )
    shown = {key: curves[key] for key in findings.chosen.keys if key in curves}
    if shown:
        found.append(
            Chart(
                "training",
                "How it was trained",
                f"Accuracy on training data per epoch, of each trial of {findings.chosen.name}.",
                _single(training_curves(shown)),
            )
        )
    return found


def _first(summaries: Sequence[Summary], chosen: Summary, has: Callable[[Summary], bool]) -> tuple[int, str] | None:
    """Place and name of the setting shown, or of the first other one that has bars; None where none has."""
    places = [k for k, s in enumerate(summaries) if has(s)]
    shown = [k for k in places if summaries[k] is chosen] or places
    return (shown[0], summaries[shown[0]].name) if shown else None


def _single(figure: Figure) -> dict[str, str]:
    return {"": inline(figure)}


def _marks(number: int, front: frozenset[int], chosen: int) -> list[str]:
    """The classes of the rows of settings."""
    return [f"{'front' if k in front else ''} {'chosen' if k == chosen else ''}".strip() for k in range(number)]


def blocks(fingerprint: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A fingerprint in blocks: nested mappings become headings of their own, the rest comes first."""
    flat = {name: value for name, value in fingerprint.items() if not isinstance(value, Mapping)}
    nested = {name: dict(value) for name, value in fingerprint.items() if isinstance(value, Mapping)}
    return {**({"versions": flat} if flat else {}), **nested}
