"""The charts of one section, one function each: records or summaries in, a plotly figure out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from secateur.report import format as fmt
from secateur.report.looks import (
    HOVER,
    MANY_CURVES,
    SETTINGS,
    TRIALS,
    Curve,
    curves_of,
    error_bars,
    figure,
    line,
    marker,
    with_room,
)
from secateur.report.palette import CHANCE, FAINT, INK, MUTED, SURFACE
from secateur.report.records import Record
from secateur.report.statistics import Estimate, Summary, estimate, params_left, pareto_front
from secateur.report.thinning import thinned

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

CROWD = 200  # settings, from which on points are small
FAR = 8.0  # ratio of MACs, from which on speed-ups are drawn on axes of equal factors
STAGES = {"dense": "dash", "fine-tuned": "solid", "repaired": "dashdot", "pruned": "dot"}


def accuracy_over_sparsity(records: Sequence[Record], summaries: Sequence[Summary]) -> Figure:
    """The classic chart: dense on top, fine-tuned and repaired below it, pruned lowest; one colour per method."""
    curves = curves_of(summaries)
    found = figure(removed_title(summaries), "test accuracy", height=460)
    dense, right = dense_of(records), right_of(summaries)
    _band(found, dense, right)
    for curve in curves:
        if curve.prunes != "nothing":  # what it was before any training says nothing
            _stage(found, curve, "pruned", lambda s: s.accuracy_pruned, bars=len(curves) <= MANY_CURVES)
            found.data[-1].update(line={"dash": "dot", "width": 1.8}, marker={"color": SURFACE})
        _repaired(found, curve)
        found.add_scatter(
            **line(curve, lambda s: s.accuracy_finetuned), name=escape(curve.name), legendgroup=curve.name
        )
    for summary in (s for s in summaries if s.unpruned):
        _level(found, summary, summary.accuracy_finetuned.mean, right, f"{fmt.accuracy(summary.accuracy_finetuned)} %")
    with_repair = any(s.accuracy_repaired for s in summaries)
    explain_stages(found, [stage for stage in STAGES if stage != "repaired" or with_repair], len(curves))
    found.update_xaxes(range=[0, right], tickformat=".0%", dtick=0.1)
    found.update_yaxes(tickformat=".0%", range=_accuracy_range(summaries, dense))
    return found


def drop_over_sparsity(records: Sequence[Record], summaries: Sequence[Summary]) -> Figure:
    """A close-up of the fine-tuned models: accuracy against the same seed's dense model, in percentage points."""
    found = figure(removed_title(summaries), "accuracy against dense, points")
    right = right_of(summaries)
    for curve in curves_of(summaries):
        found.add_scatter(**line(curve, gain_in_points), name=escape(curve.name))
    for summary in (s for s in summaries if s.unpruned):
        gain = gain_in_points(summary).mean
        _level(found, summary, gain, right, f"{fmt.signed_points(gain / 100)} points")
    found.add_hline(y=0, line={"color": MUTED, "dash": "dash", "width": 1.5}, layer="below")
    found.update_xaxes(range=[0, right], tickformat=".0%", dtick=0.1)
    found.update_yaxes(tickformat=".1~f")
    return with_room(found)


@dataclass(frozen=True)
class Axis:
    """What accuracy is set against."""

    name: str
    title: str
    cost: Callable[[Summary], float]
    of_trial: Callable[[Record], float]
    dense: Callable[[Sequence[Record]], float]
    unit: str


AXES = {
    axis.name: axis
    for axis in (
        Axis(
            "MACs",
            "multiply-accumulates per input",
            lambda s: s.macs,
            lambda r: r.macs.after,
            lambda records: records[0].macs.before,
            "MACs",
        ),
        Axis(
            "params",
            "parameters that are not zero",
            lambda s: s.params_left,
            params_left,
            lambda records: records[0].params.before,
            "parameters",
        ),
        Axis(
            "latency",
            "measured latency, ms per batch",
            lambda s: s.latency_ms,
            lambda r: r.latency_ms.after,
            lambda records: estimate(r.latency_ms.before for r in records).mean,
            "ms",
        ),
    )
}


