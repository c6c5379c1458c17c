"""Criteria against independent formulas; laws that every criterion in the table obeys; evidence."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import secateur as sc
from nets_attention import ATTENTION
from nets_for_tests import CASES, Case, Net, conv, head, pooled, randomised
from secateur.criteria.sequential import Greedy
from secateur.criteria.table import CRITERIA, needs_of, resolve
from secateur.errors import DataError, InputError, ModelError, PlanMismatchError, UnknownNameError

CLASSIFIERS = [case for case in CASES if case.inputs is None and case.name != "mlp over positions"]


def batches(case: Case, count: int = 3, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(size, *case.shape, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@cache
def graph_of(name: str) -> sc.Graph:
    """The graph of a case: nothing in it depends on weights, so that one will do for every criterion."""
    case = case_named(name)
    return sc.trace(case.model(), case.batch(2))


def scores_of(
    case: Case, criterion: str, model: nn.Module | None = None, seed: int = 0, graph: sc.Graph | None = None
) -> dict[str, Tensor]:
    model = model or case.model()
    graph = graph or sc.trace(model, case.batch(2))
    return scored(criterion, graph, sc.observe(model, graph, batches(case), needs_of(criterion)), seed)


def scored(criterion: str, graph: sc.Graph, facts: sc.Evidence, seed: int = 0) -> dict[str, Tensor]:
    """The scores; of a greedy criterion those that it begins with."""
    found = resolve(criterion)
    return sc.score(graph, facts, found.criterion if isinstance(found, Greedy) else criterion, seed=seed)


# -- laws that every criterion obeys ---------------------------------------------------------------------------------


# What a criterion is not defined for, and what it says then.
UNDEFINED = {"slimming": "has no BatchNorm scale", "thinet": "no convolution or linear map was seen to read"}


@pytest.mark.untraced
@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@pytest.mark.parametrize("case", CLASSIFIERS, ids=str)
def test_scores_are_finite_one_per_channel_and_the_same_every_time(criterion: str, case: Case) -> None:
    try:
        first, again = scores_of(case, criterion, graph=graph_of(case.name)), scores_of(case, criterion)
    except InputError as error:
        assert UNDEFINED.get(criterion, "no such words") in str(error)
        assert criterion == "slimming" or "transposed" in case.name or "sum of zeros" in case.name
        return
    assert set(first) == set(case.free)
    for name, score in first.items():
        assert score.shape == (case.free[name],) and torch.isfinite(score).all() and score.is_floating_point()
        assert torch.equal(score, again[name])


# Their draws go by position: what they estimate does not depend on the order, what they give does.
DRAWN = {"random", "hessian"}


@pytest.mark.untraced
@pytest.mark.parametrize("case", [*CLASSIFIERS, *(case for case in ATTENTION if case.inputs is None)], ids=str)
def test_permuting_the_channels_of_a_model_permutes_the_scores(case: Case) -> None:
    def loss(output: object, batch: object) -> Tensor:
        return first(output).square().mean()

    model, data = case.model(), batches(case)
    graph = sc.trace(model, case.batch(2), form=getattr(case, "form", "live"))
    twin, orders = permuted(model, graph)
    assert torch.allclose(first(model(data[0][0])), first(twin(data[0][0])), atol=1e-10)
    needs = sorted({need for criterion in CRITERIA for need in needs_of(criterion)} - {"hessian"})
    facts, others = (sc.observe(each, graph, data, needs, positions=None, loss=loss) for each in (model, twin))
    for criterion in sorted(set(CRITERIA) - DRAWN):
        try:
            expected = scored(criterion, graph, facts)
        except InputError as error:
            assert UNDEFINED.get(criterion, "no such words") in str(error)
            continue
        found = scored(criterion, graph, others)
        for name, order in orders.items():
            assert torch.allclose(found[name], expected[name][order], rtol=1e-8, atol=1e-10), (criterion, name)


def permuted(model: nn.Module, graph: sc.Graph) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy in which row i of every slot of a group is what was row order[i]; balanced groups have the same order."""
    twin, generator = copy.deepcopy(model), torch.Generator().manual_seed(3)
    tensors = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
    orders = {group.name: torch.randperm(group.channels, generator=generator) for group in graph.prunable}
    with torch.no_grad():
        for group in graph.prunable:
            orders[group.name] = orders[graph.together(group.name)[0]]
            for slot in group.slots:
                indices = torch.as_tensor(slot.indices)
                rows = tensors[slot.tensor].index_select(slot.dim, indices[orders[group.name]].flatten())
                tensors[slot.tensor].index_copy_(slot.dim, indices.flatten(), rows)
    return twin, orders


