"""What each need of `observe` collects: one class each, all fed by the same pass over the data.

A collector is given every layer call of the forward pass, then every batch after its backward pass, and adds to named
sums. Sums over disjoint data add up, which is what makes evidence mergeable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from secateur.coupling.groups import Graph, Group
from secateur.errors import InputError
from secateur.layercalls import LayerCall

CHUNK_BYTES = 1 << 26  # of the largest intermediate of per-sample gradients


@dataclass(eq=False)
class Observation:
    """What the collectors of one pass share."""

    model: nn.Module  # a private copy, in eval mode
    graph: Graph | None
    positions: int | None  # output positions per sample for "gram"; None: all
    generator: torch.Generator
    sums: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # statistic -> name -> sum
    layers: frozenset[str] | None = None  # the weights whose calls are of interest; None: all
    batch_samples: int = 0  # of the batch under way
    listening: bool = True  # off while second derivatives are taken: that, too, would call the hooks

    def add(self, statistic: str, name: str, value: Tensor) -> None:
        """Add to a sum; sums are float64 on the CPU."""
        value = value.detach().to(device="cpu", dtype=torch.float64)
        known = self.sums.setdefault(statistic, {})
        if name in known:
            known[name] += value
        else:
            known[name] = value.clone()

    def joined(self, side: str, name: str, values: Tensor, each: Tensor, over: Callable[[Tensor], Tensor]) -> Tensor:
        """(samples, channels): `each`, which is `over` the last dimension of `values` (samples, channels, positions).

        Where several entries along the weight's dimension are one channel of the graph (a flattened map, the width of
        an attention head), `over` is taken over all of them together, and each of them holds that.
        """
        blocks = [(size, at) for size, at in self._blocks.get((side, name), ()) if values.shape[1] % size == 0]
        found = each.clone() if blocks else each
        for size, indices in blocks:
            maps = values.reshape(len(values), -1, size, values.shape[2])[
                :, :, indices
            ]  # (samples, groups, channels, k, p)
            found.view(len(values), -1, size)[:, :, indices] = over(maps.flatten(3))[..., None]
        return found

    @cached_property
    def _blocks(self) -> dict[tuple[str, str], list[tuple[int, Tensor]]]:
        """(side, weight) -> the length of its dimension, and (channels, k): its entries that are one channel each."""
        found: dict[tuple[str, str], list[tuple[int, Tensor]]] = {}
        for slot in (slot for group in (self.graph.groups if self.graph else ()) for slot in group.slots):
            if slot.indices.shape[1] > 1:
                found.setdefault((slot.role, slot.tensor), []).append((slot.size, torch.as_tensor(slot.indices)))
        return found


class Collector:
    """Base of the collectors. `backward`: whether it needs the loss's gradient, `second`: its second derivative."""

    backward = False
    second = False

    def __init__(self, observation: Observation) -> None:
        self.observation = observation

    def call(self, call: LayerCall) -> None:
        """A layer was called in the forward pass."""

    def batch(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """The batch is through; parameters have their gradients where the collector asked for them."""


class Activations(Collector):
    """Moments of what layers read and make.

    Per side ("input", "output") and weight, (channels,) each: `sum`, `square`, `absolute`, `zeros` over samples and
    positions, `norm` (the L2 norm of a sample's map, over samples); and `count`, samples times positions. A map that is
    read flattened is one map still (`Observation.joined`).
    """

    def call(self, call: LayerCall) -> None:
        """Add the moments of both sides."""
        for side, values in (("input", call.inputs()), ("output", call.outputs())):
            values = values.detach()  # noqa: PLW2901
            each = torch.linalg.vector_norm(values, dim=2)
            lengths = self.observation.joined(side, call.name, values, each, _length)
            nonzero = values.sign().abs_().sum(2)  # a sixth of the time that counting takes
            entries = values.shape[0] * values.shape[2]
            self._add(side, "sum", call, values.sum((0, 2)))
            self._add(side, "square", call, each.square().sum(0))
            self._add(side, "absolute", call, values.abs().sum((0, 2)))
            self._add(side, "zeros", call, entries - nonzero.sum(0))
            self._add(side, "norm", call, lengths.sum(0))
            self._add(side, "samples", call, torch.tensor(values.shape[0]))
            self._add(side, "count", call, torch.tensor(entries))

    def _add(self, side: str, statistic: str, call: LayerCall, value: Tensor) -> None:
        self.observation.add(f"{side}.{statistic}", call.name, value)


class ActivationGradients(Collector):
    """`input.taylor` and `output.taylor`, (channels,): over samples, |mean over positions of gradient x activation|.

    The gradient is that of the sample's own loss: of the mean over the batch, times the samples in it.
    """

    backward = True

    def call(self, call: LayerCall) -> None:
        """Listen for the gradients of both sides."""
        if call.input.requires_grad:
            call.input.register_hook(self._listener("input", call, call.input.detach()))  # type: ignore[no-untyped-call]
        if call.output.requires_grad:  # a copy: nonlinearities may write over what a layer has made
            _on_gradient(call.output, self._listener("output", call, call.output.detach().clone()))

    def _listener(self, side: str, call: LayerCall, values: Tensor) -> Callable[[Tensor], None]:
        seen = replace(call, input=values, output=values)  # nothing that leads back to the hooked tensor: a cycle

        def hook(gradient: Tensor) -> None:
            if not self.observation.listening:
                return
            effects = replace(seen, input=gradient.detach()).inputs() * seen.inputs()
            joined = self.observation.joined(side, seen.name, effects, effects.mean(2), _mean)
            self.observation.add(f"{side}.taylor", seen.name, joined.abs().sum(0) * self.observation.batch_samples)
            self.observation.add(f"{side}.taylor_samples", seen.name, torch.tensor(len(effects)))

        return hook


def _on_gradient(output: Tensor, hook: Callable[[Tensor], None]) -> None:
    """Give `hook` the gradient of what a layer has just made, also where that is written over later.

    A view that is written over leaves the autograd graph, and its hooks with it; the tensor that it views stays.
    """
    made, shape = output if output._base is None else output._base, output.shape
    made.register_hook(lambda gradient: hook(gradient.reshape(shape)))  # type: ignore[no-untyped-call]


def _mean(values: Tensor) -> Tensor:
    return values.mean(-1)


def _length(values: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(values, dim=-1)
    return length


class Gradients(Collector):
    """`gradient` per parameter, the sum over batches; `taylor_fo` per group, see `evidence.observe`."""

    backward = True

    def batch(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Add gradients, and their effects per group."""
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                self.observation.add("gradient", name, parameter.grad)
        for group in self.observation.graph.prunable if self.observation.graph else ():
            self.observation.add("taylor_fo", group.name, _squared_effect(group, parameters))


def _squared_effect(group: Group, parameters: Mapping[str, nn.Parameter]) -> Tensor:
    """(channels,): the squared first-order effect of removing each channel, on this batch."""
    effects = []
    for slot in group.outputs:
        weight = parameters.get(slot.tensor)
        if weight is not None and weight.grad is not None:
            products = (weight.grad * weight.detach()).movedim(slot.dim, 0)[torch.as_tensor(slot.indices)]
            effects.append(products.flatten(1).double().sum(1).square())
    return torch.stack(effects).mean(0) if effects else torch.zeros(group.channels)


class Fisher(Collector):
    """`fisher` per weight: the sum over samples of the squared gradient of the sample's own loss.

    The loss is taken to be a mean over the samples of the batch, and the first dimension of a layer's input to go
    through them in order (windows of one image stand next to each other). Of a weight that is used more than once, the
    squares of each use add up: products of gradients from different uses are left out.
    """

    backward = True

    def call(self, call: LayerCall) -> None:
        """Listen for the gradient of the output."""
        if not call.output.requires_grad:
            return
        seen = replace(call, input=call.input.detach(), output=call.output.detach())  # no cycle through the hook

        def hook(gradient: Tensor) -> None:
            if self.observation.listening:
                self.observation.add("fisher", seen.name, self._squares(_differentiated(seen, gradient.detach())))

        _on_gradient(call.output, hook)

    def _squares(self, call: LayerCall) -> Tensor:
        """In the shape of the weight; the output of `call` is the gradient."""
        samples = self.observation.batch_samples
        gradients = call.outputs()
        rows = gradients.shape[0]
        places = gradients.shape[2]
        entries = call.weight[0].numel() * places + call.weight.numel()
        chunk = max(1, CHUNK_BYTES // (4 * entries))
        together = rows // samples if rows % samples == 0 else 1  # rows per sample, such as windows of an image
        chunk = max(together, chunk // together * together)
        total = torch.zeros_like(call.weight, dtype=torch.float64, device="cpu").flatten(1)
        if call.transposed:
            total = total.T
        for start in range(0, rows, chunk):
            part = LayerCall(call.name, call.weight, _rows(call.input, call, start, chunk), call.output, call.window)
            patches = part.patches()  # (groups, rows * P, K)
            groups, _, inputs = patches.shape
            patches = patches.reshape(groups, -1, together * places, inputs)
            part_gradients = gradients[start : start + chunk].transpose(1, 2)  # (rows, P, out)
            outputs = part_gradients.reshape(patches.shape[1], -1, groups, part_gradients.shape[2] // groups)
            each = torch.einsum("gnpk,npgo->ngok", patches, outputs * samples)
            total += each.square().sum(0).flatten(0, 1).double().cpu()
        return (total.T if call.transposed else total).reshape(call.weight.shape)


def _as_weight(call: LayerCall, taps: Tensor) -> Tensor:
    """(in channels, taps) in a shape that broadcasts to the weight's."""
    kernel = call.weight.shape[2:]
    if call.transposed or not call.has_patches:
        return taps.reshape(-1, 1, *kernel)
    if call.groups == 1:
        return taps.reshape(1, -1, *kernel)
    inputs = taps.reshape(call.groups, 1, -1, *kernel)  # of each group; its filters share them
    return inputs.expand(-1, call.weight.shape[0] // call.groups, -1, *kernel).flatten(0, 1)


def _differentiated(call: LayerCall, gradient: Tensor) -> LayerCall:
    """The call whose patches, times its outputs, give the weight's gradient.

    A transposed convolution's is that of the convolution the other way, from the gradient to the input.
    """
    if call.window is None or not call.window.transposed:
        return replace(call, output=gradient)
    return replace(call, input=gradient, output=call.input, window=replace(call.window, transposed=False))


def _rows(tensor: Tensor, call: LayerCall, start: int, count: int) -> Tensor:
    unbatched = tensor.dim() < call.weight.dim() if call.window else tensor.dim() == 1
    return (tensor[None] if unbatched else tensor)[start : start + count]


class InputNorms(Collector):
    """`taps` per weight, in a shape that broadcasts to it: the sum of the squared input that meets each entry."""

    def call(self, call: LayerCall) -> None:
        """Add the squares."""
        self.observation.add("taps", call.name, _as_weight(call, call.tap_squares().detach()))
        self.observation.add("taps_samples", call.name, torch.tensor(call.inputs().shape[0]))


class Grams(Collector):
    """`gram` per weight, (groups, k, k): the sum of patch x patch^T; `gram_rows`, over how many patches.

    k is in / groups * taps, in the order of the weight. At most `positions` patches per sample, drawn at random.
    """

    def __init__(self, observation: Observation) -> None:
        super().__init__(observation)
        self._last: tuple[Tensor, Tensor, int] | None = None  # an input, its second moments, its rows

    def call(self, call: LayerCall) -> None:
        """Add the second moments."""
        if call.has_patches:
            gram, rows = self._moments(call)
            self.observation.add("gram", call.name, gram)
            self.observation.add("gram_rows", call.name, torch.tensor(rows))

    def batch(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Let go of the last input."""
        self._last = None

    def _moments(self, call: LayerCall) -> tuple[Tensor, int]:
        again = call.window is None and self.observation.positions is None  # queries, keys and values read the same
        if again and self._last is not None and self._last[0] is call.input:
            return self._last[1:]
        positions = call.positions(self.observation.positions, self.observation.generator)
        patches = call.patches(positions).detach()
        gram, rows = patches.transpose(1, 2) @ patches, patches.shape[1]
        if again:
            self._last = (call.input, gram, rows)
        return gram, rows


class Curvatures(Collector):
    """`hessian` per weight: over batches, v * (H v) with random signs v, whose mean is the diagonal of the Hessian.

    Source: Hutchinson's estimator, as in Yao 2021, arXiv 2006.00719, section 3.1.
    """

    backward = True
    second = True

    def batch(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Gradients are there with their graph."""
        named = {name: p for name, p in parameters.items() if p.grad is not None and p.grad.requires_grad}
        signs = [
            torch.randint(0, 2, p.shape, generator=self.observation.generator).to(p.device, p.dtype) * 2 - 1
            for p in named.values()
        ]
        gradients = [p.grad for p in named.values() if p.grad is not None]
        self.observation.listening = False
        try:
            products = torch.autograd.grad(gradients, list(named.values()), signs, allow_unused=True)
        except RuntimeError as error:
            raise InputError(
                f"the model has no second derivative that torch can take ({error}): 'obd' gets along without."
            ) from error
        self.observation.listening = True
        for name, sign, product in zip(named, signs, products, strict=True):
            if product is not None:
                self.observation.add("hessian", name, sign * product)


# The one table: need -> what collects it, and a statistic by which evidence is known to hold it.
COLLECTORS: dict[str, tuple[type[Collector], str]] = {
    "activation": (Activations, "input.count"),
    "activation_gradient": (ActivationGradients, "input.taylor"),
    "fisher": (Fisher, "fisher"),
    "gradient": (Gradients, "gradient"),
    "gram": (Grams, "gram_rows"),
    "hessian": (Curvatures, "hessian"),
    "input_norm": (InputNorms, "taps"),
}