def accuracy_over_cost(records: Sequence[Record], summaries: Sequence[Summary], axis: Axis) -> Figure:
    """Fine-tuned accuracy against a cost, with the Pareto front: the settings that no other beats on both."""
    found = figure(axis.title, "test accuracy, fine-tuned")
    front = pareto_front(summaries, axis.cost)
    found.add_scatter(
        x=[axis.cost(s) for s in front],
        y=[s.accuracy_finetuned.mean for s in front],
        mode="lines",
        name="front",
        line={"color": FAINT, "width": 7, "shape": "hv"},
        hoverinfo="skip",
    )
    curves = curves_of(summaries)
    if len(records) > len(summaries):
        _single_trials(found, records, curves, axis)
    members = {id(s) for s in front}
    unpruned = [place for place, s in enumerate(summaries) if s.unpruned]
    points = [(axis.cost(s), s.accuracy_finetuned.mean) for s in summaries]
    for curve in curves:
        keep = [k for k, row in enumerate(curve.rows) if id(row) in members]
        places = _thinned_places(curve, points, keep)
        look = _point_look(curve, len(summaries))
        found.add_scatter(**_at(points, places), name=escape(curve.name), legendgroup=curve.name, marker=look)
    if unpruned:
        look = {"color": MUTED, "symbol": "star-open", "size": 12, "line": {"width": 1.6}}
        found.add_scatter(**_at(points, unpruned), name=escape(summaries[unpruned[0]].method), marker=look)
    dense, cost = dense_of(records), axis.dense(records)
    said = fmt.significant(cost) if axis.unit == "ms" else fmt.count(cost)
    found.add_scatter(
        x=[cost],
        y=[dense.mean],
        mode="markers",
        name="dense",
        marker={"color": INK, "symbol": "star", "size": 13},
        hovertemplate=f"<b>dense</b><br>{fmt.percent(dense.mean)}, {said} {axis.unit}<extra></extra>",
    )
    found.update_xaxes(rangemode="tozero", tickformat="~s" if axis.unit != "ms" else "~g")
    found.update_yaxes(tickformat=".1~%")
    return with_room(found)


def speedup_over_macs(records: Sequence[Record], summaries: Sequence[Summary]) -> Figure:
    """Measured speed-up against the one that the MACs promise; the diagonal is a machine without overhead."""
    found = figure("speed-up by MACs", "speed-up measured")
    top = 1.08 * max(*(s.macs_ratio for s in summaries), *(s.speedup.most for s in summaries))
    low = min(0.9, *(s.speedup.least for s in summaries))
    found.add_scatter(
        x=[1, top], y=[1, top], mode="lines", name="ideal", line={"color": FAINT, "width": 2}, hoverinfo="skip"
    )
    points = [(s.macs_ratio, s.speedup.mean) for s in summaries]
    for curve in curves_of(summaries):
        places = _thinned_places(curve, points)
        found.add_scatter(
            **_at(points, places),
            error_y=error_bars([summaries[place].speedup for place in places], curve.colour),
            name=escape(curve.name),
            marker=_point_look(curve, len(summaries)),
        )
    found.add_hline(y=1, line={"color": MUTED, "dash": "dash", "width": 1.5}, layer="below")
    found.update_xaxes(ticksuffix=fmt.CROSS, rangemode="normal")
    if top > FAR:
        ends = [math.log10(low * 0.9), math.log10(top * 1.1)]
        found.update_xaxes(type="log", range=[math.log10(0.9), ends[1]], dtick="D2")
        found.update_yaxes(ticksuffix=fmt.CROSS, type="log", range=ends, dtick="D2")
    else:
        found.update_yaxes(ticksuffix=fmt.CROSS, range=[max(0.0, low - 0.1), top])
    return with_room(found)


def dense_of(records: Sequence[Record]) -> Estimate:
    """Accuracy of the dense models, each counted once."""
    return estimate({r.seed: r.accuracy_dense for r in records}.values())


def gain_in_points(summary: Summary) -> Estimate:
    """Fine-tuned against dense, in percentage points."""
    drop = summary.drop
    mean, low, high, least, most = (-100 * v for v in (drop.mean, drop.high, drop.low, drop.most, drop.least))
    return Estimate(mean, low, high, least, most, drop.seeds)


TITLES = {
    "channels": "channels removed",
    "weights": "weights set to zero",
    "macs": "MACs removed",
    "params": "parameters removed",
}


def removed_title(summaries: Sequence[Summary]) -> str:
    """What the axis of sparsities counts."""
    targets = {s.target for s in summaries if s.prunes != "nothing"}
    if len(targets) > 1:
        return "removed, as each method counts it"
    return TITLES.get(next(iter(targets), ""), "removed")


def right_of(summaries: Sequence[Summary]) -> float:
    """Where the axis of sparsities ends."""
    return min(1.0, max(0.1, *(s.sparsity for s in summaries)) + 0.03)


def explain_stages(found: Figure, stages: Sequence[str], curves: int) -> None:
    """A second legend, of line styles; below the chart where the first one is long."""
    for stage in stages:
        style = {"color": MUTED, "dash": STAGES[stage], "width": 2}
        found.add_scatter(x=[None], y=[None], mode="lines", name=stage, legend="legend2", line=style)
    if curves > MANY_CURVES:
        found.update_layout(legend2={"x": 0, "xanchor": "left", "y": -0.14, "yanchor": "top"})


