"""Patterns beyond plain layers: hand-worked groups and widths, shrunk equals zeroed, and nets that invite mistakes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import secateur as sc
from nets_for_tests import Case, Net, Trap, distance, head, outputs_of, randomised, zeroed_by_hand
from nets_patterns import PATTERN_TRAPS, PATTERNS
from secateur.coupling.memory import overlaps

HALF = sc.Target(sparsity=0.5)


def plan_for(model: nn.Module, batch: object, target: sc.Target = HALF) -> sc.Plan:
    graph = sc.trace(model, batch)
    return sc.select(graph, sc.score(graph, sc.observe(model, graph), "l2"), target, scope="layer")


@pytest.mark.parametrize("case", PATTERNS, ids=str)
def test_groups_and_locks_are_those_worked_out_by_hand(case: Case) -> None:
    graph = sc.trace(case.model(), case.batch(2))
    assert {group.name: group.channels for group in graph.prunable} == dict(case.free), graph.table()
    locked = {group.name: group.locked for group in graph.groups if group.locked is not None}
    assert set(locked) == set(case.locked), locked
    for name, part in case.locked.items():
        assert part in locked[name], locked[name]
    assert tuple(graph.unknown) == case.unknown
    assert tuple(graph.balances) == case.balances


@pytest.mark.parametrize("case", [case for case in PATTERNS if case.free], ids=str)
def test_shrunk_equals_zeroed_with_widths_worked_out_by_hand(case: Case) -> None:
    model, batch = case.model(), case.batch(2)
    plan = plan_for(model, batch)
    assert {row.layer: row.after for row in plan.widths} == dict(case.widths)
    assert not plan.replacements
    small, original = sc.shrink(model, plan), zeroed_by_hand(model, plan)
    for size in (2, 5):
        inputs = case.batch(size)
        assert distance(original, small, inputs) < 1e-9
        assert distance(model, original, inputs) > 1e-4, "vacuous: zeroing changes nothing"
        assert all(torch.isfinite(output).all() for output in outputs_of(original, inputs))
        assert all(output.std() > 1e-6 for output in outputs_of(original, inputs)), "vacuous: the output is constant"
    assert sc.verify(model, plan, small, batch) < 1e-9


@pytest.mark.untraced
@pytest.mark.parametrize("case", [case for case in PATTERNS if case.free], ids=str)
def test_one_index_off_is_noticed(case: Case) -> None:
    model, batch = case.model(), case.batch(2)
    plan = plan_for(model, batch)
    noticed = 0
    for number, cut in enumerate(plan.cuts):
        shifted = _shifted(cut.kept, cut.size)
        if shifted is None:
            continue
        cuts = tuple(replace(c, kept=shifted) if n == number else c for n, c in enumerate(plan.cuts))
        small = sc.shrink(model, replace(plan, cuts=cuts))
        noticed += distance(zeroed_by_hand(model, plan), small, batch) > 1e-6
    assert noticed >= 1


def _shifted(kept: tuple[int, ...], size: int) -> tuple[int, ...] | None:
    """The same number of positions, one of them its neighbour."""
    free = set(range(size)) - set(kept)
    for spot, place in enumerate(kept):
        for other in (place + 1, place - 1):
            if other in free:
                return tuple(sorted({*kept[:spot], other, *kept[spot + 1 :]}))
    return None


@pytest.mark.parametrize("trap", PATTERN_TRAPS, ids=str)
def test_a_net_that_invites_a_mistake_is_locked_or_right(trap: Trap) -> None:
    model = randomised(trap.build().double()).eval()
    batch = torch.randn(2, *trap.shape, dtype=torch.float64)
    graph = sc.trace(model, batch)
    if not graph.prunable:
        return
    scores = sc.score(graph, sc.observe(model, graph), "random")
    for sparsity in (0.25, 0.5, 0.95):
        plan = sc.select(graph, scores, sc.Target(sparsity=sparsity), scope="layer")
        assert distance(zeroed_by_hand(model, plan), sc.shrink(model, plan), batch) < 1e-9


# -- what else must hold for layers with state of their own ----------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_describes_itself_trains_and_shrinks_again(kind: type[nn.RNNBase]) -> None:
    model = Net(lambda s, x: s.head(s.r(x)[0].mean(1)), r=kind(4, 8, num_layers=2, batch_first=True), head=head(8))
    batch = torch.randn(2, 5, 4)
    once = sc.prune(model, batch, sparsity=0.5).model
    assert (once.r.input_size, once.r.hidden_size) == (4, 4)
    assert [id(w) for w in once.r._flat_weights] == [id(w) for w in once.r.parameters()]
    twice = sc.prune(once, batch, sparsity=0.5).model
    assert twice.r.hidden_size == 2
    twice(batch).sum().backward()
    assert all(parameter.grad is not None for parameter in twice.parameters())


def test_a_weight_that_a_hook_computes_has_its_new_shape_at_once() -> None:
    case = next(case for case in PATTERNS if case.name == "weight norm by hooks")
    small = sc.prune(case.model(), case.batch(2), sparsity=0.5).model
    assert small.a.weight.shape == (4, 3, 3, 3)
    assert (small.b.in_channels, small.b.out_channels) == (4, 3)


def test_the_size_of_a_normalised_filter_is_its_gain() -> None:
    case = next(case for case in PATTERNS if case.name == "weight norm by hooks")
    model = case.model()
    with torch.no_grad():
        model.a.weight_g.copy_(torch.arange(8.0).view(8, 1, 1, 1) + 1)
        model.a.weight_v.mul_(torch.arange(8.0, 0, -1).view(8, 1, 1, 1))  # the lengths of directions mean nothing
    plan = plan_for(model, case.batch(2))
    kept = next(cut.kept for cut in plan.cuts if cut.tensor == "a.weight_g")
    assert kept == (4, 5, 6, 7)


# -- views of one memory ---------------------------------------------------------------------------------------------


def test_views_overlap_iff_they_share_an_element() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = {True: 0, False: 0}
    for _ in range(400):
        base = torch.zeros(4, 3, 6)
        left, right = (_random_view(base, generator) for _ in range(2))
        share = bool(_elements(left) & _elements(right))
        seen[share] += 1
        if share:
            assert overlaps(left, right)
        elif left.stride() == right.stride():
            assert not overlaps(left, right)
    assert min(seen.values()) > 20


def _random_view(base: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    for dim in range(base.dim()):
        first, last = sorted(torch.randint(0, base.shape[dim] + 1, (2,), generator=generator).tolist())
        base = base.narrow(dim, first, last - first)
    return base


def _elements(view: torch.Tensor) -> set[int]:
    places = torch.arange(4 * 3 * 6)
    return set(torch.as_strided(places, view.shape, view.stride(), view.storage_offset()).flatten().tolist())
