"""Shrunk equals zeroed, on nets with hand-worked widths; and everything else about the model survives."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from nets_for_tests import (
    CASES,
    Case,
    Net,
    assert_shrunk_equals_zeroed,
    conv,
    distance,
    head,
    outputs_of,
    pooled,
    zeroed_by_hand,
)
from secateur.errors import PlanMismatchError
from secateur.plans import Cut, tensor_shapes

HALF = sc.Target(sparsity=0.5)


def by_norm(graph: sc.Graph, model: nn.Module) -> dict[str, Tensor]:
    return sc.score(graph, sc.observe(model, graph), "l2")


def plan_for(model: nn.Module, batch: Any, target: sc.Target = HALF, **options: Any) -> sc.Plan:
    graph = sc.trace(model, batch)
    return sc.select(graph, by_norm(graph, model), target, **{"scope": "layer", **options})


def widths_of(plan: sc.Plan) -> dict[str, int]:
    return {row.layer: row.after for row in plan.widths}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shrunk_equals_zeroed_with_widths_worked_out_by_hand(case: Case) -> None:
    model, batch = case.model(), case.batch(2)
    plan = plan_for(model, batch)
    assert widths_of(plan) == dict(case.widths)
    small = sc.shrink(model, plan)
    assert_shrunk_equals_zeroed(model, plan, small, [batch, case.batch(5)])
    assert sc.verify(model, plan, small, batch) < 1e-9
    before, after = sc.count(model, batch), sc.count(small, batch)
    assert plan.macs == (before.macs, after.macs)
    assert plan.params == (before.params, after.params)
    assert tensor_shapes(small) == plan.shapes_after()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_removing_nothing_is_the_identity_bit_for_bit(case: Case) -> None:
    model, batch = case.model(), case.batch(2)
    plan = plan_for(model, batch, sc.Target(sparsity=0.0))
    assert plan.is_identity
    same = sc.shrink(model, plan)
    assert all(torch.equal(a, b) for a, b in zip(outputs_of(model, batch), outputs_of(same, batch), strict=True))
    assert state_of(model) == state_of(same)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_callers_model_is_left_bit_for_bit_as_it_was(case: Case) -> None:
    model, batch = case.model().train(), case.batch(2)
    before = state_of(model)
    sc.prune(model, batch, sparsity=0.5)
    assert state_of(model) == before


@pytest.mark.parametrize("case", CASES, ids=str)
def test_zero_channels_is_what_one_writes_by_hand(case: Case) -> None:
    model = case.model()
    plan = plan_for(model, case.batch(2))
    ours, theirs = zeroed_by_hand(model, plan).state_dict(), sc.zero_channels(model, plan).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that can be compared: tensors as bytes, attributes, modes, hooks."""
    state: dict[str, Any] = {
        name: (tensor.detach().numpy().tobytes(), str(tensor.dtype), tensor.requires_grad, tuple(tensor.stride()))
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if not key.startswith("_") or key.endswith("_hooks"):
                state[f"{name}:{key}"] = (type(value), repr(value) if not callable(value) else None)
    return state


# -- the oracle itself can fail --------------------------------------------------------------------------------------

CONSUMERS = ("plain chain", "batch norm", "concatenation", "flatten with positions", "depthwise")


@pytest.mark.parametrize("case", [case for case in CASES if case.name in CONSUMERS], ids=str)
def test_one_index_off_in_one_consumer_is_noticed(case: Case) -> None:
    model, batch = case.model(), case.batch(2)
    plan = plan_for(model, batch)
    cut = next(cut for cut in plan.cuts if cut.dim == 1 and cut.tensor.endswith("weight"))
    kept = list(cut.kept)
    free = set(range(cut.size)) - set(kept)
    spot = next(place for place in range(len(kept)) if kept[place] + 1 in free or kept[place] - 1 in free)
    kept[spot] += 1 if kept[spot] + 1 in free else -1
    wrong = replace(plan, cuts=tuple(replace(c, kept=tuple(kept)) if c is cut else c for c in plan.cuts))
    small = sc.shrink(model, wrong)
    assert distance(zeroed_by_hand(model, plan), small, batch) > 1e-6
    with pytest.raises(sc.VerificationError, match="differs from the zeroed original"):
        sc.verify(model, plan, small, batch)


@pytest.mark.parametrize("statistic", ["running_mean", "running_var"])
def test_wrong_running_statistics_are_noticed(statistic: str) -> None:
    case = next(case for case in CASES if case.name == "batch norm")
    model, batch = case.model(), case.batch(2)
    plan = plan_for(model, batch)
    cuts = tuple(
        replace(cut, kept=tuple(sorted(set(range(cut.size)) - set(cut.kept))))
        if cut.tensor == f"bn1.{statistic}"
        else cut
        for cut in plan.cuts
    )
    small = sc.shrink(model, replace(plan, cuts=cuts))
    assert distance(zeroed_by_hand(model, plan), small, batch) > 1e-6
    with pytest.raises(sc.VerificationError):
        sc.verify(model, plan, small, batch)


def test_a_mistake_behind_a_zero_initialised_layer_is_noticed() -> None:
    case = next(case for case in CASES if case.name == "batch norm")
    model, batch = case.model(), case.batch(2)
    nn.init.zeros_(model.bn2.weight)
    plan = plan_for(model, batch)
    small = sc.shrink(model, plan)
    assert sc.verify(model, plan, small, batch) < 1e-9
    order = (1, 0, *range(2, len(small.b.weight[0])))
    wrong = replace(
        plan, cuts=tuple(_moved(cut) if cut.tensor == "b.weight" and cut.dim == 1 else cut for cut in plan.cuts)
    )
    assert order and wrong != plan
    with pytest.raises(sc.VerificationError):
        sc.verify(model, plan, sc.shrink(model, wrong), batch)


def _moved(cut: Cut) -> Cut:
    return replace(cut, kept=tuple(sorted(set(range(cut.size)) - set(cut.kept))))


def test_a_trained_model_no_longer_verifies() -> None:
    case = CASES[0]
    model, batch = case.model(), case.batch(2)
    plan = plan_for(model, batch)
    small = sc.shrink(model, plan)
    with torch.no_grad():
        small.a.weight.mul_(1.01)
    with pytest.raises(sc.VerificationError, match="trained or repaired since"):
        sc.verify(model, plan, small, batch)


# -- what survives ---------------------------------------------------------------------------------------------------


def example() -> tuple[nn.Module, Tensor]:
    case = next(case for case in CASES if case.name == "batch norm")
    return case.model(), case.batch(2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_survives(dtype: torch.dtype) -> None:
    model, batch = example()
    model, batch = model.to(dtype), batch.to(dtype)
    pruned = sc.prune(model, batch, sparsity=0.5)
    tensors = [t for t in pruned.model.state_dict().values() if t.is_floating_point()]
    assert {tensor.dtype for tensor in tensors} == {dtype}
    assert pruned.model(batch).dtype == dtype


def test_requires_grad_and_training_modes_survive() -> None:
    model, batch = example()
    model.train()
    model.bn1.eval()
    model.b.weight.requires_grad_(False)
    small = sc.prune(model, batch, sparsity=0.5).model
    assert small.training and not small.bn1.training and small.bn2.training
    assert not small.b.weight.requires_grad and small.a.weight.requires_grad
    assert isinstance(small.a.weight, nn.Parameter) and small.a.weight.is_leaf and small.a.weight.grad is None


def test_frozen_weights_prune_like_others() -> None:
    model, batch = example()
    expected = plan_for(model, batch)
    assert plan_for(model.requires_grad_(False), batch) == expected


def test_the_shrunk_model_trains() -> None:
    model, batch = example()
    small = sc.prune(model, batch, sparsity=0.5).model.train()
    small(batch).square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


def test_hooks_survive_and_are_not_called_on_the_callers_model() -> None:
    model, batch = example()
    seen: list[tuple[int, ...]] = []
    model.a.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    small = sc.prune(model, batch, sparsity=0.5).model
    seen.clear()
    small(batch)
    assert seen == [(2, 4, 6, 6)]
    model(batch)
    assert seen[1:] == [(2, 8, 6, 6)]


def test_tied_parameters_stay_tied() -> None:
    case = next(case for case in CASES if case.name == "tied weights")
    small = sc.prune(case.model(), case.batch(2), sparsity=0.5).model
    assert small.t.weight is small.u.weight


def test_buffers_keep_their_values_and_their_persistence() -> None:
    model = Net(lambda s, x: s.head(pooled(s.a(x) * s.scale)), a=conv(3, 8), head=head(8))
    model.register_buffer("scale", torch.arange(1.0, 9.0).view(8, 1, 1), persistent=False)
    model.register_buffer("steps", torch.tensor(7))
    x = torch.randn(2, 3, 6, 6)
    pruned = sc.prune(model, x, sparsity=0.5)
    kept = next(cut.kept for cut in pruned.plan.cuts if cut.tensor == "a.weight")
    assert pruned.model.scale.flatten().tolist() == [place + 1.0 for place in kept]
    assert pruned.model.steps == 7
    assert set(pruned.model.state_dict()) == set(model.state_dict())


def test_attributes_of_leaf_modules_follow_their_tensors() -> None:
    model = Net(
        lambda s, x: s.head(pooled(s.act(s.in_(s.gn(s.t(s.dw(s.bn(s.a(x))))))))),
        a=conv(3, 8),
        bn=nn.BatchNorm2d(8),
        dw=conv(8, 16, groups=8),
        t=nn.ConvTranspose2d(16, 12, 2),
        gn=nn.GroupNorm(6, 12),
        in_=nn.InstanceNorm2d(12, affine=True),
        act=nn.PReLU(12),
        head=head(12),
    )
    small = sc.prune(model, torch.randn(2, 3, 6, 6), sparsity=0.5).model
    assert repr(small.a).startswith("Conv2d(3, 4,")
    assert repr(small.bn).startswith("BatchNorm2d(4,")
    assert repr(small.dw).startswith("Conv2d(4, 8,") and small.dw.groups == 4
    assert repr(small.t).startswith("ConvTranspose2d(8, 6,")
    assert repr(small.gn).startswith("GroupNorm(3, 6,")
    assert repr(small.in_).startswith("InstanceNorm2d(6,")
    assert repr(small.act) == "PReLU(num_parameters=6)"
    assert repr(small.head).startswith("Linear(in_features=6, out_features=3")


def test_a_norm_without_parameters_follows_too(recwarn: pytest.WarningsRecorder) -> None:
    model = Net(
        lambda s, x: s.head(pooled(F.relu(s.norm(s.a(x))))), a=conv(3, 8), norm=nn.InstanceNorm2d(8), head=head(8)
    )
    x = torch.randn(2, 3, 6, 6)
    small = sc.prune(model, x, sparsity=0.5).model
    small(x)
    assert small.norm.num_features == 4
    assert not [w for w in recwarn if "num_features" in str(w.message)]


def test_memory_format_survives() -> None:
    model, batch = example()
    model = model.to(memory_format=torch.channels_last)
    small = sc.prune(model, batch, sparsity=0.5).model
    assert small.b.weight.is_contiguous(memory_format=torch.channels_last)


def test_marks_on_parameters_survive() -> None:
    model, batch = example()
    model.a.weight.no_weight_decay = True
    assert sc.prune(model, batch, sparsity=0.5).model.a.weight.no_weight_decay is True


def test_the_shrunk_model_is_of_the_same_class_and_can_be_copied_and_exported() -> None:
    model, batch = example()
    small = sc.prune(model, batch, sparsity=0.5).model
    assert type(small) is type(model)
    assert torch.equal(copy.deepcopy(small)(batch), small(batch))
    assert torch.allclose(torch.export.export(small, (batch,)).module()(batch), small(batch))


def test_ten_prunings_in_a_row() -> None:
    case = next(case for case in CASES if case.name == "two blocks on one stream")
    model, batch = case.model(), case.batch(2)
    dense, total = model, None
    for _ in range(10):
        graph = sc.trace(model, batch)
        if not graph.prunable:
            break
        plan = sc.select(graph, by_norm(graph, model), sc.Target(sparsity=0.25), scope="global")
        small = sc.shrink(model, plan)
        assert_shrunk_equals_zeroed(model, plan, small, [batch])
        total = plan if total is None else total.then(plan)
        model = small
    assert total is not None
    assert state_of(sc.shrink(dense, total)) == state_of(model)


# -- plans that do not fit -------------------------------------------------------------------------------------------


def test_a_plan_for_another_model_names_the_first_tensor_that_differs() -> None:
    model, batch = example()
    plan = plan_for(model, batch)
    other = Net(
        model.function,
        a=conv(3, 9, bias=False),
        bn1=nn.BatchNorm2d(9),
        b=conv(9, 6, bias=False),
        bn2=nn.BatchNorm2d(6),
        head=head(6),
    )
    for function in (sc.shrink, sc.zero_channels):
        with pytest.raises(
            PlanMismatchError, match=r"'a\.weight' has shape \[9, 3, 3, 3\] in the model, \[8, 3, 3, 3\]"
        ):
            function(other, plan)
    with pytest.raises(PlanMismatchError, match=r"has no tensor 'a\.weight'"):
        sc.shrink(nn.Linear(2, 2), plan)


def test_a_plan_cannot_be_applied_twice() -> None:
    model, batch = example()
    plan = plan_for(model, batch)
    with pytest.raises(PlanMismatchError, match=r"a\.weight"):
        sc.shrink(sc.shrink(model, plan), plan)


def test_an_edit_of_an_attribute_that_is_not_there_is_refused() -> None:
    case = next(case for case in CASES if case.name == "view with a size in an attribute")
    model, batch = case.model(), case.batch(2)
    plan = plan_for(model, batch)
    assert [(edit.attribute, edit.before, edit.after) for edit in plan.edits] == [("flat", 400, 200)]
    model.flat = 401
    with pytest.raises(PlanMismatchError, match="flat is 401; the plan expects 400"):
        sc.shrink(model, plan)
    del model.flat
    with pytest.raises(PlanMismatchError, match=r"flat"):
        sc.shrink(model, plan)


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ((), "not empty"),
        ((1, 0), "ascending"),
        ((0, 0), "ascending"),
        ((-1, 2), "must lie in"),
        ((0, 8), "must lie in"),
    ],
)
def test_a_cut_checks_itself(kept: tuple[int, ...], words: str) -> None:
    with pytest.raises(PlanMismatchError, match=words):
        Cut("a.weight", 0, 8, kept)


def test_a_forward_that_insists_on_its_own_precision_is_verified_in_it() -> None:
    model = Net(lambda s, x: s.head(pooled(F.relu(s.a(x.float())))), a=conv(3, 8), head=head(8))
    batch = torch.randn(2, 3, 6, 6)
    plan = plan_for(model, batch)
    small = sc.shrink(model, plan)
    assert sc.verify(model, plan, small, batch) < 2e-6
    with torch.no_grad():
        small.a.bias.add_(0.01)
    with pytest.raises(sc.VerificationError, match="allowed: 2e-06"):
        sc.verify(model, plan, small, batch)


def test_a_model_of_fixed_batch_size_is_verified_at_that_size() -> None:
    model = Net(lambda s, x: s.head(pooled(F.relu(s.a(x)))) * torch.ones(2, 1), a=conv(3, 8), head=head(8))
    batch = torch.randn(2, 3, 6, 6)
    with pytest.raises(RuntimeError):
        model(torch.cat([batch, batch]))
    assert sc.prune(model, batch, sparsity=0.5).model(batch).shape == (2, 3)
