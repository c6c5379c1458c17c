"""Greedy choice, group after group: what is left of a model is what the next group is scored on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from nets_for_tests import CASES, Case, conv
from secateur.errors import DataError, InputError, TargetError, UnknownNameError
from secateur.ordering import select_in_order

HALF = sc.Target(sparsity=0.5)


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def traced(name: str = "plain chain") -> tuple[nn.Module, sc.Graph, Case]:
    case = case_named(name)
    model = case.model()
    return model, sc.trace(model, case.batch(2)), case


def batches(case: Case, count: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(case.batch(4 + number), torch.arange(4 + number) % 3) for number in range(count)]


def kept(plan: sc.Plan) -> dict[tuple[str, int], tuple[int, ...]]:
    return {(cut.tensor, cut.dim): cut.kept for cut in plan.cuts}


# -- what it chooses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores_that_no_choice_changes_give_what_select_gives(case: Case) -> None:
    model = case.model()
    graph = sc.trace(model, case.batch(2))
    scores = sc.score(graph, sc.observe(model, graph), "random", seed=7)
    for options in ({}, {"keep_at_least": 3}):
        expected = sc.select(graph, scores, HALF, scope="layer", **options)
        assert select_in_order(model, graph, sc.greedy("random"), HALF, seed=7, **options) == expected


def test_greedy_l1_by_hand() -> None:
    model = nn.Sequential(*[conv(*widths, bias=False) for widths in ((3, 6), (6, 5), (5, 4), (4, 2))]).double()
    weights = [layer.weight.detach().clone() for layer in model]
    graph = sc.trace(model, torch.randn(1, 3, 9, 9, dtype=torch.float64))
    found = kept(select_in_order(model, graph, sc.greedy("l1"), HALF))
    for number in range(3):
        sums = [float(sum(abs(w) for w in filter_.flatten())) for filter_ in weights[number]]
        gone = sorted(range(len(sums)), key=sums.__getitem__)[: len(sums) // 2]
        stay = tuple(i for i in range(len(sums)) if i not in gone)
        weights[number + 1][:, gone] = 0  # the next layer's sums leave these inputs out
        assert found[f"{number}.weight", 0] == found[f"{number + 1}.weight", 1] == stay


def test_each_group_sees_the_choices_before_it() -> None:
    seen: list[tuple[str, dict[str, list[int]]]] = []

    def watching(group: sc.Group, evidence: sc.Evidence) -> Tensor:
        zeros = {name: evidence.tensors[f"{name}.weight"].flatten(1).abs().sum(1) == 0 for name in ("a", "b")}
        seen.append((group.name, {name: zero.nonzero().flatten().tolist() for name, zero in zeros.items()}))
        return torch.arange(group.channels, dtype=torch.float64)

    model, graph, _ = traced()
    select_in_order(model, graph, sc.greedy(watching), HALF)
    assert seen == [("a", {"a": [], "b": []}), ("b", {"a": [0, 1, 2, 3], "b": []})]


def test_the_counts_are_those_of_scope_layer_also_for_budgets_and_patterns() -> None:
    model, graph, _ = traced()
    even = {group.name: torch.zeros(group.channels) for group in graph.prunable}
    for target in (sc.Target(max_macs=0.4), sc.Target(max_params=0.6), sc.Target(sparsity={"b": 0.5})):
        plan, expected = (
            select_in_order(model, graph, sc.greedy("l2"), target),
            sc.select(graph, even, target, scope="layer"),
        )
        assert plan.widths == expected.widths and plan.macs == expected.macs and not plan.is_identity
    with pytest.raises(TargetError, match="cannot be reached"):
        select_in_order(model, graph, sc.greedy("l2"), sc.Target(max_macs=1))


def test_a_group_that_loses_nothing_is_not_measured() -> None:
    def refuse(group: sc.Group, evidence: sc.Evidence) -> Tensor:
        raise AssertionError(group.name)

    model, graph, _ = traced()
    assert select_in_order(model, graph, sc.greedy(refuse), sc.Target(sparsity=0.0)).is_identity


# -- what it leaves alone, and what it needs -------------------------------------------------------------------------


def test_model_generators_and_data_are_left_alone_and_the_choice_is_the_same_again() -> None:
    model, graph, case = traced("batch norm")
    model.train()
    before, state = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    data = batches(case)
    plans = [select_in_order(model, graph, sc.greedy("taylor"), HALF, data, seed=1) for _ in range(2)]
    assert plans[0] == plans[1] and not plans[0].is_identity
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_data_is_gone_through_once_per_group() -> None:
    class Counted(list[tuple[Tensor, Tensor]]):
        rounds = 0

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            self.rounds += 1
            return super().__iter__()

    model, graph, case = traced()
    data = Counted(batches(case))
    select_in_order(model, graph, sc.greedy("output_norm"), HALF, data)
    assert data.rounds == len(graph.prunable) == 2
    with pytest.raises(DataError, match="exhausted generator"):
        select_in_order(model, graph, sc.greedy("output_norm"), HALF, iter(batches(case)))
    with pytest.raises(InputError, match="pass data="):
        select_in_order(model, graph, sc.greedy("output_norm"), HALF)


def test_what_is_no_greedy_criterion_is_refused() -> None:
    model, graph, _ = traced()
    assert select_in_order(model, graph, "l1_greedy", HALF) == select_in_order(model, graph, sc.greedy("l1"), HALF)
    with pytest.raises(InputError, match=r"pass greedy\('l1'\), or use `select`"):
        select_in_order(model, graph, "l1", HALF)
    with pytest.raises(UnknownNameError, match="Did you mean 'l1_greedy'"):
        select_in_order(model, graph, "l1_greedily", HALF)
    with pytest.raises(InputError, match="not finite"):
        select_in_order(model, graph, sc.greedy(lambda group, evidence: torch.full((group.channels,), torch.nan)), HALF)
