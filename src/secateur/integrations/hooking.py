"""What the callbacks share: calling hooks at their three moments, and their state beside the trainer's checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from secateur.errors import InputError, TrainingError
from secateur.files import replacing
from secateur.training import hooks as hooking

FILE = "secateur_hooks.pt"


class Hooks:
    """Some hooks, called together; a single one will do."""

    def __init__(self, hooks: object | Sequence[object]) -> None:
        """Raises InputError for an object without any of the three methods."""
        self.hooks = tuple(hooks) if isinstance(hooks, Sequence) else (hooks,)
        if not self.hooks:
            raise InputError("no hook to call: pass masks.hook(), Gradual(...), GammaPenalty(...) or the like.")
        hooking.check(self.hooks)

    def call(self, moment: str, model: nn.Module, optimizer: Optimizer) -> None:
        """Call that method of every hook that has it."""
        hooking.call(self.hooks, moment, model, optimizer)

    def state_dict(self) -> dict[str, Any]:
        """The state of every hook that has one."""
        return {"names": hooking.names(self.hooks), "states": hooking.states(self.hooks)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back. Raises TrainingError for that of other hooks."""
        ours, theirs = hooking.names(self.hooks), list(state["names"])
        if ours != theirs:
            raise TrainingError(f"the checkpoint was written with the hooks {theirs}, this run has {ours}.")
        hooking.restore(self.hooks, state["states"])

    def save(self, folder: Path) -> None:
        """Write the state into a checkpoint's folder."""
        with replacing(folder / FILE) as file:
            torch.save(self.state_dict(), file)

    def load(self, folder: Path) -> None:
        """Read it from there; a checkpoint without one was written without these hooks, and raises TrainingError."""
        path = folder / FILE
        if not path.exists():
            raise TrainingError(f"{folder} holds no state of hooks: it was written by a run without this callback.")
        self.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
