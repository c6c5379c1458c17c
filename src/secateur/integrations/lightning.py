"""A callback for Lightning: masks that hold, weights pruned along a schedule, penalties."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from secateur.errors import InputError
from secateur.integrations.hooking import Hooks


class PruningCallback(Callback):
    """Calls training hooks at their moments: `Trainer(callbacks=[PruningCallback(masks.hook(), of="net")])`.

    The hooks see the network in the attribute `of` of the LightningModule ("": the module itself), which is the one
    that masks were made for. Their state goes into Lightning's checkpoints. With several optimizers the hooks are
    called for each of them.
    """

    def __init__(self, hooks: object | Sequence[object], of: str = "model") -> None:
        """`hooks`: one or several of `Masks.hook()`, `Gradual`, `GammaPenalty` ... or of your own."""
        self._hooks, self._of, self._steps = Hooks(hooks), of, 0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Gradients are there, the weights have not moved."""
        self._hooks.call("after_backward", self._network(pl_module), optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The weights have moved, unless gradients are still being accumulated."""
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            for optimizer in trainer.optimizers:
                self._hooks.call("after_step", self._network(pl_module), optimizer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch is over."""
        for optimizer in trainer.optimizers:
            self._hooks.call("after_epoch", self._network(pl_module), optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Of the hooks, for Lightning's checkpoint."""
        return {**self._hooks.state_dict(), "steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._steps = state_dict["steps"]
        self._hooks.load_state_dict(state_dict)

    def _network(self, module: LightningModule) -> nn.Module:
        found = module if not self._of else getattr(module, self._of, None)
        if not isinstance(found, nn.Module):
            raise InputError(f"{type(module).__name__} has no network in its attribute {self._of!r}: pass of=.")
        return found
