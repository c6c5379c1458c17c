"""Evidence: what criteria may know of a model, gathered in one streaming pass over the data."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from secateur.batches import Forward, Loss, default_forward, default_loss, first_tensor, logits_of, move
from secateur.collecting import COLLECTORS, Collector, Observation
from secateur.coupling.groups import Graph, Group, Slot
from secateur.errors import ArtifactError, DataError, InputError, UnknownNameError
from secateur.files import write_bytes
from secateur.inputs import check_model, check_weights, private_copy
from secateur.layercalls import LayerCall, LayerCalls, observable
from secateur.plans import check_shapes, named_tensors, tensor_shapes
from secateur.tensorfiles import read_header, read_tensors, with_metadata

NEEDS = tuple(sorted(COLLECTORS))
_SAMPLES, _BATCHES = "secateur.samples", "secateur.batches"


@dataclass(frozen=True, eq=False)
class Evidence:
    """Weights always; sums over the data where they were asked for. Sums over disjoint data can be merged."""

    tensors: Mapping[str, Tensor]  # every parameter and buffer, detached
    parameters: frozenset[str] = frozenset()  # the names of those that are parameters
    sums: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)  # statistic -> tensor or group -> float64
    samples: int = 0
    batches: int = 0
    seed: int = 0  # for criteria that draw

    @property
    def taylor(self) -> dict[str, Tensor]:
        """{group: (channels,)}: the mean over batches of what the need "gradient" gathers for `taylor_fo`."""
        return {name: total / self.batches for name, total in self.sums.get("taylor_fo", {}).items()}

    def merge(self, other: Evidence) -> Evidence:
        """The evidence of both passes together, as if one pass had seen all batches."""
        if any(self._names(kind) != other._names(kind) for kind in {*self.sums, *other.sums}):
            raise InputError("cannot merge evidence of different models, or gathered for different needs.")
        merged = {
            kind: {name: total + other.sums[kind][name] for name, total in totals.items()}
            for kind, totals in self.sums.items()
        }
        samples, batches = self.samples + other.samples, self.batches + other.batches
        return replace(self, sums=merged, samples=samples, batches=batches)

    def save(self, path: Path | str) -> None:
        """Write the sums to a safetensors file, so that another process can merge them. Raises OSError."""
        tensors = {f"{kind}|{name}": total for kind, totals in self.sums.items() for name, total in totals.items()}
        content = to_bytes(tensors)
        counts = {_SAMPLES: str(self.samples), _BATCHES: str(self.batches)}
        start, offset = with_metadata(content, counts)
        write_bytes(path, start + content[offset:])

    @classmethod
    def load(cls, path: Path | str, model: nn.Module) -> Evidence:
        """The sums that `save` wrote, with the weights of `model`, which they were gathered on.

        Raises ArtifactError for any other file.
        """
        metadata, entries = read_header(path)
        try:
            samples, batches = int(metadata[_SAMPLES]), int(metadata[_BATCHES])
        except (KeyError, ValueError) as error:
            raise ArtifactError(f"{path} holds no evidence.") from error
        if samples < 0 or batches < 0 or any("|" not in name for name in entries):
            raise ArtifactError(f"{path} holds no evidence.")
        sums: dict[str, dict[str, Tensor]] = {}
        for name, total in read_tensors(path).items():
            kind, _, target = name.partition("|")
            sums.setdefault(kind, {})[target] = total.double()
        return replace(_weights_of(model), sums=sums, samples=samples, batches=batches)

    def has(self, need: str) -> bool:
        """Whether what a need gathers is there."""
        return COLLECTORS[need][1] in self.sums

    def of(self, statistic: str, name: str) -> Tensor | None:
        """The sum of a statistic for a tensor or group; None where nothing was seen."""
        return self.sums.get(statistic, {}).get(name)

    def rows(self, slot: Slot) -> Tensor:
        """(channels, k): all entries of the slot's tensor that belong to each channel, in float32 at least."""
        return self.entries(slot, self.tensors[slot.tensor])

    def entries(self, slot: Slot, tensor: Tensor) -> Tensor:
        """(channels, k): the entries of `tensor`, shaped like the slot's, that belong to each channel."""
        rows = tensor.movedim(slot.dim, 0)[torch.as_tensor(slot.indices, device=tensor.device)]  # (channels, k, ...)
        rows = rows.flatten(1)  # the k positions fold in: a block of channels is judged as one
        return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows

    def norms(self, slot: Slot, order: int) -> Tensor:
        """(channels,): the norm of each row of `rows(slot)`, taken where the tensor lies."""
        tensor = self.tensors[slot.tensor]
        others = [dim for dim in range(tensor.dim()) if dim != slot.dim]
        dtype = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
        each: Tensor = torch.linalg.vector_norm(tensor, order, others, dtype=dtype) if others else tensor.to(dtype)
        rows: Tensor = each[torch.as_tensor(slot.indices, device=tensor.device)].norm(p=order, dim=1)
        return rows

    def activations(self, group: Group, statistic: str, per: str = "count", side: str = "input") -> Tensor:
        """(channels,): a mean of `statistic` over what was seen of a group's activations, averaged over its layers.

        `statistic`: one of those of the need "activation", or "variance". `per`: the statistic that it is divided by.
        `side`: "input", where the next layers read the channels (behind norms and nonlinearities); "output", as the
        producing layers make them. Where the group has no such layer, the other side. Raises InputError for a group
        that no layer call was seen to make or read.
        """
        other = "output" if side == "input" else "input"
        found = self._at(group, statistic, per, side) or self._at(group, statistic, per, other)
        if not found:
            raise InputError(
                f"no activation of group {group.name!r} was seen: its layers are no convolutions or linear maps with "
                "weights of their own. Choose a criterion on weights, or pass ignore= with its layers: "
                f"{', '.join(group.layers)}."
            )
        return torch.stack(found).mean(0)

    def _at(self, group: Group, statistic: str, per: str, side: str) -> list[Tensor]:
        found = []
        for slot in group.slots:
            mean = self._mean(f"{side}.", slot.tensor, statistic, per) if slot.role == side else None
            if mean is not None and len(mean) % slot.size == 0:
                # a grouped convolution's weight has one position for several channels: one in every group
                each = mean.reshape(-1, slot.size).mean(0)
                found.append(each[torch.as_tensor(slot.indices)].mean(1))
        return found

    def _mean(self, side: str, name: str, statistic: str, per: str) -> Tensor | None:
        if statistic == "variance":
            mean, square = (self._mean(side, name, part, per) for part in ("sum", "square"))
            return None if mean is None or square is None else (square - mean.square()).clamp_min(0)
        total, count = self.of(side + statistic, name), self.of(side + per, name)
        return None if total is None or count is None else total / count

    def _names(self, kind: str) -> frozenset[str]:
        return frozenset(self.sums.get(kind, {}))


