"""Colours: eight hues that colour-blind readers can tell apart (after Okabe and Ito), for a light and a dark page.

The charts are built with the light colours; the page swaps each for its dark partner when the reader's system is dark.
"""

from __future__ import annotations

from collections.abc import Iterable

INK, MUTED, GRID, FAINT, SURFACE = "#1d2329", "#626c76", "#e6e9ec", "#c9d2da", "#ffffff"
HUES = ("#0068a8", "#cc5500", "#00856a", "#a8437f", "#a67c00", "#3a9bd1", "#6b4fbb", "#7a5c3e")
CHANCE = "#7d8790"  # random, the criterion that knows nothing, is grey
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "star", "hexagon")

DARK = {
    INK: "#e8ecef",
    MUTED: "#9aa5b0",
    GRID: "#2a3138",
    FAINT: "#46515c",
    SURFACE: "#171b20",
    CHANCE: "#a3adb6",
    **dict(
        zip(
            HUES,
            ("#58b0e8", "#f08c4a", "#3cc4a2", "#e08cba", "#dcb445", "#9ad4f5", "#a796ea", "#c4a484"),
            strict=True,
        )
    ),
}


def styles(criteria: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker symbol of each criterion, in the order given; eight repeat with other pairings."""
    names = [name for name in dict.fromkeys(criteria) if name != "random"]
    found = {name: (HUES[i % len(HUES)], SYMBOLS[(i + i // len(HUES)) % len(SYMBOLS)]) for i, name in enumerate(names)}
    return {**found, "random": (CHANCE, "x")}
