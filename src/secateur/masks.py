"""Masks: which weights are forced to zero in a model of unchanged shape. The value that weight pruning exchanges."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
_FORMAT, _SHAPES = "secateur.masks", "secateur.shapes"
MOMENTS = ("epoch", "step")


@dataclass(frozen=True, eq=False)
class Masks:
    """What stays of each masked tensor of a model of the given shapes. Make them with `make_masks`."""

    keep: Mapping[str, Tensor]  # name -> bool on the CPU, in the tensor's shape
    shapes: Mapping[str, tuple[int, ...]]  # every parameter and buffer of the model they fit
    values: Mapping[str, Tensor] = field(default_factory=dict)  # new weights, where a method makes them (SparseGPT)

    def __post_init__(self) -> None:
        for name, tensor in (*self.keep.items(), *self.values.items()):
            if tuple(tensor.shape) != tuple(self.shapes.get(name, ())) or name not in self.keep:
                expected = list(self.shapes.get(name, ()))
                raise PlanMismatchError(f"the mask of {name!r} has shape {list(tensor.shape)}, expected {expected}.")
        if any(tensor.dtype != torch.bool for tensor in self.keep.values()):
            raise InputError("a mask is a bool tensor, true where the weight stays.")

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
        replace(self, values={})._zero_(tensors)

    def hold(self, model: nn.Module, optimizer: Optimizer) -> RemovableHandle:
        """Keep the zeros while `optimizer` trains `model`: they are written again after each of its steps.

        Momentum and weight decay would bring masked weights back otherwise. `.remove()` of the result ends it.
        """
        self.check(model)
        tensors = {name: tensor for name, tensor in named_tensors(model).items() if name in self.keep}
        self._zero_(tensors)
        return optimizer.register_step_post_hook(lambda *_: self._zero_(tensors))

    def hook(self, every: str = "step") -> Held:
        """The same as a hook for `fit(hooks=[...])` or a loop of your own.

        `every`: "step", after every optimizer step; "epoch", only after every epoch, between which masked weights grow
        back (Batra, Das and Xu, "Exploring Large Convolutional Network Pruning").
        """
        return Held(self, every)

    def __and__(self, other: Masks) -> Masks:
        """Both together: what either forces to zero. Raises PlanMismatchError for masks of another model."""
        check_shapes(other.shapes, self.shapes, "the other set of masks", "this one")
        both = {
            name: self.keep.get(name, torch.ones(self.shapes[name], dtype=torch.bool))
            & other.keep.get(name, torch.ones(self.shapes[name], dtype=torch.bool))
            for name in {**self.keep, **other.keep}
        }
        return Masks(both, self.shapes, {**self.values, **other.values})

    def save(self, path: Path | str) -> None:
        """Write a safetensors file. Raises OSError; an old file of that name then survives."""
        tensors = {f"keep.{name}": keep.to(torch.uint8).contiguous() for name, keep in self.keep.items()}
        tensors |= {f"value.{name}": value.detach().cpu().contiguous() for name, value in self.values.items()}
        content = to_bytes(tensors)
        shapes = json.dumps({name: list(shape) for name, shape in self.shapes.items()})
        start, offset = with_metadata(content, {_FORMAT: FORMAT, _SHAPES: shapes})
        write_bytes(path, start + content[offset:])

    @classmethod
    def load(cls, path: Path | str) -> Masks:
        """The masks that `save` wrote. Raises ArtifactError for any other file."""
        metadata, _ = read_header(path)
        if metadata.get(_FORMAT) != FORMAT:
            raise ArtifactError(f"{path} holds no masks of this version.")
        try:
            shapes = {str(name): tuple(map(_size, shape)) for name, shape in json.loads(metadata[_SHAPES]).items()}
            parts: dict[str, dict[str, Tensor]] = {"keep": {}, "value": {}}
            for name, tensor in read_tensors(path).items():
                kind, _, target = name.partition(".")
                parts[kind][target] = _as_mask(tensor) if kind == "keep" else tensor
            return cls(parts["keep"], shapes, parts["value"])
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
            lines.append(f"{name:<{wide}}  {keep.numel():>10,}  {1 - float(keep.float().mean()):>8.2%}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{self!r}\n{self.table()}"

    def _zero_(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, keep in self.keep.items():
                tensors[name].mul_(keep.to(tensors[name].device))


class Held:
    """The hook that keeps masks in force during training: gradients of masked weights are zero, too."""

    def __init__(self, masks: Masks, every: str) -> None:
        if every not in MOMENTS:
            raise InputError(f"masks are held after every 'step' or every 'epoch'; got every={every!r}.")
        self._masks, self._every = replace(masks, values={}), every
        self._device: torch.device | None = None

    def __repr__(self) -> str:
        return f"Held({self._masks!r}, every {self._every})"

    def after_backward(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Masked weights take no part in the norm of the gradients, and gather no momentum."""
        if self._every == "step":
            tensors = self._tensors(model)
            for name, keep in self._masks.keep.items():
                gradient = tensors[name].grad
                if gradient is not None:
                    gradient.mul_(keep)

    def after_step(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Write the zeros again."""
        if self._every == "step":
            self._masks._zero_(self._tensors(model))

    def after_epoch(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Write the zeros again."""
        self._masks._zero_(self._tensors(model))

    def _tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's tensors. The masks come to their device the first time, when they are also compared with it."""
        tensors = named_tensors(model)
        device = next(iter(tensors.values())).device
        if self._device != device:
            self._masks.check(model)
            keep = {name: keep.to(tensors[name].device) for name, keep in self._masks.keep.items()}
            self._masks, self._device = replace(self._masks, keep=keep), device
        return tensors


def _size(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"expected a length, got {value!r}")
    return value


def _as_mask(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.uint8 or bool((tensor > 1).any()):
        raise ValueError("a mask holds zeros and ones")
    return tensor.bool()
