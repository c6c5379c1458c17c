"""Penalties that make a model easier to prune while it trains: hooks for `fit(hooks=[...])` or a loop of your own.

Each adds the gradient of its penalty between the backward pass and the optimizer's step, so that the loss that is
reported stays the task's. In a loop of your own call `hook.after_backward(model, optimizer)` there, after unscaling
where gradients are scaled. Parameters without a gradient (frozen, or not used in the pass) are left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from secateur.coupling.groups import Graph
from secateur.errors import InputError, TrainingError
from secateur.plans import check_shapes, tensor_shapes

_NO_MAPS = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)  # weights of two dimensions that map nothing


@dataclass(frozen=True)
class GammaPenalty:
    """Network slimming: adds strength * sign(gamma) to the gradient of every BatchNorm scale; sign(0) = 0.

    That is the subgradient of strength * sum |gamma|. The paper takes 1e-4 for VGG and 1e-5 for ResNet-164 and
    DenseNet-40. Weight decay pulls at gamma as well, unless the optimizer leaves it out: `Recipe.weight_decay` acts on
    every parameter. `within`: names or patterns of modules ("layer4.*"); None for all.

    Source: Liu 2017, arXiv 1708.06519, equation 1.
    """

    strength: float = 1e-4
    within: Sequence[str] | None = None

    def __post_init__(self) -> None:
        _check_strength(self, self.strength)
        object.__setattr__(self, "within", _patterns(self.within))

    def after_backward(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Add the gradient. Raises InputError for a model without BatchNorm scales (within `within`)."""
        scales = _chosen(model, self.within, _scale, "BatchNorm with a scale")
        _add_(scales, lambda gamma: self.strength * gamma.sign())


