"""`prune_residual=True`: widths under norms shrink, and the norms run over the channels that live."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from nets_for_tests import HEAD, Net, conv, distance, head, outputs_of, pooled, randomised, zeroed_by_hand
from secateur.errors import NothingToPruneError

WIDTH, EPS = 6, 1e-5
NORMED = "normalised over this width"
MEAN = "reduced by mean over channels"


# -- norms that people write -----------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """As language models write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


class ByHand(nn.Module):
    """LayerNorm in steps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return self.gain * x / torch.sqrt(x.square().mean(-1, keepdim=True) + EPS) + self.shift


class Functional(ByHand):
    """Calls the framework's function with a width from an attribute, or read off its input."""

    def __init__(self, width: int, *, read_off: bool) -> None:
        super().__init__(width)
        self.width, self.read_off = width, read_off

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape[-1:] if self.read_off else (self.width,)
        return F.layer_norm(x, shape, self.gain, self.shift, EPS)


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of maps, with the channels brought to the end and back."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResponseNorm(nn.Module):
    """Global response normalisation of ConvNeXt V2, (N, H, W, C): every channel against the mean of all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.empty(1, 1, 1, width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        response = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        return self.gamma * (x * response / (response.mean(-1, keepdim=True) + EPS)) + self.beta + x


# -- the reference: the same norms over live channels, by sums and a mask ---------------------------------------------


class Live(nn.Module):
    """The norm of the channels in `mask`; zero for the others."""

    def __init__(self, norm: nn.Module, mask: Tensor) -> None:
        super().__init__()
        self.norm, self.mask, self.eps = norm, mask, float("nan")  # unlike any other: no layer takes a short cut

    def forward(self, x: Tensor) -> Tensor:
        dim = 1 if isinstance(self.norm, (LayerNorm2d, nn.GroupNorm)) else x.dim() - 1
        mask = self.mask.view([-1 if d == dim else 1 for d in range(x.dim())])

        def over(values: Tensor, dims: tuple[int, ...] = (dim,)) -> Tensor:
            return (values * mask).sum(dims, keepdim=True) / mask.sum()

        norm = self.norm
        given = [*norm.parameters()]
        scale, shift = ([*(p.reshape(mask.shape) for p in given), *[torch.ones(()), torch.zeros(())][len(given) :]])[:2]
        if isinstance(norm, ResponseNorm):
            response = x.square().sum((1, 2), keepdim=True).sqrt()
            return (scale * x * response / (over(response) + EPS) + shift + x) * mask
        if isinstance(norm, (RMSNorm, nn.RMSNorm)):
            eps = torch.finfo(x.dtype).eps if getattr(norm, "eps", EPS) is None else EPS
            return scale * x / (over(x.square()) + eps).sqrt() * mask
        if isinstance(norm, nn.GroupNorm):  # one group: also over the positions
            positions = tuple(range(2, x.dim()))
            x = x - over(x.mean(positions, keepdim=True))
            return (scale * x / (over(x.square().mean(positions, keepdim=True)) + EPS).sqrt() + shift) * mask
        x = x - over(x)
        return (scale * x / (over(x.square()) + EPS).sqrt() + shift) * mask


@dataclass(frozen=True)
class Stream:
    """A net with norms: what is free without and with `prune_residual`, and where it says what a norm sees."""

    name: str
    build: Callable[[], nn.Module]
    closed: Mapping[str, int]
    opened: Mapping[str, int]
    widths: Mapping[str, int]  # with half of every group removed, opened
    norms: Mapping[str, tuple[str, int]]  # norm -> a tensor and a dimension of it, which is what the norm makes
    locked: Mapping[str, str] = field(default_factory=lambda: dict(HEAD))  # opened
    shape: tuple[int, ...] = (5, 7)

    def batch(self, size: int, length: int | None = None) -> Tensor:
        shape = self.shape if length is None else (length, *self.shape[1:])
        return torch.randn(size, *shape, generator=torch.Generator().manual_seed(size), dtype=torch.float64)

    def model(self) -> nn.Module:
        return randomised(self.build().double()).eval()

    def __str__(self) -> str:
        return self.name


def live(model: nn.Module, plan: sc.Plan, norms: Mapping[str, tuple[str, int]]) -> nn.Module:
    """`model` with what the plan cuts at zero, and its norms over what lives."""
    result, cuts = zeroed_by_hand(model, plan), {(cut.tensor, cut.dim): cut for cut in plan.cuts}
    for name, place in norms.items():
        cut = cuts.get(place)
        if cut is not None:
            mask = torch.zeros(cut.size, dtype=torch.float64)
            mask[list(cut.kept)] = 1.0
            owner, _, own = name.rpartition(".")
            setattr(result.get_submodule(owner), own, Live(copy.deepcopy(model.get_submodule(name)), mask))
    return result


# -- nets ------------------------------------------------------------------------------------------------------------


def _block(s: Any, x: Tensor) -> Tensor:
    h = s.stem(x)
    h = h + s.down(F.relu(s.up(s.norm(h))))
    return s.head(s.last(h).mean(1))


def _sequence(norm: Callable[[int], nn.Module]) -> nn.Module:
    layers = {"stem": nn.Linear(7, WIDTH), "up": nn.Linear(WIDTH, 8), "down": nn.Linear(8, WIDTH)}
    return Net(_block, **layers, norm=norm(WIDTH), last=norm(WIDTH), head=head(WIDTH))


def _maps(s: Any, x: Tensor) -> Tensor:
    h = s.stem(x)
    return s.head(pooled(h + s.down(F.relu(s.up(s.norm(h))))))


def _responses(s: Any, x: Tensor) -> Tensor:
    h = F.relu(s.stem(x)).permute(0, 2, 3, 1)
    return s.head(s.norm(h).mean((1, 2)))


def _shared(s: Any, x: Tensor) -> Tensor:
    return s.head(F.relu(s.norm(s.a(x)) * s.norm(s.b(x))).mean(1))


def _concatenated(s: Any, x: Tensor) -> Tensor:
    return s.head(s.norm(torch.cat([s.a(x), s.b(x)], -1)).mean(1))


def _two_dims(s: Any, x: Tensor) -> Tensor:
    return s.head(s.norm(s.stem(x)).mean(1))


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 10, batch_first=True, norm_first=True)
    return Net(lambda s, x: s.head(s.layer(s.stem(x)).mean(1)), stem=nn.Linear(7, 8), layer=layer, head=head(8))


FREE, OPEN = {"up": 8}, {"stem": 6, "up": 8}
HALF = {"stem": 3, "up": 4, "down": 3, "head": 3}
SEEN = {"norm": ("up.weight", 1), "last": ("head.weight", 1)}
IMAGE = (3, 6, 6)

STREAMS = (
    *(
        Stream(name, lambda norm=norm: _sequence(norm), FREE, OPEN, HALF, SEEN)
        for name, norm in {
            "LayerNorm": nn.LayerNorm,
            "LayerNorm without gains": lambda width: nn.LayerNorm(width, elementwise_affine=False),
            "LayerNorm without shifts": lambda width: nn.LayerNorm(width, bias=False),
            "LayerNorm by hand": ByHand,
            "LayerNorm as a function": lambda width: Functional(width, read_off=False),
            "LayerNorm as a function of a shape": lambda width: Functional(width, read_off=True),
            "RMSNorm": nn.RMSNorm,
            "RMSNorm without gains": lambda width: nn.RMSNorm(width, elementwise_affine=False),
            "RMSNorm by hand": RMSNorm,
        }.items()
    ),
    *(
        Stream(
            name,
            lambda norm=norm: Net(
                _maps, stem=conv(3, 6), norm=norm(), up=conv(6, 8, 1), down=conv(8, 6, 1), head=head(6)
            ),
            FREE,
            OPEN,
            HALF,
            {"norm": ("up.weight", 1)},
            shape=IMAGE,
        )
        for name, norm in {
            "LayerNorm over the channels of maps": lambda: LayerNorm2d(6),
            "GroupNorm of one group": lambda: nn.GroupNorm(1, 6),
        }.items()
    ),
    Stream(
        "global response norm",
        lambda: Net(_responses, stem=conv(3, 6), norm=ResponseNorm(6), head=head(6)),
        {},
        {"stem": 6},
        {"stem": 3, "head": 3},
        {"norm": ("head.weight", 1)},
        shape=IMAGE,
    ),
    Stream(
        "a norm called twice",  # one set of gains, so both inputs lose the same channels
        lambda: Net(_shared, a=nn.Linear(7, 6), b=nn.Linear(7, 6), norm=nn.LayerNorm(6), head=head(6)),
        {},
        {"a": 6},
        {"a": 3, "b": 3, "head": 3},
        {"norm": ("head.weight", 1)},
    ),
    Stream(
        "a norm over a concatenation",
        lambda: Net(_concatenated, a=nn.Linear(7, 4), b=nn.Linear(7, 6), norm=nn.LayerNorm(10), head=head(10)),
        {},
        {"a": 4, "b": 6},
        {"a": 2, "b": 3, "head": 3},
        {"norm": ("head.weight", 1)},
    ),
    Stream(
        "a norm over two dimensions",  # the positions are no channels, and the width is one with them
        lambda: Net(_two_dims, stem=nn.Linear(7, 6), norm=nn.LayerNorm((5, 6)), head=head(6)),
        {},
        {},
        {},
        {},
        {"stem": NORMED, **HEAD},
    ),
    Stream(
        "encoder layer",
        _encoder,
        {"layer.self_attn": 2, "layer.linear1": 10},
        {"stem": 8, "layer.self_attn": 2, "layer.linear1": 10},
        {
            "stem": 4,
            "layer.self_attn": 12,
            "layer.self_attn.out_proj": 4,
            "layer.linear1": 5,
            "layer.linear2": 4,
            "head": 3,
        },
        {"layer.norm1": ("layer.self_attn.in_proj_weight", 1), "layer.norm2": ("layer.linear1.weight", 1)},
    ),
)
OPENED = [stream for stream in STREAMS if stream.opened]


def free(graph: sc.Graph) -> dict[str, int]:
    return {group.name: group.channels for group in graph.prunable}


def plan_for(model: nn.Module, batch: Tensor, sparsity: float = 0.5) -> sc.Plan:
    graph = sc.trace(model, batch, prune_residual=True)
    scores = sc.score(graph, sc.observe(model, graph), "l2")
    return sc.select(graph, scores, sc.Target(sparsity=sparsity), scope="layer")


@pytest.mark.parametrize("stream", STREAMS, ids=str)
def test_widths_under_norms_are_closed_unless_asked_for(stream: Stream) -> None:
    model, batch = stream.model(), stream.batch(2)
    closed, opened = sc.trace(model, batch), sc.trace(model, batch, prune_residual=True)
    assert free(closed) == dict(stream.closed), closed.table()
    assert free(opened) == dict(stream.opened), opened.table()
    locked = {group.name: group.locked for group in opened.groups if group.locked}
    assert set(locked) == set(stream.locked), opened.table()
    for name, part in stream.locked.items():
        assert part in locked[name]


@pytest.mark.parametrize("stream", OPENED, ids=str)
def test_shrunk_equals_the_original_with_norms_over_live_channels(stream: Stream) -> None:
    model, batch = stream.model(), stream.batch(2)
    plan = plan_for(model, batch)
    assert {row.layer: row.after for row in plan.widths} == dict(stream.widths)
    small, reference = sc.shrink(model, plan), live(model, plan, stream.norms)
    for inputs in (batch, stream.batch(5), stream.batch(3, None if stream.shape == IMAGE else 9)):
        assert distance(reference, small, inputs) < 1e-9
        assert distance(reference, sc.zero_channels(model, plan), inputs) < 1e-9
        assert all(output.std() > 1e-6 for output in outputs_of(reference, inputs)), "vacuous: the output is constant"
    assert distance(reference, zeroed_by_hand(model, plan), batch) > 1e-4, "vacuous: zeros in a norm change nothing"
    assert sc.verify(model, plan, small, batch) < 1e-9
    assert sc.Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("stream", OPENED, ids=str)
def test_pruned_in_one_call_and_once_more(stream: Stream) -> None:
    model, batch = stream.model(), stream.batch(2)
    first = sc.prune(model, batch, sparsity=0.3, prune_residual=True)
    again = sc.prune(first.model, batch, sparsity=0.4, prune_residual=True)
    total = first.plan.then(again.plan)
    at_once = sc.shrink(model, total)
    assert distance(at_once, again.model, batch) == 0.0
    assert distance(live(model, total, stream.norms), at_once, batch) < 1e-9
    assert sc.verify(model, total, at_once, batch) < 1e-9


@pytest.mark.parametrize("stream", OPENED, ids=str)
def test_a_norm_that_saw_another_channel_is_noticed(stream: Stream) -> None:
    """The reference takes every norm over the channels of another plan: all that a wrong norm can be."""
    model, batch = stream.model(), stream.batch(2)
    plan = plan_for(model, batch)
    wrong = live(model, plan, stream.norms)
    for module in wrong.modules():
        if isinstance(module, Live):
            module.mask.fill_(1.0)
    assert distance(wrong, sc.shrink(model, plan), batch) > 1e-6


def test_the_references_norms_are_the_originals_where_all_channels_live() -> None:
    for norm in (
        nn.LayerNorm(6),
        ByHand(6),
        nn.RMSNorm(6),
        RMSNorm(6),
        ResponseNorm(6),
        LayerNorm2d(6),
        nn.GroupNorm(1, 6),
    ):
        x, whole = torch.randn(2, 6, 6, 6).double(), Live(randomised(norm.double()), torch.ones(6).double())
        assert torch.allclose(whole(x), norm(x), rtol=1e-9, atol=1e-9), norm


# -- what stays closed -----------------------------------------------------------------------------------------------


def test_where_nothing_else_is_free_the_message_says_how_to_open_the_stream() -> None:
    net = randomised(
        Net(lambda s, x: s.head(s.norm(s.stem(x))), stem=nn.Linear(7, 6), norm=nn.LayerNorm(6), head=head(6))
    )
    x = torch.randn(2, 7)
    with pytest.raises(NothingToPruneError, match="prune_residual=True opens the widths under LayerNorm and RMSNorm"):
        sc.prune(net, x, sparsity=0.5)
    pruned = sc.prune(net, x, sparsity=0.5, prune_residual=True)
    assert pruned.model.norm.normalized_shape == (3,)
    with pytest.raises(NothingToPruneError) as error:
        sc.prune(net, x, sparsity=0.5, prune_residual=True, ignore=["stem"])
    assert "prune_residual" not in str(error.value)


def test_a_norm_that_somebody_wrote_gets_the_same_hint() -> None:
    net = randomised(Net(lambda s, x: s.head(s.norm(s.stem(x))), stem=nn.Linear(7, 6), norm=RMSNorm(6), head=head(6)))
    with pytest.raises(NothingToPruneError, match="prune_residual=True"):
        sc.prune(net, torch.randn(2, 7), sparsity=0.5)


def _gate(s: Any, x: Tensor) -> Tensor:
    h = F.relu(s.stem(x))
    seen = torch.cat([h.mean(1, keepdim=True), h.amax(1, keepdim=True)], 1)
    return s.head(pooled(h * torch.sigmoid(s.where(seen))))


def _bare_mean(s: Any, x: Tensor) -> Tensor:
    h = s.stem(x)
    return s.head((h - h.mean(1, keepdim=True)).mean((2, 3)))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: Net(_gate, stem=conv(3, 6), where=conv(2, 1), head=head(6)), "over channels"),
        (lambda: Net(_bare_mean, stem=conv(3, 6), head=head(6)), MEAN),
    ],
)
def test_a_mean_over_channels_outside_a_norm_stays_closed(build: Callable[[], nn.Module], reason: str) -> None:
    model, x = randomised(build().double()).eval(), torch.randn(2, *IMAGE).double()
    graph = sc.trace(model, x, prune_residual=True)
    assert free(graph) == {}, graph.table()
    stem = next(group for group in graph.groups if group.name == "stem")
    assert stem.locked is not None and reason in stem.locked


def test_what_is_free_beside_a_closed_norm_still_goes() -> None:
    stream = STREAMS[0]
    model, batch = stream.model(), stream.batch(2)
    pruned = sc.prune(model, batch, sparsity=0.5)
    assert not pruned.plan.norms
    assert {row.layer: row.after for row in pruned.plan.widths} == {"stem": 6, "up": 4, "down": 6, "head": 3}
    assert distance(zeroed_by_hand(model, pruned.plan), pruned.model, batch) < 1e-9
