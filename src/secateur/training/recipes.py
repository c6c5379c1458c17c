"""Recipe: everything about a training run that is a number or a name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from secateur.errors import InputError


@dataclass(frozen=True)
class Recipe:
    """How to train. Checked when made: raises InputError."""

    epochs: int = 10
    lr: float = 0.1  # the highest learning rate
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9  # of SGD
    nesterov: bool = True  # of SGD; needs momentum
    weight_decay: float = 5e-4  # acts on every trained parameter, also on those of BatchNorm
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    milestones: tuple[float, ...] = ()  # of "step": epochs after which lr is multiplied by gamma
    gamma: float = 0.1
    warmup_epochs: float = 0.0  # over which lr rises from 0 in a straight line
    label_smoothing: float = 0.0  # of the default cross-entropy
    clip_norm: float | None = None  # limit of the norm of all gradients together
    bf16: bool = False  # forward and loss under bfloat16 autocast; weights stay float32
    channels_last: bool = False  # memory layout of 4-d tensors while training; often faster
    seed: int = 0  # of everything random inside `fit`: dropout, and the order of a shuffling DataLoader

    def __post_init__(self) -> None:
        _demand(self.epochs >= 1, "epochs is at least 1", self.epochs)
        _demand(0 < self.lr < math.inf, "lr is greater than 0", self.lr)
        _demand(self.optimizer in ("sgd", "adamw"), "optimizer is 'sgd' or 'adamw'", self.optimizer)
        _demand(0 <= self.momentum < 1, "momentum lies in [0, 1)", self.momentum)
        _demand(self.weight_decay >= 0, "weight_decay is at least 0", self.weight_decay)
        _demand(self.schedule in ("cosine", "step", "constant"), "schedule is cosine, step or constant", self.schedule)
        _demand((self.schedule == "step") == bool(self.milestones), "milestones go with 'step'", self.milestones)
        rising = all(a < b for a, b in zip((0.0, *self.milestones), self.milestones, strict=False))
        _demand(rising, "milestones are epochs in rising order", self.milestones)
        _demand(0 < self.gamma <= 1, "gamma lies in (0, 1]", self.gamma)
        _demand(0 <= self.warmup_epochs <= self.epochs, "warmup_epochs lies in [0, epochs]", self.warmup_epochs)
        _demand(0 <= self.label_smoothing < 1, "label_smoothing lies in [0, 1)", self.label_smoothing)
        _demand(self.clip_norm is None or self.clip_norm > 0, "clip_norm is greater than 0, or None", self.clip_norm)


def learning_rate(recipe: Recipe, epoch: float) -> float:
    """The learning rate at a moment of the run, in epochs: 0 is its start, 2.5 the middle of the third epoch.

    Cosine: Loshchilov and Hutter 2017, without restarts. Warm-up multiplies whatever the schedule says.
    """
    rate = recipe.lr
    if recipe.schedule == "cosine":
        span = max(recipe.epochs - recipe.warmup_epochs, 1e-12)
        done = min(max((epoch - recipe.warmup_epochs) / span, 0.0), 1.0)
        rate *= (1 + math.cos(math.pi * done)) / 2
    elif recipe.schedule == "step":
        rate *= recipe.gamma ** sum(epoch >= milestone for milestone in recipe.milestones)
    if epoch < recipe.warmup_epochs:
        rate *= epoch / recipe.warmup_epochs
    return rate


def _demand(holds: bool, rule: str, got: object) -> None:
    if not holds:
        raise InputError(f"Recipe: {rule}; got {got!r}.")
