"""Masks: which weights are forced to zero in a model of unchanged shape. The value that weight pruning exchanges."""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from secateur.errors import ArtifactError, InputError, PlanMismatchError
from secateur.files import write_bytes
from secateur.inputs import private_copy
from secateur.plans import check_shapes, human, named_tensors, tensor_shapes
from secateur.tensorfiles import clipped, read_header, read_tensors, with_metadata

FORMAT = "1"
_FORMAT, _SHAPES, _PARAMETERS = "secateur.masks", "secateur.shapes", "secateur.parameters"
MOMENTS = ("epoch", "step")


@dataclass(frozen=True, eq=False)
class Masks:
    """What stays of each masked tensor of a model of the given shapes. Make them with `make_masks`."""

    keep: Mapping[str, Tensor]  # name -> bool on the CPU, in the tensor's shape
    shapes: Mapping[str, tuple[int, ...]]  # every parameter and buffer of the model they fit
    values: Mapping[str, Tensor] = field(default_factory=dict)  # new weights, where a method makes them (SparseGPT)
    parameters: int | None = None  # how many numbers the model's parameters hold, tied ones once; None: not known

    def __post_init__(self) -> None:
        for name, tensor in (*self.keep.items(), *self.values.items()):
            if name not in self.shapes:
                raise PlanMismatchError(f"a mask is for {name!r}, which the model of these masks does not have.")
            if tuple(tensor.shape) != tuple(self.shapes[name]):
                expected = list(self.shapes[name])
                raise PlanMismatchError(f"the mask of {name!r} has shape {list(tensor.shape)}, expected {expected}.")
        if any(tensor.dtype != torch.bool for tensor in self.keep.values()):
            raise InputError("a mask is a bool tensor, true where the weight stays.")
        if any(name not in self.keep or not tensor.is_floating_point() for name, tensor in self.values.items()):
            raise InputError("new weights are floating-point numbers, and only for tensors that have a mask.")

    @property
    def counts(self) -> tuple[int, int]:
        """Of the masked tensors: entries that are forced to zero, and all entries."""
        total = sum(keep.numel() for keep in self.keep.values())
        return total - sum(int(keep.sum()) for keep in self.keep.values()), total

    @property
    def sparsity(self) -> float:
        """The fraction of the masked tensors' entries that is forced to zero."""
        gone, total = self.counts
        return gone / max(total, 1)

    def check(self, model: nn.Module) -> None:
        """Raise PlanMismatchError naming the first tensor in which `model` is not what these masks were made for."""
        check_shapes(tensor_shapes(model), self.shapes, "the model", "the set of masks")

    def apply(self, model: nn.Module) -> nn.Module:
        """A copy of `model` with zeros, and with the new weights where a method made them."""
        copied = private_copy(model)
        self.apply_(copied)
        return copied

    def apply_(self, model: nn.Module) -> None:
        """Write the zeros, and the new weights where a method made them, into `model` itself."""
        self.check(model)
        tensors = named_tensors(model)
        with torch.no_grad():
            for name, value in self.values.items():
                tensors[name].copy_(value)
        _zero_(tensors, self._gone(tensors))

    def hold(self, model: nn.Module, optimizer: Optimizer) -> RemovableHandle:
        """Keep the zeros while `optimizer` trains `model`: they are written now, and again after each of its steps.

        Momentum and weight decay would bring masked weights back otherwise. `.remove()` of the result ends it. New
        weights are written by `apply`, not here. Raises InputError for an optimizer that trains none of the weights.
        """
        held = self.hook()
        tensors = named_tensors(model)
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self.check(model)
        if not any(id(tensors[name]) in trained for name in self.keep):
            raise InputError("the optimizer trains none of the masked weights: was it made for another copy?")
        held.after_step(model, optimizer)
        return optimizer.register_step_post_hook(lambda *_: held.after_step(model, optimizer))

    def hook(self, every: str = "step") -> Held:
        """The same as a hook for `fit(hooks=[...])` or a loop of your own. Start from `apply(model)`.

        `every`: "step", after every optimizer step; "epoch", only after every epoch, between which masked weights grow
        back (Batra, Das and Xu, "Exploring Large Convolutional Network Pruning").
        """
        return Held(self, every)

    def __and__(self, other: Masks) -> Masks:
        """Both together: what either forces to zero.

        Raises PlanMismatchError for masks of another model, InputError where both bring new weights for one tensor.
        """
        check_shapes(other.shapes, self.shapes, "the other set of masks", "this one")
        twice = sorted(self.values.keys() & other.values.keys())
        if twice:
            raise InputError(f"both sets of masks bring new weights for {twice[0]!r}: apply one, then make the other.")
        both = {
            name: self.keep[name] & other.keep[name] if name in self.keep and name in other.keep else keep
            for name, keep in {**self.keep, **other.keep}.items()
        }
        parameters = other.parameters if self.parameters is None else self.parameters
        return Masks(both, self.shapes, {**self.values, **other.values}, parameters)

    def save(self, path: Path | str) -> None:
        """Write a safetensors file. Raises OSError; an old file of that name then survives."""
        tensors = {f"keep.{name}": keep.to(torch.uint8).contiguous() for name, keep in self.keep.items()}
        tensors |= {f"value.{name}": value.detach().cpu().contiguous() for name, value in self.values.items()}
        content = to_bytes(tensors)
        shapes = json.dumps({name: list(shape) for name, shape in self.shapes.items()})
        metadata = {_FORMAT: FORMAT, _SHAPES: shapes, _PARAMETERS: json.dumps(self.parameters)}
        start, offset = with_metadata(content, metadata)
        write_bytes(path, start + content[offset:])

    @classmethod
    def load(cls, path: Path | str) -> Masks:
        """The masks that `save` wrote. Raises ArtifactError for any other file."""
        metadata, _ = read_header(path)
        if metadata.get(_FORMAT) != FORMAT:
            raise ArtifactError(f"{path} holds no masks of this version.")
        try:
            shapes = {name: _shape(shape) for name, shape in json.loads(metadata[_SHAPES]).items()}
            parameters = json.loads(metadata[_PARAMETERS])
            parts: dict[str, dict[str, Tensor]] = {"keep": {}, "value": {}}
            for name, tensor in read_tensors(path).items():
                kind, _, target = name.partition(".")
                parts[kind][target] = _as_mask(tensor) if kind == "keep" else _finite(tensor)
            return cls(parts["keep"], shapes, parts["value"], None if parameters is None else _size(parameters))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, PlanMismatchError) as error:
            raise ArtifactError(f"{path} is damaged: {clipped(error)}.") from error

    def __repr__(self) -> str:
        gone, total = self.counts
        return f"Masks({len(self.keep)} tensors, {human(gone)} of {human(total)} weights zero, {self.sparsity:.2%})"

    def table(self) -> str:
        """One line per masked tensor: entries, how many of them are zero; and what that makes of the whole model."""
        wide = max([len(name) for name in self.keep], default=6)
        lines = [f"{'tensor':<{wide}}  {'entries':>10}  sparsity"]
        for name, keep in self.keep.items():
            gone = keep.numel() - int(keep.sum())
            lines.append(f"{name:<{wide}}  {keep.numel():>10,}  {gone / max(keep.numel(), 1):>8.2%}")
        if self.parameters is not None:
            lines.append(
                f"of all {self.parameters:,} parameters, {self.counts[0] / max(self.parameters, 1):.2%} are zero"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{self!r}\n{self.table()}"

    def _gone(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is to be zero, where the tensors lie."""
        return {name: (~keep).to(tensors[name].device) for name, keep in self.keep.items()}


class Held:
    """The hook that keeps masks in force during training: gradients of masked weights are zero, too."""

    def __init__(self, masks: Masks, every: str) -> None:
        if every not in MOMENTS:
            raise InputError(f"masks are held after every 'step' or every 'epoch'; got every={every!r}.")
        self._masks, self._every = masks, every
        self._model: weakref.ref[nn.Module] | None = None  # the one that the masks were compared with
        self._device: torch.device | None = None
        self._gone: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        return f"Held({self._masks!r}, every {self._every})"

    def after_backward(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Masked weights take no part in the norm of the gradients, and gather no momentum."""
        if self._every == "step":
            tensors = self._tensors(model)
            _zero_({name: grad for name, tensor in tensors.items() if (grad := tensor.grad) is not None}, self._gone)

    def after_step(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Write the zeros again."""
        if self._every == "step":
            _zero_(self._tensors(model), self._gone)

    def after_epoch(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Write the zeros again."""
        _zero_(self._tensors(model), self._gone)

    def _tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The masked tensors. A model that is new here is compared with the masks, which come to its device."""
        tensors = named_tensors(model)
        if self._model is None or self._model() is not model:
            self._masks.check(model)
            self._model, self._device = weakref.ref(model), None
        masked = {name: tensors[name] for name in self._masks.keep}
        device = next((tensor.device for tensor in masked.values()), None)
        if self._device != device:
            self._gone, self._device = self._masks._gone(tensors), device
        return masked


def _zero_(tensors: Mapping[str, Tensor], gone: Mapping[str, Tensor]) -> None:
    """Fill in zeros; a product with the mask would leave NaN where a weight or gradient is infinite, and -0."""
    with torch.no_grad():
        for name in tensors.keys() & gone.keys():
            tensors[name].masked_fill_(gone[name], 0)


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ValueError(f"expected a shape, got {value!r}")
    return tuple(map(_size, value))


def _size(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"expected a length, got {value!r}")
    return value


def _as_mask(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.uint8 or bool((tensor > 1).any()):
        raise ValueError("a mask holds zeros and ones")
    return tensor.bool()


def _finite(tensor: Tensor) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise ValueError("new weights are finite numbers")
    return tensor
