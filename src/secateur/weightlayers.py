"""The weights that masks are for: which tensors of a model they are, and what their rows are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from secateur.errors import InputError


@dataclass(frozen=True)
class WeightLayer:
    """One prunable tensor. Its rows are what its outputs are made from: (out, in / groups, taps)."""

    name: str
    module: str
    shape: tuple[int, ...]
    groups: int = 1
    transposed: bool = False  # (in, out / groups, ...) instead of (out, in / groups, ...)
    bias: bool = False  # a vector with one entry per output: no rows

    @property
    def entries(self) -> int:
        """How many weights it has."""
        return math.prod(self.shape)

    def rows(self, tensor: Tensor) -> Tensor:
        """(out, in / groups, taps) of a tensor in the weight's shape."""
        if self.bias:
            return tensor.reshape(1, -1, 1)
        if not self.transposed:
            return tensor.reshape(*self.shape[:2], -1)
        inputs, outputs = self.shape[0] // self.groups, self.shape[1]
        return tensor.reshape(self.groups, inputs, outputs, -1).transpose(1, 2).flatten(0, 1)

    def from_rows(self, rows: Tensor) -> Tensor:
        """The inverse of `rows`."""
        if not self.transposed or self.bias:
            return rows.reshape(self.shape)
        return rows.reshape(self.groups, self.shape[1], -1, rows.shape[2]).transpose(1, 2).reshape(self.shape)


def weight_layers(
    model: nn.Module,
    within: Iterable[str | nn.Module] | str | nn.Module | None = None,
    ignore: Iterable[str | nn.Module] | str | nn.Module = (),
    *,
    biases: bool = False,
) -> tuple[WeightLayer, ...]:
    """Weights of convolutions, linear maps and attention projections; with `biases` theirs, too. A tied one once.

    `within`, `ignore`: modules, or names or patterns of modules or tensors. Raises InputError for one that matches
    nothing, and where nothing is left.
    """
    found = list(_layers(model, biases))
    modules = {id(module): name for name, module in model.named_modules()}
    for entries, keep in ((within, True), (ignore, False)):
        if entries is None:
            continue
        listed = [entries] if isinstance(entries, (str, nn.Module)) else list(entries)
        hits = set()
        for entry in listed:
            here = {layer.name for layer in found if _matches(layer, entry, modules)}
            if not here and not any(_matches(layer, entry, modules) for layer in _layers(model, True)):
                word = "within" if keep else "ignore"
                raise InputError(f"{word}={entry!r} matches no prunable weight of the model.")
            hits |= here
        found = [layer for layer in found if (layer.name in hits) == keep]
    if not found:
        raise InputError("no weight is left to prune: convolutions, linear maps and attention projections have some.")
    return tuple(found)


def _layers(model: nn.Module, biases: bool) -> Iterator[WeightLayer]:
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for local, groups, transposed in _weights_of(module):
            parameter = module._parameters.get(local)
            if parameter is None or parameter.dim() < 2 or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            yield WeightLayer(first[id(parameter)], module_name, tuple(parameter.shape), groups, transposed)
            bias = module._parameters.get("in_proj_bias" if local == "in_proj_weight" else "bias")
            if biases and bias is not None and id(bias) not in seen:
                seen.add(id(bias))
                yield WeightLayer(first[id(bias)], module_name, tuple(bias.shape), bias=True)


def _weights_of(module: nn.Module) -> Iterator[tuple[str, int, bool]]:
    """Names of weights, their groups, and whether they are transposed."""
    if isinstance(module, nn.modules.conv._ConvNd):
        yield "weight", module.groups, module.transposed
    elif isinstance(module, nn.Linear):
        yield "weight", 1, False
    elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers' linear map, (in, out)
        yield "weight", 1, True
    else:  # attention: nn.MultiheadAttention, or the module that takes its place when heads go
        yield from ((f"{part}_proj_weight", 1, False) for part in ("in", "q", "k", "v"))


def _matches(layer: WeightLayer, entry: str | nn.Module, modules: dict[int, str]) -> bool:
    if isinstance(entry, str):
        owners = layer.module.split(".") if layer.module else []
        names = [layer.name, *(".".join(owners[:count]) for count in range(1, len(owners) + 1))]
        return any(fnmatchcase(name, entry) for name in names)
    inside = modules.get(id(entry))
    return inside is not None and (not inside or f"{layer.module}.".startswith(f"{inside}."))
