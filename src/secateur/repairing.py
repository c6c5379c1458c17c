"""Recovery without gradients: layers scaled, or fitted by least squares; BatchNorm statistics measured anew."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.batches import Forward, default_forward, move, size_of
from secateur.errors import DataError, InputError, UnknownNameError
from secateur.inputs import check_model, private_copy
from secateur.layercalls import observable
from secateur.plans import Plan, check_shapes, tensor_shapes
from secateur.reconstruction import Fitting, Way, reconstruct_

DEFAULT_STEPS = ("least_squares", "batch_norm")
TOWARDS: tuple[Way, ...] = ("least_squares", "scale", "fold")  # the dense model; each does more than those behind it
STEPS = ("batch_norm", *TOWARDS)
LITTLE_DATA = ("scale", "batch_norm")  # what a hundred samples are enough for


@torch.inference_mode(False)
def repair(
    small: nn.Module,
    data: Iterable[Any],
    *,
    dense: nn.Module | None = None,
    plan: Plan | None = None,
    steps: Collection[str] | None = None,
    samples: int = 2000,
    batches: int = 100,
    positions: int = 64,
    damping: float = 0.01,
    seed: int = 0,
    forward: Forward | None = None,
) -> nn.Module:
    """A copy of the shrunk model `small` that comes closer to the dense one, without a gradient step.

    `steps`, each after the other; by default the last two, and without `dense` and `plan` only the last:

    - "fold": every layer that lost inputs gets the mean outputs that it has in `dense`, by its bias or by the running
      mean of the BatchNorm behind it. Exact for removed channels that are constant; where they are not, outputs whose
      means stay while they vary less can be worse than none of it.
    - "scale": their outputs are scaled, too, each by the number that fits them best; includes "fold". A hundred samples
      are enough.
    - "least_squares": whole weights are fitted, in order of execution, on the inputs that the layers repaired before
      give (He 2017, arXiv 1707.06168); includes "fold". In all three, positions with far larger outputs than the
      usual count for less.
    - "batch_norm": BatchNorm statistics become the exact averages over up to `batches` batches (Li 2020, EagleEye,
      arXiv 2007.02491).

    `dense`, `plan`: the model that was pruned, and how. `samples`: how many the fit looks at, kept in memory while it
    works; `positions`: how many output positions of each. `damping`: times the mean diagonal of X^T X, pulls towards
    the weights as they are. Pass training data, augmented as in training.

    Raises InputError for steps that need `dense` and `plan`, PlanMismatchError for those of other models, DataError for
    data that is empty or not finite, CalibrationError where it is too small for the least squares: before any work.
    """
    check_model(small)
    chosen = _steps(steps, dense, plan)
    if not isinstance(data, Iterable):
        raise InputError(f"data is an iterable of batches; got {type(data).__name__}.")
    for name, value in (("batches", batches), ("samples", samples), ("positions", positions)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} is a whole number, at least 1; got {value!r}.")
    if not 0 <= damping < float("inf"):
        raise InputError(f"damping is at least 0; got {damping!r}.")
    repaired = private_copy(small)
    run = forward or default_forward
    towards = next((step for step in TOWARDS if step in chosen), None)
    if dense is not None and plan is not None and towards is not None:
        plan.check(tensor_shapes(dense))
        check_shapes(tensor_shapes(small), plan.shapes_after(), "the shrunk model", "the plan")
        calibration = list(_taken(data, samples))
        data = calibration if isinstance(data, Iterator) else data  # an iterator is read once
        fitting = Fitting(towards, damping, positions, seed)
        _reconstruct_(repaired, dense, plan, calibration, fitting, run)
    if "batch_norm" in chosen:
        _measure_norms_(repaired, data, batches, run)
    return repaired


def repairable(model: nn.Module) -> bool:
    """Whether there is a BatchNorm whose statistics can be measured anew."""
    return bool(_batch_norms(model))


def _steps(steps: Collection[str] | None, dense: nn.Module | None, plan: Plan | None) -> tuple[str, ...]:
    if (dense is None) != (plan is None):
        raise InputError("dense= and plan= go together: the model that was pruned, and the plan that pruned it.")
    if steps is None:
        return ("batch_norm",) if dense is None else DEFAULT_STEPS
    chosen = (steps,) if isinstance(steps, str) else tuple(steps)
    for step in chosen:
        if step not in STEPS:
            raise UnknownNameError("step of repair", step, STEPS)
    if dense is None and set(chosen) != {"batch_norm"}:
        raise InputError(f"steps={list(chosen)} compare with the dense model: pass dense= and plan=.")
    return chosen


def _taken(data: Iterable[Any], samples: int) -> Iterator[Any]:
    """Whole batches, until there are `samples` samples."""
    seen = 0
    for number, batch in enumerate(data):
        for tensor in tree_leaves(batch):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise DataError(f"batch {number} of the calibration data holds NaN or infinity.")
        yield batch
        seen += size_of(batch)
        if seen >= samples:
            return
    if not seen:
        raise DataError(_EMPTY)


def _reconstruct_(
    small: nn.Module, dense: nn.Module, plan: Plan, batches: list[Any], fitting: Fitting, forward: Forward
) -> None:
    seen, modes = observable(private_copy(dense)).eval(), [(module, module.training) for module in small.modules()]
    small.eval()
    with torch.no_grad():
        reconstruct_(small, seen, plan, batches, fitting, forward)
    for module, mode in modes:
        module.training = mode


def _measure_norms_(model: nn.Module, data: Iterable[Any], batches: int, forward: Forward) -> None:
    norms = _batch_norms(model)
    if not norms:
        return
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
        norm.train()
    device = next(model.parameters()).device
    seen = 0
    with torch.no_grad():
        for batch in islice(data, batches):
            forward(model, move(batch, device))
            seen += 1
    if seen == 0:
        raise DataError(_EMPTY)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for module, mode in modes:
        module.training = mode


_EMPTY = "the data holds no batch; an exhausted generator? Pass something that can be iterated."


def _batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    return [norm for norm in norms if norm.track_running_stats]
