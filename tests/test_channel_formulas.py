"""Every channel criterion against a few lines of its own formula, on small tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from nets_for_tests import CASES, Net, conv, head, pooled, randomised
from secateur.criteria.table import CRITERIA, is_raw, needs_of
from secateur.errors import InputError
from secateur.ordering import select_in_order


def net() -> nn.Module:
    """conv -> BatchNorm -> ReLU -> conv -> ReLU -> head; a group of four channels and one of three."""

    def forward(s: Net, x: Tensor) -> Tensor:
        return s.head(pooled(F.relu(s.b(F.relu(s.bn(s.a(x)))))))

    parts = {"a": conv(3, 4, bias=False), "bn": nn.BatchNorm2d(4), "b": conv(4, 3), "head": head(3)}
    return randomised(Net(forward, **parts).double()).eval()


def data(count: int = 3, size: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(size, 3, 6, 6, generator=generator, dtype=torch.float64), torch.arange(size) % 3)
        for _ in range(count)
    ]


def scores(model: nn.Module, criterion: str, batches: list[tuple[Tensor, Tensor]] | None = None, **options: object):
    batches = batches or data()
    graph = sc.trace(model, batches[0][0][:2])
    facts = sc.observe(model, graph, batches, needs_of(criterion), positions=None, **options)
    return sc.score(graph, facts, criterion)


def hidden(model: nn.Module, x: Tensor) -> Tensor:
    return F.relu(model.bn(model.a(x)))


# -- weights ---------------------------------------------------------------------------------------------------------


def test_fpgm_is_the_sum_of_distances_to_the_other_filters() -> None:
    model = net()
    rows = model.a.weight.detach().numpy().reshape(4, -1)
    expected = [sum(np.linalg.norm(row - other) for other in rows) for row in rows]
    assert np.allclose(scores(model, "fpgm")["a"], expected)


def test_fpgm_averages_over_producers() -> None:
    case = next(case for case in CASES if case.name == "residual add")
    model = case.model()
    graph = sc.trace(model, case.batch(2))
    sums = []
    for weight in (model.stem.weight, model.two.weight):
        rows = weight.detach().numpy().reshape(len(weight), -1)
        sums.append([sum(np.linalg.norm(row - other) for other in rows) for row in rows])
    assert np.allclose(sc.score(graph, sc.observe(model, graph), "fpgm")["stem"], np.mean(sums, axis=0))


def test_slimming_is_gamma_as_it_is_and_needs_one() -> None:
    model = net()
    graph = sc.trace(model, data()[0][0])
    with pytest.raises(InputError, match="group 'b' has no BatchNorm scale: use 'bn_scale'"):
        sc.score(graph, sc.observe(model, graph), "slimming")
    graph = sc.trace(model, data()[0][0], ignore=["b"])
    assert torch.equal(sc.score(graph, sc.observe(model, graph), "slimming")["a"], model.bn.weight.detach().abs())
    assert is_raw("slimming") and not is_raw("bn_scale")


def test_one_percentile_of_gamma_over_all_layers() -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(6, 2, 1)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.01, -0.9, 0.02, 0.8]))
        model[4].weight.copy_(torch.tensor([5.0, 4.0, -0.03, 6.0, 7.0, 0.5]))
    plan = sc.prune(model, torch.randn(1, 3, 8, 8), criterion="slimming", sparsity=0.4, scope="global").plan
    kept = {cut.tensor: cut.kept for cut in plan.cuts}
    assert kept["1.weight"] == (1, 3) and kept["4.weight"] == (0, 1, 3, 4)  # the four smallest of ten, wherever


def test_group_norm_is_the_mean_over_all_that_is_tied_to_a_channel() -> None:
    model = net()
    parts = [
        model.a.weight.detach().square().sum((1, 2, 3)),
        model.bn.weight.detach().square(),
        model.bn.bias.detach().square(),
        model.b.weight.detach().square().sum((0, 2, 3)),
    ]
    assert torch.allclose(scores(model, "group_norm")["a"], torch.stack(parts).mean(0))


def test_lamp_divides_by_the_squares_of_those_at_least_as_large() -> None:
    model = net()
    squares = model.a.weight.detach().square().sum((1, 2, 3)).numpy()
    expected = [value / squares[squares >= value].sum() for value in squares]
    found = scores(model, "lamp")["a"]
    assert np.allclose(found, expected) and float(found.max()) == 1.0
    with torch.no_grad():
        model.a.weight[2] = model.a.weight[0]
    tied = scores(model, "lamp")["a"]
    assert tied[0] == tied[2]


# -- activations -----------------------------------------------------------------------------------------------------


def test_activation_criteria_are_moments_where_the_next_layer_reads() -> None:
    model, batches = net(), data()
    with torch.no_grad():
        read = torch.cat([hidden(model, x) for x, _ in batches]).numpy()
        made = torch.cat([model.a(x) for x, _ in batches]).numpy()
    norms = np.sqrt((read**2).sum(axis=(2, 3))).mean(axis=0)
    assert np.allclose(scores(model, "output_norm")["a"], norms)
    assert np.allclose(scores(model, "output_norm_pre")["a"], np.sqrt((made**2).sum(axis=(2, 3))).mean(axis=0))
    assert np.allclose(scores(model, "activation_mean")["a"], np.abs(read).mean(axis=(0, 2, 3)))
    assert np.allclose(scores(model, "apoz")["a"], (read != 0).mean(axis=(0, 2, 3)))
    assert np.allclose(scores(model, "activation_variance")["a"], read.var(axis=(0, 2, 3)))
    assert 0 < float(scores(model, "apoz")["a"].min()) < float(scores(model, "apoz")["a"].max()) < 1


def test_a_flattened_map_is_one_channel_again() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        return s.head(F.relu(s.a(x)).flatten(1))

    model = randomised(Net(forward, a=conv(3, 4), head=nn.Linear(4 * 36, 3)).double()).eval()
    with torch.no_grad():
        read = torch.cat([F.relu(model.a(x)) for x, _ in data()]).numpy()
    assert np.allclose(scores(model, "activation_mean")["a"], read.mean(axis=(0, 2, 3)))


def test_the_norm_of_a_flattened_map_is_that_of_the_map() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        return s.head(F.relu(s.a(x)).flatten(1))

    model = randomised(Net(forward, a=conv(3, 4), head=nn.Linear(4 * 36, 3)).double()).eval()
    with torch.no_grad():
        read = torch.cat([F.relu(model.a(x)) for x, _ in data()]).numpy()
    assert np.allclose(scores(model, "output_norm")["a"], np.sqrt((read**2).sum(axis=(2, 3))).mean(axis=0))


def test_variance_is_taken_where_each_layer_reads() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        h = s.a(x)
        return s.head(pooled(s.b(h) + s.c(5 + h)))

    model = randomised(Net(forward, a=conv(3, 4, 1), b=conv(4, 3), c=conv(4, 3), head=head(3)).double()).eval()
    with torch.no_grad():
        model.a.weight[2] = 0  # constant, but not the same for both of its readers
        read = torch.cat([model.a(x) for x, _ in data()]).numpy()
    found = scores(model, "activation_variance")["a"]
    assert np.allclose(found, read.var(axis=(0, 2, 3))) and float(found[2]) < 1e-12


# -- gradients and curvature -----------------------------------------------------------------------------------------


def test_taylor_takes_the_mean_over_positions_before_the_absolute_value() -> None:
    model, batches = net(), data()
    total, samples = np.zeros(4), 0
    for x, y in batches:
        for image, label in zip(x, y, strict=True):
            read = hidden(model, image[None]).detach().requires_grad_()
            out = model.head(pooled(F.relu(model.b(read))))
            (gradient,) = torch.autograd.grad(F.cross_entropy(out, label[None]), read)
            total += (gradient * read).mean((2, 3)).abs()[0].detach().numpy()
            samples += 1
    expected = total / samples
    assert np.allclose(scores(model, "taylor")["a"], expected / np.sqrt((expected**2).sum()))


def test_obd_sums_half_the_fisher_times_the_square() -> None:
    model, batches = net(), data()
    fisher = torch.zeros_like(model.a.weight)
    for x, y in batches:
        for image, label in zip(x, y, strict=True):
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(image[None]), label[None]), model.a.weight)
            fisher += gradient**2 / 15
    assert torch.allclose(scores(model, "obd")["a"], (fisher * model.a.weight**2 / 2).sum((1, 2, 3)).detach())


def test_hessian_estimates_the_trace_of_the_filter() -> None:
    layers = Net(lambda s, x: s.out(torch.tanh(s.a(x))), a=nn.Linear(2, 3), out=nn.Linear(3, 3))
    model = randomised(layers.double()).eval()
    x, y = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.arange(6) % 3

    def loss(weight: Tensor) -> Tensor:
        return F.cross_entropy(model.out(torch.tanh(F.linear(x, weight, model.a.bias))), y)

    exact = torch.autograd.functional.hessian(loss, model.a.weight.detach())
    diagonal = torch.stack([torch.stack([exact[i, j, i, j] for j in range(2)]) for i in range(3)])
    expected = diagonal.sum(1) / (2 * 2) * model.a.weight.detach().square().sum(1)
    graph = sc.trace(model, x[:2])
    found = sc.score(graph, sc.observe(model, graph, [(x, y)] * 700, ("hessian",)), "hessian")["a"]
    assert torch.allclose(found, expected, rtol=0.2, atol=0.04 * float(expected.abs().max()))
    few = sc.score(graph, sc.observe(model, graph, [(x, y)], ("hessian",)), "hessian")["a"]
    assert not torch.allclose(few, expected, rtol=0.01)


def test_evidence_of_no_graph_knows_no_groups() -> None:
    model = net()
    graph = sc.trace(model, data()[0][0])
    with pytest.raises(InputError, match="knows no group 'a': pass `observe` the graph"):
        sc.score(graph, sc.observe(model, None, data(), ("gradient",)), "taylor_fo")


# -- reconstruction --------------------------------------------------------------------------------------------------


def test_thinet_grows_the_removed_set_that_disturbs_the_next_layer_least() -> None:
    model, batches = net(), data()
    with torch.no_grad():
        read = torch.cat([hidden(model, x) for x, _ in batches])
        parts = torch.stack(
            [F.conv2d(read[:, [j]], model.b.weight[:, [j]], padding=model.b.padding) for j in range(4)]
        ).numpy()
    order: list[int] = []
    while len(order) < 4:
        left = [j for j in range(4) if j not in order]
        order.append(min(left, key=lambda j: (parts[[*order, j]].sum(axis=0) ** 2).sum()))
    assert scores(model, "thinet")["a"].argsort().tolist() == order


def test_thinet_finds_channels_that_give_nothing_equal() -> None:
    model = net()
    with torch.no_grad():
        model.bn.bias[1] = model.bn.bias[3] = -100.0
    found = scores(model, "thinet")["a"].tolist()
    assert found[1] == found[3] == 0 and {found[0], found[2]} == {2, 3}


def test_thinet_without_a_reading_layer_says_so() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        return s.up(F.relu(s.a(x))).mean((2, 3))

    model = randomised(Net(forward, a=conv(3, 4), up=nn.ConvTranspose2d(4, 3, 2)).double()).eval()
    with pytest.raises(InputError, match="no convolution or linear map was seen to read group 'a'"):
        scores(model, "thinet")


# -- wrappers --------------------------------------------------------------------------------------------------------


def test_an_ensemble_is_the_weighted_mean_of_normalised_scores() -> None:
    model = net()
    graph = sc.trace(model, data()[0][0])
    both = sc.ensemble("l1", "taylor_fo", weights=(1, 3))
    assert both.needs == ("gradient",) and both.__name__ == "ensemble(l1, taylor_fo)" and is_raw(both)
    facts = sc.observe(model, graph, data(), both.needs)
    parts = [sc.score(graph, facts, name)["a"].double() for name in ("l1", "taylor_fo")]
    expected = (parts[0] / parts[0].mean() + 3 * parts[1] / parts[1].mean()) / 4
    assert torch.allclose(sc.score(graph, facts, both)["a"], expected)
    assert torch.allclose(sc.score(graph, facts, sc.normalised("l1"))["a"], parts[0] / parts[0].mean())
    with pytest.raises(InputError, match="at least one criterion"):
        sc.ensemble()
    with pytest.raises(InputError, match="one per criterion"):
        sc.ensemble("l1", "l2", weights=(1,))
    with pytest.raises(InputError, match="cannot be wrapped"):
        sc.normalised("l1_greedy")


# -- in order --------------------------------------------------------------------------------------------------------


def test_greedy_l1_leaves_removed_input_channels_out_of_the_sum() -> None:
    model = nn.Sequential(conv(3, 2, bias=False), nn.ReLU(), conv(2, 2, bias=False), nn.ReLU(), conv(2, 2)).double()
    with torch.no_grad():
        model[0].weight[0], model[0].weight[1] = 1.0, 0.1  # channel 1 goes
        model[2].weight[0, 0], model[2].weight[0, 1] = 0.5, 9.0  # large only through the channel that is gone
        model[2].weight[1, 0], model[2].weight[1, 1] = 1.0, 0.0
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    independent = sc.prune(model, x, criterion="l1", sparsity=0.5).plan
    greedy = sc.prune(model, x, criterion="l1_greedy", sparsity=0.5).plan
    kept = [{cut.tensor: cut.kept for cut in plan.cuts if cut.dim == 0} for plan in (independent, greedy)]
    assert kept[0]["0.weight"] == kept[1]["0.weight"] == (0,)
    assert kept[0]["2.weight"] == (0,) and kept[1]["2.weight"] == (1,)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_greedy_output_norm_measures_later_layers_again() -> None:
    model, batches = net(), data()
    graph = sc.trace(model, batches[0][0])
    plan = select_in_order(model, graph, sc.greedy("output_norm"), sc.Target(sparsity=0.5), batches)
    first = scores(model, "output_norm")["a"].argsort()[:2].tolist()
    with torch.no_grad():
        for x, _ in batches:
            assert x.shape[1] == 3
        live = [j for j in range(4) if j not in first]
        reads = torch.cat(
            [
                F.relu(F.conv2d(hidden(model, x)[:, live], model.b.weight[:, live], model.b.bias, padding=1))
                for x, _ in batches
            ]
        )
    gone = int(reads.flatten(2).norm(dim=2).mean(0).argmin())
    kept = {(cut.tensor, cut.dim): cut.kept for cut in plan.cuts}
    assert kept["a.weight", 0] == tuple(live) and gone not in kept["b.weight", 0] and len(kept["b.weight", 0]) == 2


def test_greedy_methods_take_their_own_way() -> None:
    model, x = net(), data()[0][0]
    with pytest.raises(InputError, match="scope='layer'"):
        sc.prune(model, x, criterion="l1_greedy", sparsity=0.5, scope="global")
    with pytest.raises(InputError, match=r"use `prune`, or `select_in_order`"):
        graph = sc.trace(model, x)
        sc.score(graph, sc.observe(model, graph), "l1_greedy")
    half = sc.prune(model, x, criterion="l1_greedy", target=sc.Target(max_macs=0.5))
    assert half.plan.macs[1] <= half.plan.macs[0] / 2


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_data_that_is_missing_is_asked_for_before_any_work(criterion: str) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the model was run")

    model = net()
    model.register_forward_pre_hook(refuse)
    if needs_of(criterion):
        with pytest.raises(InputError, match=rf"criterion '{criterion}' needs .* evidence: pass data="):
            sc.prune(model, data()[0][0], criterion=criterion, sparsity=0.5)


# -- scopes ----------------------------------------------------------------------------------------------------------


def test_isomorphic_groups_compete_and_every_class_loses_the_same_fraction() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        h = F.relu(s.fine(F.relu(s.stem(x))))
        return s.head(F.relu(s.wide(s.point(h).relu())).mean((2, 3)))

    parts = {"stem": conv(3, 4), "fine": conv(4, 8), "point": conv(8, 6, 1), "wide": conv(6, 10, 1)}
    model = randomised(Net(forward, **parts, head=head(10)).double()).eval()
    with torch.no_grad():
        model.stem.weight.mul_(100)  # of the class of 3x3 layers read by 3x3 layers, alone in it
    x = data()[0][0]
    plan = sc.prune(model, x, criterion="l2", sparsity=0.5, scope="isomorphic").plan
    after = {row.layer: row.after for row in plan.widths}
    assert after["stem"] == 2 and after["fine"] == 4 and after["wide"] == 5
    twins = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 2)).double()
    randomised(twins)
    with torch.no_grad():
        twins[2].weight[:6].mul_(1e-3)
    even = sc.prune(twins, x, criterion="l2", sparsity=0.25, scope="isomorphic", target=None).plan
    assert {row.layer: row.after for row in even.widths}["2"] < 8


def test_structures_do_not_depend_on_widths() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        h = torch.tanh(s.b(torch.tanh(s.a(x) + s.first)) + s.second)
        return s.head(h.mean(1))

    places = {"first": nn.Parameter(torch.ones(1, 5, 6)), "second": nn.Parameter(torch.ones(1, 5, 10))}
    model = Net(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 10), head=nn.Linear(10, 3), **places)
    graph = sc.trace(model, torch.randn(2, 5, 4))
    given = {"a": torch.arange(6.0), "b": torch.arange(10.0) + 100}
    plan = sc.select(graph, given, sc.Target(sparsity=0.25), scope="isomorphic", normalise=False)
    assert {row.layer: row.after for row in plan.widths} == {"a": 2, "b": 10, "head": 3}  # they compete: 4 of 16


def test_a_budget_is_spent_isomorphically() -> None:
    layers = [conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 8, 1), nn.ReLU(), conv(8, 8, 1), nn.ReLU()]
    model = randomised(nn.Sequential(*layers, conv(8, 2, 1)).double())
    graph = sc.trace(model, data()[0][0])
    given = {group.name: torch.arange(8.0) * 10**number for number, group in enumerate(graph.prunable)}
    plan = sc.select(graph, given, sc.Target(max_macs=0.5), scope="isomorphic", normalise=False)
    after = {row.layer: row.after for row in plan.widths}
    # classes: a 3x3 layer read by a 3x3 layer; one read by a 1x1 layer; the two 1x1 layers, which compete
    assert abs(after["0"] - after["2"]) <= 1 and abs(after["4"] + after["6"] - 2 * after["2"]) <= 2
    assert after["4"] < after["6"] and plan.macs[1] <= plan.macs[0] / 2


def test_a_budget_is_spent_globally_and_a_sparsity_by_layer_unless_told_otherwise() -> None:
    model, x = net(), data()[0][0]
    graph = sc.trace(model, x)
    given = sc.score(graph, sc.observe(model, graph), "l2")
    for target, scope in ((sc.Target(max_macs=0.5), "global"), (sc.Target(sparsity=0.5), "layer")):
        assert sc.select(graph, given, target) == sc.select(graph, given, target, scope=scope)
