"""Attention in the ways people write it: hand-worked groups and widths, replaced modules, shrunk equals zeroed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import nn

import secateur as sc
from drawn_oracle import shifted
from nets_attention import ATTENTION, AttentionCase
from nets_for_tests import assert_shrunk_equals_zeroed, distance, zeroed_by_hand

FREE = [case for case in ATTENTION if case.free]


def plan_for(case: AttentionCase, model: nn.Module) -> sc.Plan:
    graph = sc.trace(model, case.batch(2), form=case.form)
    scores = sc.score(graph, sc.observe(model, graph), "l2")
    return sc.select(graph, scores, sc.Target(sparsity=0.5), scope="layer")


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_groups_and_locks_are_those_worked_out_by_hand(case: AttentionCase) -> None:
    graph = sc.trace(case.model(), case.batch(2), form=case.form)
    assert {group.name: group.channels for group in graph.prunable} == dict(case.free), graph.table()
    locked = {group.name: group.locked for group in graph.groups if group.locked is not None}
    assert set(locked) == set(case.locked), graph.table()
    for name, part in case.locked.items():
        assert part in locked[name], locked[name]
    assert tuple(graph.balances) == case.balances
    assert not graph.unknown


@pytest.mark.parametrize("case", FREE, ids=str)
def test_shrunk_equals_zeroed_with_widths_worked_out_by_hand(case: AttentionCase) -> None:
    model, batch = case.model(), case.batch(2)
    plan = plan_for(case, model)
    assert {row.layer: row.after for row in plan.widths} == dict(case.widths)
    assert tuple(replacement.module for replacement in plan.replacements) == case.replaced
    small = sc.shrink(model, plan)
    assert_shrunk_equals_zeroed(model, plan, small, [batch, case.batch(5)])
    assert sc.verify(model, plan, small, batch) < 1e-9
    before, after = sc.count(model, batch), sc.count(small, batch)
    assert plan.params == (before.params, after.params)
    assert plan.macs[1] == after.macs


@pytest.mark.untraced
@pytest.mark.parametrize("case", FREE, ids=str)
def test_one_index_off_is_noticed(case: AttentionCase) -> None:
    """In one tensor at a time. (Not in every one: a bias of keys adds the same to all logits of a query.)"""
    model, batch = case.model(), case.batch(2)
    plan = plan_for(case, model)
    zeroed, tried, noticed = zeroed_by_hand(model, plan), 0, 0
    for number, cut in enumerate(plan.cuts):
        kept = shifted(cut.kept, cut.size)
        if kept is not None:
            cuts = tuple(replace(c, kept=kept) if n == number else c for n, c in enumerate(plan.cuts))
            tried += 1
            noticed += distance(zeroed, sc.shrink(model, replace(plan, cuts=cuts)), batch) > 1e-6
    assert noticed > tried / 2


@pytest.mark.untraced
@pytest.mark.parametrize("case", FREE, ids=str)
@pytest.mark.parametrize("sparsity", [0.25, 0.75, 0.95])
def test_any_choice_of_channels_is_exact(case: AttentionCase, sparsity: float) -> None:
    model, batch = case.model(), case.batch(2)
    graph = sc.trace(model, batch, form=case.form)
    scores = sc.score(graph, sc.observe(model, graph), "random", seed=7)
    plan = sc.select(graph, scores, sc.Target(sparsity=sparsity), scope="layer")
    assert distance(zeroed_by_hand(model, plan), sc.shrink(model, plan), case.batch(3)) < 1e-9
