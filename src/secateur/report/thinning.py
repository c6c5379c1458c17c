"""Fewer points that look the same: a chart of thousands of settings draws in time."""

from __future__ import annotations

from collections.abc import Collection, Sequence

MANY = 100  # points of one method in one chart
CELLS = (64, 40)  # across and up: about a small marker's size on the page


def thinned(points: Sequence[tuple[float, float]], keep: Collection[int] = (), limit: int = MANY) -> list[int]:
    """The places of the points to draw: all up to `limit`; above it the first in each cell of a grid, and `keep`."""
    if len(points) <= limit:
        return list(range(len(points)))
    spans = []
    for values, cells in zip(zip(*points, strict=True), CELLS, strict=True):
        low, high = min(values), max(values)
        spans.append((low, (high - low) / cells or 1.0))
    taken = set(keep)
    seen = set()
    for place, point in enumerate(points):
        cell = tuple(int((value - low) / size) for value, (low, size) in zip(point, spans, strict=True))
        if cell not in seen:
            seen.add(cell)
            taken.add(place)
    return sorted(taken)
