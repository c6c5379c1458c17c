"""Greedy criteria: groups are scored one after another, each on what the choices before it have left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Greedy:
    """A criterion that is measured anew for every group, with the channels chosen so far zeroed.

    `ordering.select_in_order` runs it, in order of execution.
    """

    criterion: Callable[..., Tensor]

    @property
    def needs(self) -> tuple[str, ...]:
        """The evidence its criterion needs, for every group."""
        return tuple(getattr(self.criterion, "needs", ()))

    @property
    def __name__(self) -> str:
        return f"greedy({getattr(self.criterion, '__name__', self.criterion)})"
