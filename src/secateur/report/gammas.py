"""The histogram of BatchNorm scales that network slimming is judged by: one figure in one HTML file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.errors import InputError
from secateur.files import write_bytes
from secateur.report import format as fmt
from secateur.report import palette
from secateur.report.looks import figure as empty_figure
from secateur.report.page import asset, packed
from secateur.report.palette import HUES, INK
from secateur.report.sections import inline

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Gammas = Mapping[str, Sequence[float]]

BINS = 80
NAMED = 3  # layers that a hover text names


def gamma_histogram(gammas: Gammas, threshold: float, out: Path | str, title: str = "BatchNorm scales") -> Path:
    """Write the histogram of |gamma| over all BatchNorm channels, with the threshold, as an HTML file; return its path.

    `gammas`: {layer: gamma, or |gamma|, of each channel}. Channels strictly below `threshold` are those that would go.
    The file holds all it needs and fetches nothing; it is replaced whole. Raises InputError for no channels, or numbers
    that are not finite; OSError where it cannot be written.

    Source: Liu 2017, arXiv 1708.06519, figure 4.
    """
    figure = gamma_figure(gammas, threshold)
    write_bytes(out, _page(figure, title, gammas, threshold).encode())
    return Path(out)


def gamma_figure(gammas: Gammas, threshold: float) -> Figure:
    """The plotly figure: equal bins, in each the channels below the threshold under those that stay.

    Heights grow with the root of the counts: sparse training piles so many channels up at zero that the others, among
    which the threshold has to be chosen, would lie flat on a plain axis.
    """
    values = _checked(gammas, threshold)
    width = (max(*values, threshold) or 1.0) / BINS
    figure = empty_figure("|\N{GREEK SMALL LETTER GAMMA}|, the scale of a channel", "channels, root scale", height=460)
    goes = _counted(gammas, width, lambda gamma: gamma < threshold)
    stays = _counted(gammas, width, lambda gamma: gamma >= threshold)
    for name, colour, bins in (("below the threshold", HUES[1], goes), ("stays", HUES[0], stays)):
        under = {place: goes[place].total() if bins is stays and place in goes else 0 for place in bins}
        figure.add_bar(
            x=[(place + 0.5) * width for place in bins],
            y=[math.sqrt(under[p] + counts.total()) - math.sqrt(under[p]) for p, counts in bins.items()],
            base=[math.sqrt(count) for count in under.values()],
            width=width,
            name=name,
            marker={"color": colour, "line": {"width": 0}},
            customdata=[
                [
                    f"{place * width:.3g} to {(place + 1) * width:.3g}",
                    fmt.several(counts.total(), "channel"),
                    _layers(counts),
                ]
                for place, counts in bins.items()
            ],
            hovertemplate="<b>%{customdata[1]}</b><br>%{customdata[0]}<br>%{customdata[2]}<extra></extra>",
        )
    ticks = _ticks(
        max(goes.get(place, Counter()).total() + stays.get(place, Counter()).total() for place in range(BINS))
    )
    left = threshold < 0.6 * BINS * width  # the label stands where there is more room
    figure.add_vline(x=threshold, line={"color": INK, "dash": "dash", "width": 1.5})
    figure.add_annotation(
        x=threshold,
        y=1,
        yref="paper",
        yanchor="top",
        xanchor="left" if left else "right",
        xshift=8 if left else -8,
        text=_label(values, threshold),
        align="left" if left else "right",
        showarrow=False,
        font={"color": INK, "size": 13},
    )
    figure.update_layout(barmode="overlay", bargap=0)
    figure.update_xaxes(range=[0, BINS * width], tickformat=".3~g")
    figure.update_yaxes(rangemode="tozero", tickvals=[math.sqrt(t) for t in ticks], ticktext=[f"{t:,}" for t in ticks])
    return figure


def emptied(gammas: Gammas, threshold: float) -> list[str]:
    """The layers all of whose channels lie below the threshold: pruned by it alone, they would be cut through."""
    return [name for name, part in gammas.items() if len(part) and all(abs(gamma) < threshold for gamma in part)]


def _page(figure: Figure, title: str, gammas: Gammas, threshold: float) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    values, lost = _checked(gammas, threshold), emptied(gammas, threshold)
    below = sum(value < threshold for value in values)
    warning = f"{fmt.listed(lost)} would lose every channel at this threshold. Keep some of every layer, or lower it."
    environment = Environment(loader=PackageLoader("secateur", "report"), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("gammas.html").render(
        title=title,
        headline=f"{fmt.percent(below / len(values))} of all channels lie below {threshold:.3g}",
        caption=f"{fmt.several(len(values), 'channel')} of {fmt.several(len(gammas), 'BatchNorm layer')}, by the "
        "absolute value of their scale. Sparse training drives scales to zero; what lies below the threshold can go. "
        "Bars grow with the root of their counts.",
        emptied=warning if lost else "",
        figure=Markup(inline(figure)),
        dark=Markup(inline(palette.DARK)),
        css=Markup(asset("page.css")),
        script=Markup(asset("page.js")),
        plotly=packed(get_plotlyjs()),
    )


def _label(values: Sequence[float], threshold: float) -> str:
    below = sum(value < threshold for value in values)
    share = below / len(values)
    return (
        f"<b>threshold {threshold:.3g}</b><br>percentile {100 * share:.3g}<br>"
        f"{below:,} of {len(values):,} channels below"
    )


def _counted(gammas: Gammas, width: float, wanted: Callable[[float], bool]) -> dict[int, Counter[str]]:
    """Per bin how many of the wanted channels each layer has in it; the largest value falls into the last bin."""
    found: dict[int, Counter[str]] = {}
    for name, part in gammas.items():
        for gamma in filter(wanted, map(abs, part)):
            found.setdefault(min(int(gamma / width), BINS - 1), Counter())[name] += 1
    return dict(sorted(found.items()))


def _ticks(most: int) -> list[int]:
    """Round counts from 0 to `most` that stand well apart on a root scale."""
    found = [0]
    for count in (step * 10**power for power in range(len(str(most))) for step in (1, 2, 5)):
        if found[-1] < count <= most and math.sqrt(count) - math.sqrt(found[-1]) >= 0.08 * math.sqrt(most):
            found.append(count)
    return found


def _layers(counts: Counter[str]) -> str:
    most = [f"{escape(name)} {count:,}" for name, count in counts.most_common(NAMED)]
    more = len(counts) - len(most)
    return ", ".join(most) + (f" and {fmt.several(more, 'more layer')}" if more else "")


def _checked(gammas: Gammas, threshold: float) -> list[float]:
    values = [abs(float(gamma)) for gamma in chain(*gammas.values())]
    if not values:
        raise InputError("there is no gamma to draw: the model has no BatchNorm with a scale.")
    if not all(map(math.isfinite, values)):
        raise InputError("a gamma is not a finite number: did training diverge?")
    if isinstance(threshold, bool) or not 0 <= threshold < math.inf:
        raise InputError(f"the threshold is a finite number, at least 0; got {threshold!r}.")
    return values
