"""Colours: eight hues that colour-blind readers can tell apart (after Okabe and Ito), for a light and a dark page.

The charts are built with the light colours; the page swaps each for its dark partner when the reader's system is dark.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

INK, MUTED, GRID, FAINT, SURFACE = "#1d2329", "#626c76", "#e6e9ec", "#c9d2da", "#ffffff"
HUES = ("#0068a8", "#cc5500", "#00856a", "#a8437f", "#a67c00", "#3a9bd1", "#6b4fbb", "#7a5c3e")
CHANCE = "#7d8790"  # random, the criterion that knows nothing, is grey
GREYS = ("#4c565f", "#98a2ab", "#626c77", "#b0b8bf")  # of the other controls
OPEN_SYMBOLS = ("circle-open", "square-open", "diamond-open", "triangle-up-open")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "star", "hexagon")

DARK = {
    INK: "#e8ecef",
    MUTED: "#9aa5b0",
    GRID: "#2a3138",
    FAINT: "#46515c",
    SURFACE: "#171b20",
    CHANCE: "#a3adb6",
    **dict(zip(GREYS, ("#c3cad1", "#7f8a94", "#b4bcc4", "#69737c"), strict=True)),
    **dict(
        zip(
            HUES,
            ("#58b0e8", "#f08c4a", "#3cc4a2", "#e08cba", "#dcb445", "#9ad4f5", "#a796ea", "#c4a484"),
            strict=True,
        )
    ),
}


def styles(methods: Iterable[str], controls: Collection[str] = ()) -> dict[str, tuple[str, str]]:
    """Colour and marker symbol of each method, in the order given; eight repeat with other pairings.

    Controls are grey with open symbols; `random` is always a grey cross.
    """
    names = [name for name in dict.fromkeys(methods) if name != "random"]
    free = [name for name in names if name not in controls]
    found = {name: (HUES[i % len(HUES)], SYMBOLS[(i + i // len(HUES)) % len(SYMBOLS)]) for i, name in enumerate(free)}
    tied = [name for name in names if name in controls]
    found |= {
        name: (GREYS[i % len(GREYS)], OPEN_SYMBOLS[(i + i // len(GREYS)) % len(OPEN_SYMBOLS)])
        for i, name in enumerate(tied)
    }
    return {**found, "random": (CHANCE, "x")}
