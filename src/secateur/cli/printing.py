"""How commands speak: tables on standard output, progress on standard error, errors in one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from secateur.study.driver import Told


def one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{type(error).__name__}: {error.strerror}{where}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@contextmanager
def progress(total: int) -> Iterator[Told]:
    """A bar on a terminal, plain lines elsewhere; both on standard error."""
    if not sys.stderr.isatty():
        yield lambda done, line: typer.echo(f"[{done:>{len(str(total))}}/{total}] {line}", err=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(),
        MofNCompleteColumn(),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("training the dense model", total=total)
        yield lambda done, line: bars.update(task, completed=done, description=line)


def show(what: Table | str, least_width: int = 0) -> None:
    """Print to standard output, which is taken to be 120 characters wide where it is no terminal."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    console.width = max(console.width, least_width)
    console.print(what, highlight=False, markup=False, soft_wrap=isinstance(what, str))


def box() -> Any:
    """How tables are drawn: a rule below the heads."""
    from rich.box import SIMPLE_HEAD

    return SIMPLE_HEAD
