"""Schedules: hand-worked points, the laws of every name, and the turns of a net whose groups are known."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

import secateur as sc
from nets_for_tests import CASES
from secateur.errors import InputError, UnknownNameError
from secateur.schedules import LAYER_BY_LAYER, NAMES, in_turn, named_in, resolve, steps_of, turns

OF_PROGRESS = [name for name in NAMES if name != LAYER_BY_LAYER]


def graph_of(name: str) -> tuple[torch.nn.Module, Any, sc.Graph]:
    case = next(case for case in CASES if case.name == name)
    model, batch = case.model(), case.batch(2)
    return model, batch, sc.trace(model, batch)


def removed(name: str, final: float, steps: int) -> list[float]:
    due = resolve(name, final)
    return [final * due(step / steps) for step in range(1, steps + 1)]


# -- points --------------------------------------------------------------------------------------------------------


def test_geometric_halves_what_is_left() -> None:
    assert removed("geometric", 0.875, 3) == pytest.approx([0.5, 0.75, 0.875], abs=1e-12)


def test_geometric_with_a_fifth_per_round_keeps_powers_of_four_fifths() -> None:
    final = 1 - 0.8**5
    kept = [1 - gone for gone in removed("geometric", final, 5)]
    assert kept == pytest.approx([0.8, 0.64, 0.512, 0.4096, 0.32768], abs=1e-12)


def test_linear_gives_the_cumulative_levels() -> None:
    assert removed("linear", 0.4, 4) == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_cubic_by_hand() -> None:
    assert removed("cubic", 0.8, 4) == pytest.approx([0.8 * part for part in (37 / 64, 7 / 8, 63 / 64, 1)])


def test_one_shot_is_the_direct_way() -> None:
    assert removed("one_shot", 0.6, 3) == [0.6, 0.6, 0.6]


@pytest.mark.parametrize(("final", "steps"), [(0.04, 8), (0.13, 26), (0.005, 1), (0.5, 100), (0.042, 9), (0.0, 1)])
def test_stepwise_takes_half_a_percent_per_step(final: float, steps: int) -> None:
    assert steps_of("stepwise", final) == steps
    levels = [0.0, *removed("stepwise", final, steps)]
    parts = [after - before for before, after in pairwise(levels)]
    assert parts == pytest.approx([final / steps] * steps)
    assert max(parts) <= 0.005 + 1e-12


def test_the_number_of_steps_is_otherwise_the_callers() -> None:
    assert {steps_of(name, 0.5) for name in ("one_shot", "linear", "cubic", "geometric", lambda t: t)} == {None}


# -- laws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OF_PROGRESS)
@pytest.mark.parametrize("final", [0.0, 1e-9, 0.3, 0.9, 0.999999])
def test_every_schedule_rises_from_nothing_to_all(name: str, final: float) -> None:
    due = resolve(name, final)
    points = [due(step / 97) for step in range(98)]
    assert points[0] == 0 and points[-1] == 1 and points == sorted(points)
    assert due(0.5) == due(0.5)


def test_geometric_is_linear_in_the_limit_of_removing_nothing() -> None:
    assert resolve("geometric", 1e-12)(0.3) == pytest.approx(0.3)
    assert resolve("geometric", 0.0)(0.3) == 0.3


# -- the caller's own ----------------------------------------------------------------------------------------------


def test_a_callable_is_its_own_schedule() -> None:
    due = resolve(lambda progress: progress**2)
    assert [due(t) for t in (0.0, 0.5, 1.0)] == [0, 0.25, 1]


@pytest.mark.parametrize("wrong", [1.5, -0.1, math.nan, "all", None, True])
def test_a_fraction_that_cannot_be_due_is_refused_at_use(wrong: Any) -> None:
    due = resolve(lambda progress: wrong)
    with pytest.raises(InputError, match=r"in \[0, 1\]; at progress 0.5 it returned"):
        due(0.5)


def test_a_schedule_that_falls_is_refused_at_use() -> None:
    due = resolve(lambda progress: 1 - progress)
    due(0.25)
    with pytest.raises(InputError, match=r"never falls.*0.75 at progress 0.25 and is 0.5 at 0.5"):
        due(0.5)
    backwards = resolve(lambda progress: 1 - progress)
    backwards(0.5)
    with pytest.raises(InputError, match=r"0.75 at progress 0.25"):
        backwards(0.25)


@pytest.mark.parametrize("progress", [-0.1, 1.1, math.nan])
def test_progress_lies_between_nothing_and_all(progress: float) -> None:
    with pytest.raises(InputError, match="progress lies"):
        resolve("linear")(progress)


def test_what_cannot_be_resolved() -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean 'cubic'\? Known: cubic, geometric, layer_by_layer"):
        resolve("cubik")
    with pytest.raises(InputError, match="pass final="):
        resolve("geometric")
    with pytest.raises(InputError, match="pass final="):
        steps_of("stepwise")
    for wrong in (1.0, -0.1, 40, True, "half"):
        with pytest.raises(InputError, match=r"in \[0, 1\)"):
            resolve("geometric", wrong)  # type: ignore[arg-type]  # what a user may write
    with pytest.raises(InputError, match="no function of progress"):
        resolve(LAYER_BY_LAYER)
    with pytest.raises(InputError, match="pass graph="):
        steps_of(LAYER_BY_LAYER)
    with pytest.raises(InputError, match="a name or a callable"):
        resolve(3)  # type: ignore[arg-type]  # what a user may write


# -- layer by layer ------------------------------------------------------------------------------------------------


def widths(plan: sc.Plan) -> dict[str, int]:
    return {row.layer: row.after for row in plan.widths}


def test_turns_follow_the_order_of_execution() -> None:
    _, _, graph = graph_of("two blocks on one stream")
    assert turns(graph) == (("stem",), ("a",), ("c",))
    assert steps_of(LAYER_BY_LAYER, graph=graph) == 3


def test_balanced_groups_take_their_turn_together() -> None:
    balanced = [case for case in CASES if case.balances]
    assert balanced
    for case in balanced:
        graph = sc.trace(case.model(), case.batch(2))
        found = turns(graph)
        assert sorted(name for turn in found for name in turn) == sorted(group.name for group in graph.prunable)
        for part in graph.balances:
            assert sum(not set(part).isdisjoint(turn) for turn in found) == 1


def test_turns_that_a_later_group_links_become_one() -> None:
    _, _, graph = graph_of("two blocks on one stream")
    linked = replace(graph, balances=(("stem", "c"),))
    assert turns(linked) == (("stem", "c"), ("a",))


def test_each_step_brings_the_next_layer_to_its_full_target() -> None:
    model, batch, dense = graph_of("two blocks on one stream")
    found, graph = [], dense
    for number in range(1, 4):
        free = in_turn(graph, dense, number)
        scores = sc.score(free, sc.observe(model, free), "l1")
        plan = sc.select(free, scores, sc.Target(sparsity=0.5), scope="layer", dense=dense)
        model = sc.shrink(model, plan)
        graph = sc.trace(model, batch)
        found.append(widths(plan))
    after = {"stem": 4, "a": 4, "b": 4, "c": 6, "d": 4, "head": 3}
    assert found == [after, {**after, "a": 2}, {**after, "a": 2, "c": 3}]


def test_layer_by_layer_ends_where_one_step_would() -> None:
    complete = 0
    for case in CASES[::3]:
        model, batch = case.model(), case.batch(2)
        dense = graph = sc.trace(model, batch)
        every, plan = True, None
        for number in range(1, len(turns(dense)) + 1):
            free = in_turn(graph, dense, number)
            every &= bool(free.prunable)  # a grouped convolution may change its kind as it shrinks
            plan = sc.select(free, sc.score(free, sc.observe(model, free), "l1"), sc.Target(sparsity=0.5), dense=dense)
            assert plan.is_identity or free.prunable
            model = sc.shrink(model, plan)
            graph = sc.trace(model, batch)
        if plan is not None and every:
            assert widths(plan) == dict(case.widths), case.name
            complete += 1
    assert complete > 8


def test_a_turn_that_does_not_exist_is_an_error() -> None:
    _, _, graph = graph_of("plain chain")
    for number in (0, 3, -1):
        with pytest.raises(InputError, match="are 1 to 2 for this model"):
            in_turn(graph, graph, number)


def test_patterns_are_narrowed_to_the_layer_whose_turn_it_is() -> None:
    _, _, graph = graph_of("two blocks on one stream")
    patterns = {"a": 0.5, "[bs]*": 0.25, "c": 0.75}
    assert named_in(patterns, in_turn(graph, graph, 1)) == {"[bs]*": 0.25}
    assert named_in(patterns, in_turn(graph, graph, 2)) == {"a": 0.5}
    assert named_in({"c": 0.75}, in_turn(graph, graph, 2)) == {}
