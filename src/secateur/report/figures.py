"""Figures for papers: PNG files at 300 dpi, as wide as a column, in the page's colours."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import InputError
from secateur.report import charts
from secateur.report.looks import Curve, curves_of
from secateur.report.overview import Family, families, family_looks
from secateur.report.palette import CHANCE, FAINT, GRID, HUES, INK, MUTED
from secateur.report.records import Record, as_records, studies
from secateur.report.sections import Duels, duel_table
from secateur.report.statistics import Estimate, Summary, pareto_front, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 300
COLUMN = (3.5, 2.8)  # inches
LOOK: dict[Any, Any] = {
    "font.size": 7.5,
    "font.family": "sans-serif",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 6.5,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.6,
}
MARKERS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle-up": "^",
    "cross": "P",
    "triangle-down": "v",
    "star": "*",
    "hexagon": "h",
    "x": "X",
}


def write_figures(records: Iterable[Record | Mapping[str, Any]], folder: Path | str) -> list[Path]:
    """Write the figures of every model on every data set, and of families of models; returns their paths.

    The classic lines, accuracy against MACs, parameters and latency, and method against method. Raises InputError for
    no records or without matplotlib, OSError where a file cannot be written.
    """
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        raise InputError("figures are drawn with matplotlib: pip install 'secateur[figures]'.") from error

    found = as_records(records)
    if not found:
        raise InputError("no records to draw: run at least one trial first.")
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    results = {key: (rows, summarise(rows)) for key, rows in studies(found).items()}
    written: list[Path] = []
    with mpl.rc_context(LOOK):
        for (model, data), (rows, summaries) in results.items():
            name = _slug(f"{model}-{data}", written)
            written.append(_save(_classic(rows, summaries), place / f"{name}-classic.png"))
            for axis in charts.AXES.values():
                figure = _pareto(rows, summaries, axis)
                written.append(_save(figure, place / f"{name}-pareto-{axis.name.lower()}.png"))
            duels = duel_table(rows)
            if duels:
                written.append(_save(_paired(duels), place / f"{name}-paired.png"))
        if len(results) > 1:
            groups = families({key: summaries for key, (_, summaries) in results.items()})
            looks = family_looks(groups)
            for family in groups:
                name = _slug(f"family-{family.name}-{family.data}", written)
                written.append(_save(_family(family, looks), place / f"{name}.png"))
            duels = duel_table(found)
            if duels:
                written.append(_save(_paired(duels), place / "all-paired.png"))
    return written


def _classic(records: Sequence[Record], summaries: Sequence[Summary]) -> Figure:
    figure, axes = _empty(charts.removed_title(summaries), "test accuracy")
    dense, right = charts.dense_of(records), charts.right_of(summaries)
    axes.axhline(dense.mean, color=MUTED, linestyle="--", linewidth=0.9, label="dense")
    if dense.seeds > 1:
        axes.axhspan(*dense.bar, color=CHANCE, alpha=0.14, linewidth=0)
    for curve in curves_of(summaries):
        if curve.prunes != "nothing":
            _line(axes, curve, [s.accuracy_pruned for s in curve.rows], ":", bars=False)
        repaired = [s.accuracy_repaired for s in curve.rows]
        if all(repaired):
            _line(axes, curve, [e for e in repaired if e], "-.", bars=False, marker=False)
        _line(axes, curve, [s.accuracy_finetuned for s in curve.rows], "-", label=curve.name)
    for s in summaries:
        if s.unpruned:
            axes.axhline(s.accuracy_finetuned.mean, color=MUTED, linestyle=(0, (8, 3)), linewidth=0.8, label=s.method)
    axes.set_xlim(0, right)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_percent())
    _legend(figure, axes, "solid: fine-tuned; dash-dotted: repaired; dotted: pruned only")
    return figure


def _pareto(records: Sequence[Record], summaries: Sequence[Summary], axis: charts.Axis) -> Figure:
    figure, axes = _empty(axis.title, "test accuracy, fine-tuned")
    front = pareto_front(summaries, axis.cost)
    axes.step(
        [axis.cost(s) for s in front],
        [s.accuracy_finetuned.mean for s in front],
        where="post",
        color=FAINT,
        linewidth=3,
        zorder=1,
        label="front",
    )
    for curve in curves_of(summaries):
        x = [axis.cost(s) for s in curve.rows]
        axes.plot(
            x,
            [s.accuracy_finetuned.mean for s in curve.rows],
            linestyle="",
            label=curve.name,
            **_marker(curve.colour, curve.symbol),
        )
    for s in summaries:
        if s.unpruned:
            axes.plot(
                axis.cost(s), s.accuracy_finetuned.mean, "*", color=MUTED, mfc="none", ms=7, label=s.method, ls=""
            )
    axes.plot(axis.dense(records), charts.dense_of(records).mean, "*", color=INK, ms=7, label="dense", ls="")
    axes.set_xlim(left=0)
    if axis.unit != "ms":
        from matplotlib.ticker import EngFormatter

        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter(_percent(1))
    _legend(figure, axes)
    return figure


def _family(family: Family, looks: Mapping[str, tuple[str, str]]) -> Figure:
    figure, axes = _empty("removed", "test accuracy, family average")
    axes.axhline(family.dense, color=CHANCE, linestyle=":", linewidth=0.9, label="dense")
    for method, points in family.curves.items():
        if all(p.sparsity == 0 for p in points):
            axes.axhline(points[0].finetuned, color=MUTED, linestyle=(0, (8, 3)), linewidth=0.8, label=method)
            continue
        colour, symbol = looks[method]
        look = _marker(colour, symbol)
        before = [(p.sparsity, p.pruned) for p in points if p.pruned is not None]
        if before:
            axes.plot(*zip(*before, strict=True), "--", **{**look, "markerfacecolor": "white"})
        axes.plot([p.sparsity for p in points], [p.finetuned for p in points], label=method, **look)
    axes.set_xlim(left=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_percent())
    _legend(figure, axes, f"mean over {', '.join(family.models)}; dashed: before fine-tuning, solid: after it")
    return figure


def _paired(duels: Duels) -> Figure:
    from matplotlib.colors import LinearSegmentedColormap

    number = len(duels.methods)
    side = max(COLUMN[0], 0.62 * number + 1.2)
    figure, axes = _empty("", "", (side, 0.42 * number + 1.1))
    values = [[math.nan if d is None else 100 * d.gain.mean for d in cells] for _, cells in duels.rows]
    colours = LinearSegmentedColormap.from_list("difference", [HUES[1], "#ffffff", HUES[0]])
    top = 100 * duels.largest * 1.6 or 1.0  # pale enough for dark figures on it
    axes.imshow(values, cmap=colours, vmin=-top, vmax=top, aspect="auto")
    for row, (_, cells) in enumerate(duels.rows):
        for column, duel in enumerate(cells):
            if duel:
                text = f"{100 * duel.gain.mean:+.1f}" + ("*" if duel.clear else "")
                weight = "bold" if duel.clear else "normal"
                axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=INK, fontweight=weight)
    axes.set_xticks(range(number), duels.methods, rotation=35, ha="right")
    axes.set_yticks(range(number), duels.methods)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_title("row minus column, points of accuracy; * 95 % interval leaves out 0", fontsize=6.5, color=MUTED)
    return figure


def _line(
    axes: Axes,
    curve: Curve,
    values: Sequence[Estimate],
    style: str,
    *,
    label: str = "",
    bars: bool = True,
    marker: bool = True,
) -> None:
    x = [s.sparsity + curve.shift for s in curve.rows]
    look = _marker(curve.colour, curve.symbol) if marker else {"color": curve.colour}
    if not label:
        look = {**look, "markerfacecolor": "white"}
    if bars and any(e.seeds > 1 for e in values):
        spread = [[e.mean - e.bar[0] for e in values], [e.bar[1] - e.mean for e in values]]
        spread = [[half if math.isfinite(half) else 0.0 for half in side] for side in spread]
        axes.errorbar(x, [e.mean for e in values], spread, fmt=style, elinewidth=0.7, capsize=1.5, label=label, **look)
    else:
        axes.plot(x, [e.mean for e in values], style, label=label or None, **look)


def _marker(colour: str, symbol: str) -> dict[str, Any]:
    base = symbol.removesuffix("-open")
    filled = {} if base == symbol else {"markerfacecolor": "none"}
    return {"color": colour, "marker": MARKERS[base], "markeredgewidth": 0.8, **filled}


def _empty(x_title: str, y_title: str, size: tuple[float, float] = COLUMN) -> tuple[Figure, Axes]:
    """Made without pyplot: no state outlives it, and no display is asked for."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(x_title)
    axes.set_ylabel(y_title)
    axes.tick_params(length=0)
    return figure, axes


def _legend(figure: Figure, axes: Axes, note: str = "") -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3, handlelength=1.8, columnspacing=1.2)
    if note:
        figure.text(0.01, -0.01, note, fontsize=5.8, color=MUTED, va="top")


def _percent(decimals: int = 0) -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1, decimals)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=DPI, bbox_inches="tight", pad_inches=0.04, facecolor="white")
    return path


def _slug(name: str, written: Sequence[Path]) -> str:
    """A file name made of the words; numbered where another figure has it already."""
    base = re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.") or "figures"
    taken = {path.name for path in written}
    number = 1
    found = base
    while any(other.startswith((f"{found}-classic", f"{found}.png")) for other in taken):
        number += 1
        found = f"{base}-{number}"
    return found
