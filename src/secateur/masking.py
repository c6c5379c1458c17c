"""make_masks(): which weights go. Scores per weight, what competes with what, and the shape that zeros take."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.optim import Optimizer

from secateur.batches import Forward, Loss, default_forward, move
from secateur.criteria.weights import SCOPES, WEIGHT_CRITERIA, WeightCriterion
from secateur.errors import DataError, InputError, TargetError, TrainingError, UnknownNameError
from secateur.evidence import Evidence, observe
from secateur.inputs import check_model, check_weights, private_copy
from secateur.layercalls import LayerCalls, observable
from secateur.masks import Held, Masks
from secateur.plans import named_tensors, tensor_shapes
from secateur.schedules import Schedule
from secateur.schedules import resolve as resolve_schedule
from secateur.sparsegpt import sparsegpt_rows
from secateur.synflow import ROUNDS, flow, positive, synflow_scores
from secateur.targets import Target
from secateur.weightlayers import Side, WeightLayer, check_whole, named_layers, weight_layers

Pattern = str | tuple[int, int] | None
Scores = Mapping[str, Tensor]  # per layer (out, in / groups, taps)


@dataclass(frozen=True)
class WeightMethod:
    """What is more than a score per weight: it says itself how to run. The docstring of `about` describes it."""

    about: Callable[..., Any]
    needs: tuple[str, ...]
    scopes: tuple[str, ...]
    patterns: bool
    cost: str
    biases: bool = False


def ln_structured(model: nn.Module, sparsity: float, *, order: float = 2) -> Masks:
    """Whole filters masked by torch.nn.utils.prune.ln_structured, each convolution alone: the control that stays large.

    Shapes stay, and so do biases, BatchNorm and the next layers' kernels: nothing is smaller or faster, and a masked
    filter still gives a constant. Layers that are added to one another choose different filters, so that cutting them
    for real removes the union: masks that keep 53 % of the filters left 6 % of a ResNet-18's weights.
    Source: torch.nn.utils.prune; Ou Yang and Xu, "Pruning in Deep Neural Network" (structured pruning).
    """
    Target(sparsity=sparsity)
    check_model(model)
    check_weights(model)
    copied, keep = private_copy(model), {}
    for layer in _convolutions(weight_layers(model)):
        module, dim = copied.get_submodule(layer.module), 1 if layer.transposed else 0
        amount = math.floor(sparsity * layer.shape[dim] + 1e-9)
        torch_prune.ln_structured(module, "weight", amount, order, dim)  # type: ignore[no-untyped-call]
        keep[layer.name] = module.get_buffer("weight_mask").bool().cpu()
    if not keep:
        raise InputError("ln_structured masks filters of convolutions; the model has none.")
    return _masks(model, keep)


def _convolutions(layers: Iterable[WeightLayer]) -> list[WeightLayer]:
    return [layer for layer in layers if len(layer.shape) > 2 and not layer.bias]


def _masks(model: nn.Module, keep: Mapping[str, Tensor], values: Mapping[str, Tensor] | None = None) -> Masks:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Masks(keep, tensor_shapes(model), values or {}, parameters)


SWEEP = "a forward pass and a sweep of weight updates, once per layer"
WEIGHT_METHODS: dict[str, WeightCriterion | WeightMethod] = {
    **WEIGHT_CRITERIA,
    "ln_structured": WeightMethod(ln_structured, (), ("layer",), patterns=False, cost="reads the weights"),
    "sparsegpt": WeightMethod(sparsegpt_rows, ("gram",), ("layer",), patterns=True, cost=SWEEP),
    "synflow": WeightMethod(synflow_scores, (), ("global",), patterns=False, cost=f"{ROUNDS} backward passes, on ones"),
}


@torch.inference_mode(False)
def make_masks(
    model: nn.Module,
    criterion: str | WeightCriterion = "magnitude",
    sparsity: float | Mapping[str, float] | None = None,
    *,
    scope: str | None = None,
    pattern: Pattern = None,
    data: Iterable[Any] | None = None,
    within: Iterable[str | nn.Module] | str | nn.Module | None = None,
    ignore: Iterable[str | nn.Module] | str | nn.Module = (),
    biases: bool = False,
    propagate: bool | None = None,
    masks: Masks | None = None,
    seed: int = 0,
    forward: Forward | None = None,
    loss: Loss | None = None,
) -> Masks:
    """Choose the weights to force to zero; the model is not changed. Exactly floor(sparsity * n) of n go.

    `criterion`: a name that `secateur criteria` lists, or a callable (weight name, evidence) -> scores in the weight's
    shape, higher means keep. `sparsity`: the fraction removed, in [0, 1); or {layer pattern: fraction}, other layers
    keep all. `scope`: what competes: "layer", "global", or "row" (the weights of one output, a filter); by default what
    the criterion's source does, and "layer" with a pattern, or where fractions per layer leave nothing global.
    `pattern`: "n:m" keeps n of every m consecutive input channels at each tap, as sparse tensor cores read them, and
    needs no sparsity; (a, b) removes whole blocks of outputs x inputs at each tap, by the sum of their scores.

    `data`: batches for criteria that look at them. `within`, `ignore`: layers to prune or to spare: modules, names or
    patterns; by default all convolutions, linear maps and attention projections. A tied weight, such as a language
    model's head, is pruned where `within` names both sides, spared where `ignore` names one. `biases`: prune biases
    too, each vector of them as one unit. `propagate`: measure layer by layer in order of execution, each with the
    layers before it already pruned, as Wanda's paper does; otherwise all on the model as it is, in one pass. By default
    only SparseGPT does. `masks`: weights that went before; they stay zero and count. New weights that those masks bring
    are not looked at: to go on from them, pass `masks.apply(model)` as the model. Ties go in order of position.

    Raises InputError, TargetError or UnknownNameError for what makes no sense, PlanMismatchError for masks of another
    model: before any work.
    """
    in_turn = criterion == "sparsegpt" if propagate is None else propagate
    found, layers, choice = asked_of(
        model, criterion, sparsity, scope, pattern, data, within, ignore, biases=biases, propagate=in_turn
    )
    if masks is not None:
        masks.check(model)
    before = {} if masks is None else masks.keep
    start = model if masks is None else replace(masks, values={}).apply(model)
    source = _Source(data, seed, forward, loss)
    values: dict[str, Tensor] = {}
    if criterion == "ln_structured":
        keep = _ln_structured(start, layers, choice)
    elif criterion == "sparsegpt":
        keep, values = _sparsegpt(start, layers, choice, source, before, in_turn)
    elif criterion == "synflow":
        keep = _synflow(start, layers, choice, source, before)
    elif in_turn:
        keep = _in_turn(start, layers, found, choice, source, before)
    else:
        needs = tuple(getattr(found, "needs", ()))
        facts = observe(start, None, data, needs, positions=None, seed=seed, forward=forward, loss=loss)
        keep = _kept(_scores(found, layers, replace(facts, seed=seed)), layers, choice, before)
    both = {name: kept & before[name] if name in before else kept for name, kept in keep.items()}
    return _masks(model, {**before, **both}, values)


def threshold_masks(
    model: nn.Module,
    threshold: float,
    *,
    within: Iterable[str | nn.Module] | str | nn.Module | None = None,
    ignore: Iterable[str | nn.Module] | str | nn.Module = (),
) -> Masks:
    """Every weight with |w| < threshold goes: the weight threshold after fine-tuning of slimming studies.

    Source: Lee, Li and Li, "10605 Mini Project" (network slimming, after fine-tuning).
    """
    check_model(model)
    check_weights(model)
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold < math.inf:
        raise InputError(f"threshold is the smallest |w| that stays, at least 0; got {threshold!r}.")
    tensors = named_tensors(model)
    layers = weight_layers(model, within, ignore)
    keep = {layer.name: (tensors[layer.name].detach().abs() >= threshold).cpu() for layer in layers}
    return _masks(model, keep)


# -- what is asked for -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Choice:
    scope: str
    pattern: tuple[str, int, int] | None  # ("n:m", n, m) or ("block", rows, columns)
    fractions: Mapping[str, float]  # layer -> to remove


@dataclass(frozen=True)
class _Source:
    data: Iterable[Any] | None
    seed: int
    forward: Forward | None
    loss: Loss | None

    def first(self) -> Any:
        """The first batch."""
        batch = next(iter(self.data or ()), None)
        if batch is None:
            raise DataError("the data holds no batch; an exhausted generator? Pass something that can be iterated.")
        return batch

    def evidence(self, model: nn.Module, needs: tuple[str, ...], layers: Collection[str]) -> Evidence:
        """What the calls of these layers say."""
        options: dict[str, Any] = {"seed": self.seed, "forward": self.forward, "loss": self.loss}
        found = observe(model, None, self.data, needs, layers=layers, positions=None, **options)
        return replace(found, seed=self.seed)


def asked_of(
    model: nn.Module,
    criterion: str | WeightCriterion,
    sparsity: float | Mapping[str, float] | None,
    scope: str | None,
    pattern: Pattern,
    data: Iterable[Any] | None,
    within: Iterable[str | nn.Module] | str | nn.Module | None,
    ignore: Iterable[str | nn.Module] | str | nn.Module,
    *,
    biases: bool = False,
    propagate: bool = False,
) -> tuple[WeightCriterion | WeightMethod, tuple[WeightLayer, ...], _Choice]:
    """The criterion, the layers and how to choose, of a request that makes sense; raises what `make_masks` does."""
    check_model(model)
    check_weights(model)
    found = _resolve(criterion)
    layers = weight_layers(model, within, ignore, biases=biases)
    where = _scope(criterion, found, scope, pattern, sparsity)
    choice = _Choice(where, _parsed(pattern, sparsity), _fractions(layers, sparsity))
    _check(criterion, found, layers, choice, data, biases, propagate)
    return found, layers, choice


def _resolve(criterion: str | WeightCriterion) -> WeightCriterion | WeightMethod:
    if isinstance(criterion, str):
        if criterion not in WEIGHT_METHODS:
            raise UnknownNameError("criterion for weights", criterion, WEIGHT_METHODS)
        return WEIGHT_METHODS[criterion]
    if not callable(criterion):
        raise InputError(f"a criterion is a name or a callable (weight name, evidence) -> Tensor; got {criterion!r}.")
    return criterion


def _scope(criterion: object, found: object, scope: str | None, pattern: Pattern, sparsity: object) -> str:
    allowed: Sequence[str] = getattr(found, "scopes", SCOPES)
    if scope is None:
        by_layer = pattern is not None or (allowed[0] == "global" and isinstance(sparsity, Mapping))
        return "layer" if by_layer and "layer" in allowed else allowed[0]
    if scope not in SCOPES:
        raise UnknownNameError("scope", scope, SCOPES)
    if scope not in allowed:
        raise InputError(f"criterion {criterion!r} makes no sense with scope={scope!r}; it takes {', '.join(allowed)}.")
    return scope


def _parsed(pattern: Pattern, sparsity: object) -> tuple[str, int, int] | None:
    if sparsity is None and not isinstance(pattern, str):
        raise TargetError(
            "nothing to aim for: pass sparsity=, the fraction to remove, or an n:m pattern such as '2:4'."
        )
    if pattern is None:
        return None
    if isinstance(pattern, str):
        kept, colon, size = pattern.partition(":")
        if not (colon and kept.isdigit() and size.isdigit() and 0 < int(kept) < int(size)):
            raise InputError(f"pattern 'n:m' keeps n of m, such as '2:4', with 0 < n < m; got {pattern!r}.")
        implied = 1 - int(kept) / int(size)
        same = isinstance(sparsity, (int, float)) and math.isclose(sparsity, implied, abs_tol=1e-6)
        if sparsity is not None and not same:
            raise InputError(f"pattern={pattern!r} removes {implied:g} of the weights; sparsity={sparsity!r} differs.")
        return "n:m", int(kept), int(size)
    sides = tuple(pattern) if isinstance(pattern, (tuple, list)) else ()
    if len(sides) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in sides):
        raise InputError(f"pattern is 'n:m' or a block (outputs, inputs) of whole numbers; got {pattern!r}.")
    return "block", sides[0], sides[1]


def _fractions(layers: Sequence[WeightLayer], sparsity: float | Mapping[str, float] | None) -> dict[str, float]:
    if sparsity is None:
        return {layer.name: 0.0 for layer in layers}
    Target(sparsity=sparsity)  # raises TargetError
    if not isinstance(sparsity, Mapping):
        return {layer.name: sparsity for layer in layers}
    found: dict[str, float] = {}

    def names(side: Side, pattern: str) -> bool:
        return fnmatchcase(side.name, pattern) or fnmatchcase(side.module, pattern)

    for pattern in sparsity:
        if not any(names(side, pattern) for layer in layers for side in layer.sides):
            raise TargetError(
                f"sparsity= names {pattern!r}, which matches none of: {', '.join(x.name for x in layers)}."
            )
    chosen = named_layers(layers, list(sparsity), names, "sparsity")
    check_whole(chosen, [pattern for pattern, fraction in sparsity.items() if fraction], names, "sparsity")
    for pattern, fraction in sparsity.items():
        for layer in (each for each in chosen if any(names(side, pattern) for side in each.sides)):
            if found.setdefault(layer.name, fraction) != fraction:
                raise TargetError(f"sparsity= asks for {found[layer.name]} and for {fraction} of {layer.name!r}.")
    return {layer.name: found.get(layer.name, 0.0) for layer in layers}


def _check(
    criterion: object,
    found: WeightCriterion | WeightMethod,
    layers: Sequence[WeightLayer],
    choice: _Choice,
    data: Iterable[Any] | None,
    biases: bool,
    propagate: bool,
) -> None:
    _check_data(criterion, found, data, choice, propagate)
    if choice.scope == "global" and len(set(choice.fractions.values())) > 1:
        raise TargetError("different fractions per layer leave nothing for scope='global' to decide: use 'layer'.")
    if biases and not getattr(found, "biases", not isinstance(criterion, str)):
        raise InputError(f"criterion {criterion!r} says nothing about biases: leave biases=False.")
    if biases and propagate:
        raise InputError("propagate=True goes from weight to weight, which leaves biases out: leave biases=False.")
    if criterion == "ln_structured" and not _convolutions(layers):
        raise InputError("ln_structured masks filters of convolutions; there are none among the layers to prune.")
    transposed = [layer.module for layer in _convolutions(layers) if layer.transposed]
    if criterion == "sparsegpt" and transposed:
        raise InputError(f"sparsegpt has no patches for transposed convolutions: pass ignore={transposed!r}.")
    if choice.pattern is not None:
        _check_pattern(criterion, found, layers, choice, biases)


def _check_data(
    criterion: object,
    found: WeightCriterion | WeightMethod,
    data: Iterable[Any] | None,
    choice: _Choice,
    propagate: bool,
) -> None:
    needs = tuple(getattr(found, "needs", ()))
    if propagate and choice.scope == "global":
        raise InputError("propagate=True prunes layer after layer: it cannot rank them together in scope 'global'.")
    if propagate and not needs:
        raise InputError(
            f"criterion {criterion!r} measures nothing that pruned layers could change: no propagate=True."
        )
    if data is None and (needs or criterion == "synflow"):
        why = "the shape of its input" if criterion == "synflow" else f"{', '.join(needs)} evidence"
        raise InputError(f"criterion {criterion!r} needs {why}: pass data=, an iterable of batches.")
    if isinstance(data, Iterator) and propagate:
        raise InputError(
            "the data is an iterator, good for one pass, but every layer takes one: pass a list of batches."
        )


def _check_pattern(
    criterion: object,
    found: WeightCriterion | WeightMethod,
    layers: Sequence[WeightLayer],
    choice: _Choice,
    biases: bool,
) -> None:
    assert choice.pattern is not None
    kind, first, second = choice.pattern
    if biases:
        raise InputError("a pattern is about inputs and outputs, which biases have not: leave biases=False.")
    if isinstance(found, WeightMethod) and (not found.patterns or kind == "block"):
        raise InputError(f"criterion {criterion!r} cannot make {'blocks' if kind == 'block' else 'n:m'} of zeros.")
    if choice.scope == "row" and kind == "block":
        raise InputError("blocks cover several outputs: they compete in scope 'layer' or 'global', not 'row'.")
    if choice.scope != "layer" and kind == "n:m":
        raise InputError(f"in an n:m pattern weights compete m by m: scope={choice.scope!r} has no meaning there.")
    sides = {layer: tuple(layer.rows(torch.empty(layer.shape, device="meta")).shape[:2]) for layer in layers}
    bad = [layer for layer, (out, into) in sides.items() if into % second or (kind == "block" and out % first)]
    if bad:
        wish = (
            f"inputs that {second} divides" if kind == "n:m" else f"(outputs, inputs) that ({first}, {second}) divide"
        )
        listed = ", ".join(f"{layer.name!r} has {sides[layer]}" for layer in bad)
        raise InputError(
            f"pattern: not every layer has {wish}, in each of its groups: {listed}. "
            f"Pass ignore={[layer.module for layer in bad]!r}, or within= with the layers to prune."
        )


# -- choosing --------------------------------------------------------------------------------------------------------


def _scores(criterion: Any, layers: Sequence[WeightLayer], facts: Evidence) -> dict[str, Tensor]:
    found = {}
    for layer in layers:
        scores = criterion(layer.name, facts)
        if not isinstance(scores, Tensor) or tuple(scores.shape) != layer.shape:
            got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise InputError(f"scores of {layer.name!r} are {got}, expected a tensor of shape {list(layer.shape)}.")
        if not torch.isfinite(scores).all():
            raise InputError(f"scores of {layer.name!r} are not finite; check the data and the model's weights.")
        found[layer.name] = layer.rows(scores.detach().cpu())
    return found


def _kept(
    scores: Scores, layers: Sequence[WeightLayer], choice: _Choice, before: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The masks, in the weights' shapes. What went before has the lowest score of all."""
    ranked = {}
    for layer in layers:
        rows = scores[layer.name].double()
        if layer.name in before:
            whole = choice.pattern is not None and choice.pattern[0] == "block"  # a block counts by what is left of it
            rows = rows.masked_fill(~layer.rows(before[layer.name]), 0 if whole else -math.inf)
        ranked[layer.name] = rows
    if choice.pattern is not None and choice.pattern[0] == "n:m":
        keep = {name: _n_of_m(rows, *choice.pattern[1:]) for name, rows in ranked.items()}
    elif choice.pattern is not None:
        blocks = {name: _blocks(rows, *choice.pattern[1:]) for name, rows in ranked.items()}
        chosen = _lowest_go(blocks, choice)
        keep = {
            name: kept.repeat_interleave(choice.pattern[1], 0).repeat_interleave(choice.pattern[2], 1)
            for name, kept in chosen.items()
        }
    else:
        keep = _lowest_go(ranked, choice)
    return {layer.name: layer.from_rows(keep[layer.name]) for layer in layers}


