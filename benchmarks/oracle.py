"""Is a pruned model right? A judge that trusts no pruning library: it only compares tensors and outputs.

What a library kept is found by value: a pruned tensor's entries are looked up in the original's, which are distinct.
The pruned model is right when it computes what the original computes with everything else set to zero. Where the width
under a norm was cut, two readings of "zero" are fair: the norm runs over all positions, or over the live ones only;
either is accepted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

TOLERANCE = 1e-6  # of the largest output, in float64
VOTERS = 64  # entries of a slice that are looked up to learn where the slice comes from
CORRECT, WRONG, NOTHING, UNDECIDED = "correct", "wrong", "nothing removed", "undecided"


@dataclass(frozen=True)
class Verdict:
    """What the judge says, and why."""

    status: str  # CORRECT, WRONG, NOTHING or UNDECIDED
    reason: str = ""
    difference: float | None = None  # to the better reference, relative to the largest output
    norms: str = ""  # over which positions the reference's norms ran: "all" or "live"


class NotFoundError(Exception):
    """A pruned tensor's values are not those of the original."""


def judge(original: nn.Module, pruned: nn.Module, example_inputs: Any) -> Verdict:
    """Compare `pruned` with `original`, of which no forward pass has been run yet, in eval mode and float64.

    `example_inputs`: a tensor, a tuple or a mapping. Other values of the same shapes are used, at two batch sizes.
    """
    try:
        masks = kept_masks(original, pruned)
    except NotFoundError as error:
        return Verdict(UNDECIDED, str(error))
    original, reference, pruned = (_in_double(m) for m in (original, masked(original, masks), pruned))
    batches, wholes, found = [], [], []
    for batch in _batches(example_inputs):
        try:
            whole = _outputs(original, batch)
        except Exception as error:
            if not batches:
                return Verdict(UNDECIDED, f"the original does not run in float64: {short(error)}")
            continue  # a model of fixed batch size
        try:
            found.append(_outputs(pruned, batch))
        except Exception as error:
            return Verdict(WRONG, f"the pruned model does not run on a batch of {_first_size(batch)}: {short(error)}")
        batches.append(batch)
        wholes.append(whole)
    verdict = _compared(reference, batches, found)
    if verdict.status != CORRECT:
        return verdict
    if all(mask.all() for mask in masks.values()):
        return replace(verdict, status=NOTHING, reason="every entry of every tensor is still there")
    if max(map(_gap, wholes, found)) <= 1e-12:
        return replace(verdict, status=UNDECIDED, reason="vacuous: what was removed had no part in the output")
    return verdict


def _compared(reference: nn.Module, batches: list[Any], found: list[list[Tensor]]) -> Verdict:
    """The verdict by the better of the two references."""
    verdicts = []
    for norms, context in (("all", nullcontext), ("live", LiveNorms)):
        with context():
            expected = [_outputs(reference, batch) for batch in batches]
        if any(_is_constant(outputs[0]) for outputs in expected):
            return Verdict(UNDECIDED, "vacuous: the reference's output is constant")
        for left, right in zip(expected, found, strict=True):
            if [len(left), left[0].shape] != [len(right), right[0].shape]:
                shapes = [list(tensors[0].shape) for tensors in (left, right)]
                return Verdict(WRONG, f"{len(left)} outputs, the first {shapes[0]}, became {len(right)}, {shapes[1]}")
        gap = max(map(_gap, expected, found))
        if gap <= TOLERANCE:
            return Verdict(CORRECT, "", gap, norms)
        verdicts.append(Verdict(WRONG, f"off by {gap:.1e} of the largest output", gap, norms))
    return min(verdicts, key=lambda verdict: verdict.difference)


# -- what was kept ---------------------------------------------------------------------------------------------------


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under every name it has."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def kept_masks(original: nn.Module, pruned: nn.Module) -> dict[str, Tensor]:
    """Name -> which entries of the original's tensor are in the pruned model, for tensors that both have.

    A tensor that only one of them has is left alone: the outputs tell whether it matters. Raises NotFoundError.
    """
    after = named_tensors(pruned)
    masks: dict[str, Tensor] = {}
    for name, tensor in named_tensors(original).items():
        if name not in after:
            continue
        try:
            masks[name] = kept_mask(tensor.detach().cpu(), after[name].detach().cpu())
        except NotFoundError as error:
            if isinstance(tensor, nn.Parameter):
                raise NotFoundError(f"{name}: {error}") from error
            # A constant, or computed anew such as an index table: the reference keeps it, the outputs tell.
            masks[name] = torch.ones(tensor.shape, dtype=torch.bool)
    return masks


def kept_mask(before: Tensor, after: Tensor) -> Tensor:
    """Which entries of `before` are in `after`, which was cut along any of its dims. Raises NotFoundError."""
    if before.dim() != after.dim():
        raise NotFoundError(f"shape {list(before.shape)} became {list(after.shape)}")
    after = after.to(before.dtype)
    if before.shape == after.shape and torch.equal(before, after):
        return torch.ones(before.shape, dtype=torch.bool)
    if any(m > n for m, n in zip(after.shape, before.shape, strict=True)):
        raise NotFoundError(f"shape {list(before.shape)} grew to {list(after.shape)}")
    if after.numel() == 0:
        return torch.zeros(before.shape, dtype=torch.bool)
    values, places = _sorted(before)
    kept = [_origins(after, dim, before.shape, values, places) for dim in range(after.dim())]
    if _is_cut(before, after, kept):
        return _outer(kept, before.shape)
    return _row_by_row(before, after, kept[0])