def first(output: object) -> Tensor:
    """The first tensor of an output."""
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_scoring_leaves_model_data_and_generators_alone(criterion: str) -> None:
    case = case_named("batch norm")
    model, data = case.model().train(), batches(case)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copies, state = [x.clone() for x, _ in data], torch.get_rng_state()
    graph = sc.trace(model, data[0][0])
    scored(criterion, graph, sc.observe(model, graph, data, needs_of(criterion)))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(x, copied) for (x, _), copied in zip(data, copies, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and all(
        parameter.grad is None and parameter.requires_grad for parameter in model.parameters()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_weights_are_scored_in_float32(dtype: torch.dtype) -> None:
    case = case_named("plain chain")
    model = case.model().to(dtype)
    graph = sc.trace(model, case.batch(2).to(dtype))
    for criterion in ("l1", "l2", "bn_scale"):
        score = sc.score(graph, sc.observe(model, graph), criterion)["a"]
        exact = sc.score(graph, sc.observe(model.double(), graph), criterion)["a"]
        model.to(dtype)
        assert score.dtype == torch.float32
        assert torch.allclose(score.double(), exact, rtol=1e-5)


# -- formulas --------------------------------------------------------------------------------------------------------


def test_l1_and_l2_are_norms_of_filters() -> None:
    case = case_named("plain chain")
    model = case.model()
    weight = model.a.weight.detach().numpy()
    assert np.allclose(scores_of(case, "l1")["a"], np.abs(weight).sum(axis=(1, 2, 3)))
    assert np.allclose(scores_of(case, "l2")["a"], np.sqrt((weight**2).sum(axis=(1, 2, 3))))


def test_several_producers_are_averaged() -> None:
    case = case_named("residual add")
    model = case.model()
    norms = [np.sqrt((w.detach().numpy() ** 2).sum(axis=(1, 2, 3))) for w in (model.stem.weight, model.two.weight)]
    assert np.allclose(scores_of(case, "l2")["stem"], (norms[0] + norms[1]) / 2)


def test_a_channel_of_several_positions_is_judged_as_one() -> None:
    case = case_named("two groups, tied by position")
    weight = case.model().a.weight.detach().numpy().reshape(2, 4, -1)  # positions i and i + 4 go together
    assert np.allclose(scores_of(case, "l2")["a"], np.sqrt((weight**2).sum(axis=(0, 2))))


def test_transposed_and_depthwise_filters_are_rows_of_the_right_dimension() -> None:
    case = case_named("transposed convolution")
    weight = case.model().b.weight.detach().numpy()  # (in, out, h, w)
    assert np.allclose(scores_of(case, "l1")["b"], np.abs(weight).sum(axis=(0, 2, 3)))
    case = case_named("depthwise")
    model = case.model()
    norms = [np.abs(w.detach().numpy()).sum(axis=(1, 2, 3)) for w in (model.a.weight, model.b.weight)]
    assert np.allclose(scores_of(case, "l1")["a"], (norms[0] + norms[1]) / 2)


def test_bn_scale_is_the_absolute_scale_averaged_over_norms_and_l2_without_any() -> None:
    case = case_named("batch norm")
    assert np.allclose(scores_of(case, "bn_scale")["a"], case.model().bn1.weight.detach().abs())
    case = case_named("projection residual")
    model = case.model()
    mean = (model.norm.weight.detach().abs() + model.skip_norm.weight.detach().abs()) / 2
    assert np.allclose(scores_of(case, "bn_scale")["body"], mean)
    case = case_named("plain chain")
    assert torch.equal(scores_of(case, "bn_scale")["a"], scores_of(case, "l2")["a"])


def test_taylor_is_the_squared_effect_on_the_loss_averaged_over_batches() -> None:
    case = case_named("plain chain")
    model, expected = case.model(), np.zeros(8)
    for x, y in batches(case):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        expected += (model.a.weight * model.a.weight.grad).sum((1, 2, 3)).detach().numpy() ** 2 / 3
    assert np.allclose(scores_of(case, "taylor_fo")["a"], expected)


def test_taylor_predicts_what_removing_a_small_filter_costs() -> None:
    model = Net(
        lambda s, x: s.head(pooled(torch.tanh(s.b(torch.tanh(s.a(x)))))),
        a=conv(3, 8, bias=False),
        b=conv(8, 6),
        head=head(6),
    )
    model = randomised(model.double()).eval()
    with torch.no_grad():
        model.a.weight.mul_(1e-3)
    x, y = torch.randn(16, 3, 6, 6, dtype=torch.float64), torch.randint(0, 3, (16,))
    graph = sc.trace(model, x)
    score = sc.score(graph, sc.observe(model, graph, [(x, y)], ("gradient",)), "taylor_fo")["a"]
    with torch.no_grad():
        before = F.cross_entropy(model(x), y)
        for channel in range(8):
            saved = model.a.weight[channel].clone()
            model.a.weight[channel] = 0
            change = float(F.cross_entropy(model(x), y) - before)
            model.a.weight[channel] = saved
            assert math.isclose(abs(change), float(score[channel]) ** 0.5, rel_tol=0.05)


def test_random_depends_on_the_seed_and_the_group_only() -> None:
    case = case_named("plain chain")
    one, other = scores_of(case, "random", seed=0), scores_of(case, "random", seed=1)
    assert not torch.equal(one["a"], other["a"])
    assert not torch.equal(one["a"][:6], one["b"])
    assert torch.equal(one["a"], scores_of(case, "random", model=case.model(seed=5))["a"])
    assert all(0 <= value < 1 for value in one["a"].tolist())


def test_a_criterion_of_ones_own() -> None:
    case = case_named("plain chain")
    model = case.model()
    graph = sc.trace(model, case.batch(2))
    evidence = sc.observe(model, graph)

    def largest(group: sc.Group, evidence: sc.Evidence) -> Tensor:
        return torch.stack([evidence.rows(slot).abs().amax(1) for slot in group.outputs]).mean(0)

    assert torch.equal(sc.score(graph, evidence, largest)["a"], model.a.weight.detach().abs().amax((1, 2, 3)))
    with pytest.raises(InputError, match=r"have shape \[1\], expected \[8\]"):
        sc.score(graph, evidence, lambda group, evidence: torch.zeros(1))
    with pytest.raises(InputError, match="not finite"):
        sc.score(graph, evidence, lambda group, evidence: torch.full((group.channels,), math.nan))


# -- evidence --------------------------------------------------------------------------------------------------------


def test_merged_evidence_is_that_of_one_pass_over_everything() -> None:
    case = case_named("batch norm")
    model, data = case.model(), batches(case, count=5)
    graph = sc.trace(model, case.batch(2))
    whole = sc.observe(model, graph, data, ("gradient",))
    parts = [sc.observe(model, graph, part, ("gradient",)) for part in (data[:2], data[2:3], data[3:])]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert merged.batches == whole.batches == 5
    for name, expected in whole.taylor.items():
        assert torch.allclose(merged.taylor[name], expected, rtol=1e-12)
    with pytest.raises(InputError, match="cannot merge"):
        whole.merge(sc.observe(model, graph))


def test_evidence_of_weights_needs_no_data_and_shares_no_gradient() -> None:
    case = case_named("plain chain")
    model = case.model()
    facts = sc.observe(model, sc.trace(model, case.batch(2)))
    assert set(facts.tensors) == set(model.state_dict()) and facts.batches == 0
    assert not any(tensor.requires_grad for tensor in facts.tensors.values())


def test_frozen_weights_are_scored_by_gradient_too() -> None:
    case = case_named("plain chain")
    frozen = case.model().requires_grad_(False)
    expected = scores_of(case, "taylor_fo")
    found = scores_of(case, "taylor_fo", model=frozen)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_are_gathered_even_where_the_caller_turned_them_off(context: type) -> None:
    case = case_named("plain chain")
    model, expected, data = case.model(), scores_of(case, "taylor_fo"), batches(case)
    with context():
        graph = sc.trace(model, data[0][0])
        found = sc.score(graph, sc.observe(model, graph, data, ("gradient",)), "taylor_fo")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_own_forward_and_loss() -> None:
    case = case_named("two inputs and a dict of outputs")
    model = case.model()
    graph = sc.trace(model, case.batch(2))
    data = [{"x": case.batch(3), "y": torch.tensor([0, 1, 2])}]
    facts = sc.observe(
        model,
        graph,
        data,
        ("gradient",),
        forward=lambda model, batch: model(*batch["x"]),
        loss=lambda output, batch: F.cross_entropy(output["logits"], batch["y"]),
    )
    assert float(facts.taylor["a"].sum()) > 0


def test_evidence_that_cannot_be_gathered() -> None:
    case = case_named("plain chain")
    model, data = case.model(), batches(case)
    graph = sc.trace(model, case.batch(2))
    with pytest.raises(InputError, match="pass data="):
        sc.observe(model, graph, None, ("gradient",))
    with pytest.raises(UnknownNameError, match=r"no need named 'gradients'\. Did you mean 'gradient'"):
        sc.observe(model, graph, data, ("gradients",))
    for empty in ([], iter(()), (batch for batch in [])):
        with pytest.raises(DataError, match="holds no batch"):
            sc.observe(model, graph, empty, ("gradient",))
    with pytest.raises(InputError, match=r"must return a scalar tensor; got shape \[4, 3\]"):
        sc.observe(model, graph, data, ("gradient",), loss=lambda output, batch: output)
    with pytest.raises(InputError, match="loss"):
        sc.observe(model, graph, data, ("gradient",), loss=lambda output, batch: 1.0)
    with pytest.raises(DataError, match="the loss is nan on batch 0"):
        sc.observe(model, graph, data, ("gradient",), loss=lambda output, batch: output.sum() * math.nan)
    with pytest.raises(InputError, match="pair"):
        sc.observe(model, graph, ["text"], ("gradient",))
    with pytest.raises(PlanMismatchError, match=r"'a\.weight'"):
        sc.observe(Net(model.function, a=conv(3, 9), b=conv(9, 6), head=head(6)), graph)
    with pytest.raises(InputError, match="needs gradient evidence: pass data="):
        sc.score(graph, sc.observe(model, graph), "taylor_fo")


def test_not_a_number_in_a_weight_is_named() -> None:
    case = case_named("plain chain")
    model = case.model()
    with torch.no_grad():
        model.b.weight[2, 0, 0, 0] = math.nan
    graph = sc.trace(case.model(), case.batch(2))
    with pytest.raises(ModelError, match=r"parameter 'b\.weight' holds NaN"):
        sc.score(graph, sc.observe(model, graph), "l2")


def test_a_layer_that_the_loss_does_not_reach_scores_zero() -> None:
    def forward(s: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        return s.head(pooled(F.relu(s.a(x)))), s.other(pooled(F.relu(s.b(x))))

    model = randomised(Net(forward, a=conv(3, 8), b=conv(3, 6), head=head(8), other=head(6)).double())
    data = [(torch.randn(4, 3, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0]))]
    graph = sc.trace(model, data[0][0])
    facts = sc.observe(
        model, graph, data, ("gradient",), loss=lambda output, batch: F.cross_entropy(output[0], batch[1])
    )
    scores = sc.score(graph, facts, "taylor_fo")
    assert scores["a"].min() > 0 and torch.equal(scores["b"], torch.zeros(6, dtype=torch.float64))
    assert replace(facts, seed=3).seed == 3