@torch.inference_mode(False)
def observe(
    model: nn.Module,
    graph: Graph | None = None,
    data: Iterable[Any] | None = None,
    needs: Collection[str] = (),
    *,
    layers: Collection[str] | None = None,
    positions: int | None = 64,
    seed: int = 0,
    forward: Forward | None = None,
    loss: Loss | None = None,
) -> Evidence:
    """Gather what criteria need, all of it in one pass over `data`; the model is copied, run in eval mode, left as is.

    `needs`, and the sums they fill (see `secateur.collecting`):

    - "activation": moments of what every convolution and linear map reads and makes.
    - "activation_gradient": |mean over positions of gradient x activation| per sample (Molchanov 2017).
    - "gradient": gradients of parameters, and per group the mean over batches of (sum over a channel's output weights
      of gradient x weight) squared, averaged over the layers that make it (Molchanov 2019, equation 8).
    - "fisher": squared gradients of each sample. "hessian": the Hessian's diagonal, estimated (twice the cost of a
      gradient and more). "input_norm": squares of what each weight meets. "gram": second moments of layer inputs.

    `graph`: may be None where only weights are judged. `data`: batches, as `forward(model, batch)` and
    `loss(output, batch)` take them; the defaults serve (x, y) pairs and Mappings. The loss is a mean over the batch.
    `layers`: weights whose calls are looked at; None for all. `positions`: how many output positions of each sample
    "gram" looks at; None for all. `seed`: of what is drawn.

    Memory does not grow with the data. Raises InputError where a need has no data or the loss is no scalar, DataError
    for data without batches, or with NaN.
    """
    check_model(model)
    if graph is not None:
        check_shapes(tensor_shapes(model), graph.shapes, "the model", "the graph")
    for need in needs:
        if need not in NEEDS:
            raise UnknownNameError("need", need, NEEDS)
    check_weights(model)
    evidence = _weights_of(model)
    if not needs:
        return evidence
    if not isinstance(data, Iterable):
        raise InputError(f"evidence {', '.join(needs)} comes from data: pass data=, an iterable of batches.")
    private = observable(private_copy(model)).eval()
    wanted = None if layers is None else frozenset(layers)
    observation = Observation(private, graph, positions, torch.Generator().manual_seed(seed), layers=wanted)
    collectors = [COLLECTORS[need][0](observation) for need in dict.fromkeys(sorted(needs))]
    samples, batches = _pass(observation, collectors, data, forward or default_forward, loss or default_loss)
    return replace(evidence, sums=observation.sums, samples=samples, batches=batches)


