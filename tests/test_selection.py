"""Which channels go: scopes, targets, rounding, balances, ties."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from nets_for_tests import CASES, Case, Net, conv, head, pooled, randomised
from secateur.errors import InputError, NothingToPruneError, TargetError, UnknownNameError

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def chain(*widths: int) -> Net:
    """Convolutions named c0, c1, ... of the given widths, and a head."""

    def forward(s: Any, x: Tensor) -> Tensor:
        for number in range(len(widths)):
            x = F.relu(getattr(s, f"c{number}")(x))
        return s.head(pooled(x))

    parts = {
        f"c{number}": conv(before, after)
        for number, (before, after) in enumerate(zip((3, *widths), widths, strict=False))
    }
    return Net(forward, **parts, head=head(widths[-1]))


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def even_scores(graph: sc.Graph) -> dict[str, Tensor]:
    return {group.name: torch.ones(group.channels) for group in graph.groups}


def rising_scores(graph: sc.Graph) -> dict[str, Tensor]:
    return {group.name: torch.arange(1.0, group.channels + 1) for group in graph.groups}


def kept(plan: sc.Plan, tensor: str, dim: int = 0) -> tuple[int, ...] | None:
    return next((cut.kept for cut in plan.cuts if (cut.tensor, cut.dim) == (tensor, dim)), None)


def after(plan: sc.Plan) -> dict[str, int]:
    return {row.layer: row.after for row in plan.widths if row.layer != "head"}


# -- which ones ------------------------------------------------------------------------------------------------------


def test_the_lowest_scores_go() -> None:
    graph = sc.trace(chain(6), X)
    plan = sc.select(graph, {"c0": torch.tensor([3.0, 0.5, 2.0, 0.1, 5.0, 0.2])}, sc.Target(sparsity=0.5))
    assert kept(plan, "c0.weight") == kept(plan, "c0.bias") == kept(plan, "head.weight", 1) == (0, 2, 4)


def test_global_scope_compares_groups_and_layer_scope_does_not() -> None:
    graph = sc.trace(chain(8, 8), X)
    scores = {"c0": torch.arange(1.0, 9.0), "c1": torch.arange(101.0, 109.0)}
    half = sc.Target(sparsity=0.5)
    assert after(sc.select(graph, scores, half, scope="layer")) == {"c0": 4, "c1": 4}
    assert after(sc.select(graph, scores, half, scope="global", normalise=False)) == {"c0": 1, "c1": 7}


def test_global_scope_divides_by_the_groups_mean() -> None:
    graph = sc.trace(chain(8, 8), X)
    scores = {"c0": torch.arange(1.0, 9.0), "c1": 1000 * torch.arange(1.0, 9.0)}
    assert after(sc.select(graph, scores, sc.Target(sparsity=0.5), scope="global")) == {"c0": 4, "c1": 4}


def test_ties_are_broken_by_position_and_always_alike() -> None:
    graph = sc.trace(chain(8, 8), X)
    plans = [
        sc.select(graph, even_scores(graph), sc.Target(sparsity=0.5), scope=scope) for scope in ("global", "layer") * 2
    ]
    assert plans[0] == plans[2] and plans[1] == plans[3]
    assert kept(plans[1], "c0.weight") == (4, 5, 6, 7)


@pytest.mark.parametrize("value", [0.1, 0.3, 1.5768100536988188, 1e-30, 1e30])
@pytest.mark.parametrize("multiple", [3, 7, 8, 16])
def test_ties_and_rounding_do_not_disturb_the_order(value: float, multiple: int) -> None:
    graph = sc.trace(chain(39), X)
    scores = {"c0": torch.full((39,), value, dtype=torch.float64)}
    for sparsity in (0.3, 0.6, 0.95):
        plans = [
            sc.select(graph, scores, sc.Target(sparsity=sparsity), scope=scope, round_to=multiple, normalise=False)
            for scope in ("global", "layer")
        ]
        assert plans[0] == plans[1]


def test_scores_of_both_signs_and_of_mean_zero_are_ranked() -> None:
    graph = sc.trace(chain(4, 4), X)
    scores = {"c0": torch.tensor([-10.0, 10.0, -5.0, 5.0]), "c1": torch.zeros(4)}
    plan = sc.select(graph, scores, sc.Target(sparsity=0.5), scope="layer")
    assert kept(plan, "c0.weight") == (1, 3)
    plan = sc.select(graph, scores, sc.Target(sparsity=0.5), scope="global")
    assert plan.channels == (8, 4)


def test_permuting_a_layers_filters_permutes_its_scores_and_the_plan() -> None:
    model = randomised(chain(8, 6).double())
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    other = randomised(chain(8, 6).double())
    with torch.no_grad():
        other.c0.weight.copy_(model.c0.weight[order])
        other.c0.bias.copy_(model.c0.bias[order])
        other.c1.weight.copy_(model.c1.weight[:, order])
    x = X.double()
    assert torch.allclose(model(x), other(x))
    graph = sc.trace(model, x)
    for criterion in ("l1", "l2", "bn_scale"):
        mine = sc.score(graph, sc.observe(model, graph), criterion)
        theirs = sc.score(graph, sc.observe(other, graph), criterion)
        assert torch.allclose(mine["c0"][order], theirs["c0"]) and torch.allclose(mine["c1"], theirs["c1"])
        plans = [sc.select(graph, scores, sc.Target(sparsity=0.5), scope="layer") for scores in (mine, theirs)]
        assert {int(order[i]) for i in kept(plans[1], "c0.weight")} == set(kept(plans[0], "c0.weight"))


# -- how many --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.29, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_layer_scope_rounds_down_in_every_layer(sparsity: float) -> None:
    graph = sc.trace(chain(10, 7), X)
    plan = sc.select(graph, rising_scores(graph), sc.Target(sparsity=sparsity), scope="layer")
    for row in plan.widths[:2]:
        assert row.after == max(1, row.before - math.floor(sparsity * row.before + 1e-9))


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9])
def test_global_sparsity_is_met_within_one_channel_and_never_exceeded(sparsity: float) -> None:
    case = case_named("two blocks on one stream")
    graph = sc.trace(case.model(), case.batch(2))
    plan = sc.select(graph, rising_scores(graph), sc.Target(sparsity=sparsity), scope="global")
    assert plan.channels[0] == 3 * 8 + 4 + 6  # the stream counts once per layer that writes to it
    assert plan.removed_channels <= sparsity * plan.channels[0] + 1e-9
    assert sparsity * plan.channels[0] - plan.removed_channels < 3 or set(after(plan).values()) == {1}


@pytest.mark.parametrize("name", ["max_macs", "max_params"])
@pytest.mark.parametrize("fraction", [1.0, 0.9, 0.5, 0.25, 0.1])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_budgets_are_met_by_the_small_model_itself(name: str, fraction: float, scope: str) -> None:
    model = chain(12, 10, 8)
    graph = sc.trace(model, X)
    plan = sc.select(graph, rising_scores(graph), sc.Target(**{name: fraction}), scope=scope)
    counts = sc.count(sc.shrink(model, plan), X)
    assert plan.macs[1] == counts.macs and plan.params[1] == counts.params
    before, now = plan.macs if name == "max_macs" else plan.params
    assert now <= fraction * before
    assert fraction < 1 or plan.is_identity


def test_a_whole_number_is_an_absolute_budget_and_both_budgets_hold_together() -> None:
    graph = sc.trace(chain(12, 10), X)
    scores = rising_scores(graph)
    assert sc.select(graph, scores, sc.Target(max_params=500)).params[1] <= 500
    both = sc.select(graph, scores, sc.Target(max_params=500, max_macs=0.3))
    assert both.params[1] <= 500 and both.macs[1] <= 0.3 * both.macs[0]
    assert sc.select(graph, scores, sc.Target(max_params=10**9)).is_identity


def test_a_budget_may_be_of_some_modules_only() -> None:
    model = chain(12, 10, 8)
    graph = sc.trace(model, X)
    plan = sc.select(graph, rising_scores(graph), sc.Target(max_params=0.5, of=("c1", "c2.weight")))

    def counted(m: nn.Module) -> int:
        return sum(p.numel() for name, p in m.named_parameters() if name.startswith("c1.") or name == "c2.weight")

    small = sc.shrink(model, plan)
    assert 0.3 * counted(model) < counted(small) <= 0.5 * counted(model)
    whole = sc.select(graph, rising_scores(graph), sc.Target(max_params=0.5))
    assert whole.params[1] < plan.params[1]  # the first layer and the head did not count
    *_, last = sc.prune_steps(model, X, sc.Target(max_params=0.5, of="c1"), schedule="linear", steps=3)
    assert last.model.c1.weight.numel() + last.model.c1.bias.numel() <= 0.5 * (model.c1.weight.numel() + 10)


def test_a_budget_of_modules_that_are_not_there_is_refused() -> None:
    graph = sc.trace(chain(12, 10), X)
    with pytest.raises(TargetError, match=r"of='encoder\.\*' matches no parameter"):
        sc.select(graph, rising_scores(graph), sc.Target(max_params=0.5, of=("c1", "encoder.*")))
    for wrong in ({"sparsity": 0.5}, {"max_macs": 0.5}, {"max_macs": 0.5, "max_params": 0.5}):
        with pytest.raises(TargetError, match="of= says what max_params= counts"):
            sc.Target(**wrong, of="c1")


def test_an_unreachable_budget_names_the_limit_which_is_then_reached() -> None:
    model = chain(12, 10)
    graph = sc.trace(model, X)
    scores = rising_scores(graph)
    with pytest.raises(TargetError, match=r"max_params=3 cannot be reached: .* (\d+) remain") as caught:
        sc.select(graph, scores, sc.Target(max_params=3))
    least = int(str(caught.value).partition(" remain")[0].rpartition(" ")[2].replace(",", ""))
    plan = sc.select(graph, scores, sc.Target(max_params=least))
    assert plan.params[1] == least == sc.count(sc.shrink(model, plan), X).params
    with pytest.raises(TargetError):
        sc.select(graph, scores, sc.Target(max_params=least - 1))
    with pytest.raises(TargetError, match="cannot be reached"):
        sc.select(graph, scores, sc.Target(max_params=least), keep_at_least=2)


# -- patterns --------------------------------------------------------------------------------------------------------


def layered() -> Net:
    return Net(
        lambda s, x: s.head(
            pooled(F.relu(s.layer2(F.relu(s.layer1[1](F.relu(s.layer1[0](F.relu(s.stem(x))))))))),
        ),
        stem=conv(3, 10),
        layer1=nn.ModuleList([conv(10, 10), conv(10, 20)]),
        layer2=conv(20, 10),
        head=head(10),
    )


def test_patterns_say_how_much_each_layer_loses() -> None:
    graph = sc.trace(layered(), X)
    plan = sc.select(graph, rising_scores(graph), sc.Target(sparsity={"layer1.*": 0.3, "stem": 0.5}))
    assert after(plan) == {"stem": 5, "layer1.0": 7, "layer1.1": 14, "layer2": 10}


def test_a_pattern_that_matches_nothing_is_an_error_that_lists_the_layers() -> None:
    graph = sc.trace(layered(), X)
    with pytest.raises(TargetError, match=r"layr1.*Prunable: layer1\.0, layer1\.1, layer2, stem"):
        sc.select(graph, rising_scores(graph), sc.Target(sparsity={"layr1.*": 0.3, "stem": 0.5}))
    with pytest.raises(TargetError, match="head"):
        sc.select(graph, rising_scores(graph), sc.Target(sparsity={"head": 0.3}))


def test_layers_that_lose_channels_together_cannot_be_asked_to_differ() -> None:
    case = case_named("residual add")
    graph = sc.trace(case.model(), case.batch(2))
    with pytest.raises(TargetError, match="stem, two lose channels together"):
        sc.select(graph, rising_scores(graph), sc.Target(sparsity={"stem": 0.3, "two": 0.5}))
    plan = sc.select(graph, rising_scores(graph), sc.Target(sparsity={"two": 0.5}))
    assert after(plan) == {"stem": 4, "one": 6, "two": 4}


# -- restrictions ----------------------------------------------------------------------------------------------------


@pytest.mark.untraced
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("multiple", [2, 3, 4, 8])
def test_widths_that_shrink_end_at_a_multiple(scope: str, multiple: int) -> None:
    for case in CASES:
        model, batch = case.model(), case.batch(2)
        graph = sc.trace(model, batch)
        # in a layer of several groups each is rounded by itself, which is no use to a group narrower than the multiple
        partly = {layer for g in graph.prunable if g.channels * g.positions < multiple for layer in g.layers}
        plan = sc.select(graph, rising_scores(graph), sc.Target(sparsity=0.7), scope=scope, round_to=multiple)
        for row in plan.widths:
            assert row.after == row.before or row.after % multiple == 0 or row.layer in partly, (
                case.name,
                plan.table(),
            )


def test_every_layer_of_a_group_ends_at_a_multiple() -> None:
    model = Net(lambda s, x: s.head(pooled(F.glu(s.a(x), 1) + s.b(x))), a=conv(3, 32), b=conv(3, 16), head=head(16))
    graph = sc.trace(model, X)
    plan = sc.select(graph, rising_scores(graph), sc.Target(sparsity=0.5), round_to=8)
    assert after(plan) == {"a": 16, "b": 8}


def test_round_to_holds_when_the_width_was_no_multiple_before() -> None:
    graph = sc.trace(chain(13, 11), X)
    plan = sc.select(graph, rising_scores(graph), sc.Target(sparsity=0.4), scope="layer", round_to=4)
    assert after(plan) == {"c0": 8, "c1": 8}


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_keep_at_least_holds_in_every_group(scope: str) -> None:
    for case in CASES:
        graph = sc.trace(case.model(), case.batch(2))
        plan = sc.select(graph, even_scores(graph), sc.Target(sparsity=0.99), scope=scope, keep_at_least=3)
        for group in graph.prunable:
            left = group.channels - sum(_lost(plan, slot.tensor, slot.dim, slot.indices) for slot in group.slots[:1])
            assert left >= min(3, group.channels), (case.name, group.name)


def _lost(plan: sc.Plan, tensor: str, dim: int, indices: Any) -> int:
    stay = set(kept(plan, tensor, dim) or range(10**4))
    return sum(1 for row in indices.tolist() if not set(row) <= stay)


def test_balanced_halves_keep_equally_many_channels_whatever_their_scores() -> None:
    case = case_named("chunk into halves")
    graph = sc.trace(case.model(), case.batch(2))
    scores = {"a": torch.arange(4.0), "a#2": 100 + torch.tensor([5.0, 1.0, 7.0, 3.0]), "b": torch.full((6,), 50.0)}
    for scope in ("layer", "global"):
        plan = sc.select(graph, scores, sc.Target(sparsity={"a": 0.5}), scope=scope)
        assert kept(plan, "a.weight") == (2, 3, 4, 6)  # the two best of each half
        assert (kept(plan, "b.weight", 1), kept(plan, "c.weight", 1)) == ((2, 3), (0, 2))


# -- refused ---------------------------------------------------------------------------------------------------------


def test_options_that_cannot_be_meant() -> None:
    graph = sc.trace(chain(4), X)
    scores, half = rising_scores(graph), sc.Target(sparsity=0.5)
    with pytest.raises(UnknownNameError, match=r"no scope named 'layers'\. Did you mean 'layer'"):
        sc.select(graph, scores, half, scope="layers")
    for value in (0, -1, 2.0, True, "8"):
        with pytest.raises(InputError, match="round_to is a whole number of channels, at least 1; got"):
            sc.select(graph, scores, half, round_to=value)
        with pytest.raises(InputError, match="keep_at_least"):
            sc.select(graph, scores, half, keep_at_least=value)


def test_scores_that_do_not_fit() -> None:
    graph = sc.trace(chain(4), X)
    half = sc.Target(sparsity=0.5)
    with pytest.raises(InputError, match="no scores for group 'c0'"):
        sc.select(graph, {}, half)
    with pytest.raises(InputError, match=r"have shape \[5\], expected \[4\]"):
        sc.select(graph, {"c0": torch.ones(5)}, half)
    for bad in (math.nan, math.inf):
        with pytest.raises(InputError, match="not finite"):
            sc.select(graph, {"c0": torch.tensor([1.0, bad, 1.0, 1.0])}, half)


def test_nothing_to_prune_lists_every_group_with_its_reason() -> None:
    graph = sc.trace(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), torch.randn(2, 3))
    with pytest.raises(
        NothingToPruneError, match=r"0: .*normalised over this width.*2: its size is part of the model's output"
    ):
        sc.select(graph, {}, sc.Target(sparsity=0.5))


def test_a_plan_round_trips_through_json_and_prints_its_layers() -> None:
    for case in CASES:
        graph = sc.trace(case.model(), case.batch(2))
        plan = sc.select(graph, rising_scores(graph), sc.Target(sparsity=0.5))
        assert sc.Plan.from_json(plan.to_json()) == plan
        for row in plan.widths:
            assert f"{row.after}" in next(line for line in str(plan).splitlines() if line.startswith(row.layer))
