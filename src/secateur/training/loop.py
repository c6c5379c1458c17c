"""fit(): the one training loop. Resumes bit for bit, and never touches the model it was given."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from secateur.batches import Forward, Loss, default_forward, default_loss, move, usable_device
from secateur.errors import DataError, InputError, TrainingError
from secateur.inputs import private_copy
from secateur.training import hooks as hooking
from secateur.training.checkpoints import identity, read_checkpoint, write_checkpoint
from secateur.training.evaluating import Tally
from secateur.training.progress import Progress, showing
from secateur.training.randomness import own_randomness, random_state, set_random_state
from secateur.training.recipes import Recipe, learning_rate


@dataclass(frozen=True)
class Epoch:
    """What one epoch of training was like; loss and accuracy are means over its steps, while the weights moved."""

    number: int  # 0 is the first
    loss: float
    accuracy: float  # nan where outputs and batches are no logits and labels
    lr: float  # of its last step
    samples: int
    seconds: float  # wall time, hooks included, the checkpoint not

    def __str__(self) -> str:
        rate = self.samples / self.seconds if self.seconds else math.inf
        known = "" if math.isnan(self.accuracy) else f", accuracy {self.accuracy:.2%}"
        return f"epoch {self.number + 1}: loss {self.loss:.4f}{known}, {rate:,.0f} samples/s"


@dataclass(frozen=True, eq=False)
class Fitted:
    """A trained model, in eval mode on the device it was trained on, and what happened on the way."""

    model: nn.Module
    history: tuple[Epoch, ...]


def fit(
    model: nn.Module,
    data: Iterable[Any],
    recipe: Recipe | None = None,
    *,
    device: torch.device | str = "cpu",
    forward: Forward | None = None,
    loss: Loss | None = None,
    hooks: Sequence[object] = (),
    checkpoint: Path | str | None = None,
    progress: bool | None = None,
    start_epoch: int = 0,
) -> Fitted:
    """Train a copy of a model.

    Args:
        model: where training starts; it is not changed, and neither are the caller's random number generators.
        data: training batches, iterable once per epoch; `set_epoch(epoch)` is called where it exists (as in `Batches`).
        recipe: how; default `Recipe()`.
        device: cpu, cuda, cuda:1, mps.
        forward: (model, batch) -> output; default for `(x, y)` pairs and Mappings, see `secateur.batches`.
        loss: (output, batch) -> scalar tensor; default cross-entropy for pairs, the output's own loss for Mappings.
        hooks: objects with any of after_backward, after_step, after_epoch; see `secateur.training.Hook`.
        checkpoint: a file, replaced after every epoch. Where it exists the run goes on from it, and ends with the
            same bits as one that was never interrupted (same machine, thread count and version of torch; data whose
            order follows from `set_epoch` or from torch's, numpy's or python's global generators).
        progress: None shows a bar on a terminal and nothing elsewhere; True also a line per epoch elsewhere.
        start_epoch: replay the recipe from this epoch on, as if those before had led to `model`: their learning rates
            and `set_epoch` are skipped, while momentum and random numbers start anew. Rewinding is made of this.

    Raises:
        InputError: a device this machine has not, nothing to train, a batch that needs `forward` or `loss`.
        DataError: the data yields no batch.
        TrainingError: the loss is not a number, or the checkpoint is damaged, of another run, or not writable.
    """
    chosen = recipe or Recipe()
    where = usable_device(device)
    hooking.check(hooks)
    if isinstance(start_epoch, bool) or not isinstance(start_epoch, int) or not 0 <= start_epoch < chosen.epochs:
        raise InputError(f"start_epoch is one of the recipe's {chosen.epochs} epochs, from 0; got {start_epoch!r}.")
    if isinstance(data, Iterator) and chosen.epochs - start_epoch > 1:
        raise InputError("the data is an iterator, good for one epoch: pass a list, a DataLoader or Batches.")
    if loss is not None and chosen.label_smoothing:
        raise InputError("label_smoothing belongs to the default loss: smooth in your own loss= and leave it at 0.")
    trained = private_copy(model).to(where)
    if chosen.channels_last:
        _set_memory_format_(trained, torch.channels_last)
    run = _Run(
        model=trained,
        optimizer=_optimizer(trained, chosen),
        recipe=chosen,
        device=where,
        forward=forward or default_forward,
        loss=loss or partial(default_loss, label_smoothing=chosen.label_smoothing),
        hooks=tuple(hooks),
        start=start_epoch,
    )
    with own_randomness(chosen.seed, where):
        history = run.resume(checkpoint)
        steps = len(data) if isinstance(data, Sized) else None
        done = start_epoch + len(history)
        with showing(progress, chosen.epochs, done, steps) as display:
            for number in range(done, chosen.epochs):
                history.append(run.epoch(number, data, steps, display))
                hooking.call(hooks, "after_epoch", run.model, run.optimizer)
                run.save(checkpoint, history)
                display.epoch(str(history[-1]))
    if chosen.channels_last:
        _set_memory_format_(trained, torch.contiguous_format)
    return Fitted(trained.eval(), tuple(history))


@dataclass(frozen=True)
class _Run:
    model: nn.Module
    optimizer: Optimizer
    recipe: Recipe
    device: torch.device
    forward: Forward
    loss: Loss
    hooks: tuple[object, ...]
    start: int

    def epoch(self, number: int, data: Iterable[Any], steps: int | None, display: Progress) -> Epoch:
        """Go through the data once."""
        start, total, rate = time.perf_counter(), Tally(), 0.0
        set_epoch = getattr(data, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(number)
        self.model.train()
        for step, batch in enumerate(data):
            # The rate of a step is that of its middle; without a known length, that of the middle of the epoch.
            moment = (step + 0.5) / steps if steps else 0.5
            rate = learning_rate(self.recipe, number + min(moment, 1.0))
            display.step(self.step(batch, rate, total, f"epoch {number + 1}, step {step + 1}"))
        if not total.samples:
            raise DataError(f"the data yielded no batch in epoch {number + 1}.")
        found = total.metrics()
        return Epoch(number, found.loss, found.accuracy, rate, found.samples, time.perf_counter() - start)

    def step(self, batch: Any, rate: float, total: Tally, when: str) -> float:
        """One update of the weights; returns the loss before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        here = move(batch, self.device)
        if self.recipe.channels_last:
            here = _channels_last(here)
        with self._precision():
            output = self.forward(self.model, here)
            loss = self.loss(output, here)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise InputError(
                f"loss(output, batch) must return a tensor of one value, the mean over the batch; got {got}."
            )
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value} in {when}, at learning rate {rate:.3g}: nothing of this epoch was kept. "
                "Try a lower lr, warmup_epochs=1, clip_norm=1, or bf16=False; then look for NaN in the data."
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        hooking.call(self.hooks, "after_backward", self.model, self.optimizer)
        if self.recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        hooking.call(self.hooks, "after_step", self.model, self.optimizer)
        total.add(output, here, loss)
        return value

    def save(self, checkpoint: Path | str | None, history: Sequence[Epoch]) -> None:
        """Write down everything the coming epochs depend on."""
        if checkpoint is not None:
            state = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "random": random_state(self.device),
                "hooks": hooking.states(self.hooks),
                "history": [asdict(row) for row in history],
            }
            write_checkpoint(Path(checkpoint), self._identity(), state)

    def resume(self, checkpoint: Path | str | None) -> list[Epoch]:
        """Take up the state in the checkpoint, if there is one; returns the epochs it has behind it."""
        state = read_checkpoint(Path(checkpoint), self._identity()) if checkpoint is not None else None
        if state is None:
            return []
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        set_random_state(state["random"], self.device)
        hooking.restore(self.hooks, state["hooks"])
        return [Epoch(**row) for row in state["history"]]

    def _identity(self) -> dict[str, Any]:
        settings = {**asdict(self.recipe), "device": self.device.type, "hooks": hooking.names(self.hooks)}
        # only where it says something, so that the checkpoints of runs without it stay what they were
        return identity(self.model, {**settings, "start_epoch": self.start} if self.start else settings)

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.recipe.bf16 else nullcontext()


def _optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise InputError("the model has no parameter that requires a gradient: there is nothing to train.")
    if recipe.optimizer == "adamw":
        # torch chooses well on a GPU; on a CPU it goes tensor by tensor, five times as slowly as in one pass
        fused = all(parameter.device.type == "cpu" and parameter.is_floating_point() for parameter in trained)
        return AdamW(trained, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=fused or None)
    nesterov = recipe.nesterov and recipe.momentum > 0
    return SGD(trained, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=nesterov)


def _set_memory_format_(model: nn.Module, layout: torch.memory_format) -> None:
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=layout)


def _channels_last(batch: Any) -> Any:
    if isinstance(batch, Tensor) and batch.dim() == 4:
        return batch.contiguous(memory_format=torch.channels_last)
    if isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
        return type(batch)(_channels_last(part) for part in batch)
    return {k: _channels_last(v) for k, v in batch.items()} if isinstance(batch, dict) else batch
