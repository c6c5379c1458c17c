"""The control of every pruning: the same small net, trained from scratch at the same cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import nn

from secateur.errors import InputError
from secateur.inputs import private_copy
from secateur.training.randomness import own_randomness
from secateur.training.recipes import Recipe


def from_scratch(
    model: nn.Module, seed: int = 0, *, initialise: Callable[[nn.Module], object] | None = None
) -> nn.Module:
    """A copy of a (pruned) model with fresh weights: the control that tells what the inherited weights are worth.

    Every module's own `reset_parameters` is called, what it holds before itself, drawing from `seed`; BatchNorm
    statistics start anew. That is how torch's layers are born. What a network's constructor does beyond that (He's
    initialisation, zero gammas) cannot be seen in the model: pass `initialise`, a function that sets the weights of the
    model it is given, in place, and is called last; it draws from `seed`, too.

    Raises InputError naming the parameters that no `reset_parameters` reaches, unless `initialise` is given.

    Source: Liu 2019, arXiv 1810.05270, section 3.
    """
    fresh = private_copy(model)
    missed = [name for name, module in _own_parameters(fresh) if _resetter(module) is None]
    if missed and initialise is None:
        raise InputError(
            f"{', '.join(missed)}: the modules that own these parameters have no reset_parameters(), so that nobody "
            "knows their initial values: pass initialise=, a function that sets the weights of the model it is given."
        )
    with own_randomness(seed, device_of(fresh)), torch.no_grad():
        for module in _inside_out(fresh):
            reset = _resetter(module)
            if reset is not None:
                reset()
        if initialise is not None:
            initialise(fresh)
    return fresh


def equal_budget(dense: Recipe, tuning: Recipe, macs: tuple[int, int] | None = None) -> Recipe:
    """The recipe by which a pruned net is trained from scratch at the cost of pruning: dense training and fine-tuning.

    Without `macs` the epochs are the same in number (scratch-E): those of `dense` plus those of `tuning`. With `macs`,
    (before, after), they cost the same (scratch-B): an epoch of the dense model pays for before / after epochs of the
    small one. Everything else is `dense`'s, its milestones and warm-up stretched in proportion. Raises InputError for
    MACs that do not shrink.

    Source: Liu 2019, arXiv 1810.05270, section 3.
    """
    ratio = 1.0
    if macs is not None:
        before, after = macs
        if not 0 < after <= before:
            raise InputError(f"macs are those of the dense and of the pruned model, (before, after); got {macs!r}.")
        ratio = before / after
    epochs = round(dense.epochs * ratio) + tuning.epochs
    stretch = epochs / dense.epochs
    milestones = tuple(milestone * stretch for milestone in dense.milestones)
    return replace(dense, epochs=epochs, milestones=milestones, warmup_epochs=dense.warmup_epochs * stretch)


def _own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every parameter's name, with the module that holds it itself."""
    for prefix, module in model.named_modules():
        for name, _ in module.named_parameters(prefix, recurse=False):
            yield name, module


def _inside_out(module: nn.Module) -> Iterator[nn.Module]:
    """Every module once, after those it holds: as constructors run, so that a parent has the last word."""
    seen: set[int] = set()

    def visit(one: nn.Module) -> Iterator[nn.Module]:
        if id(one) not in seen:
            seen.add(id(one))
            for child in one.children():
                yield from visit(child)
            yield one

    return visit(module)


def _resetter(module: nn.Module) -> Callable[[], object] | None:
    """How a module gives its parameters their initial values; torch's attention and transformers hide the name."""
    for name in ("reset_parameters", "_reset_parameters"):
        found = getattr(module, name, None)
        if callable(found):
            reset: Callable[[], object] = found
            return reset
    return None


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first tensor; the CPU for one without any."""
    tensor = next(iter([*model.parameters(), *model.buffers()]), None)
    return torch.device("cpu") if tensor is None else tensor.device
