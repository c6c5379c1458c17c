"""Tiny networks, one per pattern, with groups and widths worked out by hand; and an oracle of our own for them.

`free` is {group: channels}, `locked` {group: part of the reason}, `widths` the output width of every layer after
pruning with sparsity=0.5 and scope="layer": every group loses half of its channels, rounded down.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.inputs import as_inputs
from secateur.plans import Plan

OUTPUT = "part of the model's output"


class Net(nn.Module):
    """`forward` is a function (self, *inputs); the parts are modules, parameters or numbers."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.__dict__["function"] = function

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.function(self, *inputs, **named)


@dataclass(frozen=True)
class Case:
    """A network and what must be found out about it."""

    name: str
    build: Callable[[], nn.Module]
    free: Mapping[str, int]
    locked: Mapping[str, str]
    widths: Mapping[str, int]
    shape: tuple[int, ...] = (3, 6, 6)  # of one input, without the batch
    inputs: Callable[[int], Any] | None = None  # batch size -> example inputs, where one tensor will not do
    unknown: tuple[str, ...] = ()
    balances: tuple[tuple[str, ...], ...] = ()

    def batch(self, size: int) -> Any:
        if self.inputs is not None:
            return self.inputs(size)
        generator = torch.Generator().manual_seed(size)
        return torch.randn(size, *self.shape, generator=generator, dtype=torch.float64)

    def model(self, seed: int = 0) -> nn.Module:
        """The net in float64 and eval mode, with every parameter and statistic random: nothing is zero by birth."""
        return randomised(self.build().double(), seed).eval()

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Trap:
    """A network that invites a mistake: what is free in it must be right."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (3, 6, 6)
    tensors: tuple[str, ...] = ()  # tensors that no plan may cut
    hidden: bool = False  # Python tells nobody that the width was used: only the verification can notice

    def __str__(self) -> str:
        return self.name


# -- the oracle, without a line of the package's own -----------------------------------------------------------------


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` itself, with random parameters and statistics; variances between 0.5 and 1.5."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if name.endswith("running_var"):
                noise = noise.abs().clamp(max=1) + 0.5
            elif tensor.dim() > 1:
                noise = 1.5 * noise / max(1, tensor[0].numel()) ** 0.5
            tensor.copy_(noise)
    return model


# A weight-normed direction and its gain, by the ends of their names: parametrization and hook.
DIRECTIONS = {".original1": ".original0", "_v": "_g"}


def zeroed_by_hand(model: nn.Module, plan: Plan) -> nn.Module:
    """`model` with everything that the plan cuts set to zero, running variances to one.

    A direction of weight normalisation keeps its length, as 0 / 0 is no zero: its filter is zero by its gain.
    """
    copied = copy.deepcopy(model)
    tensors = {**dict(copied.named_parameters()), **dict(copied.named_buffers())}
    with torch.no_grad():
        for cut in plan.cuts:
            if _has_gain_along(tensors, cut.tensor, cut.dim):
                continue
            removed = [place for place in range(cut.size) if place not in set(cut.kept)]
            tensors[cut.tensor].index_fill_(
                cut.dim, torch.tensor(removed), 1.0 if cut.tensor.endswith("running_var") else 0.0
            )
    return copied


def _has_gain_along(tensors: Mapping[str, Tensor], name: str, dim: int) -> bool:
    gains = [tensors.get(name.removesuffix(v) + g) for v, g in DIRECTIONS.items() if name.endswith(v)]
    return any(gain is not None and gain.dim() > 0 and gain.shape[dim] > 1 for gain in gains)


def outputs_of(model: nn.Module, batch: Any) -> list[Tensor]:
    """The output tensors, as a list."""
    inputs = as_inputs(batch)
    with torch.no_grad():
        found = model(*[_clone(x) for x in inputs.args], **{name: _clone(x) for name, x in inputs.kwargs.items()})
    if isinstance(found, Mapping):
        return list(found.values())
    return list(found) if isinstance(found, tuple) else [found]


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def distance(left: nn.Module, right: nn.Module, batch: Any) -> float:
    """The largest difference between two models' outputs, relative to the largest output of the first."""
    worst = 0.0
    for a, b in zip(outputs_of(left, batch), outputs_of(right, batch), strict=True):
        assert a.shape == b.shape, f"{list(a.shape)} is not {list(b.shape)}"
        assert torch.isfinite(a).all() and torch.isfinite(b).all()
        worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp(min=1e-300)))
    return worst


def assert_shrunk_equals_zeroed(model: nn.Module, plan: Plan, small: nn.Module, batches: list[Any]) -> None:
    """The law; and that it says something: zeroing changes the output, and the output is not constant."""
    zeroed = zeroed_by_hand(model, plan)
    for batch in batches:
        difference = distance(zeroed, small, batch)
        assert difference < 1e-9, f"the shrunk model is off by {difference:.1e}"
        if plan.cuts:
            assert distance(model, zeroed, batch) > 1e-4, "vacuous: zeroing changes nothing"
        for output in outputs_of(zeroed, batch):
            assert output.std() > 1e-6, "vacuous: the output is constant"


# -- building blocks -------------------------------------------------------------------------------------------------


def conv(inputs: int, outputs: int, size: int = 3, **options: Any) -> nn.Conv2d:
    """A convolution that keeps the picture's size."""
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


def pooled(features: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C)."""
    return features.mean((2, 3))


def head(inputs: int) -> nn.Linear:
    """The classifier: three classes, so its width is the output's."""
    return nn.Linear(inputs, 3)


HEAD = {"head": OUTPUT}


# -- forward passes that need more than a line -----------------------------------------------------------------------


def _residual(s: Any, x: Tensor) -> Tensor:
    h = F.relu(s.stem(x))
    return s.head(pooled(F.relu(h + s.two(F.relu(s.one(h))))))


def _projection(s: Any, x: Tensor) -> Tensor:
    h = F.relu(s.stem(x))
    return s.head(pooled(F.relu(s.norm(s.body(h)) + s.skip_norm(s.skip(h)))))


