"""What a person sees of a training run: a bar on a terminal, a line per epoch elsewhere, or nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """What `fit` tells the display."""

    def step(self, loss: float) -> None:
        """One more step was made."""

    def epoch(self, text: str) -> None:
        """An epoch ended; `text` sums it up in one line."""


class _Silent:
    def step(self, loss: float) -> None:
        pass

    def epoch(self, text: str) -> None:
        pass


class _Lines:
    def step(self, loss: float) -> None:
        pass

    def epoch(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)  # noqa: T201 - this is the display


@contextmanager
def showing(wanted: bool | None, epochs: int, done: int, steps: int | None) -> Iterator[Progress]:
    """The display of a run of `epochs`, of which `done` were made before; `steps` per epoch where known.

    `wanted` None: a bar where standard error is a terminal, else nothing. True: elsewhere a line per epoch. False:
    nothing anywhere.
    """
    terminal = sys.stderr.isatty()
    if wanted is False or (wanted is None and not terminal):
        yield _Silent()
        return
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars
    except ModuleNotFoundError:
        terminal = False  # rich comes with the command line; the library does without
    if not terminal:
        yield _Lines()
        return
    from rich.console import Console

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("training", total=epochs * steps if steps else None, completed=done * (steps or 0))

        class _Bar:
            def step(self, loss: float) -> None:
                bars.advance(task)

            def epoch(self, text: str) -> None:
                bars.update(task, description=text)

        yield _Bar()