def _weights_of(model: nn.Module) -> Evidence:
    tensors = {name: tensor.detach() for name, tensor in named_tensors(model).items()}
    return Evidence(tensors, frozenset(name for name, _ in model.named_parameters()))


def _pass(
    observation: Observation, collectors: list[Collector], data: Iterable[Any], forward: Forward, loss: Loss
) -> tuple[int, int]:
    """Run every batch through the model; returns how many samples and batches there were."""
    model = observation.model
    backward, second = (any(getattr(c, kind) for c in collectors) for kind in ("backward", "second"))
    collectors = sorted(collectors, key=lambda collector: collector.second)
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(backward and parameter.is_floating_point())
    device = next(iter(parameters.values())).device

    def seen(call: LayerCall) -> None:
        if observation.layers is None or call.name in observation.layers:
            for collector in collectors:
                collector.call(call)

    watch = LayerCalls(model, seen)
    samples = batches = 0
    for raw in data:
        batch = tree_map_only(Tensor, _usable, move(raw, device))
        observation.batch_samples = _size(batch)
        with torch.set_grad_enabled(backward):
            with watch, sdpa_kernel(SDPBackend.MATH) if second else nullcontext():  # fused attention: once only
                output = forward(model, batch)
            value = loss(output, batch) if backward else None
        if value is None:
            _check_output(output, batches)
        else:
            _check_loss(value, batches)
            model.zero_grad(set_to_none=True)
            _differentiate_(value, parameters, with_graph=second)
        with torch.set_grad_enabled(second):
            for collector in collectors:
                collector.batch(parameters)
        model.zero_grad(set_to_none=True)
        samples += observation.batch_samples
        batches += 1
    if batches == 0:
        raise DataError("the data holds no batch; an exhausted generator? Pass something that can be iterated.")
    return samples, batches


def _differentiate_(loss: Tensor, parameters: Mapping[str, nn.Parameter], *, with_graph: bool) -> None:
    """Give every parameter its gradient; with its graph, where second derivatives are asked for."""
    if not with_graph:
        torch.autograd.backward(loss)
        return
    wanted = [parameter for parameter in parameters.values() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)
    for parameter, gradient in zip(wanted, gradients, strict=True):
        parameter.grad = gradient


def _check_loss(value: Any, batches: int) -> None:
    if not isinstance(value, Tensor) or value.dim() != 0:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"loss(output, batch) must return a scalar tensor; got {got}.")
    if not torch.isfinite(value):
        raise DataError(f"the loss is {value.item()} on batch {batches}: check the data for NaN or infinity.")
    if not value.requires_grad:
        raise InputError("the loss does not depend on the model's parameters: it has no gradient.")


def _check_output(output: Any, batches: int) -> None:
    found = logits_of(output)
    if found is not None and not torch.isfinite(found).all():
        raise DataError(f"the output is not finite on batch {batches}: check the data for NaN or infinity.")


def _size(batch: Any) -> int:
    tensor = first_tensor(batch)
    return tensor.shape[0] if tensor is not None and tensor.dim() else 1


def _usable(tensor: Tensor) -> Tensor:
    """Autograd does not take part in what was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor
