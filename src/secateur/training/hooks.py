"""The three moments of a training step at which something else may act, in `fit` or in any loop of your own.

A hook is any object with one or more of the methods of `Hook`. Slimming adds a penalty's gradient in
`after_backward`; masks set weights back to zero in `after_step`; a schedule moves on in `after_epoch`.
A hook with state that a resumed run needs has `state_dict` and `load_state_dict`, in plain values and tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import nn
from torch.optim import Optimizer

from secateur.errors import InputError

MOMENTS = ("after_backward", "after_step", "after_epoch")


class Hook(Protocol):
    """All that a hook may have; each method may be missing. A method may change the model it is given."""

    def after_backward(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Gradients are there, not yet clipped; the weights have not moved."""

    def after_step(self, model: nn.Module, optimizer: Optimizer) -> None:
        """The optimizer has moved the weights."""

    def after_epoch(self, model: nn.Module, optimizer: Optimizer) -> None:
        """An epoch is over; its checkpoint is not yet written."""


@runtime_checkable
class Stateful(Protocol):
    """A hook whose state belongs in the checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """The state, in plain values and tensors."""

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Take a state back."""


def call(hooks: Sequence[object], moment: str, model: nn.Module, optimizer: Optimizer) -> None:
    """Call that method of every hook that has it, in order."""
    for hook in hooks:
        method = getattr(hook, moment, None)
        if method is not None:
            method(model, optimizer)


def check(hooks: Sequence[object]) -> None:
    """Raise InputError about the first object that has none of the three methods."""
    for hook in hooks:
        if not any(callable(getattr(hook, moment, None)) for moment in MOMENTS):
            raise InputError(f"a hook has at least one of the methods {', '.join(MOMENTS)}; {hook!r} has none.")


def states(hooks: Sequence[object]) -> list[dict[str, Any] | None]:
    """What of every hook belongs in a checkpoint; None where nothing does."""
    return [hook.state_dict() if isinstance(hook, Stateful) else None for hook in hooks]


def restore(hooks: Sequence[object], saved: Sequence[dict[str, Any] | None]) -> None:
    """Give every stateful hook back the state it had."""
    for hook, state in zip(hooks, saved, strict=True):
        if isinstance(hook, Stateful) and state is not None:
            hook.load_state_dict(state)
