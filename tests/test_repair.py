"""Repair towards the dense model: constants folded, layers fitted by least squares."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from nets_for_tests import CASES, Case, Net, randomised
from secateur import reconstruction
from secateur.errors import CalibrationError, DataError, InputError, PlanMismatchError, UnknownNameError
from secateur.reconstruction import Moments, run_until, scaled, solved


def plan_without(model: nn.Module, example: Tensor, gone: dict[str, list[int]]) -> sc.Plan:
    """The plan that removes these channels of these groups."""
    graph = sc.trace(model, example)
    scores = {group.name: torch.arange(group.channels, dtype=torch.float64) + 1 for group in graph.prunable}
    sparsity = {}
    for name, channels in gone.items():
        scores[name][channels] = 0
        sparsity[name] = len(channels) / len(scores[name])
    return sc.select(graph, scores, sc.Target(sparsity=sparsity))


def images(count: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - other(x)).square().mean())


def chain(**options: object) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3, **options), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 1))


# -- the equations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centred", [True, False])
def test_the_solution_is_that_of_the_stacked_least_squares_problem(centred: bool) -> None:
    x, y, old = images(40, 7).numpy(), images(40, 3, seed=1).numpy(), images(3, 7, seed=2).numpy()
    x, y = x + 2, y - 1  # means that matter
    weights = np.linspace(0.1, 1, 40)
    moments = Moments()
    for start in (0, 10, 25, 40):
        stop = {0: 10, 10: 25, 25: 40, 40: 40}[start]
        if stop > start:
            rows = slice(start, stop)
            moments.add(torch.tensor(x[None, rows]), torch.tensor(y[None, rows]), torch.tensor(weights[rows]))
    means = [np.average(values, axis=0, weights=weights) for values in (x, y)]
    a, b = (x - means[0], y - means[1]) if centred else (x, y)
    share = np.sqrt(weights / weights.sum())[:, None]
    ridge = 0.1 * np.mean(((share * a) ** 2).sum(0))
    stacked = np.vstack([share * a, math.sqrt(ridge) * np.eye(7)])
    wanted = np.vstack([share * b, math.sqrt(ridge) * old.T])
    expected = np.linalg.lstsq(stacked, wanted, rcond=None)[0].T
    found = solved(moments, torch.tensor(old)[None], 0.1, centred=centred)
    assert np.allclose(found[0].numpy(), expected)
    assert not np.allclose(expected, old)


@pytest.mark.parametrize("centred", [False, True])
def test_outputs_are_scaled_as_numpy_scales_them(centred: bool) -> None:
    random = np.random.default_rng(1)
    x, y = random.normal(1, 1, (300, 7)), random.normal(size=(300, 4))
    old, weights = random.normal(size=(4, 7)), random.uniform(0.1, 1.0, 300)
    moments = Moments()
    moments.add(torch.tensor(x)[None], torch.tensor(y)[None], torch.tensor(weights))
    means = [(weights[:, None] * z).sum(0) / weights.sum() for z in (x, y)]
    a, b = (x - means[0], y - means[1]) if centred else (x, y)
    share = np.sqrt(weights / weights.sum())[:, None]
    made = share * (a @ old.T)
    ridge = (0.1 + 1 / weights.sum()) * np.mean((made**2).sum(0))
    expected = []
    for row, own, wanted in zip(old, made.T, (share * b).T, strict=True):
        matrix, target = np.append(own, math.sqrt(ridge))[:, None], np.append(wanted, math.sqrt(ridge))
        expected.append(row * np.linalg.lstsq(matrix, target, rcond=None)[0][0])
    found = scaled(moments, torch.tensor(old)[None], 0.1, centred=centred)
    assert np.allclose(found[0].numpy(), np.stack(expected), rtol=1e-6)
    assert not np.allclose(expected, old)


def test_outputs_that_do_not_vary_keep_their_scale() -> None:
    x, old = torch.ones(1, 40, 3, dtype=torch.float64), torch.randn(1, 2, 3, dtype=torch.float64)
    moments = Moments()
    moments.add(x, torch.randn(1, 40, 2, dtype=torch.float64), torch.ones(40))
    assert torch.allclose(scaled(moments, old, 0.01, centred=True), old, rtol=1e-6)
    one = Moments()
    one.add(torch.randn(1, 1, 3, dtype=torch.float64), torch.randn(1, 1, 2, dtype=torch.float64), torch.ones(1))
    assert torch.allclose(scaled(one, old, 0.01, centred=True), old, rtol=1e-6)


def test_positions_with_huge_activations_do_not_outweigh_all_others() -> None:
    """As the first token of a transformer: hundreds of times as large, and made small again by the norm behind."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)).double().eval()
    x = torch.randn(64, 9, 6, dtype=torch.float64)
    x[:, 0] = 300 * torch.rand(6, dtype=torch.float64)
    pruned = sc.prune(model, x[:2], sparsity=0.5, repair=())
    for steps in (("fold",), ("scale",), ("least_squares",)):
        repaired = sc.repair(pruned.model, [x], dense=model, plan=pruned.plan, steps=steps)
        assert error(repaired, model, x[:, 1:]) < error(pruned.model, model, x[:, 1:])


