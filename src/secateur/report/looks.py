"""What all charts share: the empty figure, curves with their styles, error bars and hover texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from secateur.report import format as fmt
from secateur.report.palette import FAINT, GRID, INK, MUTED, SURFACE, styles
from secateur.report.statistics import Estimate, Summary

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

FONT = "Inter, system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
DODGE = 0.004  # methods stand side by side, so that their error bars do not cover each other
MANY_POINTS = 40  # on one curve, from which on its markers would be a band
HALF_WIDTH = 400  # pixels that a legend has in a chart of half the page's width
LEGEND_ROWS = (3, 16)  # that fit without making a chart taller, and that are worth making it taller for
MANY_CURVES = 4  # above which pruned lines go without error bars, and the line styles are explained below the chart
HOVER = "%{customdata}<extra></extra>"
SETTINGS, TRIALS = "settings", "trials"  # whose places a trace's customdata holds; the page puts the texts in


@dataclass(frozen=True)
class Curve:
    """The settings of one method, by growing sparsity."""

    name: str
    colour: str
    symbol: str
    shift: float  # of its points, to the side
    rows: Sequence[Summary]
    places: Sequence[int]  # of the rows among all settings

    @property
    def prunes(self) -> str:
        """What the method prunes."""
        return self.rows[0].prunes


def curves_of(summaries: Sequence[Summary]) -> list[Curve]:
    """One curve per method, and per scope or target where a method has several; unpruned, a point, is left out."""
    labels = labels_of(summaries)
    found: dict[str, list[int]] = {}
    for place, summary in enumerate(summaries):
        if not summary.unpruned:
            found.setdefault(labels[place], []).append(place)
    controls = {labels[place] for place, summary in enumerate(summaries) if summary.is_control}
    looks = styles(found, controls)
    return [
        Curve(name, *looks[name], DODGE * (k - (len(found) - 1) / 2), [summaries[i] for i in places], places)
        for k, (name, places) in enumerate(found.items())
    ]


def labels_of(summaries: Sequence[Summary]) -> list[str]:
    """What to call the method of each setting: its scope and target are named where it has several."""
    scopes: dict[str, set[str]] = {}
    targets: dict[str, set[str]] = {}
    for s in summaries:
        scopes.setdefault(s.method, set()).add(s.scope)
        targets.setdefault(s.method, set()).add(s.target)
    return [
        s.method
        + (f", {s.scope}" if len(scopes[s.method]) > 1 else "")
        + (f", of {s.target}" if len(targets[s.method]) > 1 else "")
        for s in summaries
    ]


def hover_text(summary: Summary) -> str:
    """What a chart says of one setting under the pointer."""
    lines = [
        f"<b>{escape(summary.name)}</b>",
        f"dense {fmt.accuracy(summary.accuracy_dense)} %",
        f"pruned {fmt.accuracy(summary.accuracy_pruned)} %" if summary.prunes != "nothing" else "",
        f"repaired {fmt.accuracy(summary.accuracy_repaired)} %" if summary.accuracy_repaired else "",
        f"fine-tuned {fmt.accuracy(summary.accuracy_finetuned)} %",
        f"{fmt.count(summary.macs)} MACs, {fmt.count(summary.params_left)} params"
        + (" not zero" if summary.prunes == "weights" else ""),
        f"{fmt.significant(summary.latency_ms)} ms, speed-up {fmt.times(summary.speedup.mean)}"
        + (" (masked)" if summary.prunes == "weights" else ""),
        fmt.several(len(summary.seeds), "trial") if len(summary.keys) > 1 else escape(summary.keys[0]),
    ]
    return "<br>".join(filter(None, lines))


def line(curve: Curve, value: Callable[[Summary], Estimate], *, bars: bool = True) -> dict[str, Any]:
    """The arguments of a curve's scatter trace."""
    estimates = [value(row) for row in curve.rows]
    return {
        "x": [round(row.sparsity + curve.shift, 5) for row in curve.rows],
        "y": [e.mean for e in estimates],
        **({"error_y": error_bars(estimates, curve.colour)} if bars and any(e.seeds > 1 for e in estimates) else {}),
        "mode": "lines+markers" if len(curve.rows) <= MANY_POINTS else "lines",
        "line": {"color": curve.colour, "width": 2.4},
        "marker": marker(curve, size=8),
        "customdata": list(curve.places),
        "meta": SETTINGS,
        "hovertemplate": HOVER,
    }


def marker(curve: Curve, size: float) -> dict[str, Any]:
    """The marker of a curve: its colour and symbol."""
    return {
        "color": curve.colour,
        "symbol": curve.symbol,
        "size": size,
        "line": {"color": curve.colour, "width": 1.6},
    }


def error_bars(estimates: Sequence[Estimate], colour: str) -> dict[str, Any]:
    """Error bars as plotly wants them."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [round(e.bar[1] - e.mean, 6) if e.seeds > 1 else 0.0 for e in estimates],
        "arrayminus": [round(e.mean - e.bar[0], 6) if e.seeds > 1 else 0.0 for e in estimates],
        "thickness": 1.2,
        "width": 3,
        "color": colour,
    }


def figure(x_title: str, y_title: str, height: int = 380) -> Figure:
    """An empty figure in the page's look. Titles sit at the ends of the axes, legends above the plot."""
    from plotly.graph_objects import Figure

    axis: dict[str, Any] = {
        "gridcolor": GRID,
        "linecolor": FAINT,
        "zeroline": False,
        "ticks": "",
        "tickfont": {"color": MUTED, "size": 12},
        "title": {"font": {"color": MUTED, "size": 12.5}, "standoff": 10},
        "automargin": True,
    }
    legend = {
        "orientation": "h",
        "x": 0,
        "xanchor": "left",
        "yanchor": "bottom",
        "font": {"color": INK, "size": 12.5},
        "entrywidth": 0,
    }
    found = Figure()
    found.update_layout(
        template="none",
        height=height,
        margin={"l": 8, "r": 12, "t": 8, "b": 8},
        font={"family": FONT, "size": 13, "color": INK},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hovermode="closest",
        hoverlabel={"bgcolor": SURFACE, "bordercolor": FAINT, "font": {"color": INK, "family": FONT}, "align": "left"},
        legend={**legend, "y": 1.02},
        legend2={**legend, "x": 1, "xanchor": "right", "y": 1.02, "itemclick": False, "itemdoubleclick": False},
        xaxis={**axis, "title": {**axis["title"], "text": x_title}, "showgrid": False, "showline": True},
        yaxis={**axis, "title": {**axis["title"], "text": y_title}},
    )
    return found


def with_room(found: Figure) -> Figure:
    """A chart of half the page's width, taller by what its legend needs more than a few rows."""
    names = [len(trace.name) for trace in found.data if trace.name and trace.showlegend is not False]
    symbol, letter, row = 46, 6.6, 19  # pixels, as drawn
    across = max(1, int(HALF_WIDTH / (symbol + letter * max(names, default=1))))
    usual, most = LEGEND_ROWS
    more = min(most, math.ceil(len(names) / across)) - usual
    found.update_layout(height=found.layout.height + row * max(0, more))
    return found
