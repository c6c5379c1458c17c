"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer


def _remember_debug(ctx: typer.Context, value: bool) -> bool:
    if value:
        ctx.find_root().obj = "debug"
    return value


Debug = Annotated[
    bool, typer.Option("--debug", callback=_remember_debug, is_eager=True, help="Show the traceback of an error.")
]
