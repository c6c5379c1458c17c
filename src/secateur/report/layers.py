"""Layer by layer: widths and sparsities as bars, and the same for every setting in as few numbers as will do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from secateur.report import format as fmt
from secateur.report.looks import figure
from secateur.report.palette import FAINT, HUES, INK
from secateur.report.statistics import Summary

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

LONGEST_NAME = 28  # characters below a bar


def layer_widths(summary: Summary) -> Figure:
    """Output channels of every layer before and after; the page swaps in other settings."""
    found = figure("", "output channels")
    layers = [_short(row.layer) for row in summary.widths]
    found.add_bar(x=layers, y=[row.before for row in summary.widths], name="dense", marker={"color": FAINT})
    found.add_bar(x=layers, y=[row.after for row in summary.widths], name="pruned", marker={"color": INK})
    found.update_layout(barmode="overlay", bargap=0.35, barcornerradius=2)
    _name_layers(found, layers)
    found.update_yaxes(rangemode="tozero")
    return found


def layer_sparsities(summary: Summary) -> Figure:
    """The fraction of every layer's weights that are gone or zero; the page swaps in other settings."""
    found = figure("", "weights gone or zero, %")
    layers = [_short(row.layer) for row in summary.layers]
    found.add_bar(
        x=layers,
        y=[mille / 10 for mille in _gone(summary)],
        marker={"color": HUES[0]},
        hovertemplate="%{x}: %{y} %<extra></extra>",
    )
    found.update_layout(bargap=0.35, barcornerradius=2)
    _name_layers(found, layers)
    found.update_yaxes(range=[0, 100])
    return found


def width_choices(summaries: Sequence[Summary]) -> dict[str, Any]:
    """The widths of every setting, as `Choices` of the page's script: two bars per layer."""
    return _choices(
        [[(_short(row.layer), row.before) for row in s.widths] for s in summaries],
        [[row.after for row in s.widths] for s in summaries],
    )


def sparsity_choices(summaries: Sequence[Summary]) -> dict[str, Any]:
    """The sparsities of every setting, in thousandths: one bar per layer."""
    return _choices([[(_short(row.layer), 0) for row in s.layers] for s in summaries], [_gone(s) for s in summaries])


@dataclass(frozen=True)
class WidthTable:
    """Per layer its width in the dense model and in each setting of one method; heads where channels go in blocks."""

    method: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


def width_table(summaries: Sequence[Summary], chosen: Summary) -> WidthTable | None:
    """Of the method of the highlighted setting, at each of its sparsities; None where nothing got narrower."""
    shown = [s for s in summaries if (s.method, s.scope, s.target) == (chosen.method, chosen.scope, chosen.target)]
    rows = [[(row.layer, row.before) for row in s.widths] for s in shown]
    if not rows[0] or any(row != rows[0] for row in rows):
        return None
    dense = [_width(row.before, row.block) for row in shown[0].widths]
    cells = [[_width(row.after, row.block) for row in s.widths] for s in shown]
    layers = [row.layer for row in shown[0].widths]
    return WidthTable(
        chosen.method,
        ("layer", "dense", *(f"{fmt.share(s.sparsity)} % removed" for s in shown)),
        [(layer, *row) for layer, *row in zip(layers, dense, *cells, strict=True) if len(set(row)) > 1],
    )


def _width(channels: int, block: int) -> str:
    return f"{channels}" if block == 1 else f"{channels // block} {fmt.CROSS} {block}"


def _name_layers(found: Figure, layers: Sequence[str]) -> None:
    """Names below the bars, unless they are so long that they would leave the bars no room."""
    found.update_xaxes(type="category", showgrid=False, tickangle=-35, automargin=True)
    if max(map(len, layers), default=0) > LONGEST_NAME:
        found.update_xaxes(showticklabels=False, title_text="layers in their order; point at one for its name")


def _short(layer: str) -> str:
    return escape(layer.removesuffix(".weight"))


def _gone(summary: Summary) -> list[int]:
    return [round(1000 * (1 - row.left / row.before)) for row in summary.layers]


def _choices(layers: Sequence[Sequence[tuple[str, int]]], bars: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Layer names and dense widths once per architecture, in `nets`; per setting the net's place and its bars."""
    nets: dict[tuple[tuple[str, int], ...], int] = {}
    rows = [[nets.setdefault(tuple(names), len(nets)), *values] for names, values in zip(layers, bars, strict=True)]
    return {
        "nets": [{"layers": [n for n, _ in net], "before": [b for _, b in net]} for net in nets],
        "rows": rows,
    }
