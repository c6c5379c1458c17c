"""Shrunk equals zeroed: the proof that a pruned model computes what the original computes without those channels."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from secateur.coupling.recording import output_tensors
from secateur.errors import VerificationError
from secateur.inputs import (
    Inputs,
    as_inputs,
    check_devices,
    check_model,
    check_weights,
    evaluating,
    other_batch,
    private_copy,
)
from secateur.plans import Plan, named_tensors
from secateur.shrinking import sliced, zero_channels

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-6}  # relative to the output's largest value


@torch.inference_mode(False)
def verify(model: nn.Module, plan: Plan, small: nn.Module, example_inputs: Any) -> float:
    """The largest difference between `small` and `zero_channels(model, plan)`, relative to the output's largest value.

    Compared in eval mode at two batch sizes on float64 CPU copies where they fit in memory (tolerance 1e-9), else in
    float32 (2e-6). Where the model holds tensors that are all zero at birth, or answers with zeros only, which would
    hide a mistake, the comparison is made once more with those tensors randomised. Raises VerificationError above the
    tolerance, and where the shrunk model does not run.
    """
    check_model(model)
    check_model(small)
    check_weights(model)
    inputs = as_inputs(example_inputs)
    check_devices(model, inputs)
    zeroed = zero_channels(model, plan)
    worst, scale = _compare(zeroed, small, inputs)
    if scale == 0 or any(_is_blank(tensor) for tensor in model.parameters()):
        awake, awake_small = _randomised(model, small, plan)
        worst = max(worst, _compare(zero_channels(awake, plan), awake_small, inputs)[0])
    return worst


def _compare(zeroed: nn.Module, small: nn.Module, inputs: Inputs) -> tuple[float, float]:
    """(largest relative difference, largest output), at both batch sizes."""
    dtype = torch.float64 if _fits_in_double(zeroed) else torch.float32
    try:
        return _compare_in(zeroed, small, inputs, dtype)
    except VerificationError:
        raise
    except RuntimeError:
        if dtype is torch.float32:
            raise
        return _compare_in(zeroed, small, inputs, torch.float32)  # a forward that insists on its own precision


def _compare_in(zeroed: nn.Module, small: nn.Module, inputs: Inputs, dtype: torch.dtype) -> tuple[float, float]:
    zeroed, small = (private_copy(m).to(device="cpu", dtype=dtype) for m in (zeroed, small))
    batches = [_converted(inputs, dtype)]
    larger = other_batch(batches[0])
    worst, scale = 0.0, 0.0
    for batch in [*batches, *([larger] if larger is not None else [])]:
        try:
            expected = _outputs(zeroed, batch)
        except Exception:
            if batch is batches[0]:
                raise
            continue  # a model of fixed batch size
        try:
            actual = _outputs(small, batch)
        except Exception as error:
            raise VerificationError(
                f"the shrunk model does not run: {type(error).__name__}: {error}. "
                "Please report it with the model; `ignore=` can keep the layers involved."
            ) from error
        difference, largest = _difference(expected, actual)
        worst, scale = max(worst, difference), max(scale, largest)
    if not worst <= TOLERANCE[dtype]:
        raise VerificationError(
            f"the shrunk model differs from the zeroed original by {worst:.1e} of the largest output "
            f"(allowed: {TOLERANCE[dtype]:.0e}). Was it trained or repaired since? Verify right after shrinking."
        )
    return worst, scale


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad(), evaluating(model):
        return [tensor.detach().double() for tensor in output_tensors(inputs.map(torch.clone).call(model))]


def _difference(expected: list[Tensor], actual: list[Tensor]) -> tuple[float, float]:
    if [t.shape for t in expected] != [t.shape for t in actual]:
        shapes = [list(t.shape) for t in actual], [list(t.shape) for t in expected]
        raise VerificationError(f"the shrunk model's outputs have shapes {shapes[0]}, the original's {shapes[1]}.")
    worst, largest = 0.0, 0.0
    for left, right in zip(expected, actual, strict=True):
        if left.numel() == 0:
            continue
        if not torch.equal(torch.isfinite(left), torch.isfinite(right)):
            raise VerificationError("the two models' outputs are not finite in the same places.")
        finite = torch.isfinite(left)
        if not finite.any():
            raise VerificationError("the original's output holds no finite number: there is nothing to compare.")
        scale = float(left[finite].abs().max())
        gap = float((left - right)[finite].abs().max())
        worst = max(worst, gap / scale if scale else gap)
        largest = max(largest, scale)
    return worst, largest


def _converted(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return inputs.map(lambda t: t.detach().to(device="cpu", dtype=dtype if t.is_floating_point() else t.dtype))


def _is_blank(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and tensor.dim() > 0 and not bool(tensor.detach().any())


def _randomised(model: nn.Module, small: nn.Module, plan: Plan) -> tuple[nn.Module, nn.Module]:
    """Copies of both models in which what is all zero in `model` holds small random numbers, the same in both."""
    awake, awake_small = private_copy(model), private_copy(small)
    targets = dict(awake_small.named_parameters())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in awake.named_parameters():
            if _is_blank(parameter):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.copy_(0.1 * noise.to(parameter.device))
                cuts = [cut for cut in plan.cuts if cut.tensor == name]
                targets[name].copy_(sliced(parameter, cuts))
    return awake, awake_small


def _fits_in_double(model: nn.Module) -> bool:
    """Whether two float64 copies fit in half of the free memory."""
    entries = sum(tensor.numel() for tensor in named_tensors(model).values())
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not on this platform
        return entries < 100_000_000
    return 2 * 8 * entries < free / 2