@dataclass(frozen=True)
class WeightPenalty:
    """L1- or L2-regularised training of the weights of convolutions and linear maps; biases and norms are spared.

    `order` 1 penalises strength * sum |w|: the gradient is strength * sign(w). `order` 2 penalises strength * sum w^2:
    the gradient is 2 * strength * w, so that SGD with weight_decay = 2 * strength on those weights does the same.
    `within`: names or patterns of modules; None for all.

    Source: Han 2015, arXiv 1506.02626, section 3.1.
    """

    strength: float
    order: int = 1
    within: Sequence[str] | None = None

    def __post_init__(self) -> None:
        _check_strength(self, self.strength)
        if self.order not in (1, 2):
            raise InputError(f"WeightPenalty: order is 1 (sum |w|) or 2 (sum w^2); got {self.order!r}.")
        object.__setattr__(self, "within", _patterns(self.within))

    def after_backward(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Add the gradient. Raises InputError for a model without such weights (within `within`)."""
        weights = _chosen(model, self.within, _maps, "convolution or linear map")
        gradient = torch.sign if self.order == 1 else (lambda weight: 2 * weight)
        _add_(weights, lambda weight: self.strength * gradient(weight))


class GroupPenalty:
    """DepGraph's sparse learning: channels that matter little decay faster, with everything that goes with them.

    The gradient of every parameter entry w of channel k of a prunable group grows by strength * 2^(alpha * u_k) * w,
    u_k = (I_max - I_k) / (I_max - I_min): a factor of 1 for the group's largest channel, 2^alpha = 16 for its smallest.
    I_k is the root of the sum of w^2 over all parameters of the channel. An entry of two groups (a weight from one
    to the next) gets both terms. Where all I_k are equal the factor is 1.

    The importances I are taken at the first step and then at the start of every epoch, or every `every` steps.
    `graph`: of the model that is trained. Resumes bit for bit in `fit`. A hook is for one run.

    Source: Fang 2023, arXiv 2301.12900; the paper's CIFAR runs take strength 5e-4.
    """

    def __init__(self, graph: Graph, strength: float = 1e-4, alpha: float = 4.0, every: int | None = None) -> None:
        _check_strength(self, strength)
        if not 0 <= alpha < math.inf:
            raise InputError(f"GroupPenalty: alpha is at least 0; got {alpha!r}.")
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise InputError(f"GroupPenalty: every is a whole number of steps, or None for each epoch; got {every!r}.")
        if not graph.prunable:
            raise InputError("GroupPenalty: every group of the graph is locked, so there is nothing to make sparse.")
        self.graph, self.strength, self.alpha, self.every = graph, strength, alpha, every
        self._steps = 0
        self._importance: dict[str, Tensor] | None = None  # group -> (channels,)
        self._factors: dict[str, Tensor] = {}  # parameter -> what multiplies it, of a shape that broadcasts to it

    def after_backward(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Add the gradient. Raises PlanMismatchError for a model that the graph was not made from."""
        if self._importance is None or (self.every is not None and self._steps % self.every == 0):
            check_shapes(tensor_shapes(model), self.graph.shapes, "the model", "the graph")
            self._importance, self._factors = group_importance(model, self.graph), {}
        if not self._factors:
            self._factors = self._factors_of(model, self._importance)
        self._steps += 1
        parameters = dict(model.named_parameters())
        for name, factor in self._factors.items():
            _add_([parameters[name]], factor.mul)

    def after_epoch(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Without `every`, the next step takes the importances anew."""
        if self.every is None:
            self._importance = None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, and by what it knows its own."""
        return {**self._settings(), "steps": self._steps, "importance": self._importance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint. Raises TrainingError for that of another penalty."""
        for name, ours in self._settings().items():
            if state[name] != ours:
                raise TrainingError(f"the checkpoint is of a GroupPenalty with {name}={state[name]!r}, not {ours!r}.")
        self._steps, self._importance, self._factors = state["steps"], state["importance"], {}

    def _settings(self) -> dict[str, Any]:
        return {"strength": self.strength, "alpha": self.alpha, "every": self.every}

    def _factors_of(self, model: nn.Module, importance: dict[str, Tensor]) -> dict[str, Tensor]:
        parameters, factors = dict(model.named_parameters()), dict[str, Tensor]()
        for group in self.graph.prunable:
            rates = self.strength * 2 ** (self.alpha * _unimportance(importance[group.name]))
            for slot in group.slots:
                weight = parameters.get(slot.tensor)
                if weight is None or not weight.is_floating_point():
                    continue  # running statistics are no parameters
                along = torch.zeros(slot.size, dtype=_wide(weight), device=weight.device)
                places = torch.as_tensor(slot.indices, device=weight.device)
                along[places] = rates.to(along.dtype).to(along.device)[:, None].expand(places.shape)
                shape = [slot.size if dim == slot.dim else 1 for dim in range(weight.dim())]
                factor = along.to(weight.dtype).reshape(shape)
                factors[slot.tensor] = factors[slot.tensor] + factor if slot.tensor in factors else factor
        return factors


@torch.no_grad()
def group_importance(model: nn.Module, graph: Graph) -> dict[str, Tensor]:
    """{group: (channels,) on the CPU}: the root of the sum of squares of all parameters of each channel."""
    parameters = dict(model.named_parameters())
    found = {}
    for group in graph.prunable:
        total = torch.zeros(group.channels, dtype=torch.float64)
        for slot in group.slots:
            weight = parameters.get(slot.tensor)
            if weight is not None and weight.is_floating_point():
                others = [dim for dim in range(weight.dim()) if dim != slot.dim]
                squares = weight.to(_wide(weight)).square()
                each = squares.sum(others) if others else squares
                total += each.cpu().to(torch.float64)[torch.as_tensor(slot.indices)].sum(1)
        found[group.name] = total.sqrt()
    return found


def gammas(model: nn.Module) -> dict[str, Tensor]:
    """{BatchNorm module: (channels,) of |gamma|, on the CPU}, in the model's order; those without a scale are left out.

    For `secateur.report.gammas.gamma_histogram`: `{name: values.tolist() for name, values in gammas(model).items()}`.
    """
    return {name: gamma.detach().abs().cpu() for name, module in model.named_modules() for gamma in _scale(module)}


def gamma_threshold(model: nn.Module, percentile: float) -> float:
    """The |gamma| below which a fraction `percentile` of all BatchNorm channels of the model lie, rounded down.

    One ranking over all layers: the smallest value that stays when floor(percentile * channels) channels go. Of equal
    values none lies below. Raises InputError for a model without BatchNorm scales, and unless 0 <= percentile < 1.

    Source: Liu 2017, arXiv 1708.06519, section 3.
    """
    if isinstance(percentile, bool) or not isinstance(percentile, (int, float)) or not 0 <= percentile < 1:
        hint = f" For {percentile} % pass {percentile / 100:g}." if percentile and 1 < percentile < 100 else ""
        raise InputError(f"percentile is a fraction of the channels, in [0, 1); got {percentile!r}.{hint}")
    found = gammas(model)
    if not found:
        raise InputError("the model has no BatchNorm with a scale: there is no gamma to take a percentile of.")
    ranked = torch.cat([values.float() for values in found.values()]).sort().values
    return float(ranked[math.floor(percentile * len(ranked) + 1e-9)])


def _add_(weights: Iterable[nn.Parameter], gradient: Callable[[Tensor], Tensor]) -> None:
    """Add to the gradient of every weight that has one; one that is used twice gets it once."""
    with torch.no_grad():
        for weight in dict.fromkeys(weights):
            if weight.grad is not None:
                weight.grad.add_(gradient(weight.detach()))


def _scale(module: nn.Module) -> Iterator[nn.Parameter]:
    """The gamma of a BatchNorm that has one."""
    if isinstance(module, _BatchNorm) and isinstance(module.weight, nn.Parameter):
        yield module.weight


def _maps(module: nn.Module) -> Iterator[nn.Parameter]:
    """The weights of a module by which it maps channels to channels: convolutions, linear maps, attention, recurrences.

    By what they are and not by class, so that a module's graph form and linear maps of other libraries have them too.
    """
    if not isinstance(module, _NO_MAPS):
        for name, parameter in module.named_parameters(recurse=False):
            if "weight" in name and parameter.dim() >= 2:
                yield parameter


def _chosen(
    model: nn.Module,
    within: Sequence[str] | None,
    weights_of: Callable[[nn.Module], Iterable[nn.Parameter]],
    kind: str,
) -> list[nn.Parameter]:
    found = [(name, weight) for name, module in model.named_modules() for weight in weights_of(module)]
    if not found:
        raise InputError(f"the model has no {kind}: there is nothing to penalise.")
    if within is None:
        return [weight for _, weight in found]
    for pattern in within:
        if not any(fnmatchcase(name, pattern) for name, _ in found):
            raise InputError(f"within={pattern!r} names no {kind} of the model.")
    return [weight for name, weight in found if any(fnmatchcase(name, pattern) for pattern in within)]


def _patterns(within: str | Iterable[str] | None) -> tuple[str, ...] | None:
    if within is None:
        return None
    found = (within,) if isinstance(within, str) else tuple(within)
    if not found or not all(isinstance(entry, str) for entry in found):
        raise InputError(f"within is one or more names or patterns of modules, or None for all; got {within!r}.")
    return found


def _check_strength(penalty: object, strength: float) -> None:
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength < math.inf:
        raise InputError(f"{type(penalty).__name__}: strength is a finite number, at least 0; got {strength!r}.")


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _unimportance(importance: Tensor) -> Tensor:
    """0 for the largest, 1 for the smallest, linear in between; 0 throughout where all are equal."""
    most, least = importance.max(), importance.min()
    return (most - importance) / (most - least) if most > least else torch.zeros_like(importance)