def _lowest_go(scores: Scores, choice: _Choice) -> dict[str, Tensor]:
    if choice.scope == "global":
        flat = torch.cat([rows.flatten() for rows in scores.values()])
        kept = _without_lowest(flat[None], next(iter(choice.fractions.values())))[0]
        parts = torch.split(kept, [rows.numel() for rows in scores.values()])
        return {name: part.reshape(rows.shape) for (name, rows), part in zip(scores.items(), parts, strict=True)}
    units = {name: rows.flatten(1) if choice.scope == "row" else rows.reshape(1, -1) for name, rows in scores.items()}
    return {
        name: _without_lowest(unit, choice.fractions[name]).reshape(scores[name].shape) for name, unit in units.items()
    }


def _without_lowest(units: Tensor, fraction: float) -> Tensor:
    """(units, n) of bool: per unit the floor(fraction * n) lowest are false; those that went before count.

    Of equal ones the first go: as in a stable sort, but found in a fraction of its time.
    """
    count = math.floor(fraction * units.shape[1] + 1e-9)
    if count == 0:
        return ~units.isneginf()
    highest = units.kthvalue(count, dim=1, keepdim=True).values  # of those that go
    below, ties = units < highest, units == highest
    room = count - below.sum(1, keepdim=True)
    return ~(below | (ties & (ties.cumsum(1) <= room)) | units.isneginf())