def _stage(found: Figure, curve: Curve, stage: str, value: Callable[[Summary], Estimate], *, bars: bool) -> None:
    found.add_scatter(
        **line(curve, value, bars=bars),
        name=f"{escape(curve.name)}, {stage}",
        legendgroup=curve.name,
        showlegend=False,
    )


def _repaired(found: Figure, curve: Curve) -> None:
    mended = [(place, s, s.accuracy_repaired) for place, s in zip(curve.places, curve.rows, strict=True)]
    known = [(place, s, accuracy) for place, s, accuracy in mended if accuracy]
    if known:
        found.add_scatter(
            x=[s.sparsity + curve.shift for _, s, _ in known],
            y=[accuracy.mean for *_, accuracy in known],
            mode="lines",
            name=f"{escape(curve.name)}, repaired",
            legendgroup=curve.name,
            showlegend=False,
            line={"color": curve.colour, "width": 1.8, "dash": "dashdot"},
            customdata=[place for place, *_ in known],
            meta=SETTINGS,
            hovertemplate=HOVER,
        )


def _level(found: Figure, summary: Summary, height: float, right: float, said: str) -> None:
    """A control without a sparsity is a level across the chart."""
    found.add_scatter(
        x=[0, right],
        y=[height, height],
        mode="lines",
        name=escape(summary.method),
        line={"color": MUTED, "dash": "longdash", "width": 1.4},
        hovertemplate=f"<b>{escape(summary.name)}</b>, fine-tuned as long: {said}<extra></extra>",
    )


def _thinned_places(curve: Curve, points: Sequence[tuple[float, float]], keep: Sequence[int] = ()) -> list[int]:
    """The places of a curve's points that are drawn."""
    return [curve.places[k] for k in thinned([points[place] for place in curve.places], keep)]


def _point_look(curve: Curve, settings: int) -> dict[str, Any]:
    look = marker(curve, size=10 if settings <= CROWD else 6)
    open_one = curve.symbol.endswith("open")
    return {**look, "line": {"color": curve.colour, "width": 2} if open_one else {"color": SURFACE, "width": 1}}


def _at(points: Sequence[tuple[float, float]], places: Sequence[int]) -> dict[str, Any]:
    return {
        "x": [points[place][0] for place in places],
        "y": [points[place][1] for place in places],
        "mode": "markers",
        "customdata": list(places),
        "meta": SETTINGS,
        "hovertemplate": HOVER,
    }


def _single_trials(found: Figure, records: Sequence[Record], curves: Sequence[Curve], axis: Axis) -> None:
    """Every trial as a small dot behind the means of its setting."""
    place_of = {record.key: place for place, record in enumerate(records)}
    for curve in curves:
        of_curve = [place_of[key] for row in curve.rows for key in row.keys]
        points = [(axis.of_trial(records[place]), records[place].accuracy_finetuned) for place in of_curve]
        drawn = thinned(points)
        found.add_scatter(
            x=[points[k][0] for k in drawn],
            y=[points[k][1] for k in drawn],
            mode="markers",
            name=f"{escape(curve.name)}, trials",
            legendgroup=curve.name,
            showlegend=False,
            marker={"color": curve.colour, "size": 4, "opacity": 0.45},
            customdata=[of_curve[k] for k in drawn],
            meta=TRIALS,
            hovertemplate=HOVER,
        )


def _band(found: Figure, dense: Estimate, right: float) -> None:
    low, high = dense.bar if dense.seeds > 1 else (dense.mean, dense.mean)
    found.add_hrect(y0=max(0.0, low), y1=min(1.0, high), fillcolor=CHANCE, opacity=0.16, line_width=0, layer="below")
    found.add_scatter(
        x=[0, right],
        y=[dense.mean, dense.mean],
        mode="lines",
        name="dense",
        showlegend=False,
        line={"color": MUTED, "dash": "dash", "width": 2},
        hovertemplate=f"<b>dense</b> {fmt.accuracy(dense)} %<extra></extra>",
    )


def _accuracy_range(summaries: Sequence[Summary], dense: Estimate) -> list[float]:
    shown = [s.accuracy_pruned for s in summaries if s.prunes != "nothing"]
    shown += [s.accuracy_finetuned for s in summaries]
    low = min([*(min(e.bar[0], e.least) for e in shown if e.seeds > 1), *(e.mean for e in shown)])
    high = max(dense.mean, *(e.mean for e in shown))
    return [max(0.0, low - 0.05), min(1.02, high + 0.05)]
