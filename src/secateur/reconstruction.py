"""Least squares: layers that lost inputs learn to make the dense model's outputs from what is left.

Layer by layer in order of execution: each is fitted on the inputs it really gets from the already repaired layers below
it, towards what the dense model's layer made of the same samples. Only second moments are kept (X^T X, X^T Y), so that
memory does not grow with the data.

A position whose outputs are far larger than the usual is weighted down. Transformers have a few, with activations
hundreds of times the others' (Sun 2024, arXiv 2402.17762): the norm behind takes the size away again, but in a plain
sum of squares they outweigh all the rest, and their mean, folded into a bias, spoils it.

Sources: He 2017, arXiv 1707.06168, section 3.1 (least squares on what remains); Luo 2017, arXiv 1707.06342.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateur.batches import Forward, move, size_of
from secateur.errors import CalibrationError
from secateur.layercalls import LayerCall, LayerCalls
from secateur.plans import Plan, named_tensors

OUTLIERS = 4.0  # times the median energy of a layer's outputs, above which a position counts for less
TARGET_BYTES = 1 << 29  # of the dense model's outputs that are kept between its passes

Way = Literal["least_squares", "scale", "fold"]  # what is fitted: whole weights; one number per output; only means


@dataclass(frozen=True)
class Fitting:
    """How to fit. Checked where it is made, in `repair`."""

    way: Way = "least_squares"
    damping: float = 0.01  # times the mean of the diagonal of X^T X; pulls towards the weights as they are
    positions: int = 64  # output positions per sample, drawn at random
    seed: int = 0


@dataclass(frozen=True)
class Layer:
    """What a first pass finds out about a layer of the small model."""

    name: str  # of its weight
    out_dim: int  # of the weight
    calls: int  # per forward pass
    rows: int  # equations that one pass over the data gives
    unknowns: int  # per output
    bias: str | None
    mean: str | None  # the running mean of the BatchNorm that reads its output, if one does

    @property
    def centred(self) -> bool:
        """Whether something behind the layer can take up a constant."""
        return self.bias is not None or self.mean is not None


@dataclass(eq=False)
class Moments:
    """Sums over weighted equations, per group of channels: inputs X (rows, k), outputs Y (rows, out)."""

    count: float = 0.0  # of equations: the sum of their weights
    sums: list[Tensor] = field(default_factory=list)  # X, Y, X^T X, X^T Y, each (groups, ...), float64

    def add(self, patches: Tensor, targets: Tensor, weights: Tensor) -> None:
        """`patches` (groups, rows, k), `targets` (groups, rows, out), `weights` (rows,)."""
        across = patches.transpose(1, 2) * weights
        values = [across.sum(2), (targets * weights[:, None]).sum(1), across @ patches, across @ targets]
        wide = [value.to(device="cpu", dtype=torch.float64) for value in values]
        self.sums = [total + value for total, value in zip(self.sums, wide, strict=True)] if self.sums else wide
        self.count += float(weights.sum())


def reconstruct_(
    small: nn.Module,
    dense: nn.Module,
    plan: Plan,
    batches: Sequence[Any],
    fitting: Fitting,
    forward: Forward,
) -> tuple[str, ...]:
    """Fit the layers of `small` that lost inputs, in place; returns their weights' names. Both are in eval mode.

    Raises CalibrationError where the data gives fewer equations than a layer has unknowns, before anything is changed.
    """
    kept = {(cut.tensor, cut.dim): torch.tensor(cut.kept) for cut in plan.cuts}
    layers = [layer for layer in _layers(small, batches, fitting, forward) if (layer.name, 1 - layer.out_dim) in kept]
    for layer in layers if fitting.way == "least_squares" else ():
        if layer.rows < layer.unknowns:
            raise CalibrationError(
                f"the calibration data is too small: it gives {layer.rows:,} equations for the {layer.unknowns:,} "
                f"weights of each output of {layer.name!r}. Pass more samples, or leave out the least squares."
            )
    tensors = named_tensors(small)
    before = {name: tensor.detach().clone() for name, tensor in named_tensors(dense).items()}
    targets = _Targets(dense, batches, fitting, forward, kept)
    for number, layer in enumerate(layers):
        moments, equations = Moments(), targets.of(layers, number)
        for batch, calls, weights in zip(batches, equations, _weights(equations), strict=True):
            seen: list[LayerCall] = []
            run_until(small, {layer.name: layer.calls}, batch, forward, seen.append)
            for call, (positions, target), weight in zip(seen, calls, weights, strict=True):
                groups, device = call.groups, call.input.device
                wanted = target.reshape(len(target), groups, -1).transpose(0, 1).to(device)
                moments.add(call.patches(positions), wanted, weight.to(device))
        _fit_(tensors, layer, moments, fitting, before, kept)
    return tuple(layer.name for layer in layers)


def run_until(
    model: nn.Module, wanted: dict[str, int], batch: Any, forward: Forward, seen: Callable[[LayerCall], None]
) -> None:
    """Run a batch, report the calls of the wanted weights, and stop when all of them (weight -> calls) have come."""
    left = dict(wanted)

    def note(call: LayerCall) -> None:
        if left.get(call.name):
            left[call.name] -= 1
            seen(call)
            if not any(left.values()):
                raise _Reached

    device = next(model.parameters()).device
    try:
        with torch.no_grad(), LayerCalls(model, note):
            forward(model, move(batch, device))
    except _Reached:
        pass


class _Reached(BaseException):
    """Everything that was wanted has been seen. (No code under way may take it for an error.)"""


def _layers(model: nn.Module, batches: Sequence[Any], fitting: Fitting, forward: Forward) -> Iterator[Layer]:
    """The layers with patches, in order of execution, as the first batch shows them."""
    calls: dict[str, list[LayerCall]] = {}
    watch = LayerCalls(model, lambda call: calls.setdefault(call.name, []).append(call))
    with torch.no_grad(), watch:
        forward(model, move(batches[0], next(model.parameters()).device))
    names = {id(tensor): name for name, tensor in named_tensors(model).items()}
    readers = list(watch.norms.values())
    samples, first = sum(map(size_of, batches)), size_of(batches[0])
    for name, its_calls in calls.items():
        call = its_calls[0]
        if not call.has_patches:
            continue
        out_dim = 1 if call.transposed else 0
        places = sum(
            shape[0] * min(shape[2], fitting.positions) for shape in (one.outputs().shape for one in its_calls)
        )
        mean = watch.norms.get(name)
        yield Layer(
            name,
            out_dim,
            len(its_calls),
            rows=places * samples // first,
            unknowns=call.weight.numel() // call.weight.shape[out_dim],
            bias=None if call.bias is None else names.get(id(call.bias)),
            mean=mean if mean is not None and readers.count(mean) == 1 and len(its_calls) == 1 else None,
        )


Equations = list[tuple[Tensor, Tensor]]  # per call: positions, the outputs there


def _weights(equations: Sequence[Equations]) -> list[list[Tensor]]:
    """Per batch and call (rows,): 1, or less where the outputs have more than OUTLIERS times the median energy."""
    energies = [[target.square().mean(1) for _, target in calls] for calls in equations]
    limit = OUTLIERS * float(torch.cat([energy.double().cpu() for calls in energies for energy in calls]).median())
    if not limit:  # most outputs are zero, and nothing is usual
        return [[torch.ones_like(energy) for energy in calls] for calls in energies]
    return [[(limit / energy).clamp_max(1.0) for energy in calls] for calls in energies]


@dataclass(eq=False)
class _Targets:
    """What the dense model makes, fetched for as many layers at once as memory allows."""

    dense: nn.Module
    batches: Sequence[Any]
    fitting: Fitting
    forward: Forward
    kept: dict[tuple[str, int], Tensor]
    fetched: dict[str, list[Equations]] = field(default_factory=dict)

    def of(self, layers: Sequence[Layer], number: int) -> list[Equations]:
        """Per batch and call of that layer."""
        if layers[number].name not in self.fetched:
            shapes = named_tensors(self.dense)
            ahead: dict[str, Layer] = {}
            used = 0
            for layer in layers[number:]:
                used += 4 * layer.rows * shapes[layer.name].shape[layer.out_dim]
                if ahead and used > TARGET_BYTES:
                    break
                ahead[layer.name] = layer
            self.fetched = self._fetch(ahead)
        return self.fetched.pop(layers[number].name)

    def _fetch(self, layers: dict[str, Layer]) -> dict[str, list[Equations]]:
        found: dict[str, list[Equations]] = {name: [] for name in layers}
        generator = torch.Generator().manual_seed(self.fitting.seed)
        for batch in self.batches:
            for equations in found.values():
                equations.append([])

            def note(call: LayerCall) -> None:
                positions = call.positions(self.fitting.positions, generator)
                target = call.targets(positions)
                stay = self.kept.get((call.name, layers[call.name].out_dim))
                target = target if stay is None else target[:, stay.to(target.device)]
                found[call.name][-1].append((positions, target))

            run_until(self.dense, {name: layer.calls for name, layer in layers.items()}, batch, self.forward, note)
        return found


def _fit_(
    tensors: dict[str, Tensor],
    layer: Layer,
    moments: Moments,
    fitting: Fitting,
    dense: dict[str, Tensor],
    kept: dict[tuple[str, int], Tensor],
) -> None:
    weight = tensors[layer.name].detach()
    matrix = (weight.T if layer.out_dim else weight).flatten(1).to(device="cpu", dtype=torch.float64)  # (out, k)
    groups = moments.sums[0].shape[0]
    matrix = matrix.reshape(groups, -1, matrix.shape[1])
    if fitting.way != "fold":
        fitted = solved if fitting.way == "least_squares" else scaled
        matrix = fitted(moments, matrix, fitting.damping, centred=layer.centred)
        new = matrix.flatten(0, 1)
        new = (new.T if layer.out_dim else new).reshape(weight.shape)
        weight.copy_(new)
    mean_x, mean_y = (total / moments.count for total in moments.sums[:2])
    excess = ((matrix @ mean_x[..., None])[..., 0] - mean_y).flatten()  # W x - y: what is too much, bias aside
    if layer.bias is not None:
        tensors[layer.bias].detach().copy_(-excess)
    elif layer.mean is not None:
        stay = kept.get((layer.mean, 0))
        old = dense[layer.mean] if stay is None else dense[layer.mean][stay.to(dense[layer.mean].device)]
        tensors[layer.mean].detach().copy_(old + excess.to(old.device, old.dtype))


def solved(moments: Moments, weight: Tensor, damping: float, *, centred: bool) -> Tensor:
    """(groups, out, k): argmin over W of |X W^T - Y|^2 / rows + damping * mean(diag(X^T X / rows)) * |W - weight|^2.

    Rows count by their weights. `centred`: X and Y less their means, as a constant is taken up elsewhere.
    """
    across, mixed = _products(moments, centred)
    ridge = damping * across.diagonal(dim1=1, dim2=2).mean(1)
    ridge = ridge.clamp_min(torch.finfo(torch.float64).tiny)[:, None, None] * torch.eye(across.shape[1])
    residual = mixed - across @ weight.transpose(1, 2)
    factor, failed = torch.linalg.cholesky_ex(across + ridge)
    if bool(failed.any()):  # rounding made a matrix indefinite that has next to no variance
        return weight
    return weight + torch.cholesky_solve(residual, factor).transpose(1, 2)


def scaled(moments: Moments, weight: Tensor, damping: float, *, centred: bool) -> Tensor:
    """(groups, out, k): every row w of the weight times argmin over a of |a X w - y|^2 / rows + ridge * (a - 1)^2.

    The ridge is (damping + 1 / rows) * the mean over w of |X w|^2 / rows: one unknown per output needs few rows, and
    fewer move it less. Outputs that are constant keep their scale. Otherwise as `solved`.
    """
    across, mixed = _products(moments, centred)
    own = ((weight @ across) * weight).sum(2)  # |X w|^2 / rows
    gap = (weight * mixed.transpose(1, 2)).sum(2) - own
    rounding = 1e-9 * ((weight @ moments.sums[2]) * weight).sum(2).mean() / moments.count
    ridge = (damping + 1 / moments.count) * own.mean() + rounding
    return weight * (1 + gap / (own + ridge).clamp_min(torch.finfo(torch.float64).tiny))[..., None]


def _products(moments: Moments, centred: bool) -> tuple[Tensor, Tensor]:
    """(groups, k, k) and (groups, k, out): X^T X and X^T Y per row, X and Y less their means where `centred`."""
    mean_x, mean_y, across, mixed = (total / moments.count for total in moments.sums)
    if not centred:
        return across, mixed
    return across - mean_x[:, :, None] * mean_x[:, None, :], mixed - mean_x[:, :, None] * mean_y[:, None, :]