def _two_blocks(s: Any, x: Tensor) -> Tensor:
    h = F.relu(s.stem(x))
    h = F.relu(h + s.b(F.relu(s.a(h))))
    return s.head(pooled(F.relu(h + s.d(F.relu(s.c(h))))))


def _concat(s: Any, x: Tensor) -> Tensor:
    return s.head(pooled(F.relu(s.c(torch.cat([s.a(x), s.b(x)], dim=1)))))


def _dense(s: Any, x: Tensor) -> Tensor:
    features = [s.stem(x)]
    for layer in (s.one, s.two):
        features.append(layer(F.relu(torch.cat(features, 1))))
    return s.head(pooled(torch.cat(features, 1)))


def _chain(s: Any, x: Tensor) -> Tensor:
    return s.head(pooled(F.relu(s.b(F.relu(s.a(x))))))


def _three(s: Any, x: Tensor) -> Tensor:
    return s.head(pooled(F.relu(s.c(F.relu(s.b(F.relu(s.a(x))))))))


def _grouped_concat(s: Any, x: Tensor) -> Tensor:
    return s.head(pooled(s.c(F.relu(s.g(torch.cat([s.a(x), s.b(x)], 1))))))


def _shuffle(s: Any, x: Tensor) -> Tensor:
    h = F.relu(s.a(x))
    n, c, height, width = h.shape
    h = h.view(n, s.ways, c // s.ways, height, width).transpose(1, 2).reshape(n, c, height, width)
    return s.head(pooled(F.relu(s.b(h))))


def _chunks(s: Any, x: Tensor) -> Tensor:
    first, second = F.relu(s.a(x)).chunk(2, dim=1)
    return s.head(pooled(F.relu(s.b(first) + s.c(second))))


def _split(s: Any, x: Tensor) -> Tensor:
    first, second = F.relu(s.a(x)).split(s.sizes, dim=1)
    return s.head(pooled(F.relu(s.b(first) + s.c(second))))


def _slices(s: Any, x: Tensor) -> Tensor:
    h = F.relu(s.a(x))
    c = h.shape[1]
    return s.head(pooled(F.relu(s.b(h[:, : c // 2]) + s.c(h[:, c // 2 :]))))


def _squeeze_excite(s: Any, x: Tensor) -> Tensor:
    h = F.relu(s.a(x))
    gate = torch.sigmoid(s.up(F.relu(s.down(h.mean((2, 3), keepdim=True)))))
    return s.head(pooled(F.relu(s.b(h * gate))))


def _in_place(s: Any, x: Tensor) -> Tensor:
    h = s.relu(s.stem(x))
    y = s.two(s.relu(s.one(h)))
    y += h
    return s.head(pooled(y.relu_()))


def _through_a_view(s: Any, x: Tensor) -> Tensor:
    h = s.a(x)
    h[:, :4].mul_(2.0)
    return s.head(pooled(F.relu(s.b(F.relu(h)))))


def _spectrum(s: Any, x: Tensor) -> Tensor:
    h = F.relu(s.b(F.relu(s.a(x))))
    return s.head(torch.fft.rfft(pooled(h), dim=1).abs())


def _two_inputs(s: Any, image: Tensor, extra: Tensor) -> dict[str, Tensor]:
    h = torch.cat([pooled(F.relu(s.a(image))), F.relu(s.e(extra))], 1)
    return {"logits": s.head(h), "aside": s.side(h)}


def _softmax_gate(s: Any, x: Tensor) -> Tensor:
    h = F.relu(s.a(x))
    gate = s.gate(pooled(h)).softmax(1)
    return s.head(pooled(F.relu(s.b(h * gate[:, :, None, None]))))


def _option_a(s: Any, x: Tensor) -> Tensor:
    h = F.relu(s.a(x))
    return s.head(pooled(F.relu(s.b(h) + F.pad(h, (0, 0, 0, 0, 2, 2)))))


def _pools(s: Any, x: Tensor) -> Tensor:
    h = s.average(F.relu(s.a(x)))
    h = s.most(F.relu(s.b(h)))
    return s.head(s.adaptive(F.relu(s.c(h))).flatten(1))


def _two_tensors(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    return (
        torch.randn(size, 3, 6, 6, generator=generator, dtype=torch.float64),
        torch.randn(size, 5, generator=generator, dtype=torch.float64),
    )


def _tied() -> nn.Module:
    model = Net(
        lambda s, x: s.head(pooled(F.relu(s.u(F.relu(s.t(F.relu(s.a(x)))))))),
        a=conv(3, 8),
        t=conv(8, 8, bias=False),
        u=conv(8, 8, bias=False),
        head=head(8),
    )
    model.u.weight = model.t.weight
    return model


# -- the table -------------------------------------------------------------------------------------------------------

CASES = (
    Case(
        "plain chain",
        lambda: Net(_chain, a=conv(3, 8), b=conv(8, 6), head=head(6)),
        {"a": 8, "b": 6},
        HEAD,
        {"a": 4, "b": 3, "head": 3},
    ),
    Case(
        "batch norm",
        lambda: Net(
            lambda s, x: s.head(pooled(F.relu(s.bn2(s.b(F.relu(s.bn1(s.a(x)))))))),
            a=conv(3, 8, bias=False),
            bn1=nn.BatchNorm2d(8),
            b=conv(8, 6, bias=False),
            bn2=nn.BatchNorm2d(6),
            head=head(6),
        ),
        {"a": 8, "b": 6},
        HEAD,
        {"a": 4, "b": 3, "head": 3},
    ),
    Case(
        "residual add",
        lambda: Net(_residual, stem=conv(3, 8), one=conv(8, 6), two=conv(6, 8), head=head(8)),
        {"stem": 8, "one": 6},
        HEAD,
        {"stem": 4, "one": 3, "two": 4, "head": 3},
    ),
    Case(
        "projection residual",
        lambda: Net(
            _projection,
            stem=conv(3, 6),
            body=conv(6, 8),
            norm=nn.BatchNorm2d(8),
            skip=conv(6, 8, 1),
            skip_norm=nn.BatchNorm2d(8),
            head=head(8),
        ),
        {"stem": 6, "body": 8},
        HEAD,
        {"stem": 3, "body": 4, "skip": 4, "head": 3},
    ),
    Case(
        "two blocks on one stream",
        lambda: Net(_two_blocks, stem=conv(3, 8), a=conv(8, 4), b=conv(4, 8), c=conv(8, 6), d=conv(6, 8), head=head(8)),
        {"stem": 8, "a": 4, "c": 6},
        HEAD,
        {"stem": 4, "a": 2, "b": 4, "c": 3, "d": 4, "head": 3},
    ),
    Case(
        "concatenation",
        lambda: Net(_concat, a=conv(3, 4), b=conv(3, 6), c=conv(10, 5), head=head(5)),
        {"a": 4, "b": 6, "c": 5},
        HEAD,
        {"a": 2, "b": 3, "c": 3, "head": 3},
    ),
    Case(
        "dense block",
        lambda: Net(_dense, stem=conv(3, 6), one=conv(6, 4), two=conv(10, 4), head=head(14)),
        {"stem": 6, "one": 4, "two": 4},
        HEAD,
        {"stem": 3, "one": 2, "two": 2, "head": 3},
    ),
    Case(
        "depthwise",
        lambda: Net(_three, a=conv(3, 8), b=conv(8, 8, groups=8), c=conv(8, 5), head=head(5)),
        {"a": 8, "c": 5},
        HEAD,
        {"a": 4, "b": 4, "c": 3, "head": 3},
    ),
    Case(
        "depthwise with multiplier 2",
        lambda: Net(_three, a=conv(3, 8), b=conv(8, 16, groups=8), c=conv(16, 5), head=head(5)),
        {"a": 8, "c": 5},
        HEAD,
        {"a": 4, "b": 8, "c": 3, "head": 3},
    ),
    Case(
        "two groups, tied by position",
        lambda: Net(_three, a=conv(3, 8), b=conv(8, 12, groups=2), c=conv(12, 5), head=head(5)),
        {"a": 4, "b": 6, "c": 5},
        HEAD,
        {"a": 4, "b": 6, "c": 3, "head": 3},
    ),
    Case(
        "many groups, which go whole",
        lambda: Net(_three, a=conv(3, 16), b=conv(16, 24, groups=8), c=conv(24, 5), head=head(5)),
        {"a": 8, "c": 5},
        HEAD,
        {"a": 8, "b": 12, "c": 3, "head": 3},
    ),
    Case(
        "groups after a concatenation",
        lambda: Net(_grouped_concat, a=conv(3, 4), b=conv(3, 4), g=conv(8, 12, groups=2), c=conv(12, 5), head=head(5)),
        {"a": 4, "g": 6, "c": 5},
        HEAD,
        {"a": 2, "b": 2, "g": 6, "c": 3, "head": 3},
    ),
    Case(
        "channel shuffle",
        lambda: Net(_shuffle, a=conv(3, 8), b=conv(8, 5), ways=2, head=head(5)),
        {"a": 4, "b": 5},
        HEAD,
        {"a": 4, "b": 3, "head": 3},
    ),
    Case(
        "chunk into halves",
        lambda: Net(_chunks, a=conv(3, 8), b=conv(4, 6), c=conv(4, 6), head=head(6)),
        {"a": 4, "a#2": 4, "b": 6},
        HEAD,
        {"a": 4, "b": 3, "c": 3, "head": 3},
        balances=(("a", "a#2"),),
    ),
    Case(
        "split by sizes in an attribute",
        lambda: Net(_split, a=conv(3, 8), b=conv(2, 6), c=conv(6, 6), sizes=(2, 6), head=head(6)),
        {"a": 2, "a#2": 6, "b": 6},
        HEAD,
        {"a": 4, "b": 3, "c": 3, "head": 3},
    ),
    Case(
        "slices at half the width",
        lambda: Net(_slices, a=conv(3, 8), b=conv(4, 6), c=conv(4, 6), head=head(6)),
        {"a": 4, "a#2": 4, "b": 6},
        HEAD,
        {"a": 4, "b": 3, "c": 3, "head": 3},
        balances=(("a", "a#2"),),
    ),
    Case(
        "squeeze and excite",
        lambda: Net(_squeeze_excite, a=conv(3, 8), down=conv(8, 4, 1), up=conv(4, 8, 1), b=conv(8, 5), head=head(5)),
        {"a": 8, "down": 4, "b": 5},
        HEAD,
        {"a": 4, "down": 2, "up": 4, "b": 3, "head": 3},
    ),
    Case(
        "flatten with positions",
        lambda: Net(
            lambda s, x: s.head(F.relu(s.fc(F.relu(s.a(x)).flatten(1)))),
            a=conv(3, 4),
            fc=nn.Linear(144, 6),
            head=head(6),
        ),
        {"a": 4, "fc": 6},
        HEAD,
        {"a": 2, "fc": 3, "head": 3},
    ),
    Case(
        "flatten without positions",
        lambda: Net(
            lambda s, x: s.head(s.pool(F.relu(s.a(x))).flatten(1)),
            a=conv(3, 8),
            pool=nn.AdaptiveAvgPool2d(1),
            head=head(8),
        ),
        {"a": 8},
        HEAD,
        {"a": 4, "head": 3},
    ),
    Case(
        "view with a literal size",
        lambda: Net(
            lambda s, x: s.head(s.a(F.relu(s.z(x))).view(-1, 400)), z=conv(3, 6), a=conv(6, 16), head=head(400)
        ),
        {"z": 6},
        {"a": "the code says 400", **HEAD},
        {"z": 3, "a": 16, "head": 3},
        shape=(3, 5, 5),
    ),
    Case(
        "view with a size in an attribute",
        lambda: Net(lambda s, x: s.head(s.a(x).view(-1, s.flat)), a=conv(3, 16), flat=400, head=head(400)),
        {"a": 16},
        HEAD,
        {"a": 8, "head": 3},
        shape=(3, 5, 5),
    ),
    Case(
        "group norm",
        lambda: Net(
            lambda s, x: s.head(pooled(F.relu(s.b(F.relu(s.norm(s.a(x))))))),
            a=conv(3, 8),
            norm=nn.GroupNorm(4, 8),
            b=conv(8, 5),
            head=head(5),
        ),
        {"a": 4, "b": 5},
        HEAD,
        {"a": 4, "b": 3, "head": 3},
    ),
    Case(
        "instance norm",
        lambda: Net(
            lambda s, x: s.head(pooled(F.relu(s.b(F.relu(s.norm(s.a(x))))))),
            a=conv(3, 8),
            norm=nn.InstanceNorm2d(8, affine=True),
            b=conv(8, 5),
            head=head(5),
        ),
        {"a": 8, "b": 5},
        HEAD,
        {"a": 4, "b": 3, "head": 3},
    ),
    Case(
        "layer norm",
        lambda: Net(
            lambda s, x: s.head(F.relu(s.b(s.norm(s.a(x))))),
            a=nn.Linear(6, 8),
            norm=nn.LayerNorm(8),
            b=nn.Linear(8, 6),
            head=head(6),
        ),
        {"b": 6},
        {"a": "normalised over this width", **HEAD},
        {"a": 8, "b": 3, "head": 3},
        shape=(6,),
    ),
    Case(
        "prelu per channel",
        lambda: Net(
            lambda s, x: s.head(pooled(s.b(s.act(s.a(x))))), a=conv(3, 8), act=nn.PReLU(8), b=conv(8, 5), head=head(5)
        ),
        {"a": 8, "b": 5},
        HEAD,
        {"a": 4, "b": 3, "head": 3},
    ),
    Case(
        "sigmoid after batch norm",
        lambda: Net(
            lambda s, x: s.head(pooled(s.b(torch.sigmoid(s.norm(s.a(x)))))),
            a=conv(3, 8),
            norm=nn.BatchNorm2d(8),
            b=conv(8, 5),
            head=head(5),
        ),
        {"a": 8, "b": 5},
        HEAD,
        {"a": 4, "b": 3, "head": 3},
    ),
    Case(
        "mean over channels",
        lambda: Net(
            lambda s, x: s.head(pooled(s.b(torch.sigmoid(s.a(F.relu(s.z(x)))).mean(1, keepdim=True)))),
            z=conv(3, 6),
            a=conv(6, 8),
            b=conv(1, 5),
            head=head(5),
        ),
        {"z": 6, "b": 5},
        {"a": "reduced by mean over channels", **HEAD},
        {"z": 3, "a": 8, "b": 3, "head": 3},
    ),
    Case(
        "sum of zeros over channels",
        lambda: Net(
            lambda s, x: s.head(pooled(s.b(F.relu(s.a(x)).sum(1, keepdim=True)))),
            a=conv(3, 8),
            b=conv(1, 6),
            head=head(6),
        ),
        {"a": 8, "b": 6},
        HEAD,
        {"a": 4, "b": 3, "head": 3},
    ),
    Case(
        "sum over channels that are not zero",
        lambda: Net(
            lambda s, x: s.head(pooled(s.b(torch.sigmoid(s.a(x)).sum(1, keepdim=True)))),
            a=conv(3, 8),
            b=conv(1, 6),
            head=head(6),
        ),
        {"b": 6},
        {"a": "reduced by sum over channels", **HEAD},
        {"a": 8, "b": 3, "head": 3},
    ),
    Case(
        "gain per channel",
        lambda: Net(
            lambda s, x: s.head(pooled(s.b(s.a(x) * s.gain))),
            a=conv(3, 8),
            gain=nn.Parameter(torch.ones(8, 1, 1)),
            b=conv(8, 5),
            head=head(5),
        ),
        {"a": 8, "b": 5},
        HEAD,
        {"a": 4, "b": 3, "head": 3},
    ),
    Case("tied weights", _tied, {"a": 8}, HEAD, {"a": 4, "t": 4, "head": 3}),
    Case(
        "one module used twice",
        lambda: Net(
            lambda s, x: s.head(pooled(F.relu(s.b(F.relu(s.b(F.relu(s.a(x)))))))),
            a=conv(3, 8),
            b=conv(8, 8),
            head=head(8),
        ),
        {"a": 8},
        HEAD,
        {"a": 4, "b": 4, "head": 3},
    ),
    Case(
        "convolutions in one dimension",
        lambda: Net(
            lambda s, x: s.head(F.relu(s.b(F.relu(s.norm(s.a(x))))).mean(2)),
            a=nn.Conv1d(3, 8, 3),
            norm=nn.BatchNorm1d(8),
            b=nn.Conv1d(8, 6, 3),
            head=head(6),
        ),
        {"a": 8, "b": 6},
        HEAD,
        {"a": 4, "b": 3, "head": 3},
        shape=(3, 12),
    ),
    Case(
        "convolutions in three dimensions",
        lambda: Net(
            lambda s, x: s.head(F.relu(s.b(F.relu(s.norm(s.a(x))))).mean((2, 3, 4))),
            a=nn.Conv3d(2, 8, 3),
            norm=nn.BatchNorm3d(8),
            b=nn.Conv3d(8, 6, 2),
            head=head(6),
        ),
        {"a": 8, "b": 6},
        HEAD,
        {"a": 4, "b": 3, "head": 3},
        shape=(2, 5, 5, 5),
    ),
    Case(
        "transposed convolution",
        lambda: Net(_three, a=conv(3, 8), b=nn.ConvTranspose2d(8, 6, 2, stride=2), c=conv(6, 5), head=head(5)),
        {"a": 8, "b": 6, "c": 5},
        HEAD,
        {"a": 4, "b": 3, "c": 3, "head": 3},
    ),
    Case(
        "pixel shuffle",
        lambda: Net(
            lambda s, x: s.head(pooled(F.relu(s.b(s.up(F.relu(s.a(x))))))),
            a=conv(3, 16),
            up=nn.PixelShuffle(2),
            b=conv(4, 6),
            head=head(6),
        ),
        {"a": 4, "b": 6},
        HEAD,
        {"a": 8, "b": 3, "head": 3},
    ),
    Case(
        "pixel unshuffle",
        lambda: Net(
            lambda s, x: s.head(pooled(F.relu(s.b(s.down(F.relu(s.a(x))))))),
            a=conv(3, 6),
            down=nn.PixelUnshuffle(2),
            b=conv(24, 6),
            head=head(6),
        ),
        {"a": 6, "b": 6},
        HEAD,
        {"a": 3, "b": 3, "head": 3},
    ),
    Case(
        "transposed convolution in two groups",
        lambda: Net(_three, a=conv(3, 8), b=nn.ConvTranspose2d(8, 12, 3, groups=2), c=conv(12, 5), head=head(5)),
        {"a": 4, "b": 6, "c": 5},
        HEAD,
        {"a": 4, "b": 6, "c": 3, "head": 3},
    ),
    Case(
        "transposed convolution in many groups",
        lambda: Net(_three, a=conv(3, 8), b=nn.ConvTranspose2d(8, 16, 3, groups=8), c=conv(16, 5), head=head(5)),
        {"a": 8, "c": 5},
        {"b": "shared by all convolution groups", **HEAD},
        {"a": 4, "b": 8, "c": 3, "head": 3},
    ),
    Case(
        "embedding",
        lambda: Net(
            lambda s, x: s.head(F.relu(s.b(s.table(x).sum(1)))),
            table=nn.Embedding(9, 8),
            b=nn.Linear(8, 6),
            head=head(6),
        ),
        {"table": 8, "b": 6},
        HEAD,
        {"table": 4, "b": 3, "head": 3},
        inputs=lambda size: torch.arange(size * 4).view(size, 4) ** 2 % 9,
    ),
    Case(
        "pooling of all kinds",
        lambda: Net(
            _pools,
            a=conv(3, 8),
            average=nn.AvgPool2d(2),
            b=conv(8, 6),
            most=nn.MaxPool2d(2, padding=1),
            c=conv(6, 4),
            adaptive=nn.AdaptiveMaxPool2d(1),
            head=head(4),
        ),
        {"a": 8, "b": 6, "c": 4},
        HEAD,
        {"a": 4, "b": 3, "c": 2, "head": 3},
    ),
    Case(
        "dropout",
        lambda: Net(
            lambda s, x: s.head(s.flat(pooled(F.relu(s.b(s.maps(F.relu(s.a(x)))))))),
            a=conv(3, 8),
            maps=nn.Dropout2d(0.5),
            b=conv(8, 6),
            flat=nn.Dropout(0.5),
            head=head(6),
        ),
        {"a": 8, "b": 6},
        HEAD,
        {"a": 4, "b": 3, "head": 3},
    ),
    Case(
        "in-place relu and add",
        lambda: Net(
            _in_place, stem=conv(3, 8), one=conv(8, 6), two=conv(6, 8), relu=nn.ReLU(inplace=True), head=head(8)
        ),
        {"stem": 8, "one": 6},
        HEAD,
        {"stem": 4, "one": 3, "two": 4, "head": 3},
    ),
    Case(
        "write through a view",
        lambda: Net(_through_a_view, a=conv(3, 8), b=conv(8, 6), head=head(6)),
        {"a#2": 4, "b": 6},
        {"a": "the code says 4, a number that cannot follow", **HEAD},  # h[:, :4] is written in place
        {"a": 6, "b": 3, "head": 3},
    ),
    Case(
        "an op without a rule",
        lambda: Net(_spectrum, a=conv(3, 8), b=conv(8, 6), head=head(4)),
        {"a": 8},
        {"b": "no rule for this op", **HEAD},
        {"a": 4, "b": 6, "head": 3},
        unknown=("aten._fft_r2c",),
    ),
    Case(
        "two inputs and a dict of outputs",
        lambda: Net(_two_inputs, a=conv(3, 8), e=nn.Linear(5, 6), head=head(14), side=nn.Linear(14, 2)),
        {"a": 8, "e": 6},
        {"side": OUTPUT, **HEAD},
        {"a": 4, "e": 3, "head": 3, "side": 2},
        inputs=_two_tensors,
    ),
    Case(
        "inputs by name",
        lambda: Net(_two_inputs, a=conv(3, 8), e=nn.Linear(5, 6), head=head(14), side=nn.Linear(14, 2)),
        {"a": 8, "e": 6},
        {"side": OUTPUT, **HEAD},
        {"a": 4, "e": 3, "head": 3, "side": 2},
        inputs=lambda size: dict(zip(("image", "extra"), _two_tensors(size), strict=True)),
    ),
    Case(
        "mlp",
        lambda: Net(
            lambda s, x: s.head(F.gelu(s.b(F.relu(s.norm(s.a(x)))))),
            a=nn.Linear(6, 8),
            norm=nn.BatchNorm1d(8),
            b=nn.Linear(8, 6),
            head=head(6),
        ),
        {"a": 8, "b": 6},
        HEAD,
        {"a": 4, "b": 3, "head": 3},
        shape=(6,),
    ),
    Case(
        "mlp over positions",
        lambda: Net(
            lambda s, x: s.head(F.gelu(s.b(F.relu(s.a(x))))), a=nn.Linear(6, 8), b=nn.Linear(8, 6), head=head(6)
        ),
        {"a": 8, "b": 6},
        HEAD,
        {"a": 4, "b": 3, "head": 3},
        shape=(4, 6),
    ),
    Case(
        "functional convolution",
        lambda: Net(
            lambda s, x: s.head(pooled(F.relu(s.b(F.relu(F.conv2d(x, s.weight, s.bias, padding=1)))))),
            weight=nn.Parameter(torch.ones(8, 3, 3, 3)),
            bias=nn.Parameter(torch.ones(8)),
            b=conv(8, 6),
            head=head(6),
        ),
        {"weight": 8, "b": 6},
        HEAD,
        {"weight": 4, "b": 3, "head": 3},
    ),
    Case(
        "no biases",
        lambda: Net(_chain, a=conv(3, 8, bias=False), b=conv(8, 6, bias=False), head=nn.Linear(6, 3, bias=False)),
        {"a": 8, "b": 6},
        HEAD,
        {"a": 4, "b": 3, "head": 3},
    ),
    Case(
        "gated linear unit",
        lambda: Net(lambda s, x: s.head(pooled(s.b(F.glu(s.a(x), dim=1)))), a=conv(3, 12), b=conv(6, 4), head=head(4)),
        {"a": 6, "b": 4},
        HEAD,
        {"a": 6, "b": 2, "head": 3},
    ),
    Case(
        "softmax gate",
        lambda: Net(_softmax_gate, a=conv(3, 8), gate=nn.Linear(8, 8), b=conv(8, 6), head=head(6)),
        {"b": 6},
        {"a": "combined with a tensor of fixed size", "gate": "softmax runs along it", **HEAD},
        {"a": 8, "gate": 8, "b": 3, "head": 3},
    ),
    Case(
        "division by a parameter per channel",
        lambda: Net(
            lambda s, x: s.head(pooled(s.b(s.a(x) / s.gain))),
            a=conv(3, 8),
            gain=nn.Parameter(torch.ones(8, 1, 1)),
            b=conv(8, 6),
            head=head(6),
        ),
        {"b": 6},
        {"a": "not finite where channels are zero", **HEAD},
        {"a": 8, "b": 3, "head": 3},
    ),
    Case(
        "padding",
        lambda: Net(
            lambda s, x: s.head(pooled(F.relu(s.b(F.pad(F.relu(s.a(x)), (1, 2, 0, 1)))))),
            a=nn.Conv2d(3, 8, 3, padding="same", padding_mode="reflect"),
            b=nn.Conv2d(8, 6, 3, padding="same"),
            head=head(6),
        ),
        {"a": 8, "b": 6},
        HEAD,
        {"a": 4, "b": 3, "head": 3},
    ),
    Case(
        "shortcut padded with zero channels",
        lambda: Net(_option_a, a=conv(3, 4), b=conv(4, 8), head=head(8)),
        {"a": 4},
        {"b": "fixed size", **HEAD},
        {"a": 2, "b": 6, "head": 3},
    ),
)


# -- traps: whatever a plan removes here, shrunk must equal zeroed -----------------------------------------------------


def _sum(s: Any, h: Tensor) -> Tensor:
    """A consumer without weights of its own, which sees what dead channels really hold."""
    return s.head(pooled(F.relu(s.last(h.sum(1, keepdim=True)))))


def _trap(function: Callable[..., Any], **parts: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        made = {name: part() for name, part in parts.items()}
        return Net(function, a=conv(3, 8), last=conv(1, 6), b=conv(8, 6), head=head(6), **made)

    return build


def _ends(s: Any, h: Tensor) -> Tensor:
    return s.head(pooled(F.relu(s.b(h))))


def _scaled(function: Callable[[Tensor], float]) -> Callable[[Any, Tensor], Tensor]:
    """A net that multiplies its output with a number made from the width of its first layer."""

    def forward(s: Any, x: Tensor) -> Tensor:
        h = s.a(x)
        return _ends(s, h) * function(h)

    return forward


def _asserts(s: Any, x: Tensor) -> Tensor:
    h = s.a(x)
    if h.shape[1] != s.width:
        raise ValueError(f"expected {s.width} channels")
    return _ends(s, h)


def _squeezed(s: Any, x: Tensor) -> Tensor:
    return s.fc(pooled(s.a(x))[:, :, None, None].squeeze())


def _viewed_as(name: str) -> Callable[[Any, Tensor], Tensor]:
    def forward(s: Any, x: Tensor) -> Tensor:
        other = s.other(x.flatten(1))
        h = getattr(s.a(x).mean((2, 3), keepdim=True), name)(other)
        return s.fc(h) + s.fc2(F.relu(other))

    return forward


def _numpy(s: Any, x: Tensor) -> Tensor:
    h = s.a(x).detach()
    return s.head(pooled(F.relu(s.last(torch.from_numpy(h.numpy().mean(1, keepdims=True))))))


def _listed(s: Any, x: Tensor) -> Tensor:
    return s.head(pooled(F.relu(s.last(torch.tensor(s.a(x).tolist(), dtype=x.dtype).mean(1, keepdim=True)))))


def _written_out(s: Any, x: Tensor) -> Tensor:
    h = s.a(x)
    buffer = torch.zeros_like(h)
    view = buffer[:]
    torch.add(h, 1.0, out=buffer)
    return _sum(s, view)


def _recurrent(s: Any, x: Tensor) -> Tensor:
    return s.fc(s.rnn(s.a(x).flatten(2).transpose(1, 2))[0].mean(1))


def _attended(s: Any, x: Tensor) -> Tensor:
    h = s.a(x).flatten(2).transpose(1, 2)
    return s.fc(s.attention(h, h, h, need_weights=False)[0].mean(1))


def _gram(s: Any, x: Tensor) -> Tensor:
    h = s.a(x).flatten(2)
    return (h @ h.transpose(1, 2)).flatten(1)[:, :5]


def _spatial_gate(s: Any, x: Tensor) -> Tensor:
    h = s.a(x)
    return _ends(s, h * torch.sigmoid(s.gate(h)).expand_as(h))


def _odd_slices(s: Any, x: Tensor) -> Tensor:
    h = s.odd(x)
    c = h.shape[1]
    return s.head(pooled(F.relu(s.four(h[:, : c // 2]) + s.five(h[:, c // 2 :]))))


def _maxout(s: Any, x: Tensor) -> Tensor:
    h = s.wide(x)
    n, c, height, width = h.shape
    return _ends(s, h.view(n, c // 2, 2, height, width).amax(2))


def _fancy_keys(s: Any, x: Tensor) -> Tensor:
    h = s.a(x)
    return _sum(s, h[..., None, :4, :].squeeze(-3) + h[0, ..., :4, :])


def _aside(s: Any, x: Tensor) -> Any:
    h = s.a(x)
    return (_ends(s, h), s.aside(h)) if s.training else _ends(s, h)


def _one_channel(s: Any, x: Tensor) -> Tensor:
    h = s.a(x)
    return _sum(s, h) + s.head(pooled(s.b(h)))[:, :1] * h[:, 3].mean()


def _pos(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.ones(shape))


def _branch(h: Tensor) -> float:
    return 2.0 if h.shape[1] == 8 else 1.0


TRAPS = (
    Trap("threshold", _trap(lambda s, x: _sum(s, F.threshold(s.a(x) + 3, 2.0, 0.0)))),
    Trap("comparison", _trap(lambda s, x: _sum(s, (s.a(x) + 3 > 2).to(x.dtype)))),
    Trap("far comparison", _trap(lambda s, x: _sum(s, (s.a(x) + 3e5 > 2e5).to(x.dtype)))),
    Trap("where", _trap(lambda s, x: _sum(s, torch.where(s.a(x) + 3 > 2, s.a(x), 1.0)))),
    Trap("equality", _trap(lambda s, x: _sum(s, (s.a(x) == 0).to(x.dtype) + s.a(x)))),
    Trap("rounding", _trap(lambda s, x: _sum(s, torch.round(torch.sigmoid(s.a(x)) * 0.9 + s.a(x))))),
    Trap("shrinkage", _trap(lambda s, x: _sum(s, F.hardshrink(s.a(x) + 40, 30.0)))),
    Trap("clamp from below", _trap(lambda s, x: _sum(s, s.a(x).clamp(min=0.2)))),
    Trap("exponential", _trap(lambda s, x: _sum(s, torch.exp(-s.a(x).abs())))),
    Trap("cosine", _trap(lambda s, x: _sum(s, torch.cos(s.a(x))))),
    Trap(
        "batch statistics",
        _trap(
            lambda s, x: _sum(s, F.relu(s.norm(s.a(x) + s.pos))),
            norm=lambda: nn.BatchNorm2d(8, affine=False, track_running_stats=False),
            pos=_pos(1, 1, 6, 6),
        ),
    ),
    Trap(
        "instance statistics",
        _trap(
            lambda s, x: _sum(s, F.relu(s.norm(s.a(x) + s.pos))),
            norm=lambda: nn.InstanceNorm2d(8),
            pos=_pos(1, 1, 6, 6),
        ),
    ),
    Trap(
        "instance statistics that are tracked",
        _trap(
            lambda s, x: _ends(s, s.norm(s.a(x))),
            norm=lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
        ),
    ),
    Trap(
        "group norm without parameters",
        _trap(lambda s, x: _sum(s, F.relu(F.group_norm(s.a(x) + s.pos, 4))), pos=_pos(1, 1, 6, 6)),
    ),
    Trap("one normalisation group", _trap(lambda s, x: _ends(s, s.norm(s.a(x))), norm=lambda: nn.GroupNorm(1, 8))),
    Trap("normalised channels", _trap(lambda s, x: _ends(s, F.normalize(s.a(x), dim=1)))),
    Trap("normalised positions", _trap(lambda s, x: _ends(s, F.normalize(s.a(x).flatten(2), dim=2).view_as(s.a(x))))),
    Trap(
        "negative norm", _trap(lambda s, x: s.head(torch.linalg.vector_norm(s.a(x), ord=-1, dim=1).flatten(1)[:, :6]))
    ),
    Trap(
        "count of non-zeros",
        _trap(
            lambda s, x: s.head(torch.linalg.vector_norm(s.a(x), ord=0, dim=1).flatten(1)[:, :6] + pooled(s.b(s.a(x))))
        ),
    ),
    Trap(
        "largest norm",
        _trap(lambda s, x: s.head(torch.linalg.vector_norm(s.a(x), ord=torch.inf, dim=1).flatten(1)[:, :6])),
    ),
    Trap("roll over everything", _trap(lambda s, x: _ends(s, torch.roll(s.a(x), 5)))),
    Trap("roll over channels", _trap(lambda s, x: _ends(s, torch.roll(s.a(x), 1, 1)))),
    Trap("flip of channels", _trap(lambda s, x: _ends(s, s.a(x).flip(1)))),
    Trap("sorted channels", _trap(lambda s, x: _ends(s, s.a(x).sort(dim=1, stable=True)[0]))),
    Trap("cumulative sum of channels", _trap(lambda s, x: _ends(s, s.a(x).cumsum(1)))),
    Trap("width negated", _trap(_scaled(lambda h: 3 / -h.shape[1]))),
    Trap("width modulo", _trap(_scaled(lambda h: h.shape[1] % 5))),
    Trap("width as float", _trap(_scaled(lambda h: float(h.shape[1]) ** -0.5))),
    Trap("width as int", _trap(_scaled(lambda h: int(h.shape[1])))),
    Trap("width by len", _trap(_scaled(lambda h: len(h[0])))),
    Trap("width in numel", _trap(_scaled(lambda h: h[0].numel()))),
    Trap("width in the numel of a shape", _trap(_scaled(lambda h: h.shape[1:].numel()))),
    Trap("width in a product", _trap(_scaled(lambda h: 3 / math.prod(h.shape[1:])))),
    Trap("width compared", _trap(_scaled(_branch))),
    Trap("float times width", _trap(_scaled(lambda h: 0.5 * h.shape[1])), hidden=True),
    Trap("width in a loop", _trap(_scaled(lambda h: sum(0.5 for _ in range(h.shape[1])))), hidden=True),
    Trap("width in a power", _trap(_scaled(lambda h: 3 ** -h.shape[1] + h.shape[1] ** 2))),
    Trap("width in min", _trap(_scaled(lambda h: min(h.shape[1], 6)))),
    Trap("width in bits", _trap(_scaled(lambda h: (h.shape[1] >> 1) | 1))),
    Trap("width in a text", _trap(_scaled(lambda h: len("x" * h.shape[1]))), hidden=True),
    Trap("width in a tensor", _trap(lambda s, x: _ends(s, s.a(x)) / torch.full((), s.a(x).shape[1]))),
    Trap("width guarded", _trap(_asserts, width=lambda: 8)),
    Trap("squeeze of everything", _trap(_squeezed, fc=lambda: nn.Linear(8, 3))),
    Trap(
        "view as another",
        _trap(
            _viewed_as("view_as"),
            other=lambda: nn.Linear(108, 8),
            fc=lambda: nn.Linear(8, 3),
            fc2=lambda: nn.Linear(8, 3),
        ),
    ),
    Trap(
        "reshape as another",
        _trap(
            _viewed_as("reshape_as"),
            other=lambda: nn.Linear(108, 8),
            fc=lambda: nn.Linear(8, 3),
            fc2=lambda: nn.Linear(8, 3),
        ),
    ),
    Trap("through numpy", _trap(_numpy)),
    Trap("through a list", _trap(_listed)),
    Trap("written with out=", _trap(_written_out)),
    Trap("lstm", _trap(_recurrent, rnn=lambda: nn.LSTM(8, 6, batch_first=True), fc=lambda: nn.Linear(6, 3))),
    Trap("gru", _trap(_recurrent, rnn=lambda: nn.GRU(8, 6, batch_first=True), fc=lambda: nn.Linear(6, 3))),
    Trap(
        "attention",
        _trap(_attended, attention=lambda: nn.MultiheadAttention(8, 2, batch_first=True), fc=lambda: nn.Linear(8, 3)),
    ),
    Trap("gram matrix", _trap(_gram)),
    Trap("spatial gate", _trap(_spatial_gate, gate=lambda: conv(8, 1))),
    Trap("odd slices", _trap(_odd_slices, odd=lambda: conv(3, 9), four=lambda: conv(4, 6), five=lambda: conv(5, 6))),
    Trap("maxout", _trap(_maxout, wide=lambda: conv(3, 16))),
    Trap("keys of all kinds", _trap(_fancy_keys)),
    Trap(
        "every second channel",
        _trap(lambda s, x: s.head(pooled(s.b(s.a(x)))) * pooled(s.a(x)[:, ::2]).sum(1, keepdim=True)),
    ),
    Trap(
        "all but the last",
        _trap(lambda s, x: s.head(pooled(s.b(s.a(x)))) * pooled(s.a(x)[:, :-3]).sum(1, keepdim=True)),
    ),
    Trap(
        "narrowed",
        _trap(lambda s, x: s.head(pooled(s.b(s.a(x)))) * pooled(s.a(x).narrow(1, 2, 3)).sum(1, keepdim=True)),
    ),
    Trap("one channel picked", _trap(_one_channel)),
    Trap("channels by index", _trap(lambda s, x: _ends(s, s.a(x)[:, torch.arange(7, -1, -1)]))),
    Trap("channels by mask", _trap(lambda s, x: _sum(s, s.a(x)[:, torch.arange(8) % 3 > 0]))),
    Trap(
        "repeated",
        _trap(lambda s, x: s.head(pooled(F.relu(s.twin(s.a(x).repeat(1, 2, 1, 1))))), twin=lambda: conv(16, 6)),
    ),
    Trap(
        "interleaved",
        _trap(lambda s, x: s.head(pooled(F.relu(s.twin(s.a(x).repeat_interleave(2, 1))))), twin=lambda: conv(16, 6)),
    ),
    Trap(
        "padded channels",
        _trap(lambda s, x: s.head(pooled(F.relu(s.twin(F.pad(s.a(x), (0, 0, 0, 0, 3, 5)))))), twin=lambda: conv(16, 6)),
    ),
    Trap(
        "cropped channels",
        _trap(lambda s, x: _ends(s, s.a(x)) * pooled(F.pad(s.a(x), (0, 0, 0, 0, -3, -2))).sum(1, keepdim=True)),
    ),
    Trap("padded with ones", _trap(lambda s, x: _sum(s, F.pad(s.a(x), (1, 1, 1, 1, 2, 2), value=1.0)))),
    Trap(
        "unequal chunks",
        _trap(lambda s, x: _ends(s, s.a(x)) * pooled(s.a(x).chunk(3, dim=1)[2]).sum(1, keepdim=True)),
    ),
    Trap("a float32 island", _trap(lambda s, x: _ends(s, F.relu(s.a(x)).float().double()))),
    Trap("unflattened by keyword", _trap(lambda s, x: _sum(s, s.a(x).unflatten(dim=1, sizes=(2, -1)).sum(1)))),
    Trap("split by keyword", _trap(lambda s, x: _sum(s, torch.split(s.a(x), dim=1, split_size_or_sections=4)[1]))),
    Trap(
        "circular padding",
        _trap(lambda s, x: s.head(pooled(s.ring(s.a(x)))), ring=lambda: conv(8, 6, padding_mode="circular")),
    ),
    Trap("einsum", _trap(lambda s, x: _ends(s, torch.einsum("nchw,dc->ndhw", s.a(x), s.mix)), mix=_pos(8, 8))),
    Trap(
        "weight standardisation",
        _trap(lambda s, x: _ends(s, F.conv2d(x, s.a.weight - s.a.weight.mean((1, 2, 3), keepdim=True), padding=1))),
    ),
    Trap(
        "parametrised weight",
        _trap(lambda s, x: _ends(s, s.normed(x)), normed=lambda: nn.utils.parametrizations.weight_norm(conv(3, 8))),
    ),
    Trap(
        "buffer written in forward",
        _trap(
            lambda s, x: _ends(s, s.a(x) - s.mean.mul(0.5).add_(s.a(x).mean((0, 2, 3))[:, None, None])),
            mean=_pos(8, 1, 1),
        ),
    ),
    Trap(
        "a layer that forward does not use",
        _trap(lambda s, x: _ends(s, s.a(x)), spare=lambda: conv(6, 10)),
        tensors=("spare.weight", "spare.bias"),
    ),
    Trap("a layer used in training only", _trap(_aside, aside=lambda: conv(8, 2)), tensors=("aside.bias",)),
)