# -- laws ------------------------------------------------------------------------------------------------------------


def test_a_removed_twin_is_made_up_for_exactly() -> None:
    model = randomised(chain().double()).eval()
    with torch.no_grad():
        model[0].weight[4] = model[0].weight[1]
        model[0].bias[4] = model[0].bias[1]
    x = images(32, 3, 9, 9)
    plan = plan_without(model, x[:2], {"0": [4]})
    small = sc.shrink(model, plan)
    repaired = sc.repair(small, [x], dense=model, plan=plan, damping=1e-12)
    assert error(model, small, x) > 1e-4
    assert error(model, repaired, x) < 1e-12 * error(model, small, x)


def test_outputs_that_lost_half_of_every_sum_are_doubled() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter[4:] = parameter[:4]
        model[2].weight[:, 4:] = model[2].weight[:, :4]
    x = torch.randn(4000, 5, dtype=torch.float64)
    plan = plan_without(model, x[:2], {"0": [4, 5, 6, 7]})
    small = sc.shrink(model, plan)
    scale, fold = (
        sc.repair(small, [x], dense=model, plan=plan, steps=(step,), damping=0) for step in ("scale", "fold")
    )
    assert torch.allclose(scale[2].weight, 2 * small[2].weight, rtol=1e-3)
    assert error(model, scale, x) < 1e-3 * error(model, fold, x) < error(model, small, x)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("steps", [("fold",), ("scale",), ("least_squares",)])
def test_a_removed_constant_is_folded_exactly(norm: bool, steps: tuple[str, ...]) -> None:
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3, bias=not norm)]
    model = nn.Sequential(*layers, *([nn.BatchNorm2d(5)] if norm else []), nn.ReLU(), nn.Conv2d(5, 4, 1))
    model = randomised(model.double()).eval()
    with torch.no_grad():
        model[0].weight[2] = 0
        model[0].bias[2] = 3.0
    x = images(16, 3, 9, 9)
    plan = plan_without(model, x[:2], {"0": [2]})
    small = sc.shrink(model, plan)
    if norm:  # the mean goes by what the norm says of the dense layer, so let that be true of these samples
        with torch.no_grad():
            model[3].running_mean.copy_(model[:3](x).mean((0, 2, 3)))
            small[3].running_mean.copy_(model[3].running_mean)
    repaired = sc.repair(small, [x], dense=model, plan=plan, steps=steps, damping=1e-9)
    assert error(model, small, x) > 1e-4
    assert error(model, repaired, x) < 1e-9 * error(model, small, x)
    if steps == ("fold",):
        assert torch.equal(repaired[2].weight, small[2].weight)


NORMLESS = [case for case in CASES if case.inputs is None and not case.unknown]


