"""The whole story: prune, prune_steps, repair, and the optimizer that comes along."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from nets_for_tests import CASES, Case, Net, assert_shrunk_equals_zeroed, conv, distance, head, pooled, zeroed_by_hand
from secateur.criteria.sequential import Greedy
from secateur.criteria.table import CRITERIA
from secateur.errors import DataError, InputError, PlanMismatchError, TargetError, UnknownNameError
from secateur.schedules import SCHEDULES

HALF = sc.Target(sparsity=0.5)


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def batches(case: Case, count: int = 3, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (2 + torch.randn(size, *case.shape, generator=generator, dtype=torch.float64), torch.arange(size) % 3)
        for _ in range(count)
    ]


def same_state(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- prune -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", sorted(name for name in CRITERIA if not isinstance(CRITERIA[name], Greedy)))
def test_prune_is_its_steps_in_one_call(criterion: str) -> None:
    case = case_named("batch norm")
    model, batch, data = case.model(), case.batch(2), batches(case)
    pruned = sc.prune(model, batch, criterion=criterion, sparsity=0.5, data=data, seed=3)

    graph = sc.trace(model, batch)
    facts = sc.observe(model, graph, data, getattr(CRITERIA[criterion], "needs", ()), seed=3)
    plan = sc.select(graph, sc.score(graph, facts, criterion, seed=3), HALF)
    small = sc.shrink(model, plan)
    assert pruned.plan == plan
    assert same_state(pruned.model, sc.repair(small, data, dense=model, plan=plan, seed=3))
    assert_shrunk_equals_zeroed(model, plan, small, [batch])


def test_the_summary_says_what_happened() -> None:
    case = case_named("an op without a rule")
    model, batch = case.model(), case.batch(2)
    pruned = sc.prune(model, batch, criterion="l1", sparsity=0.5)
    summary, before, after = pruned.summary, sc.count(model, batch), sc.count(pruned.model, batch)
    assert summary.criterion == "l1" and summary.repaired is False
    assert 0 <= summary.verified_difference < 1e-9
    assert summary.macs == (before.macs, after.macs) and summary.params == (before.params, after.params)
    assert summary.unknown == {"aten._fft_r2c": 1} and "no rule" in summary.locked["b"]
    assert "no: that takes data=" in str(summary) and "aten._fft_r2c" in str(summary)
    assert sc.prune(model, batch, sparsity=0.5, data=[batch]).summary.repairs == ("least_squares",)  # no BatchNorm
    normed = case_named("batch norm")
    assert sc.prune(normed.model(), normed.batch(2), sparsity=0.5, data=[normed.batch(2)]).summary.repaired is True
    assert "removes 4 of 8 channels" in repr(pruned)


def test_prune_is_deterministic_and_the_seed_matters_for_random_only() -> None:
    case = case_named("batch norm")
    model, batch = case.model(), case.batch(2)

    def plans(criterion: str, seed: int) -> sc.Plan:
        return sc.prune(model, batch, criterion=criterion, sparsity=0.5, seed=seed).plan

    assert plans("random", 1) == plans("random", 1) != plans("random", 2)
    assert plans("l2", 1) == plans("l2", 2)


def test_options_reach_the_selection() -> None:
    case = case_named("plain chain")
    model, batch = case.model(), case.batch(2)

    def widths(**options: Any) -> dict[str, int]:
        return {row.layer: row.after for row in sc.prune(model, batch, **options).plan.widths}

    assert widths(sparsity=0.5, round_to=4) == {"a": 4, "b": 4, "head": 3}
    assert widths(sparsity=0.99, keep_at_least=5) == {"a": 5, "b": 5, "head": 3}
    assert widths(sparsity=0.5, ignore=["a"]) == {"a": 8, "b": 3, "head": 3}
    assert widths(sparsity={"a": 0.25}) == {"a": 6, "b": 6, "head": 3}
    assert sum(widths(sparsity=0.5, scope="global").values()) == 7 + 3


def test_what_the_engine_overlooks_is_locked_by_the_proof_and_the_rest_still_shrinks() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        h = F.relu(s.a(x))
        return s.head(pooled(F.relu(s.b(h)))) * sum(1.0 for _ in range(h.shape[1]))

    model = Net(forward, a=conv(3, 8), b=conv(8, 6), head=head(6))
    pruned = sc.prune(model, torch.randn(2, 3, 6, 6), sparsity=0.5)
    assert {row.layer: row.after for row in pruned.plan.widths} == {"a": 8, "b": 3, "head": 3}
    assert set(pruned.summary.locked) == {"a", "head"}


# -- repair ----------------------------------------------------------------------------------------------------------


def test_repaired_statistics_are_the_averages_over_the_batches() -> None:
    case = case_named("batch norm")
    data = batches(case, count=4)
    model = case.model().train()
    model.bn1.momentum = 0.3
    repaired = sc.repair(model, data)
    means, variances, second = [], [], []
    with torch.no_grad():
        for x, _ in data:
            h = model.a(x)
            means.append(h.mean((0, 2, 3)))
            variances.append(h.var((0, 2, 3), unbiased=True))
            normal = F.batch_norm(h, None, None, model.bn1.weight, model.bn1.bias, training=True)
            second.append(model.b(F.relu(normal)).mean((0, 2, 3)))
    assert torch.allclose(repaired.bn1.running_mean, torch.stack(means).mean(0), rtol=1e-12)
    assert torch.allclose(repaired.bn1.running_var, torch.stack(variances).mean(0), rtol=1e-12)
    assert torch.allclose(repaired.bn2.running_mean, torch.stack(second).mean(0), rtol=1e-12)


def test_repair_changes_nothing_but_the_statistics() -> None:
    case = case_named("batch norm")
    model = case.model().train()
    model.bn2.eval()
    model.bn1.momentum = 0.3
    before = copy.deepcopy(model)
    repaired = sc.repair(model, batches(case))
    assert same_state(model, before) and model.training and not model.bn2.training
    assert repaired.training and not repaired.bn2.training
    assert repaired.bn1.momentum == 0.3 and repaired.bn2.momentum == 0.1
    changed = {
        name for name, tensor in repaired.state_dict().items() if not torch.equal(tensor, before.state_dict()[name])
    }
    assert changed == {
        f"bn{n}.{what}" for n in (1, 2) for what in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert all(parameter.grad is None and parameter.requires_grad for parameter in repaired.parameters())


def test_repair_reads_only_as_many_batches_as_it_is_told() -> None:
    case = case_named("batch norm")
    model, data, read = case.model(), batches(case, count=5), []

    def counted() -> Iterator[Any]:
        for number, batch in enumerate(data):
            read.append(number)
            yield batch

    few = sc.repair(model, counted(), batches=2)
    assert read in ([0, 1], [0, 1, 2])
    assert same_state(few, sc.repair(model, data[:2]))


def test_repair_without_batch_norm_is_an_equal_copy() -> None:
    case = case_named("group norm")
    model = case.model()
    repaired = sc.repair(model, batches(case))
    assert repaired is not model and same_state(repaired, model)


def test_repair_takes_a_forward_of_ones_own_and_refuses_no_data() -> None:
    case = case_named("batch norm")
    model, data = case.model(), batches(case)
    own = sc.repair(model, [{"picture": x} for x, _ in data], forward=lambda model, batch: model(batch["picture"]))
    assert same_state(own, sc.repair(model, data))
    with pytest.raises(DataError, match="no batch"):
        sc.repair(model, iter(()))
    with pytest.raises(InputError, match="at least 1; got 0"):
        sc.repair(model, data, batches=0)


# -- little by little ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [*SCHEDULES, lambda progress: progress**2])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_steps_reach_the_target_and_their_plans_compose(schedule: Any, scope: str) -> None:
    case = case_named("two blocks on one stream")
    model, batch = case.model(), case.batch(2)
    target = sc.Target(sparsity=0.6)
    steps = list(sc.prune_steps(model, batch, target, schedule=schedule, scope=scope, steps=3))
    assert [step.number for step in steps] == [1, 2, 3] and {step.steps for step in steps} == {3}
    last = steps[-1]
    assert same_state(sc.shrink(model, last.total), last.model)
    assert_shrunk_equals_zeroed(model, last.total, last.model, [batch])
    dense = sc.select(*_scored(model, batch), target, scope=scope)
    assert last.total.channels[0] == dense.channels[0] == 34
    assert dense.channels[1] <= last.total.channels[1] <= dense.channels[1] + 2  # a channel of the stream weighs 3
    assert steps[0].previous is model
    for before, after in pairwise(steps):
        assert after.previous is before.model
        assert before.total.then(after.plan) == after.total
        assert before.total.channels[1] >= after.total.channels[1]
    counts = sc.count(last.model, batch)
    assert last.total.macs[1] == counts.macs and last.total.params[1] == counts.params
    assert last.summary.channels == last.total.channels


def _scored(model: nn.Module, batch: Any) -> tuple[sc.Graph, dict[str, Tensor]]:
    graph = sc.trace(model, batch)
    return graph, sc.score(graph, sc.observe(model, graph), "l2")


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("budget", [{"max_macs": 0.3}, {"max_params": 0.4}, {"max_params": 300}])
def test_steps_meet_a_budget_of_the_dense_model(scope: str, budget: dict[str, float]) -> None:
    case = case_named("plain chain")
    model, batch = case.model(), case.batch(2)
    dense = sc.count(model, batch)
    *_, last = sc.prune_steps(model, batch, sc.Target(**budget), scope=scope, steps=4)
    counts = sc.count(last.model, batch)
    for name, limit in budget.items():
        whole, now = (dense.macs, counts.macs) if name == "max_macs" else (dense.params, counts.params)
        assert now <= (limit if isinstance(limit, int) else limit * whole)


def test_steps_go_on_from_what_the_caller_trained() -> None:
    case = case_named("plain chain")
    steps = sc.prune_steps(case.model(), case.batch(2), HALF, schedule="linear", steps=2, criterion="l1")
    first = next(steps)
    assert {row.layer: row.after for row in first.plan.widths} == {"a": 6, "b": 5, "head": 3}
    with torch.no_grad():
        first.model.a.weight[2:] = 0
        first.model.a.weight[:2] = 100
    second = next(steps)
    assert second.model.a.weight.shape[0] == 4
    assert torch.equal(second.model.a.weight[:2], first.model.a.weight[:2])


def test_sparsity_stays_relative_to_the_dense_model_when_a_layer_falls_to_one_channel() -> None:
    model = Net(lambda s, x: s.head(pooled(s.b(s.a(x)))), a=conv(3, 16), b=conv(16, 16), head=head(16))

    def first_layer_first(group: sc.Group, evidence: sc.Evidence) -> Tensor:
        scores = torch.ones(group.channels)
        return scores.mul_(torch.arange(group.channels) == 0) if group.name == "a" else scores

    steps = sc.prune_steps(
        model,
        torch.randn(2, 3, 6, 6),
        sc.Target(sparsity=0.75),
        criterion=first_layer_first,
        schedule="linear",
        steps=4,
        scope="global",
    )
    removed = [step.total.removed_channels for step in steps]
    assert removed == [6, 12, 18, 24]


def test_a_step_that_has_nothing_left_to_do_is_the_identity() -> None:
    case = case_named("plain chain")
    steps = list(sc.prune_steps(case.model(), case.batch(2), HALF, schedule="one_shot", steps=3))
    assert [step.plan.is_identity for step in steps] == [False, True, True]


def test_steps_down_to_one_channel_everywhere_do_not_fail() -> None:
    case = case_named("plain chain")
    *_, last = sc.prune_steps(case.model(), case.batch(2), sc.Target(sparsity=0.95), steps=5)
    assert {row.layer: row.after for row in last.total.widths} == {"a": 1, "b": 1, "head": 3}


def test_steps_that_cannot_be_meant() -> None:
    case = case_named("plain chain")
    model, batch = case.model(), case.batch(2)
    for steps in (0, -1, 1.5, True):
        with pytest.raises(InputError, match="steps is a whole number, at least 1; got"):
            next(sc.prune_steps(model, batch, HALF, steps=steps))
    with pytest.raises(UnknownNameError, match=r"no schedule named 'cubik'\. Did you mean 'cubic'"):
        next(sc.prune_steps(model, batch, HALF, schedule="cubik"))
    with pytest.raises(TargetError):
        next(sc.prune_steps(model, batch, 0.5))  # type: ignore[arg-type]  # what a user may write


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_schedules_rise_from_nothing_to_all(name: str) -> None:
    schedule = SCHEDULES[name]
    points = [schedule(step / 10) for step in range(11)]
    assert points[0] == 0 and points[-1] == 1 and points == sorted(points)


def test_the_cubic_schedule_is_that_of_the_paper() -> None:
    assert SCHEDULES["cubic"](0.5) == pytest.approx(1 - 0.5**3)


# -- the optimizer comes along ---------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, amsgrad=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.5),
}


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[tuple[Tensor, Tensor]]) -> None:
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def half_pruned(model: nn.Module, batch: Tensor) -> tuple[sc.Plan, nn.Module]:
    plan = sc.select(*_scored(model, batch), HALF)
    return plan, sc.shrink(model, plan)


def cut_by_hand(tensor: Tensor, plan: sc.Plan, name: str) -> Tensor:
    for cut in plan.cuts:
        if cut.tensor == name:
            tensor = tensor.index_select(cut.dim, torch.tensor(cut.kept))
    return tensor


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_moments_are_those_of_the_kept_channels(name: str) -> None:
    case = case_named("batch norm")
    model, data = case.model().train(), batches(case)
    optimizer = OPTIMIZERS[name](model.parameters())
    stepped(model, optimizer, data)
    before = {key: copy.deepcopy(optimizer.state[parameter]) for key, parameter in model.named_parameters()}
    plan, small = half_pruned(model, data[0][0])
    sc.rebind_optimizer_(optimizer, model, small, plan)
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(p) for p in small.parameters()]
    assert set(optimizer.state) == set(small.parameters())
    compared = 0
    for key, parameter in small.named_parameters():
        for entry, value in optimizer.state[parameter].items():
            expected = before[key][entry]
            if isinstance(value, Tensor) and value.dim():
                expected, compared = cut_by_hand(expected, plan, key), compared + 1
                assert value.shape == parameter.shape
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(expected))
    assert compared >= len(before)
    stepped(small, optimizer, data)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_one_step_on_the_shrunk_model_is_the_step_on_the_zeroed_one(name: str) -> None:
    """Kept entries see the same gradients in both, so they must move alike (bias-free, so that dead stays dead)."""
    case = case_named("no biases")
    model, data = case.model().train(), batches(case)
    optimizer = OPTIMIZERS[name](model.parameters())
    stepped(model, optimizer, data)
    plan, small = half_pruned(model, data[0][0])
    zeroed = zeroed_by_hand(model, plan)
    other = OPTIMIZERS[name](zeroed.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # else both share the step counts
    sc.rebind_optimizer_(optimizer, model, small, plan)
    stepped(small, optimizer, data[:1])
    stepped(zeroed, other, data[:1])
    for (key, ours), theirs in zip(small.named_parameters(), zeroed.parameters(), strict=True):
        assert torch.allclose(ours, cut_by_hand(theirs, plan, key), rtol=1e-9, atol=1e-12), key


def test_parameter_groups_keep_their_options_and_their_order() -> None:
    case = case_named("batch norm")
    model, data = case.model().train(), batches(case)
    norms = [*model.bn1.parameters(), *model.bn2.parameters()]
    rest = [model.head.weight, model.a.weight]  # b.weight and head.bias are not trained
    optimizer = torch.optim.SGD(
        [{"params": rest, "lr": 0.1}, {"params": norms, "lr": 0.2, "weight_decay": 0.0}], momentum=0.9
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    plan, small = half_pruned(model, data[0][0])
    sc.rebind_optimizer_(optimizer, model, small, plan)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 4]
    assert optimizer.param_groups[0]["params"][0] is small.head.weight
    stepped(small, optimizer, data)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.1]


def test_the_optimizer_follows_tied_parameters_and_repaired_models() -> None:
    case = case_named("tied weights")
    model, data = case.model().train(), batches(case)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    stepped(model, optimizer, data)
    plan, small = half_pruned(model, data[0][0])
    sc.rebind_optimizer_(optimizer, model, sc.repair(small, data), plan)
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))


def test_an_optimizer_of_another_model_is_refused_and_left_alone() -> None:
    case = case_named("batch norm")
    model, data = case.model().train(), batches(case)
    plan, small = half_pruned(model, data[0][0])
    stranger = OPTIMIZERS["sgd"](case.model().parameters())
    held = [id(parameter) for parameter in stranger.param_groups[0]["params"]]
    with pytest.raises(InputError, match=r"holds a parameter of shape \[8, 3, 3, 3\] that is not one of the model's"):
        sc.rebind_optimizer_(stranger, model, small, plan)
    assert [id(parameter) for parameter in stranger.param_groups[0]["params"]] == held
    with pytest.raises(PlanMismatchError, match=r"a\.weight"):
        sc.rebind_optimizer_(OPTIMIZERS["sgd"](model.parameters()), model, model, plan)


def test_training_between_steps_with_the_optimizer_rebound() -> None:
    case = case_named("batch norm")
    model, data = case.model().train(), batches(case)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    for step in sc.prune_steps(model, data[0][0], HALF, steps=3, data=data):
        sc.rebind_optimizer_(optimizer, step.previous, step.model, step.plan)
        stepped(step.model, optimizer, data)
    assert {row.layer: row.after for row in step.total.widths} == {"a": 4, "b": 3, "head": 3}
    assert distance(step.model.eval(), copy.deepcopy(step.model), data[0][0]) == 0