def kept_indices(before: Tensor, after: Tensor, dim: int) -> list[int]:
    """The positions along `dim` of which `after` still holds something, ascending. Raises NotFoundError."""
    others = [d for d in range(before.dim()) if d != dim]
    mask = kept_mask(before, after)
    return torch.nonzero(mask.any(dim=others) if others else mask).flatten().tolist()


def _sorted(tensor: Tensor) -> tuple[np.ndarray, np.ndarray]:
    flat = tensor.reshape(-1).numpy()
    order = np.argsort(flat)
    return flat[order], order


def _origins(after: Tensor, dim: int, shape: torch.Size, values: np.ndarray, places: np.ndarray) -> list[int]:
    """For every slice of `after` along `dim`, the position along `dim` of the original that most voters name."""
    rows = after.movedim(dim, 0).reshape(after.shape[dim], -1)
    step = max(1, rows.shape[1] // VOTERS)
    voters = rows[:, ::step].numpy()
    spots = np.searchsorted(values, voters)
    spots = np.minimum(spots, len(values) - 1)
    named = np.unravel_index(places[spots], tuple(shape))[dim]
    named = np.where(values[spots] == voters, named, -1)  # (slices, voters)
    found = [int(np.bincount(votes[votes >= 0]).argmax()) if (votes >= 0).any() else -1 for votes in named]
    if -1 in found:
        raise NotFoundError("holds values that the original does not have")
    return found


def _is_cut(before: Tensor, after: Tensor, kept: list[list[int]]) -> bool:
    for dim, positions in enumerate(kept):
        if len(set(positions)) < len(positions):
            return False
        before = before.index_select(dim, torch.tensor(positions))
    return torch.equal(before, after)


def _outer(kept: list[list[int]], shape: torch.Size) -> Tensor:
    mask = torch.ones(shape, dtype=torch.bool)
    for dim, positions in enumerate(kept):
        mask &= _line(positions, shape[dim]).view([-1 if d == dim else 1 for d in range(len(shape))])
    return mask


def _line(positions: list[int], size: int) -> Tensor:
    line = torch.zeros(size, dtype=torch.bool)
    line[positions] = True
    return line


def _row_by_row(before: Tensor, after: Tensor, rows: list[int]) -> Tensor:
    """The mask where every row (along dim 0) kept positions of its own, as the groups of a grouped convolution may."""
    if before.dim() < 2 or len(set(rows)) < len(rows):
        raise NotFoundError("its values are not those of whole positions of the original")
    mask = torch.zeros(before.shape, dtype=torch.bool)
    for row, cut in zip(rows, after, strict=True):
        values, places = _sorted(before[row])
        kept = [_origins(cut, dim, before.shape[1:], values, places) for dim in range(cut.dim())]
        if not _is_cut(before[row], cut, kept):
            raise NotFoundError("its values are not those of whole positions of the original")
        mask[row] = _outer(kept, before.shape[1:])
    return mask


def masked(original: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the original with zeros where a mask says so; running variances get ones."""
    reference = copy.deepcopy(original)
    tensors = named_tensors(original)
    for name, mask in masks.items():
        fill = 1.0 if name.endswith("running_var") else 0.0
        value = tensors[name].detach().clone()
        if name.endswith(".original1") and f"{name[:-1]}0" in masks:
            # weight_norm divides by the length of a direction: whole rows stay, their magnitude gets the zero.
            value[~mask & _rows(mask)] = fill
        else:
            value[~mask] = fill
        owner, _, key = name.rpartition(".")
        is_parameter = isinstance(tensors[name], nn.Parameter)
        # One by one: tensors that were tied may have been cut apart.
        setattr(
            reference.get_submodule(owner), key, nn.Parameter(value, requires_grad=False) if is_parameter else value
        )
    return reference


def _rows(mask: Tensor) -> Tensor:
    """Which rows of a mask hold anything, in a shape that broadcasts against it."""
    return mask.flatten(1).any(1).view([-1] + [1] * (mask.dim() - 1))


# -- running ---------------------------------------------------------------------------------------------------------


class LiveNorms(TorchFunctionMode):
    """Norms over the last dim, and group norms, skip the positions that were cut.

    Those are where the norm's own scale was zeroed (scales are random, never zero); a norm without a scale skips what
    is zero in all of its input.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.layer_norm:
            return _live_layer_norm(*args, **kwargs)
        if func is F.rms_norm:
            return _live_rms_norm(*args, **kwargs)
        if func in (F.group_norm, torch.group_norm):
            return _live_group_norm(*args, **kwargs)
        if func in (Tensor.mean, torch.mean):
            share = _share_of_a_norm(*args, **kwargs)
            if share is not None:
                return func(*args, **kwargs) / share
        return func(*args, **kwargs)


def _live(x: Tensor, dims: int = 1, scale: Tensor | None = None) -> Tensor:
    """Which positions along the last `dims` dims live, as ones and zeros."""
    if scale is not None:
        return (scale != 0).to(x.dtype)
    leading = tuple(range(x.dim() - dims))
    return (x != 0).any(dim=leading).to(x.dtype) if leading else (x != 0).to(x.dtype)


def _live_layer_norm(
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    live = _live(x, len(dims), weight)
    count = live.sum().clamp(min=1)
    centred = (x - (x * live).sum(dims, keepdim=True) / count) * live
    y = centred / ((centred**2).sum(dims, keepdim=True) / count + eps).sqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _live_rms_norm(x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    live = _live(x, len(dims), weight)
    count, x = live.sum().clamp(min=1), x * live
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    y = x / ((x**2).sum(dims, keepdim=True) / count + eps).sqrt()
    return y if weight is None else y * weight


def _live_group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    per_channel = [1, -1] + [1] * (x.dim() - 2)
    seen = (x != 0).movedim(1, 0).flatten(1).any(1) if weight is None else weight != 0
    live = seen.to(x.dtype).view(per_channel).expand_as(x)
    parts, live_parts = (t.reshape(len(x), num_groups, -1) for t in (x, live))
    count = live_parts.sum(-1, keepdim=True).clamp(min=1)
    centred = (parts - (parts * live_parts).sum(-1, keepdim=True) / count) * live_parts
    y = (centred / ((centred**2).sum(-1, keepdim=True) / count + eps).sqrt()).view(x.shape)
    y = y if weight is None else y * weight.view(per_channel)
    return y if bias is None else y + bias.view(per_channel)


def _share_of_a_norm(x: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Tensor | None:
    """The live share of a dim where `x.mean(dim, keepdim=True)` is a hand-written norm's mean, else None.

    A norm's dim is the last one, or is followed by dims of size 1 only (a global response norm over channels).
    """
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    if not keepdim or not isinstance(dim, int) or x.dim() < 2:
        return None
    dim %= x.dim()
    if dim == 0 or any(size > 1 for size in x.shape[dim + 1 :]):
        return None
    live = (x != 0).movedim(dim, 0).flatten(1).any(1)
    return live.to(x.dtype).mean().clamp(min=1 / len(live))


class InDouble(TorchFunctionMode):
    """Code that asks for float32 gets float64, so that rounding hides nothing."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args, kwargs = (
            tree_map(lambda x: torch.float64 if x is torch.float32 else x, given) for given in (args, kwargs or {})
        )
        return func(*args, **kwargs)


def _in_double(model: nn.Module) -> nn.Module:
    """A float64 copy in eval mode, without the tensors that modules cached while they ran."""
    model = copy.deepcopy(model).eval().double()
    for module in model.modules():
        for name, value in vars(module).items():
            if name.startswith("_"):
                continue
            if isinstance(value, Tensor) and value.is_floating_point():
                vars(module)[name] = value.double()
            elif isinstance(value, dict) and any(isinstance(item, Tensor) for item in value.values()):
                value.clear()
    return model


def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    """The output tensors, in float64."""
    batch = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, batch)
    with torch.no_grad(), InDouble():
        return [tensor.detach().double() for tensor in tensors(call(model, batch))]


def call(model: nn.Module, batch: Any) -> Any:
    """`model` on a tensor, a tuple of arguments or a mapping of keywords."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of an output. Other objects, such as caches of keys and values, are the model's own affair."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors(getattr(value, field.name))


def _batches(example_inputs: Any) -> list[Any]:
    """New values in the shapes of the example inputs, and the same with one element more along the first dim."""
    generator = torch.Generator().manual_seed(1)

    def renewed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.is_floating_point():
            return torch.randn(value.shape, generator=generator, dtype=torch.float64)
        return value.roll(1, 0)

    def grown(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        return torch.cat([value, value[:1] * 0.5 if value.is_floating_point() else value[:1]])

    renewed_inputs = tree_map(renewed, example_inputs)
    return [renewed_inputs, tree_map(grown, renewed_inputs)]


def _first_size(batch: Any) -> int:
    return next(len(tensor) for tensor in tensors(batch))


def _is_constant(output: Tensor) -> bool:
    return output.numel() > 1 and float(output.max() - output.min()) <= 1e-9 * max(1e-30, float(output.abs().max()))


def _gap(expected: list[Tensor], found: list[Tensor]) -> float:
    """The largest difference of tensors of equal shape, each relative to its largest entry; infinite for a new NaN.

    Tensors after the first may have got narrower, such as the hidden states that come along: those are not compared.
    """
    worst = 0.0
    for left, right in zip(expected, found, strict=True):
        if left.shape != right.shape or left.numel() == 0:
            continue
        finite = torch.isfinite(left)
        if not torch.equal(finite, torch.isfinite(right)):
            return float("inf")
        if finite.any():
            scale = float(left[finite].abs().max())
            worst = max(worst, float((left - right)[finite].abs().max()) / (scale or 1.0))
    return worst


def short(error: BaseException) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
