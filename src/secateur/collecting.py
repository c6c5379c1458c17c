"""What each need of `observe` collects: one class each, all fed by the same pass over the data.

A collector is given every layer call of the forward pass, then every batch after its backward pass, and adds to named
sums. Sums over disjoint data add up, which is what makes evidence mergeable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from secateur.coupling.groups import Graph, Group
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
    positions, `norm` (the L2 norm of a sample's map, over samples); and `count`, samples times positions.
    """

    def call(self, call: LayerCall) -> None:
        """Add the moments of both sides."""
        for side, values in (("input", call.inputs()), ("output", call.outputs())):
            values = values.detach()  # noqa: PLW2901
            norms = [torch.linalg.vector_norm(values, order, dim=2) for order in (0, 1, 2)]  # reads, makes no copies
            entries = values.shape[0] * values.shape[2]
            self._add(side, "sum", call, values.sum((0, 2)))
            self._add(side, "square", call, norms[2].square().sum(0))
            self._add(side, "absolute", call, norms[1].sum(0))
            self._add(side, "zeros", call, entries - norms[0].sum(0))
            self._add(side, "norm", call, norms[2].sum(0))
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
        for side, tensor, shaped in (("input", call.input, call.inputs), ("output", call.output, call.outputs)):
            if tensor.requires_grad:
                self._listen(
                    side, replace(call, input=tensor.detach(), output=tensor.detach()), tensor, shaped().detach()
                )

    def _listen(self, side: str, call: LayerCall, tensor: Tensor, values: Tensor) -> None:
        def hook(gradient: Tensor) -> None:  # holds nothing that leads back to `tensor`: such a cycle lives on
            if not self.observation.listening:
                return
            effect = (replace(call, input=gradient).inputs() * values).mean(2).abs().sum(0)
            self.observation.add(f"{side}.taylor", call.name, effect * self.observation.batch_samples)
            self.observation.add(f"{side}.taylor_samples", call.name, torch.tensor(values.shape[0]))

        tensor.register_hook(hook)  # type: ignore[no-untyped-call]


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
    through them in order (windows of one image stand next to each other).
    """

    backward = True

    def call(self, call: LayerCall) -> None:
        """Listen for the gradient of the output."""
        if not call.output.requires_grad:
            return
        seen = replace(call, input=call.input.detach(), output=call.output.detach())  # no cycle through the hook

        def hook(gradient: Tensor) -> None:
            if self.observation.listening:
                self.observation.add("fisher", seen.name, self._squares(_differentiated(seen, gradient)))

        call.output.register_hook(hook)  # type: ignore[no-untyped-call]

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

    def call(self, call: LayerCall) -> None:
        """Add the second moments."""
        if not call.has_patches:
            return
        positions = call.positions(self.observation.positions, self.observation.generator)
        patches = call.patches(positions).detach()
        self.observation.add("gram", call.name, patches.transpose(1, 2) @ patches)
        self.observation.add("gram_rows", call.name, torch.tensor(patches.shape[1]))


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
        products = torch.autograd.grad(gradients, list(named.values()), signs, allow_unused=True)
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
