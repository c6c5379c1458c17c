"""The weights that masks are for: which tensors of a model they are, and what their rows are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from secateur.dotted import is_within
from secateur.errors import InputError


@dataclass(frozen=True)
class Side:
    """A module that holds a weight: several do where it is tied, as a head to the embedding."""

    name: str  # of the weight there
    layer: bool  # whether masks are for such modules; for embeddings they are not

    @property
    def module(self) -> str:
        """The module's name."""
        return self.name.rpartition(".")[0]


Names = Callable[[Side, Any], bool]  # whether an entry of a request names the weight there


@dataclass(frozen=True)
class WeightLayer:
    """One prunable tensor. Its rows are what its outputs are made from: (out, in / groups, taps)."""

    name: str
    module: str
    shape: tuple[int, ...]
    groups: int = 1
    transposed: bool = False  # (in, out / groups, ...) instead of (out, in / groups, ...)
    bias: bool = False  # a vector with one entry per output: no rows
    sides: tuple[Side, ...] = ()  # who holds it; the first has the tensor's name

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

    `within`, `ignore`: modules, or names or patterns of modules or tensors. What is ignored on one side of a tied
    weight is spared on the other. Raises InputError for an entry that matches nothing, or that `within` asks for on one
    side of a tied weight only, and where nothing is left.
    """
    found = list(_layers(model, biases))
    modules = {id(module): name for name, module in model.named_modules()}

    def names(side: Side, entry: str | nn.Module) -> bool:
        return _matches(side, entry, modules)

    wanted, spared = None if within is None else _listed(within), _listed(ignore)
    for word, entries in (("within", wanted), ("ignore", spared)):
        for entry in entries or ():
            if not any(names(side, entry) for layer in _layers(model, True) for side in layer.sides):
                raise InputError(f"{word}={entry!r} matches no prunable weight of the model.")
    if wanted is not None:
        found = named_layers(found, wanted, names, "within")
    found = [layer for layer in found if not any(names(side, entry) for side in layer.sides for entry in spared)]
    if wanted is not None:
        check_whole(found, wanted, names, "within")
    if not found:
        raise InputError("no weight is left to prune: convolutions, linear maps and attention projections have some.")
    return tuple(found)


def named_layers(layers: Iterable[WeightLayer], entries: Sequence[Any], names: Names, word: str) -> list[WeightLayer]:
    """The layers that an entry names. What holds a layer's weight without being one, an embedding, does not count.

    Raises InputError for an entry that names nothing else.
    """
    layers = list(layers)
    found = [
        layer for layer in layers if any(side.layer and names(side, entry) for side in layer.sides for entry in entries)
    ]
    for entry in entries:
        hits = [(layer, side) for layer in layers for side in layer.sides if names(side, entry)]
        if hits and not any(side.layer or layer in found for layer, side in hits):
            raise _one_sided(word, entry, hits[0][0])
    return found


def check_whole(layers: Iterable[WeightLayer], entries: Sequence[Any], names: Names, word: str) -> None:
    """Raise InputError where the entries name a tied weight on one side only: zeros would come to the other, too."""
    for layer in layers:
        hits = [[entry for entry in entries if names(side, entry)] for side in layer.sides]
        if not layer.bias and any(hits) and not all(hits):
            raise _one_sided(word, next(entry for each in hits for entry in each), layer)


def holders(model: nn.Module) -> dict[int, list[str]]:
    """Under which names modules hold each parameter, by its id; more than one where it is tied."""
    found: dict[int, list[str]] = {}
    for module_name, module in model.named_modules():
        for local, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append(f"{module_name}.{local}" if module_name else local)
    return found


def _one_sided(word: str, entry: object, layer: WeightLayer) -> InputError:
    modules = [side.module for side in layer.sides]
    return InputError(
        f"{word}={entry!r} names one side of a tied weight: {' and '.join(map(repr, modules))} share {layer.name!r}, "
        f"and what is pruned in one is pruned in the other. Name both, {modules!r}, or neither."
    )


def _listed(entries: Iterable[str | nn.Module] | str | nn.Module) -> list[str | nn.Module]:
    return [entries] if isinstance(entries, (str, nn.Module)) else list(entries)


def _layers(model: nn.Module, biases: bool) -> Iterator[WeightLayer]:
    tied = holders(model)
    makers = {
        f"{name}.{local}" if name else local
        for name, module in model.named_modules()
        for local, _, _ in _weights_of(module)
    }
    seen: set[int] = set()

    def sides(parameter: Tensor) -> tuple[Side, ...]:
        return tuple(Side(name, name in makers) for name in tied[id(parameter)])

    for module_name, module in model.named_modules():
        for local, groups, transposed in _weights_of(module):
            parameter = module._parameters.get(local)
            if parameter is None or parameter.dim() < 2 or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            held = sides(parameter)
            yield WeightLayer(held[0].name, module_name, tuple(parameter.shape), groups, transposed, sides=held)
            bias = module._parameters.get("in_proj_bias" if local == "in_proj_weight" else "bias")
            if biases and bias is not None and id(bias) not in seen:
                seen.add(id(bias))
                held = tuple(Side(side.name, True) for side in sides(bias))
                yield WeightLayer(held[0].name, module_name, tuple(bias.shape), bias=True, sides=held)


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


def _matches(side: Side, entry: str | nn.Module, modules: dict[int, str]) -> bool:
    if isinstance(entry, str):
        return is_within(side.name, entry)
    inside = modules.get(id(entry))
    return inside is not None and (not inside or f"{side.module}.".startswith(f"{inside}."))
