"""The three moments of a training step at which something else may act, in `fit` or in any loop of your own.

A hook is any object with one or more of the methods of `Hook`. Slimming adds a penalty's gradient in
`after_backward`; masks set weights back to zero in `after_step`; a schedule moves on in `after_epoch`.
A hook with state that a resumed run needs has `state_dict` and `load_state_dict`, in plain values and tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import InputError, TrainingError
from secateur.plans import named_tensors

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


def names(hooks: Sequence[object]) -> list[str]:
    """What tells hooks apart in a checkpoint: a frozen dataclass is its settings, any other hook its class."""
    return [_name(hook) for hook in hooks]


def _name(hook: object) -> str:
    parameters = getattr(type(hook), "__dataclass_params__", None)
    if parameters is None or not parameters.frozen:
        return type(hook).__name__
    return re.sub(r" at 0x[0-9a-f]+", "", repr(hook))  # functions print where they lie, which differs from run to run


def states(hooks: Sequence[object]) -> list[dict[str, Any] | None]:
    """What of every hook belongs in a checkpoint; None where nothing does."""
    return [hook.state_dict() if isinstance(hook, Stateful) else None for hook in hooks]


def restore(hooks: Sequence[object], saved: Sequence[dict[str, Any] | None]) -> None:
    """Give every stateful hook back the state it had."""
    for hook, state in zip(hooks, saved, strict=True):
        if isinstance(hook, Stateful) and state is not None:
            hook.load_state_dict(state)


class Snapshot:
    """Keeps the weights as they were after `epoch` epochs of the one run it is given to; the run goes on as without it.

    `weights` is {name: tensor on the CPU} of every parameter and buffer. A resumed run has them too. The weights before
    the first epoch need no hook: they are those of the model that was given to `fit`.
    """

    def __init__(self, epoch: int) -> None:
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 1:
            raise InputError(f"Snapshot: epoch is how many epochs to wait for, at least 1; got {epoch!r}.")
        self.epoch = epoch
        self._seen = 0
        self._weights: dict[str, Tensor] | None = None

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """What was kept. Raises InputError before that epoch is over."""
        if self._weights is None:
            raise InputError(f"no weights yet: {self._seen} epochs are over, the snapshot is due after {self.epoch}.")
        return self._weights

    def after_epoch(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Count, and keep the weights when it is time."""
        self._seen += 1
        if self._seen == self.epoch:
            self._weights = {name: tensor.detach().cpu().clone() for name, tensor in named_tensors(model).items()}

    def state_dict(self) -> dict[str, Any]:
        """How far it is, and what it keeps."""
        return {"epoch": self.epoch, "seen": self._seen, "weights": self._weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint. Raises TrainingError for the snapshot of another epoch."""
        if state["epoch"] != self.epoch:
            raise TrainingError(
                f"the checkpoint keeps the weights after epoch {state['epoch']}, this run those after {self.epoch}: "
                "give another checkpoint path."
            )
        self._seen, self._weights = state["seen"], state["weights"]
