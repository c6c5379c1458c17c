"""What several models or data sets say together: accuracy kept by each method, and averages over families of models."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from secateur.report import format as fmt
from secateur.report.looks import figure, with_room
from secateur.report.palette import CHANCE, MUTED, SURFACE, styles
from secateur.report.statistics import Estimate, Summary

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Results = Mapping[tuple[str, str], Sequence[Summary]]  # (model, data) -> its settings


@dataclass(frozen=True)
class Cell:
    """How the accuracy of one model changed by one method, at one sparsity."""

    text: str
    detail: str
    best: bool  # of the row, controls aside


@dataclass(frozen=True)
class Panel:
    """All models against all methods, at one sparsity."""

    title: str
    methods: Sequence[str]
    controls: frozenset[str]  # among the methods
    rows: Sequence[tuple[str, str, Sequence[Cell | None]]]  # model, data, a cell per method
    means: Sequence[str]  # over the rows, "-" where one is missing


@dataclass(frozen=True)
class Family:
    """The models of one family on one data set, on average."""

    name: str
    data: str
    models: Sequence[str]
    dense: float
    curves: Mapping[str, Sequence[FamilyPoint]]  # by method
    controls: frozenset[str]

    @property
    def title(self) -> str:
        """What stands above its chart."""
        return f"{self.name} on {self.data}"


@dataclass(frozen=True)
class FamilyPoint:
    """The mean over a family's models."""

    sparsity: float
    pruned: float | None  # None for a control that prunes nothing
    finetuned: float


def panels(results: Results) -> list[Panel]:
    """One table per sparsity: change of accuracy from dense to fine-tuned."""
    levels = sorted({s.sparsity for rows in results.values() for s in rows if not s.unpruned})
    return [_panel(results, level) for level in levels]


def _panel(results: Results, level: float) -> Panel:
    found: dict[str, dict[tuple[str, str], Estimate]] = {}
    controls = set()
    for place, rows in results.items():
        for s in rows:
            if s.unpruned or s.sparsity == level:
                if s.is_control:
                    controls.add(s.method)
                found.setdefault(s.method, {})[place] = _gain(s)
    lines = []
    for place in results:
        gains = [found[method].get(place) for method in found]
        top = max((g.mean for method, g in zip(found, gains, strict=True) if g and method not in controls), default=0.0)
        lines.append((*place, [_cell(g, top, method in controls) for method, g in zip(found, gains, strict=True)]))
    means = []
    for by_place in found.values():
        whole = len(by_place) == len(results)
        means.append(fmt.signed_points(statistics.fmean(g.mean for g in by_place.values())) if whole else "-")
    return Panel(f"{fmt.share(level)} %", list(found), frozenset(controls), lines, means)


def _cell(gain: Estimate | None, top: float, control: bool) -> Cell | None:
    if gain is None:
        return None
    return Cell(
        fmt.signed_points(gain.mean),
        f"{fmt.gain(gain)} points, {fmt.several(gain.seeds, 'seed')}",
        gain.mean == top and not control,
    )


def _gain(summary: Summary) -> Estimate:
    drop = summary.drop
    return Estimate(-drop.mean, -drop.high, -drop.low, -drop.most, -drop.least, drop.seeds)


def family_of(model: str) -> str:
    """What comes before the digits of a model's name: resnet20 and resnet56 are resnets, vgg16_bn is a vgg."""
    start = re.match(r"[^\d]*[^\d\s_\-.(]", model)
    return re.sub(r"[\s_-]v$", "", start.group()) if start else model


def families(results: Results) -> list[Family]:
    """The averages of every family of several models on every data set, in order of first appearance.

    A point is there where every model of the family has it, so that lines never jump because a model joins or leaves.
    """
    members: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for model, data in results:
        members.setdefault((family_of(model), data), []).append((model, data))
    several = {family: places for family, places in members.items() if len(places) > 1}
    return [_family(name, data, [results[p] for p in places], places) for (name, data), places in several.items()]


def _family(name: str, data: str, rows: Sequence[Sequence[Summary]], places: Sequence[tuple[str, str]]) -> Family:
    settings: dict[str, dict[float, list[Summary]]] = {}
    for summaries in rows:
        for s in summaries:
            settings.setdefault(s.method, {}).setdefault(s.sparsity, []).append(s)
    curves = {
        method: [_point(level, at) for level, at in sorted(levels.items()) if len(at) == len(rows)]
        for method, levels in settings.items()
    }
    return Family(
        name=name,
        data=data,
        models=[model for model, _ in places],
        dense=_average([s[0] for s in rows], lambda s: s.accuracy_dense.mean),
        curves={method: points for method, points in curves.items() if points},
        controls=frozenset(s.method for summaries in rows for s in summaries if s.is_control),
    )


def _point(level: float, at: Sequence[Summary]) -> FamilyPoint:
    pruned = None if at[0].prunes == "nothing" else _average(at, lambda s: s.accuracy_pruned.mean)
    return FamilyPoint(level, pruned, _average(at, lambda s: s.accuracy_finetuned.mean))


def _average(rows: Sequence[Summary], value: Callable[[Summary], float]) -> float:
    return statistics.fmean(map(value, rows))


def family_lines(family: Family, looks: Mapping[str, tuple[str, str]]) -> Figure:
    """Accuracy over sparsity, averaged over a family's models: dashed before fine-tuning, solid after it."""
    found = figure("removed", "test accuracy, family average")
    levels = [p.sparsity for points in family.curves.values() for p in points]
    right = min(1.0, max([0.1, *levels]) + 0.03)
    found.add_scatter(
        x=[0, right],
        y=[family.dense, family.dense],
        mode="lines",
        name="dense",
        line={"color": CHANCE, "dash": "dot", "width": 1.6},
        hovertemplate=f"<b>dense</b> {fmt.percent(family.dense)}<extra></extra>",
    )
    for method, points in family.curves.items():
        if all(p.sparsity == 0 for p in points):
            height = points[0].finetuned
            found.add_scatter(
                x=[0, right],
                y=[height, height],
                mode="lines",
                name=escape(method),
                line={"color": MUTED, "dash": "longdash", "width": 1.4},
                hovertemplate=f"<b>{escape(method)}</b> {fmt.percent(height)}<extra></extra>",
            )
            continue
        colour, symbol = looks[method]
        for stage, known in (
            ("before", [(p.sparsity, p.pruned) for p in points if p.pruned is not None]),
            ("after", [(p.sparsity, p.finetuned) for p in points]),
        ):
            if known:
                found.add_scatter(
                    x=[x for x, _ in known],
                    y=[y for _, y in known],
                    mode="lines+markers",
                    name=escape(method) if stage == "after" else f"{escape(method)}, pruned",
                    legendgroup=method,
                    showlegend=stage == "after",
                    line={"color": colour, "dash": "solid" if stage == "after" else "dash", "width": 2.2},
                    marker={"color": colour if stage == "after" else SURFACE, "symbol": symbol, "size": 7}
                    | {"line": {"color": colour, "width": 1.5}},
                    hovertemplate=f"<b>{escape(method)}</b>, %{{x:.0%}}: %{{y:.1%}} {stage} fine-tuning<extra></extra>",
                )
    found.update_xaxes(range=[0, right], tickformat=".0%")
    found.update_yaxes(tickformat=".0%")
    return with_room(found)


def family_looks(found: Sequence[Family]) -> dict[str, tuple[str, str]]:
    """One look per method, the same in all families' charts."""
    return styles(
        (method for family in found for method, points in family.curves.items() if any(p.sparsity for p in points)),
        {name for family in found for name in family.controls},
    )
