"""The charts of the page, one function each: records or summaries in, a plotly figure out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from secateur.report import format as fmt
from secateur.report.palette import CHANCE, FAINT, GRID, INK, MUTED, SURFACE, styles
from secateur.report.records import Record
from secateur.report.statistics import Estimate, Summary, estimate, pareto_front

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

FONT = "Inter, system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
DODGE = 0.004  # criteria stand side by side, so that their error bars do not cover each other


def accuracy_over_sparsity(records: Sequence[Record], summaries: Sequence[Summary]) -> Figure:
    """The classic chart: dense on top, fine-tuned and repaired below it, pruned lowest; one colour per criterion."""
    figure = _figure("channels removed", "test accuracy", height=460)
    dense = _dense(records)
    right = max(s.sparsity for s in summaries) + 0.03
    _band(figure, dense, right)
    curves = _curves(summaries)
    for place, (name, (colour, symbol), rows) in enumerate(curves):
        shift = DODGE * (place - (len(curves) - 1) / 2)
        figure.add_scatter(
            **_line(rows, lambda s: s.accuracy_pruned, shift, colour, symbol),
            name=f"{name}, pruned",
            legendgroup=name,
            showlegend=False,
            customdata=[_hover(s) for s in rows],
            hovertemplate=_HOVER,
        )
        figure.data[-1].update(line={"dash": "dot", "width": 1.8}, marker={"color": SURFACE})
        mended = [s for s in rows if s.accuracy_repaired]
        if mended:
            figure.add_scatter(
                x=[s.sparsity + shift for s in mended],
                y=[s.accuracy_repaired.mean for s in mended if s.accuracy_repaired],
                mode="lines",
                name=f"{name}, repaired",
                legendgroup=name,
                showlegend=False,
                line={"color": colour, "width": 1.8, "dash": "dashdot"},
                customdata=[_hover(s) for s in mended],
                hovertemplate=_HOVER,
            )
        figure.add_scatter(
            **_line(rows, lambda s: s.accuracy_finetuned, shift, colour, symbol),
            name=escape(name),
            legendgroup=name,
            customdata=[_hover(s) for s in rows],
            hovertemplate=_HOVER,
        )
    stages = {"dense": "dash", "fine-tuned": "solid", "repaired": "dashdot", "pruned": "dot"}
    if all(s.accuracy_repaired is None for s in summaries):
        del stages["repaired"]
    for stage, dash in stages.items():
        line = {"color": MUTED, "dash": dash, "width": 2}
        figure.add_scatter(x=[None], y=[None], mode="lines", name=stage, legend="legend2", line=line)
    figure.update_xaxes(range=[0, right], tickformat=".0%", dtick=0.1)
    figure.update_yaxes(tickformat=".0%", range=_accuracy_range(summaries, dense))
    return figure


def drop_over_sparsity(records: Sequence[Record], summaries: Sequence[Summary]) -> Figure:
    """A close-up of the fine-tuned models: accuracy against the same seed's dense model, in percentage points."""
    figure = _figure("channels removed", "accuracy against dense, points")
    curves = _curves(summaries)
    for place, (name, (colour, symbol), rows) in enumerate(curves):
        shift = DODGE * (place - (len(curves) - 1) / 2)
        figure.add_scatter(
            **_line(rows, _gain_in_points, shift, colour, symbol),
            name=escape(name),
            customdata=[_hover(s) for s in rows],
            hovertemplate=_HOVER,
        )
    figure.add_hline(y=0, line={"color": MUTED, "dash": "dash", "width": 1.5}, layer="below")
    figure.update_xaxes(range=[0, max(s.sparsity for s in summaries) + 0.03], tickformat=".0%", dtick=0.1)
    figure.update_yaxes(tickformat=".1~f")
    return figure


def accuracy_over_macs(records: Sequence[Record], summaries: Sequence[Summary]) -> Figure:
    """Fine-tuned accuracy against MACs, with the Pareto front: the settings that no other beats on both."""
    figure = _figure("multiply-accumulates per input", "test accuracy, fine-tuned")
    front = pareto_front(summaries)
    figure.add_scatter(
        x=[s.macs for s in front],
        y=[s.accuracy_finetuned.mean for s in front],
        mode="lines",
        name="front",
        line={"color": FAINT, "width": 7, "shape": "hv"},
        hoverinfo="skip",
    )
    for name, (colour, symbol), rows in _curves(summaries):
        figure.add_scatter(
            x=[s.macs for s in rows],
            y=[s.accuracy_finetuned.mean for s in rows],
            mode="markers",
            name=escape(name),
            marker={"color": colour, "symbol": symbol, "size": 10, "line": {"color": SURFACE, "width": 1}},
            customdata=[_hover(s) for s in rows],
            hovertemplate=_HOVER,
        )
    dense, macs = _dense(records), records[0].macs.before
    figure.add_scatter(
        x=[macs],
        y=[dense.mean],
        mode="markers",
        name="dense",
        marker={"color": INK, "symbol": "star", "size": 13},
        hovertemplate=f"<b>dense</b><br>{fmt.percent(dense.mean)}, {fmt.count(macs)} MACs<extra></extra>",
    )
    figure.update_xaxes(rangemode="tozero", tickformat="~s")
    figure.update_yaxes(tickformat=".1~%")
    return figure