@pytest.mark.untraced
@pytest.mark.parametrize(("step", "slack"), [("scale", 1.2), ("least_squares", 1.05)])  # layers were fitted, not nets
@pytest.mark.parametrize("case", NORMLESS, ids=lambda case: case.name)
def test_any_net_comes_closer_to_the_dense_one_and_keeps_its_shapes(case: Case, step: str, slack: float) -> None:
    model = case.model()
    data = [images(64, *case.shape, seed=seed) for seed in range(4)]
    plan = sc.prune(model, data[0][:2], sparsity=0.5).plan
    small = sc.shrink(model, plan)
    repaired = sc.repair(small, data, dense=model, plan=plan, steps=(step,))
    assert {n: t.shape for n, t in repaired.state_dict().items()} == {n: t.shape for n, t in small.state_dict().items()}
    fresh = images(128, *case.shape, seed=9)
    assert _distance(model, repaired, fresh) <= _distance(model, small, fresh) * slack


def _distance(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        ours, theirs = model(x), other(x)
    first = ours if isinstance(ours, Tensor) else next(iter(ours.values() if isinstance(ours, dict) else ours))
    second = (
        theirs if isinstance(theirs, Tensor) else next(iter(theirs.values() if isinstance(theirs, dict) else theirs))
    )
    return float((first - second).square().mean())


def test_later_layers_are_fitted_to_what_repaired_layers_give() -> None:
    model = randomised(chain().double()).eval()
    data = [images(64, 3, 9, 9)]
    plan = sc.prune(model, data[0][:2], sparsity=0.4).plan
    small = sc.shrink(model, plan)
    together = sc.repair(small, data, dense=model, plan=plan, damping=1e-6)
    apart = copy.deepcopy(small)  # the last layer fitted to what the unrepaired layers give
    inputs, targets = apart[:4](data[0]), model(data[0])
    rows, wanted = inputs.movedim(1, -1).flatten(0, 2), targets.movedim(1, -1).flatten(0, 2)
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1)
    best = torch.linalg.lstsq(rows, wanted).solution
    with torch.no_grad():
        apart[4].weight.copy_(best[:-1].T[..., None, None])
        apart[4].bias.copy_(best[-1])
    assert error(model, together, data[0]) < error(model, apart, data[0]) < error(model, small, data[0])


def test_fetching_targets_for_few_layers_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomised(chain().double()).eval()
    data = [images(16, 3, 9, 9, seed=seed) for seed in range(3)]
    plan = sc.prune(model, data[0][:2], sparsity=0.4).plan
    small = sc.shrink(model, plan)
    whole = sc.repair(small, data, dense=model, plan=plan, positions=1000)
    monkeypatch.setattr(reconstruction, "TARGET_BYTES", 1)
    parts = sc.repair(small, data, dense=model, plan=plan, positions=1000)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_nothing_of_the_callers_is_changed_and_repeating_gives_the_same() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3)))
    model = model.double().train()
    data = [images(32, 3, 7, 7)]
    plan = sc.prune(model, data[0][:2], sparsity=0.5).plan
    small = sc.shrink(model, plan)
    before = [copy.deepcopy(m.state_dict()) for m in (model, small)]
    state = torch.get_rng_state()
    first, again = (sc.repair(small, data, dense=model, plan=plan, seed=4) for _ in range(2))
    for module, old in zip((model, small), before, strict=True):
        assert all(torch.equal(old[name], tensor) for name, tensor in module.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert model.training and small.training and first.training and first[1].training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in first.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    model = randomised(chain()).eval().to(dtype)
    data = [images(32, 3, 9, 9).to(dtype)]
    plan = sc.prune(model, data[0][:2], sparsity=0.4).plan
    small = sc.shrink(model, plan)
    repaired = sc.repair(small, data, dense=model, plan=plan)
    assert {parameter.dtype for parameter in repaired.parameters()} == {dtype}
    assert error(model.float(), repaired.float(), data[0].float()) < error(model, small.float(), data[0].float())


def test_a_layer_used_twice_and_one_computed_from_its_weight_norm_are_no_obstacle() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        h = F.relu(s.twice(F.relu(s.first(x))))
        return s.normed(F.relu(s.twice(h)))

    net = Net(
        forward,
        first=nn.Conv2d(3, 6, 1),
        twice=nn.Conv2d(6, 6, 1),
        normed=nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 4, 1)),
    )
    model = randomised(net.double()).eval()
    data = [images(64, 3, 5, 5)]
    plan = sc.prune(model, data[0][:2], sparsity=0.4).plan
    small = sc.shrink(model, plan)
    repaired = sc.repair(small, data, dense=model, plan=plan)
    assert not torch.equal(repaired.twice.weight, small.twice.weight)
    assert torch.equal(repaired.normed.weight, small.normed.weight)  # its weight is made anew in every call


