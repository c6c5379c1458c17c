"""Laws over networks that hypothesis makes up: branches, sums, concatenations, splits, groups, norms, gates, views."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from nets_for_tests import conv, distance, outputs_of, pooled, randomised, zeroed_by_hand

SIDE = 4
X = torch.randn(2, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randn(3, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# -- the grammar: a net is a list of blocks, each of which maps (N, C, H, W) to (N, C', H, W) --------------------------


class Norm(nn.Sequential):
    """A norm and an activation."""

    def __init__(self, width: int, kind: str) -> None:
        norms: dict[str, Callable[[], nn.Module]] = {
            "batch": lambda: nn.BatchNorm2d(width),
            "group": lambda: nn.GroupNorm(math.gcd(width, 4), width),
            "instance": lambda: nn.InstanceNorm2d(width, affine=True),
            "prelu": lambda: nn.PReLU(width),
            "none": nn.Identity,
        }
        super().__init__(norms[kind](), nn.GELU() if width % 4 else nn.ReLU(inplace=True))


class Plain(nn.Module):
    """Convolution, norm, activation; perhaps in groups, perhaps depthwise."""

    def __init__(self, inputs: int, outputs: int, kind: str, groups: int, norm: str) -> None:
        super().__init__()
        if kind == "depthwise":
            groups, outputs = inputs, inputs * (1 + outputs % 2)
        elif kind == "grouped":
            groups = math.gcd(inputs, groups)
            outputs = max(groups, outputs // groups * groups)
        else:
            groups = 1
        layer = nn.ConvTranspose2d if kind == "transposed" else nn.Conv2d
        self.conv = layer(inputs, outputs, 3, padding=1, groups=groups, bias=norm != "batch")
        self.norm = Norm(outputs, norm)
        self.width = outputs

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Residual(nn.Module):
    """x + f(x), with or without a projection."""

    def __init__(self, inputs: int, middle: int, outputs: int, norm: str) -> None:
        super().__init__()
        self.one = Plain(inputs, middle, "dense", 1, norm)
        self.two = conv(middle, outputs)
        self.skip = nn.Identity() if inputs == outputs else conv(inputs, outputs, 1)
        self.width = outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(self.one(x))
        y += self.skip(x)
        return F.relu(y)


class Branches(nn.Module):
    """Two branches, concatenated, perhaps with the input too."""

    def __init__(self, inputs: int, first: int, second: int, keep: bool) -> None:
        super().__init__()
        self.first, self.second, self.keep = conv(inputs, first, 1), conv(inputs, second), keep
        self.width = first + second + inputs * keep

    def forward(self, x: Tensor) -> Tensor:
        parts = [F.relu(self.first(x)), torch.sigmoid(self.second(x))]
        return torch.cat([*parts, x] if self.keep else parts, dim=1)


class Halves(nn.Module):
    """The channels in two halves, which go different ways."""

    def __init__(self, inputs: int, half: int, how: str, glue: str) -> None:
        super().__init__()
        self.make = conv(inputs, 2 * half)
        self.half, self.how, self.glue = half, how, glue
        self.way = conv(half, half)
        self.width = 2 * half if glue == "cat" else half

    def forward(self, x: Tensor) -> Tensor:
        h = self.make(x)
        if self.how == "chunk":
            a, b = h.chunk(2, 1)
        elif self.how == "split":
            a, b = torch.split(h, self.half, dim=1)
        else:
            c = h.shape[1] // 2
            a, b = h[:, :c], h[:, c:]
        if self.glue == "gate":
            return a * torch.sigmoid(b)
        return torch.cat([self.way(a), F.relu(b)], 1) if self.glue == "cat" else F.relu(self.way(a) + self.way(b))


class Excite(nn.Module):
    """Squeeze and excite."""

    def __init__(self, inputs: int, middle: int) -> None:
        super().__init__()
        self.down, self.up, self.width = nn.Linear(inputs, middle), nn.Linear(middle, inputs), inputs

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.up(F.relu(self.down(pooled(x)))))
        return x * gate.view(x.shape[0], x.shape[1], 1, 1)


class Shuffle(nn.Module):
    """Channel shuffle."""

    def __init__(self, inputs: int, ways: int) -> None:
        super().__init__()
        self.ways, self.width = math.gcd(inputs, ways), inputs

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        return x.view(n, self.ways, c // self.ways, height, width).transpose(1, 2).reshape(n, c, height, width)


class Odd(nn.Module):
    """What locks or ties channels: a mean over them, a softmax, a fixed pick, pairs, a sum."""

    def __init__(self, inputs: int, kind: str) -> None:
        super().__init__()
        self.kind, self.width = kind, inputs
        self.mix = conv(1, inputs)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "mean":
            return x + self.mix(x.mean(1, keepdim=True))
        if self.kind == "sum":
            return F.relu(self.mix(x.sum(1, keepdim=True)))
        if self.kind == "softmax":
            return x * x.softmax(1)
        if self.kind == "pick":
            return x + self.mix(x[:, 1:2])
        if self.kind == "norm":
            return x / (1 + x.norm(dim=1, keepdim=True))
        return torch.stack([x, -x], 2).amax(2)


class Ends(nn.Module):
    """From (N, C, H, W) to three numbers, by pooling or by flattening."""

    def __init__(self, inputs: int, how: str, middle: int) -> None:
        super().__init__()
        self.how, self.flat = how, inputs * SIDE * SIDE
        self.fc = nn.Linear(inputs if how == "pool" else self.flat, middle)
        self.head = nn.Linear(middle, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "pool":
            x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        elif self.how == "view":
            x = x.view(-1, self.flat)
        else:
            x = x.flatten(1)
        return self.head(torch.tanh(self.fc(x)))


WIDTH = st.integers(2, 8)
NORMS = st.sampled_from(["batch", "group", "instance", "prelu", "none"])
Block = Callable[[int], Any]

BLOCKS: list[st.SearchStrategy[Block]] = [
    st.builds(
        lambda width, kind, groups, norm: lambda c: Plain(c, width, kind, groups, norm),
        WIDTH,
        st.sampled_from(["dense", "depthwise", "grouped", "transposed"]),
        st.sampled_from([2, 3, 4]),
        NORMS,
    ),
    st.builds(
        lambda middle, width, norm, same: lambda c: Residual(c, middle, c if same else width, norm),
        WIDTH,
        WIDTH,
        NORMS,
        st.booleans(),
    ),
    st.builds(lambda first, second, keep: lambda c: Branches(c, first, second, keep), WIDTH, WIDTH, st.booleans()),
    st.builds(
        lambda half, how, glue: lambda c: Halves(c, half, how, glue),
        WIDTH,
        st.sampled_from(["chunk", "split", "slice"]),
        st.sampled_from(["cat", "add", "gate"]),
    ),
    st.builds(lambda middle: lambda c: Excite(c, middle), WIDTH),
    st.builds(lambda ways: lambda c: Shuffle(c, ways), st.sampled_from([2, 3])),
    st.builds(
        lambda kind: lambda c: Odd(c, kind), st.sampled_from(["mean", "sum", "softmax", "pick", "norm", "pairs"])
    ),
]


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    """A net of two to five blocks in float64 and eval mode, all of whose tensors are random."""
    width = draw(st.integers(3, 8))
    layers: list[nn.Module] = [conv(3, width)]
    for _ in range(draw(st.integers(1, 4))):
        block = draw(st.one_of(BLOCKS))(width)
        layers.append(block)
        width = block.width
    layers.append(Ends(width, draw(st.sampled_from(["pool", "flatten", "view"])), draw(WIDTH)))
    return randomised(nn.Sequential(*layers).double(), draw(st.integers(0, 3))).eval()


@dataclass(frozen=True)
class Wish:
    """What to ask of a net."""

    target: sc.Target
    scope: str
    round_to: int
    keep_at_least: int
    criterion: str


WISHES = st.builds(
    Wish,
    st.one_of(
        st.builds(lambda s: sc.Target(sparsity=s), st.floats(0, 0.95)),
        st.builds(lambda f: sc.Target(max_macs=f), st.floats(0.3, 1)),
        st.builds(lambda f: sc.Target(max_params=f), st.floats(0.3, 1)),
    ),
    st.sampled_from(["layer", "global"]),
    st.sampled_from([1, 1, 2, 3, 4]),
    st.sampled_from([1, 1, 2, 3]),
    st.sampled_from(["l1", "l2", "bn_scale", "random"]),
)


def planned(model: nn.Module, wish: Wish) -> tuple[sc.Graph, dict[str, Tensor], sc.Plan] | None:
    """Graph, scores and plan; None where nothing can go, or the budget lies below what the options allow."""
    graph = sc.trace(model, X)
    if not graph.prunable:
        return None
    scores = sc.score(graph, sc.observe(model, graph), wish.criterion)
    options = {"scope": wish.scope, "round_to": wish.round_to, "keep_at_least": wish.keep_at_least}
    try:
        return graph, scores, sc.select(graph, scores, wish.target, **options)
    except sc.SecateurError as error:
        assert "cannot be reached" in str(error)
        return None


def snapshot(model: nn.Module) -> list[Any]:
    """Everything of a model that could have been changed."""
    tensors = [
        (name, t.detach().numpy().tobytes(), t.requires_grad)
        for name, t in [*model.named_parameters(), *model.named_buffers()]
    ]
    rest = [
        (name, key, repr(value))
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key not in ("_parameters", "_buffers", "_modules")
    ]
    return [*tensors, *rest]


# -- the laws --------------------------------------------------------------------------------------------------------


def check_everything(model: nn.Module, wish: Wish) -> None:
    before = snapshot(model)
    found = planned(model, wish)
    if found is None:
        return
    graph, _, plan = found
    small = sc.shrink(model, plan)
    assert snapshot(model) == before
    check_equality(model, plan, small)
    check_counts(model, plan, small)
    check_target(graph, plan, wish)
    check_restrictions(graph, plan, wish)
    assert sc.Plan.from_json(plan.to_json()) == plan
    check_composition(model, plan, small, wish)


def check_equality(model: nn.Module, plan: sc.Plan, small: nn.Module) -> None:
    for batch in (X, Y):
        off = distance(zeroed_by_hand(model, plan), small, batch)
        assert off < 1e-9, f"shrunk is off by {off:.1e}"
    if plan.is_identity:
        assert torch.equal(outputs_of(model, X)[0], outputs_of(small, X)[0])
    assert sc.verify(model, plan, small, X) < 1e-9


def check_counts(model: nn.Module, plan: sc.Plan, small: nn.Module) -> None:
    before, after = sc.count(model, X), sc.count(small, X)
    assert plan.macs == (before.macs, after.macs)
    assert plan.params == (before.params, after.params)


def kept_of(graph: sc.Graph, plan: sc.Plan) -> dict[str, int]:
    """Channels that every group keeps, read off its first slot."""
    stay = {(cut.tensor, cut.dim): set(cut.kept) for cut in plan.cuts}
    counts = {}
    for group in graph.groups:
        slot = group.slots[0]
        rows = stay.get((slot.tensor, slot.dim))
        counts[group.name] = sum(1 for row in slot.indices.tolist() if rows is None or set(row) <= rows)
    return counts


def step_sizes(graph: sc.Graph, wish: Wish) -> int:
    """More channels than any one step removes, each counted as often as its group counts."""
    by_name = {group.name: group for group in graph.groups}
    parts = [*graph.balances, *((group.name,) for group in graph.prunable)]
    return max(sum(by_name[name].weight for name in part) for part in parts) * max(1, wish.round_to)


def check_target(graph: sc.Graph, plan: sc.Plan, wish: Wish) -> None:
    kept = kept_of(graph, plan)
    target = wish.target
    if target.sparsity is not None:
        wanted = target.sparsity * plan.channels[0]
        assert plan.removed_channels <= wanted + 1e-6
        if wish.scope == "layer":
            for group in graph.prunable:
                assert group.channels - kept[group.name] <= target.sparsity * group.channels + 1e-6
        elif wish.keep_at_least == wish.round_to == 1 and min(kept[group.name] for group in graph.prunable) > 1:
            assert wanted - plan.removed_channels < step_sizes(graph, wish)
        return
    now, whole, limit = (
        (plan.macs[1], plan.macs[0], target.max_macs)
        if target.max_macs is not None
        else (plan.params[1], plan.params[0], target.max_params)
    )
    assert now <= limit * whole
    assert plan.is_identity or limit < 1


def check_restrictions(graph: sc.Graph, plan: sc.Plan, wish: Wish) -> None:
    kept = kept_of(graph, plan)
    widths = {(cut.tensor, cut.dim): len(cut.kept) for cut in plan.cuts}
    shared = Counter(place for group in graph.prunable for place in {(slot.tensor, slot.dim) for slot in group.outputs})
    for group in graph.groups:
        lost = group.channels - kept[group.name]
        assert group.locked is None or lost == 0
        assert kept[group.name] >= min(wish.keep_at_least, group.channels)
        for slot in group.outputs if lost else ():
            place = slot.tensor, slot.dim
            assert shared[place] > 1 or widths[place] % wish.round_to == 0
    for part in graph.balances:
        assert len({kept[name] for name in part}) == 1


def check_composition(model: nn.Module, plan: sc.Plan, small: nn.Module, wish: Wish) -> None:
    found = planned(small, Wish(sc.Target(sparsity=0.4), wish.scope, 1, 1, "random"))
    if found is None:
        return
    later = found[2]
    twice, once = sc.shrink(small, later), sc.shrink(model, plan.then(later))
    assert snapshot(twice) == snapshot(once)
    check_equality(model, plan.then(later), once)


def check_budget_is_met_within_one_step(model: nn.Module, fraction: float, name: str, scope: str) -> None:
    """One step fewer exceeds the budget: asking for one MAC or parameter less than the plan has left costs a step."""
    wish = Wish(sc.Target(**{name: fraction}), scope, 1, 1, "l2")
    found = planned(model, wish)
    if found is None or found[2].is_identity:
        return
    graph, scores, plan = found
    costs = plan.macs if name == "max_macs" else plan.params
    kept = kept_of(graph, plan)
    lighter = [p for p in all_shorter_plans(graph, scores, scope, name, costs[0]) if p is not None]
    assert lighter, kept
    limit = int(fraction * costs[0])
    allowed = [cost for cost in lighter if cost <= limit]
    assert costs[1] == max(allowed)


def all_shorter_plans(graph: sc.Graph, scores: dict[str, Tensor], scope: str, name: str, whole: int) -> list[int]:
    """The costs along the sequence of steps: each is asked for exactly, then one less, and so on."""
    found, budget = [], whole
    while True:
        try:
            plan = sc.select(graph, scores, sc.Target(**{name: budget}), scope=scope)
        except sc.SecateurError:
            return found
        cost = plan.macs[1] if name == "max_macs" else plan.params[1]
        found.append(cost)
        budget = cost - 1


@given(networks(), WISHES)
def test_every_law_holds_on_generated_nets(model: nn.Module, wish: Wish) -> None:
    check_everything(model, wish)


@settings(max_examples=10)
@given(
    networks(), st.floats(0.4, 0.95), st.sampled_from(["max_macs", "max_params"]), st.sampled_from(["layer", "global"])
)
def test_budgets_are_met_within_one_step(model: nn.Module, fraction: float, name: str, scope: str) -> None:
    check_budget_is_met_within_one_step(model, fraction, name, scope)


@settings(max_examples=15)
@given(networks(), st.floats(0.3, 0.8))
def test_zeroing_is_visible_on_generated_nets(model: nn.Module, sparsity: float) -> None:
    """The oracle above is not vacuous: what it compares differs from the dense model wherever something was cut."""
    found = planned(model, Wish(sc.Target(sparsity=sparsity), "layer", 1, 1, "random"))
    if found is not None and found[2].cuts:
        assert distance(model, zeroed_by_hand(model, found[2]), X) > 1e-9


@settings(max_examples=10)
@given(networks(), st.sampled_from(["layer", "global"]))
def test_pruning_in_steps_composes_on_generated_nets(model: nn.Module, scope: str) -> None:
    if not sc.trace(model, X).prunable:
        return
    before = copy.deepcopy(model)
    *_, last = sc.prune_steps(model, X, sc.Target(sparsity=0.5), scope=scope, steps=2)
    assert snapshot(sc.shrink(model, last.total)) == snapshot(last.model)
    assert last.total.removed_channels <= 0.5 * last.total.channels[0]
    assert all(
        torch.equal(a, b) for a, b in zip(before.state_dict().values(), model.state_dict().values(), strict=True)
    )


@pytest.mark.slow
@settings(settings.get_profile("thorough"))
@given(networks(), WISHES)
def test_every_law_holds_on_a_thousand_generated_nets(model: nn.Module, wish: Wish) -> None:
    check_everything(model, wish)