def speedup_over_macs(records: Sequence[Record], summaries: Sequence[Summary]) -> Figure:
    """Measured speed-up against the one that the MACs promise; the diagonal is a machine without overhead."""
    figure = _figure("speed-up by MACs", "speed-up measured")
    top = 1.08 * max(*(s.macs_ratio for s in summaries), *(s.speedup.most for s in summaries))
    low = min(0.9, *(s.speedup.least for s in summaries))
    figure.add_scatter(
        x=[1, top], y=[1, top], mode="lines", name="ideal", line={"color": FAINT, "width": 2}, hoverinfo="skip"
    )
    for name, (colour, symbol), rows in _curves(summaries):
        estimates = [s.speedup for s in rows]
        figure.add_scatter(
            x=[s.macs_ratio for s in rows],
            y=[e.mean for e in estimates],
            error_y=_error_bars(estimates, colour),
            mode="markers",
            name=escape(name),
            marker={"color": colour, "symbol": symbol, "size": 9, "line": {"color": SURFACE, "width": 1}},
            customdata=[_hover(s) for s in rows],
            hovertemplate=_HOVER,
        )
    figure.add_hline(y=1, line={"color": MUTED, "dash": "dash", "width": 1.5}, layer="below")
    figure.update_xaxes(ticksuffix=fmt.CROSS, rangemode="normal")
    figure.update_yaxes(ticksuffix=fmt.CROSS, range=[max(0.0, low - 0.1), top])
    return figure


def layer_widths(summary: Summary) -> Figure:
    """Output channels of every layer before and after; the page swaps in other settings."""
    figure = _figure("", "output channels")
    layers = [escape(row.layer) for row in summary.widths]
    figure.add_bar(x=layers, y=[row.before for row in summary.widths], name="dense", marker={"color": FAINT})
    figure.add_bar(x=layers, y=[row.after for row in summary.widths], name="pruned", marker={"color": INK})
    figure.update_layout(barmode="overlay", bargap=0.35, barcornerradius=2)
    figure.update_xaxes(type="category", showgrid=False, tickangle=-35, automargin=True)
    figure.update_yaxes(rangemode="tozero")
    return figure


def _dense(records: Sequence[Record]) -> Estimate:
    return estimate({r.seed: r.accuracy_dense for r in records}.values())


def _curves(summaries: Sequence[Summary]) -> list[tuple[str, tuple[str, str], list[Summary]]]:
    """Name, style and points of each curve: one per criterion, and per scope where there are several."""
    found: dict[tuple[str, str], list[Summary]] = {}
    for summary in summaries:
        found.setdefault((summary.method, summary.scope), []).append(summary)
    one_scope = len({scope for _, scope in found}) == 1
    labels = {key: key[0] if one_scope else f"{key[0]}, {key[1]}" for key in found}
    looks = styles(labels.values())
    return [(labels[key], looks[labels[key]], rows) for key, rows in found.items()]


_HOVER = (
    "<b>%{customdata[0]}</b><br>dense %{customdata[1]}<br>pruned %{customdata[2]}%{customdata[6]}"
    "<br>fine-tuned %{customdata[3]}<br>%{customdata[4]}<br>speed-up %{customdata[5]}<extra></extra>"
)


def _hover(summary: Summary) -> list[str]:
    return [
        escape(summary.name),
        fmt.accuracy(summary.accuracy_dense) + " %",
        fmt.accuracy(summary.accuracy_pruned) + " %",
        fmt.accuracy(summary.accuracy_finetuned) + " %",
        f"{fmt.count(summary.macs)} MACs, {fmt.count(summary.params)} params",
        fmt.times(summary.speedup.mean),
        f"<br>repaired {fmt.accuracy(summary.accuracy_repaired)} %" if summary.accuracy_repaired else "",
    ]


def _gain_in_points(summary: Summary) -> Estimate:
    drop = summary.drop
    mean, low, high, least, most = (-100 * v for v in (drop.mean, drop.high, drop.low, drop.most, drop.least))
    return Estimate(mean, low, high, least, most, drop.seeds)


def _line(
    rows: Sequence[Summary], value: Callable[[Summary], Estimate], shift: float, colour: str, symbol: str
) -> dict[str, Any]:
    estimates = [value(row) for row in rows]
    return {
        "x": [row.sparsity + shift for row in rows],
        "y": [e.mean for e in estimates],
        "error_y": _error_bars(estimates, colour),
        "mode": "lines+markers",
        "line": {"color": colour, "width": 2.4},
        "marker": {"color": colour, "symbol": symbol, "size": 8, "line": {"color": colour, "width": 1.6}},
    }


def _error_bars(estimates: Sequence[Estimate], colour: str) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [e.bar[1] - e.mean if e.seeds > 1 else 0.0 for e in estimates],
        "arrayminus": [e.mean - e.bar[0] if e.seeds > 1 else 0.0 for e in estimates],
        "thickness": 1.2,
        "width": 3,
        "color": colour,
    }


def _band(figure: Figure, dense: Estimate, right: float) -> None:
    low, high = dense.bar if dense.seeds > 1 else (dense.mean, dense.mean)
    figure.add_hrect(y0=max(0.0, low), y1=min(1.0, high), fillcolor=CHANCE, opacity=0.16, line_width=0, layer="below")
    figure.add_scatter(
        x=[0, right],
        y=[dense.mean, dense.mean],
        mode="lines",
        name="dense",
        showlegend=False,
        line={"color": MUTED, "dash": "dash", "width": 2},
        hovertemplate=f"<b>dense</b> {fmt.accuracy(dense)} %<extra></extra>",
    )


def _accuracy_range(summaries: Sequence[Summary], dense: Estimate) -> list[float]:
    lows = [min(s.accuracy_pruned.bar[0], s.accuracy_pruned.least) for s in summaries if s.accuracy_pruned.seeds > 1]
    low = min([*lows, *(s.accuracy_pruned.mean for s in summaries)])
    return [max(0.0, low - 0.05), min(1.02, dense.mean + 0.05)]


def _figure(x_title: str, y_title: str, height: int = 380) -> Figure:
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
    figure = Figure()
    figure.update_layout(
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
    return figure