def test_a_pass_stops_at_the_layer_it_is_about() -> None:
    seen: list[str] = []
    model = chain().double()
    for name, module in model.named_children():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    run_until(model, {"2.weight": 1}, images(2, 3, 9, 9), lambda m, x: m(x), lambda call: None)
    assert seen == ["0", "1"]


def test_attention_and_mlp_layers_are_fitted() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    model = randomised(nn.Sequential(layer, nn.Flatten(1), nn.Linear(16 * 5, 3)).double()).eval()
    data = [images(256, 5, 16)]
    plan = sc.prune(model, data[0][:2], sparsity=0.5).plan
    small = sc.shrink(model, plan)
    repaired = sc.repair(small, data, dense=model, plan=plan)
    assert error(model, repaired, data[0]) < 0.9 * error(model, small, data[0])


# -- the one call ----------------------------------------------------------------------------------------------------


def test_prune_fits_where_the_data_is_enough_and_says_what_it_left_out() -> None:
    model = randomised(chain().double()).eval()
    example = images(2, 3, 9, 9)
    much, little = [(images(64, 3, 9, 9), torch.zeros(64))], [(images(1, 3, 5, 5), torch.zeros(1))]
    assert sc.prune(model, example, sparsity=0.4, data=much).summary.repairs == ("least_squares",)
    pruned = sc.prune(model, example, sparsity=0.4, data=little)
    assert pruned.summary.repairs == ("scale",) and "too small" in pruned.summary.left_out
    assert "outputs scaled" in str(pruned.summary) and "too small" in str(pruned.summary)
    assert sc.prune(model, example, sparsity=0.4, data=iter(little)).summary.left_out == pruned.summary.left_out
    assert sc.prune(model, example, sparsity=0.4, data=much, repair=("fold",)).summary.repairs == ("fold",)
    assert sc.prune(model, example, sparsity=0.4, data=much, repair=()).summary.repairs == ()


# -- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_before_any_work() -> None:
    model = randomised(chain().double()).eval()
    data = [images(64, 3, 9, 9)]
    plan = sc.prune(model, data[0][:2], sparsity=0.4).plan
    small = sc.shrink(model, plan)
    ran: list[int] = []

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        ran.append(1)
        return model(batch)

    def refused(kind: type[Exception], text: str, **changes: object) -> None:
        options = {"dense": model, "plan": plan, "forward": forward, "data": data, **changes}
        with pytest.raises(kind, match=text):
            sc.repair(
                changes.pop("small", small), options.pop("data"), **{k: v for k, v in options.items() if k != "small"}
            )

    refused(InputError, "go together", plan=None)
    refused(InputError, "pass dense= and plan=", dense=None, plan=None, steps=("fold",))
    refused(UnknownNameError, "Did you mean 'least_squares'", steps=("least_square",))
    refused(PlanMismatchError, "0.weight", dense=small)
    refused(PlanMismatchError, "0.weight", small=model)
    refused(InputError, "samples is a whole number", samples=0)
    refused(InputError, "damping", damping=-1.0)
    refused(DataError, "no batch", data=[])
    refused(DataError, "NaN", data=[data[0], data[0] * math.nan])
    assert not ran
    with pytest.raises(CalibrationError, match=r"4 equations for the \d+ weights"):
        sc.repair(small, [data[0][:4]], dense=model, plan=plan, positions=1)
