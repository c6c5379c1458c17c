"""A callback for `transformers.Trainer`: masks that hold, weights pruned along a schedule, penalties."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from secateur.integrations.hooking import Hooks


class PruningCallback(TrainerCallback):
    """Calls training hooks at their moments: `Trainer(..., callbacks=[PruningCallback(masks.hook())])`.

    `after_backward` comes when gradients are complete and clipped, before the optimizer's step; `after_step` behind it;
    `after_epoch` at the end of an epoch. Hooks with state (`Gradual`, `GroupPenalty`) save it in every checkpoint, and
    get it back when `trainer.train(resume_from_checkpoint=...)` goes on from one.
    """

    def __init__(self, hooks: object | Sequence[object]) -> None:
        """`hooks`: one or several of `Masks.hook()`, `Gradual`, `GammaPenalty` ... or of your own."""
        self._hooks = Hooks(hooks)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on where a checkpoint left off."""
        if state.global_step:
            self._hooks.load(_folder(args, state))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gradients are there, the weights have not moved."""
        self._hooks.call("after_backward", kwargs["model"], kwargs["optimizer"])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The weights have moved."""
        self._hooks.call("after_step", kwargs["model"], kwargs["optimizer"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An epoch is over."""
        self._hooks.call("after_epoch", kwargs["model"], kwargs["optimizer"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Beside the model and the optimizer."""
        if state.is_world_process_zero:
            self._hooks.save(_folder(args, state))


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    given = args.resume_from_checkpoint
    if isinstance(given, str) and Path(given).name == f"checkpoint-{state.global_step}":
        return Path(given)
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