def _n_of_m(rows: Tensor, kept: int, size: int) -> Tensor:
    """True for the `kept` highest of each `size` consecutive inputs, at each tap."""
    units = rows.transpose(1, 2).reshape(-1, size)  # (out * taps * in / m, m)
    keep = _without_lowest(units, (size - kept) / size)
    return keep.reshape(rows.shape[0], rows.shape[2], rows.shape[1]).transpose(1, 2)


def _blocks(rows: Tensor, high: int, wide: int) -> Tensor:
    """(out / high, in / wide, taps): the sums over blocks."""
    outputs, inputs, taps = rows.shape
    return rows.reshape(outputs // high, high, inputs // wide, wide, taps).sum((1, 3))


# -- methods that go from layer to layer -----------------------------------------------------------------------------


def _order(model: nn.Module, layers: Sequence[WeightLayer], source: _Source) -> list[WeightLayer]:
    """The layers in order of execution, on the first batch. Raises InputError about one that is not called."""
    private = observable(private_copy(model)).eval()
    called: dict[str, None] = {}
    device = next(private.parameters()).device
    with torch.no_grad(), LayerCalls(private, lambda call: called.setdefault(call.name)):
        (source.forward or default_forward)(private, move(source.first(), device))
    unseen = [layer.name for layer in layers if layer.name not in called]
    if unseen:
        raise InputError(f"no call of {unseen[0]!r} was seen on the first batch: leave it out with ignore=.")
    places = {name: place for place, name in enumerate(called)}
    return sorted(layers, key=lambda layer: places[layer.name])


def _in_turn(
    model: nn.Module,
    layers: Sequence[WeightLayer],
    criterion: Any,
    choice: _Choice,
    source: _Source,
    before: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    sparse, keep = private_copy(model), {}
    for layer in _order(model, layers, source):
        facts = source.evidence(sparse, tuple(getattr(criterion, "needs", ())), [layer.name])
        kept = _kept(_scores(criterion, [layer], facts), [layer], choice, before)[layer.name]
        keep[layer.name] = kept
        _write_(sparse, layer.name, named_tensors(sparse)[layer.name] * kept.to(facts.tensors[layer.name].device))
    return keep


def _sparsegpt(
    model: nn.Module,
    layers: Sequence[WeightLayer],
    choice: _Choice,
    source: _Source,
    before: Mapping[str, Tensor],
    in_turn: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    sparse, keep, values = private_copy(model) if in_turn else model, {}, {}
    facts = None if in_turn else source.evidence(model, ("gram",), [layer.name for layer in layers])
    for layer in _order(model, layers, source):
        facts = source.evidence(sparse, ("gram",), [layer.name]) if in_turn or facts is None else facts
        gram = facts.sums["gram"][layer.name] / facts.sums["gram_rows"][layer.name]
        weight = layer.rows(_in_double(facts.tensors[layer.name]))
        gone = ~layer.rows(before[layer.name]) if layer.name in before else None
        pattern = choice.pattern[1:] if choice.pattern is not None else None
        new, kept = sparsegpt_rows(weight, gram, choice.fractions[layer.name], pattern, gone)
        keep[layer.name] = layer.from_rows(kept).cpu()
        new = layer.from_rows(new).to(facts.tensors[layer.name].dtype)
        values[layer.name] = new.cpu()
        if in_turn:
            _write_(sparse, layer.name, new.to(facts.tensors[layer.name].device))
    return keep, values


def _in_double(tensor: Tensor) -> Tensor:
    """On its device where that knows float64, else on the CPU."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def _synflow(
    model: nn.Module, layers: Sequence[WeightLayer], choice: _Choice, source: _Source, before: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Round by round: after round k of 100, (1 - sparsity)^(k / 100) of the weights are left."""
    linear, batch, forward = positive(model), source.first(), source.forward or default_forward
    keep = {layer.name: before.get(layer.name, torch.ones(layer.shape, dtype=torch.bool)) for layer in layers}
    fraction = next(iter(choice.fractions.values()))
    for number in range(1, ROUNDS + 1):
        scores = flow(linear, keep, batch, forward)
        rows = {layer.name: layer.rows(scores[layer.name]) for layer in layers}
        level = fraction if number == ROUNDS else 1 - (1 - fraction) ** (number / ROUNDS)
        keep = _kept(rows, layers, replace(choice, fractions=dict.fromkeys(choice.fractions, level)), keep)
    return keep


def _ln_structured(model: nn.Module, layers: Sequence[WeightLayer], choice: _Choice) -> dict[str, Tensor]:
    each = {fraction: ln_structured(model, fraction).keep for fraction in set(choice.fractions.values())}
    found = {layer.name: each[choice.fractions[layer.name]].get(layer.name) for layer in layers}
    return {name: keep for name, keep in found.items() if keep is not None}


def _write_(model: nn.Module, name: str, value: Tensor) -> None:
    with torch.no_grad():
        named_tensors(model)[name].copy_(value)


# -- while training --------------------------------------------------------------------------------------------------


class Gradual:
    """A hook that prunes while the model trains: sparsity rises along a schedule, and masks hold after every step.

    From step `begin` to step `end`, every `every` steps, masks are made anew at the sparsity that is due; what is gone
    stays gone. After `end` the masks are frozen: train on for at least as long. `masks` holds the current ones, None
    before the first. Criterion, scope, pattern, layers and data are those of `make_masks`, the sparsity that of the
    end. New weights of SparseGPT are written into the model as they come. Every other hook that changes weights stands
    before this one. Raises what `make_masks` raises, at the latest at the first step.
    Source: Zhu and Gupta 2017, arXiv 1710.01878, section 3.
    """

    def __init__(
        self,
        criterion: str | WeightCriterion = "magnitude",
        sparsity: float | Mapping[str, float] = 0.9,
        *,
        end: int,
        begin: int = 0,
        every: int = 100,
        schedule: str | Schedule = "cubic",
        scope: str | None = None,
        pattern: Pattern = None,
        within: Iterable[str] | None = None,
        ignore: Iterable[str] = (),
        data: Iterable[Any] | None = None,
        seed: int = 0,
        forward: Forward | None = None,
        loss: Loss | None = None,
    ) -> None:
        if not 0 <= begin < end or every < 1:
            raise InputError(f"steps go 0 <= begin < end, every >= 1; got begin={begin}, end={end}, every={every}.")
        if isinstance(pattern, str):
            raise InputError(
                f"pattern={pattern!r} fixes the sparsity, which cannot rise: use make_masks and its hook()."
            )
        if isinstance(data, Iterator):
            raise InputError("the data is an iterator, good for one pass, but masks are made many times: pass a list.")
        self._goal = Target(sparsity=sparsity)
        self._due = resolve_schedule(schedule, self._goal.final(1, 1))
        self._begin, self._end, self._every = begin, end, every
        within, ignore = _names(within), _names(ignore) or ()
        self._asked: dict[str, Any] = {"criterion": criterion, "scope": scope, "pattern": pattern, "data": data}
        self._asked |= {"within": within, "ignore": ignore}
        self._options: dict[str, Any] = {"seed": seed, "forward": forward, "loss": loss}
        told = (_word(criterion), sparsity, begin, end, every, _word(schedule), scope, pattern, within, ignore, seed)
        self._settings = repr(told)
        found = _resolve(criterion)
        where = _scope(criterion, found, scope, pattern, sparsity)
        _check_data(criterion, found, data, _Choice(where, None, {}), propagate=False)
        self._step = 0
        self.masks: Masks | None = None
        self._held: Held | None = None

    def __repr__(self) -> str:
        return f"Gradual({self._goal.sparsity} by step {self._end}, now step {self._step}: {self.masks!r})"

    def after_backward(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Gradients of what is gone are zero."""
        if self._step == 0:
            asked_of(model, sparsity=self._goal.sparsity, **self._asked)
        if self._held is not None:
            self._held.after_backward(model, optimizer)

    def after_step(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Count, prune where it is time, and write the zeros."""
        self._step += 1
        steps = self._step - self._begin
        if steps > 0 and self._step <= self._end and (steps % self._every == 0 or self._step == self._end):
            level = self._goal.part(self._due(steps / (self._end - self._begin)), 1, 1).sparsity
            found = make_masks(model, sparsity=level, masks=self.masks, **self._asked, **self._options)
            found.apply_(model)
            self._take(replace(found, values={}))  # the model has them now, and trains on
        if self._held is not None:
            self._held.after_step(model, optimizer)

    def state_dict(self) -> dict[str, Any]:
        """How far it is, and the masks."""
        state: dict[str, Any] = {"settings": self._settings, "step": self._step, "keep": None}
        if self.masks is not None:
            shapes = {name: list(shape) for name, shape in self.masks.shapes.items()}
            state |= {"keep": dict(self.masks.keep), "shapes": shapes, "parameters": self.masks.parameters}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint. Raises TrainingError for that of a hook with other settings."""
        if state["settings"] != self._settings:
            raise TrainingError(
                f"the checkpoint is of Gradual{state['settings']}, this run's hook is Gradual{self._settings}: "
                "give another checkpoint path."
            )
        self._step, self.masks, self._held = state["step"], None, None
        if state["keep"] is not None:
            shapes = {name: tuple(shape) for name, shape in state["shapes"].items()}
            self._take(Masks(state["keep"], shapes, parameters=state["parameters"]))

    def _take(self, masks: Masks) -> None:
        self.masks, self._held = masks, masks.hook()


def _names(entries: Iterable[str] | str | None) -> str | tuple[str, ...] | None:
    if entries is None or isinstance(entries, str):
        return entries
    names = tuple(entries)
    if not all(isinstance(name, str) for name in names):
        raise InputError("Gradual takes layers by name or pattern: training works on a copy, whose modules are others.")
    return names


def _word(choice: object) -> object:
    return choice if isinstance(choice, str) else getattr(choice, "__qualname__", type(choice).__qualname__)
