"""Recovery by training: weights and learning rates rewound, lottery tickets; with distillation and the scratch control.

All of it stands on `fit`, which can start in the middle of a recipe, and on masks that hold while it trains.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.batches import Forward, Loss, usable_device
from secateur.criteria.weights import WeightCriterion
from secateur.errors import InputError, UnknownNameError
from secateur.inputs import private_copy
from secateur.masking import make_masks
from secateur.masks import Masks
from secateur.plans import check_shapes, named_tensors, tensor_shapes
from secateur.schedules import geometric
from secateur.training.distilling import distillation
from secateur.training.hooks import Snapshot
from secateur.training.loop import Epoch, fit
from secateur.training.randomness import own_randomness
from secateur.training.recipes import Recipe, learning_rate
from secateur.training.starting import device_of, equal_budget, from_scratch

__all__ = ["Snapshot", "Ticket", "distillation", "equal_budget", "from_scratch", "lottery_tickets", "rewound"]

REWINDS = ("weights", "learning_rate", "none")


@dataclass(frozen=True, eq=False)
class Ticket:
    """One round of `lottery_tickets`: what was pruned, from where it was trained, and what came of it."""

    round: int  # 0 is the dense model
    masks: Masks
    start: nn.Module  # as training began: the rewound weights under the masks
    model: nn.Module  # trained, in eval mode
    history: tuple[Epoch, ...]

    def __repr__(self) -> str:
        return f"Ticket(round {self.round}, {self.masks!r}, {self.history[-1]})"


def rewound(model: nn.Module, masks: Masks, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `model` with earlier weights under the masks: weight rewinding.

    `weights`: {name: tensor} of every parameter and buffer, as `Snapshot.weights` holds them. New values that the masks
    bring along (SparseGPT's) are left out: the earlier ones take their place. Raises PlanMismatchError for weights or
    masks of another model.

    Source: Frankle 2020, arXiv 1912.05671.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    check_shapes(shapes, tensor_shapes(model), "the set of earlier weights", "the model")
    early = private_copy(model)
    with torch.no_grad():
        for name, tensor in named_tensors(early).items():
            tensor.copy_(weights[name])
    return replace(masks, values={}).apply(early)


def lottery_tickets(
    model: nn.Module,
    data: Iterable[Any],
    recipe: Recipe,
    *,
    sparsity: float,
    rounds: int,
    rewind: str = "weights",
    rewind_epoch: int = 0,
    criterion: str | WeightCriterion = "magnitude",
    scope: str | None = "global",
    within: str | Iterable[str] | None = None,
    ignore: str | Iterable[str] = (),
    checkpoint_dir: Path | str | None = None,
    device: torch.device | str = "cpu",
    forward: Forward | None = None,
    loss: Loss | None = None,
    hooks: Sequence[object] = (),
    progress: bool | None = None,
) -> Iterator[Ticket]:
    """Iterative magnitude pruning: train, prune, rewind, again. Yields `rounds` + 1 tickets, first the dense model.

    Every round removes the same fraction of the weights that are left, so that `sparsity` is reached in the last:
    after round k of n, (1 - sparsity)^(k / n) of them are kept. Pruned weights stay pruned.

    Args:
        model: before any training; never changed.
        data: training batches, as for `fit`.
        recipe: of the dense training, and of every round.
        sparsity: fraction of the weights that is removed in the end, in [0, 1).
        rounds: how often to prune, at least 1.
        rewind: "weights" sets the weights that are left back to what they were after `rewind_epoch` epochs and trains
            from there. "learning_rate" keeps the trained weights and replays the recipe from `rewind_epoch` on. "none"
            keeps them, and trains for as many epochs at the recipe's last learning rate: plain fine-tuning.
        rewind_epoch: 0 goes back to the start, where "learning_rate" repeats the whole recipe.
        criterion, scope, within, ignore: of `make_masks`, which also gets the data; layers by name or pattern.
        checkpoint_dir: one checkpoint per round; finished rounds are read back, one under way is gone on with.
        device, forward, loss, progress: of `fit`.
        hooks: of `fit`; every round trains with copies of them as they are now.

    Raises InputError for settings out of range, and what `fit` and `make_masks` raise.

    Sources: Frankle and Carbin 2019, arXiv 1803.03635; Frankle 2020, arXiv 1912.05671 (rewinding to an epoch); Renda
    2020, arXiv 2003.02389 (rewinding the learning rate).
    """
    _check_lottery(recipe, sparsity, rounds, rewind, rewind_epoch)
    if isinstance(data, Iterator):
        raise InputError("the data is an iterator, good for one epoch: pass a list, a DataLoader or Batches.")
    prune = _Pruning(criterion, scope, _listed(within), _listed(ignore) or (), forward, loss)

    def trained(number: int, start: nn.Module, masks: Masks, how: Recipe, epoch: int, more: Sequence[object]) -> Ticket:
        file = None if checkpoint_dir is None else Path(checkpoint_dir) / f"round-{number}.pt"
        fitted = fit(
            start,
            data,
            how,
            device=device,
            forward=forward,
            loss=loss,
            hooks=[*copy.deepcopy(list(hooks)), *more],
            checkpoint=file,
            progress=progress,
            start_epoch=epoch,
        )
        return Ticket(number, masks, start, fitted.model, fitted.history)

    def run() -> Iterator[Ticket]:
        start = private_copy(model).to(usable_device(device))
        snapshot = Snapshot(rewind_epoch) if rewind_epoch and rewind == "weights" else None
        masks = prune.masks(start, 0.0, data, None, recipe.seed)
        ticket = trained(0, start, masks, recipe, 0, [snapshot] if snapshot else [])
        early = snapshot.weights if snapshot else {n: t.detach().clone() for n, t in named_tensors(start).items()}
        yield ticket
        how, epoch = _retraining(recipe, rewind, rewind_epoch)
        for number in range(1, rounds + 1):
            level = sparsity * geometric(number / rounds, sparsity) if sparsity else 0.0
            masks = prune.masks(ticket.model, level, data, ticket.masks, recipe.seed)
            start = rewound(ticket.model, masks, early) if rewind == "weights" else masks.apply(ticket.model)
            held = _Held(number, level, rewind, rewind_epoch, prune, masks.hook())
            ticket = trained(number, start, masks, how, epoch, [held])
            yield ticket

    return run()


@dataclass(frozen=True)
class _Pruning:
    """How a round prunes."""

    criterion: str | WeightCriterion
    scope: str | None
    within: tuple[str, ...] | None
    ignore: tuple[str, ...]
    forward: Forward | None = field(repr=False)
    loss: Loss | None = field(repr=False)

    def masks(self, model: nn.Module, level: float, data: Iterable[Any], before: Masks | None, seed: int) -> Masks:
        """The masks of a level, on top of those before. The same for a run that is resumed: the data starts anew."""
        set_epoch = getattr(data, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(0)
        with own_randomness(seed, device_of(model)):
            return make_masks(
                model,
                self.criterion,
                level,
                scope=self.scope,
                data=data,
                within=self.within,
                ignore=self.ignore,
                masks=before,
                seed=seed,
                forward=self.forward,
                loss=self.loss,
            )


@dataclass(frozen=True)
class _Held:
    """The hook that keeps a ticket's zeros while it trains. What it prints is part of the checkpoint's identity."""

    round: int
    sparsity: float
    rewind: str
    rewind_epoch: int
    pruning: _Pruning
    hook: Any = field(repr=False)

    def after_backward(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.hook.after_backward(model, optimizer)

    def after_step(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.hook.after_step(model, optimizer)

    def after_epoch(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.hook.after_epoch(model, optimizer)


def _listed(names: str | Iterable[str] | None) -> tuple[str, ...] | None:
    return (names,) if isinstance(names, str) else None if names is None else tuple(names)


def _retraining(recipe: Recipe, rewind: str, epoch: int) -> tuple[Recipe, int]:
    """The recipe of the rounds after the first, and the epoch it starts in."""
    if rewind != "none":
        return recipe, epoch
    last = learning_rate(recipe, recipe.epochs - 0.5)  # of the middle of the last epoch: a cosine ends at zero
    constant = replace(recipe, epochs=recipe.epochs - epoch, lr=last, schedule="constant", milestones=())
    return replace(constant, warmup_epochs=0.0), 0


def _check_lottery(recipe: Recipe, sparsity: float, rounds: int, rewind: str, epoch: int) -> None:
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise InputError(f"sparsity is the fraction removed in the end, in [0, 1); got {sparsity!r}.")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise InputError(f"rounds is how often to prune, at least 1; got {rounds!r}.")
    if rewind not in REWINDS:
        raise UnknownNameError("rewind", rewind, REWINDS)
    if isinstance(epoch, bool) or not isinstance(epoch, int) or not 0 <= epoch < recipe.epochs:
        raise InputError(f"rewind_epoch is one of the recipe's {recipe.epochs} epochs, from 0; got {epoch!r}.")
