"""Shrunk equals zeroed: the proof that a pruned model computes what the original computes without those channels."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateur.coupling.recording import output_tensors
from secateur.errors import VerificationError
from secateur.inputs import (
    Inputs,
    as_inputs,
    check_devices,
    check_model,
    check_weights,
    copy_in,
    evaluating,
    other_batch,
)
from secateur.norms import with_live_norms
from secateur.plans import Plan, named_tensors, tensor_shapes
from secateur.programs import prepared, run, traced
from secateur.shrinking import by_tensor, sliced, zero_

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-6}  # relative to the output's largest value
NEGLIGIBLE = 1e-4  # weights below it hide mistakes in what they multiply
PROGRAM_TOLERANCE = 1e-5  # an exported program may add up in another order


@torch.inference_mode(False)
def verify(model: nn.Module, plan: Plan, small: nn.Module, example_inputs: Any) -> float:
    """The largest difference between `small` and `zero_channels(model, plan)`, relative to the output's largest value.

    Compared in eval mode at two batch sizes on float64 CPU copies where they fit in memory (tolerance 1e-9), else in
    float32 (2e-6). Where the model holds tensors that are all zero at birth, which would hide a mistake, the comparison
    is made once more with those tensors randomised. Raises VerificationError above the tolerance, and where the shrunk
    model does not run.
    """
    check_model(model)
    check_model(small)
    check_weights(model)
    inputs = as_inputs(example_inputs)
    check_devices(model, inputs)
    plan.check(tensor_shapes(model))
    dtype = torch.float64 if _fits_in_double(model) else torch.float32
    try:
        return _verify_in(model, plan, small, inputs, dtype)
    except VerificationError:
        raise
    except RuntimeError:
        if dtype is torch.float32:
            raise
        return _verify_in(model, plan, small, inputs, torch.float32)  # a forward that insists on its own precision


def _verify_in(model: nn.Module, plan: Plan, small: nn.Module, inputs: Inputs, dtype: torch.dtype) -> float:
    zeroed, small = with_live_norms(copy_in(model, dtype), plan.norms), copy_in(small, dtype)
    zero_(named_tensors(zeroed), plan)
    worst = _compare(zeroed, small, inputs, dtype)
    blank = [name for name, parameter in model.named_parameters() if _is_blank(parameter)]
    if blank:
        _randomise_(blank, zeroed, small, plan)
        worst = max(worst, _compare(zeroed, small, inputs, dtype))
    return worst


def _compare(zeroed: nn.Module, small: nn.Module, inputs: Inputs, dtype: torch.dtype) -> float:
    """The largest relative difference at both batch sizes, between models of the given type."""
    batches = [_converted(inputs, dtype)]
    larger = other_batch(batches[0])
    worst = 0.0
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
        worst = max(worst, _difference(expected, actual))
    allowed = TOLERANCE[dtype]
    if dtype is torch.float64 and allowed < worst <= TOLERANCE[torch.float32] and _rounds_to_single(zeroed, batches[0]):
        allowed = TOLERANCE[torch.float32]
    if not worst <= allowed:
        raise VerificationError(
            f"the shrunk model differs from the zeroed original by {worst:.1e} of the largest output "
            f"(allowed: {allowed:.0e}). Was it trained or repaired since? Verify right after shrinking."
        )
    return worst


def verified_program(model: nn.Module, example_inputs: Any) -> ExportedProgram:
    """`model` as an exported program with open batch size and sequence length, equal to it on the example inputs.

    Raises ExportError for a model that cannot be exported, VerificationError for a program that computes another thing.
    """
    inputs = as_inputs(example_inputs)
    net = prepared(model, inputs)
    program = traced(net, inputs).program
    with torch.no_grad():
        expected, actual = (
            [leaf.double() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            for output in (run(net, inputs), inputs.map(torch.clone).call(program.module()))
        )
    worst = _difference(expected, actual)
    if not worst <= PROGRAM_TOLERANCE:
        raise VerificationError(f"the exported program differs from the model by {worst:.1e} of the largest output.")
    return program


class _Widths(TorchDispatchMode):  # type: ignore[no-untyped-call]  # the base is untyped
    """Notes the floating-point types in which ops compute."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # the base is untyped
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        self.seen.update(leaf.dtype for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


def _rounds_to_single(model: nn.Module, batch: Inputs) -> bool:
    """Whether a float64 model casts to float32 on the way, as norms of language models do."""
    with _Widths() as widths:
        _outputs(model, batch)
    return torch.float32 in widths.seen


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad(), evaluating(model):
        return [tensor.detach().double() for tensor in output_tensors(inputs.map(torch.clone).call(model))]


def _difference(expected: list[Tensor], actual: list[Tensor]) -> float:
    """The largest difference, relative to the largest entry of the output it is in."""
    if [t.shape for t in expected] != [t.shape for t in actual]:
        shapes = [list(t.shape) for t in actual], [list(t.shape) for t in expected]
        raise VerificationError(f"the shrunk model's outputs have shapes {shapes[0]}, the original's {shapes[1]}.")
    worst = 0.0
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
    return worst


def _converted(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return inputs.map(lambda t: t.detach().to(device="cpu", dtype=dtype if t.is_floating_point() else t.dtype))


def _is_blank(tensor: Tensor) -> bool:
    """Whether all entries are next to nothing, as layer scales are at birth; for most tensors the first row tells."""
    if tensor.numel() == 0 or tensor.dim() == 0:
        return False
    data = tensor.detach()
    first = data[(0,) * (data.dim() - 1)]
    return not bool((first.abs() > NEGLIGIBLE).any()) and not bool((data.abs() > NEGLIGIBLE).any())


def _randomise_(names: list[str], zeroed: nn.Module, small: nn.Module, plan: Plan) -> None:
    """Fill the named parameters, all zero so far, with small random numbers, the same in both models."""
    parameters, targets, cuts = dict(zeroed.named_parameters()), dict(small.named_parameters()), by_tensor(plan.cuts)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in names:
            noise = torch.randn(parameters[name].shape, generator=generator, dtype=torch.float32)
            parameters[name].copy_(0.1 * noise)
            targets[name].copy_(sliced(parameters[name], cuts.get(name, [])))
    zero_(named_tensors(zeroed), plan)


def _fits_in_double(model: nn.Module) -> bool:
    """Whether two float64 copies fit in half of the free memory."""
    entries = sum(tensor.numel() for tensor in named_tensors(model).values())
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not on this platform
        return entries < 100_000_000
    return 2 * 8 * entries < free / 2
