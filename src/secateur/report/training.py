"""How the trials of one setting were trained: accuracy on training data, epoch by epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any

from secateur.report.looks import figure
from secateur.report.palette import HUES, MUTED

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Curve = Sequence[tuple[str, int, float, float, float]]  # stage, epoch, loss, accuracy, learning rate


def training_curves(curves: Mapping[str, Curve]) -> Figure:
    """One line per trial over all its epochs, with a break where another stage begins; the stages are named on top."""
    found = figure("epoch", "accuracy on training data")
    marks: dict[float, str] = {}
    for place, (key, points) in enumerate(curves.items()):
        x: list[float | None] = []
        y: list[float | None] = []
        said: list[Any] = []
        done = 0
        for stage, epochs in groupby(points, key=lambda point: point[0]):
            marks.setdefault(done, stage)
            for _, epoch, loss, accuracy, rate in epochs:
                done += 1
                x.append(done)
                y.append(round(accuracy, 5))
                said.append(f"{escape(stage)}, epoch {epoch}: loss {loss:.3g}, learning rate {rate:.2g}")
            x.append(None)
            y.append(None)
            said.append("")
        found.add_scatter(
            x=x,
            y=y,
            mode="lines",
            name=escape(key),
            line={"color": HUES[place % len(HUES)], "width": 1.6},
            customdata=said,
            hovertemplate=f"<b>{escape(key)}</b><br>%{{customdata}}<br>%{{y:.1%}}<extra></extra>",
            showlegend=False,
        )
    for start, stage in marks.items():
        found.add_vline(x=start + 0.5, line={"color": MUTED, "dash": "dot", "width": 1}, layer="below")
        found.add_annotation(
            x=start + 0.5, y=1, yref="paper", yanchor="bottom", xanchor="left", text=escape(stage), showarrow=False
        ).layout.annotations[-1].font = {"color": MUTED, "size": 11.5}
    found.update_layout(margin={"l": 8, "r": 12, "t": 24, "b": 8})
    found.update_yaxes(tickformat=".0%")
    return found
