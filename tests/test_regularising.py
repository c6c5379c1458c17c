"""Penalties: each gradient term against its closed form, who is penalised and who is not, and exact resuming."""

import copy
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from nets_for_tests import CASES
from secateur.errors import InputError, PlanMismatchError, TrainingError
from secateur.regularising import (
    GammaPenalty,
    GroupPenalty,
    WeightPenalty,
    gamma_threshold,
    gammas,
    group_importance,
)
from secateur.report.gammas import _ticks, emptied, gamma_figure, gamma_histogram
from secateur.training import Recipe, fit

PLAIN_SGD = Recipe(epochs=1, lr=0.1, schedule="constant", momentum=0.0, weight_decay=0.0)


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=True),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 16, 3),
        nn.BatchNorm1d(3),
    )


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 3, 6, 6, generator=generator), torch.arange(5) % 3


def case_named(name: str) -> Any:
    return next(case for case in CASES if case.name == name)


def term_of(hook: Any, model: nn.Module) -> dict[str, Tensor]:
    """What the hook adds to the gradient of each parameter, all of which are ones before."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    hook.after_backward(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return {name: parameter.grad - 1 for name, parameter in model.named_parameters()}


# -- the terms -----------------------------------------------------------------------------------------------------


def test_the_gamma_term_is_the_sign_and_zero_at_zero() -> None:
    model = net()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.5, -2.0, 0.0, 1e-9]))
    found = term_of(GammaPenalty(0.25), model)
    assert found.pop("1.weight").tolist() == [0.25, -0.25, 0.0, 0.25]
    assert found.pop("5.weight").tolist() == [0.25] * 3
    assert not any(term.any() for term in found.values())


@pytest.mark.parametrize(
    ("hook", "moved", "term"),
    [
        (GammaPenalty(0.01), ("1.weight", "5.weight"), lambda w: 0.01 * np.sign(w)),
        (WeightPenalty(0.01), ("0.weight", "4.weight"), lambda w: 0.01 * np.sign(w)),
        (WeightPenalty(0.01, order=2), ("0.weight", "4.weight"), lambda w: 0.02 * w),
    ],
)
def test_one_step_of_sgd_moves_by_the_rate_times_the_term(
    hook: Any, moved: tuple[str, ...], term: Callable[[Any], Any]
) -> None:
    model = net()
    plain, penalised = (fit(model, [batch()], PLAIN_SGD, hooks=hooks).model for hooks in ((), (hook,)))
    for name, before in model.named_parameters():
        difference = (penalised.get_parameter(name) - plain.get_parameter(name)).detach().numpy()
        expected = -0.1 * term(before.detach().numpy()) if name in moved else np.zeros(before.shape)
        np.testing.assert_allclose(difference, expected, atol=1e-7)
        assert name not in moved or np.abs(expected).max() > 1e-5


def test_an_l2_penalty_is_weight_decay_of_twice_the_strength() -> None:
    model = nn.Linear(3, 2, bias=False)
    data = [(torch.randn(5, 3), torch.arange(5) % 2)]
    decayed = fit(model, data, Recipe(**{**vars(PLAIN_SGD), "weight_decay": 0.02})).model
    penalised = fit(model, data, PLAIN_SGD, hooks=[WeightPenalty(0.01, order=2)]).model
    assert torch.allclose(decayed.weight, penalised.weight, atol=1e-8)


def test_weights_that_map_channels_are_penalised_and_others_not() -> None:
    class Other(nn.Module):
        """A linear map that is none of torch's classes."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 3))
            self.position = nn.Parameter(torch.ones(2, 3))

    model = nn.ModuleDict(
        {
            "transposed": nn.ConvTranspose1d(2, 3, 2),
            "attention": nn.MultiheadAttention(4, 2),
            "recurrent": nn.GRU(3, 4),
            "embedding": nn.Embedding(5, 4),
            "norm": nn.LayerNorm((2, 3)),
            "other": Other(),
        }
    )
    penalised = {name for name, term in term_of(WeightPenalty(0.5), model).items() if term.any()}
    assert penalised == {
        "transposed.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "recurrent.weight_ih_l0",
        "recurrent.weight_hh_l0",
        "other.weight",
    }


@pytest.mark.parametrize(
    ("hook", "only"), [(GammaPenalty(0.5, "1"), "1.weight"), (WeightPenalty(0.5, within=("[4]",)), "4.weight")]
)
def test_within_narrows(hook: Any, only: str) -> None:
    assert {name for name, term in term_of(hook, net()).items() if term.any()} == {only}


def test_a_weight_that_is_used_twice_is_penalised_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    found = term_of(WeightPenalty(0.5), model)["0.weight"]
    assert torch.equal(found, 0.5 * model[0].weight.sign())


def test_frozen_parameters_get_no_gradient() -> None:
    model = net()
    model[1].weight.requires_grad_(False)
    model(batch()[0]).sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    GammaPenalty().after_backward(model, optimizer)
    GroupPenalty(sc.trace(model, batch()[0])).after_backward(model, optimizer)
    assert model[1].weight.grad is None


# -- DepGraph's sparse learning --------------------------------------------------------------------------------------


def group_term_by_hand(model: nn.Module, graph: sc.Graph, strength: float, alpha: float) -> dict[str, Any]:
    """The term of every parameter, entry by entry."""
    weights = {name: parameter.detach().double().numpy() for name, parameter in model.named_parameters()}
    terms = {name: np.zeros_like(weight) for name, weight in weights.items()}
    for group in graph.prunable:
        parts = [slot for slot in group.slots if slot.tensor in weights]
        importance = []
        for channel in range(group.channels):
            entries = [
                np.take(weights[slot.tensor], place, slot.dim) for slot in parts for place in slot.indices[channel]
            ]
            importance.append(np.sqrt(sum((entry**2).sum() for entry in entries)))
        for channel, mine in enumerate(importance):
            factor = 2 ** (alpha * (max(importance) - mine) / (max(importance) - min(importance)))
            for slot in parts:
                for place in slot.indices[channel]:
                    where = (slice(None),) * slot.dim + (place,)
                    terms[slot.tensor][where] += strength * factor * weights[slot.tensor][where]
    return terms


@pytest.mark.parametrize(
    "name", ["batch norm", "projection residual", "concatenation", "depthwise", "two groups, tied by position"]
)
def test_the_group_term_is_that_of_the_paper(name: str) -> None:
    case = case_named(name)
    model = case.model()
    graph = sc.trace(model, case.batch(2))
    found = term_of(GroupPenalty(graph, 0.25, alpha=3.0), model)
    expected = group_term_by_hand(model, graph, 0.25, 3.0)
    for tensor, term in expected.items():
        np.testing.assert_allclose(found[tensor].numpy(), term, rtol=1e-9, atol=1e-12)
    assert sum(bool(term.any()) for term in expected.values()) > 3


def test_the_factor_spans_one_to_sixteen() -> None:
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 0], [2.0, 0], [1.0, 0]]))
        model[2].weight.zero_()
    found = term_of(GroupPenalty(sc.trace(model, torch.randn(2, 2)), 0.5), model)["0.weight"][:, 0]
    assert found.tolist() == pytest.approx([0.5 * 1 * 3, 0.5 * 4 * 2, 0.5 * 16 * 1])


def test_equal_channels_decay_equally() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    graph = sc.trace(model, torch.randn(2, 2))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    found = term_of(GroupPenalty(graph, 0.5), model)
    assert found["0.weight"].unique().tolist() == [0.25]
    assert not found["2.bias"].any()


def test_importances_ignore_statistics_and_follow_a_permutation() -> None:
    case = case_named("batch norm")
    model = case.model()
    graph = sc.trace(model, case.batch(2))
    before = group_importance(model, graph)
    order = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    with torch.no_grad():
        model.bn1.running_mean.add_(5)
        for tensor in (model.a.weight, model.bn1.weight, model.bn1.bias):
            tensor.copy_(tensor[order])
        model.b.weight.copy_(model.b.weight[:, order])
    after = group_importance(model, graph)
    assert torch.allclose(after["a"], before["a"][order])
    assert torch.allclose(after["b"], before["b"])


class Interrupt:
    """Stops in the given step, as Ctrl-C would."""

    def __init__(self, stop: int | None = None) -> None:
        self.left = stop

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.left = None if self.left is None else self.left - 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_importances_are_taken_once_per_epoch_or_every_few_steps() -> None:
    model = net()
    graph = sc.trace(model, batch()[0])

    def refreshed(every: int | None) -> list[int]:
        hook, steps, seen = GroupPenalty(graph, every=every), [], None
        changing = copy.deepcopy(model)
        for step in range(6):
            if step == 3:
                hook.after_epoch(changing, torch.optim.SGD(changing.parameters()))
            with torch.no_grad():
                changing[0].weight[0] *= 2
            term_of(hook, changing)
            now = hook.state_dict()["importance"]["0"].tolist()
            steps += [step] if now != seen else []
            seen = now
        return steps

    assert refreshed(None) == [0, 3]
    assert refreshed(2) == [0, 2, 4]
    assert refreshed(1) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("every", [None, 2, 3, 5])
@pytest.mark.parametrize("stop", [5, 8, 9])  # 4 steps make an epoch
def test_an_interrupted_run_with_a_group_penalty_ends_with_the_same_bits(
    tmp_path: Path, every: int | None, stop: int
) -> None:
    model, data = net(), [batch()] * 4
    graph = sc.trace(model, batch()[0])
    recipe = Recipe(epochs=3, lr=0.05)

    def run(stop: int | None, checkpoint: Path | None) -> dict[str, Tensor]:
        hooks = [GroupPenalty(graph, 0.01, every=every), Interrupt(stop)]
        return fit(model, data, recipe, hooks=hooks, checkpoint=checkpoint).model.state_dict()

    whole = run(None, None)
    with pytest.raises(KeyboardInterrupt):
        run(stop, tmp_path / "c.pt")
    resumed = run(None, tmp_path / "c.pt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    plain = fit(model, data, recipe).model.state_dict()
    assert not torch.equal(whole["0.weight"], plain["0.weight"])


def test_sparse_learning_drives_the_small_channels_down_first() -> None:
    model = net()
    graph = sc.trace(model, batch()[0])
    before = group_importance(model, graph)["0"]
    trained = fit(model, [batch()] * 4, Recipe(epochs=10, lr=0.02), hooks=[GroupPenalty(graph, 0.05)]).model
    after = group_importance(trained, graph)["0"]
    assert after[before.argmin()] / before.min() < 0.8 * after[before.argmax()] / before.max()


# -- runs and checkpoints --------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_strength_is_not_resumed(tmp_path: Path) -> None:
    model, data = net(), [batch()]
    fit(model, data, PLAIN_SGD, hooks=[GammaPenalty(1e-3)], checkpoint=tmp_path / "c.pt")
    with pytest.raises(TrainingError, match=r"GammaPenalty\(strength=0.001, within=None\).*strength=0.01"):
        fit(model, data, PLAIN_SGD, hooks=[GammaPenalty(1e-2)], checkpoint=tmp_path / "c.pt")
    graph = sc.trace(model, batch()[0])
    fit(model, data, PLAIN_SGD, hooks=[GroupPenalty(graph)], checkpoint=tmp_path / "d.pt")
    with pytest.raises(TrainingError, match=r"alpha=4.0, not 2.0"):
        fit(model, data, PLAIN_SGD, hooks=[GroupPenalty(graph, alpha=2.0)], checkpoint=tmp_path / "d.pt")


# -- gammas ----------------------------------------------------------------------------------------------------------


def test_gammas_are_the_absolute_scales_of_every_batch_norm() -> None:
    model = nn.Sequential(net(), nn.BatchNorm1d(2, affine=False), nn.InstanceNorm1d(2, affine=True))
    with torch.no_grad():
        model[0][1].weight.copy_(torch.tensor([-1.0, 2.0, 0.5, -0.25]))
    found = gammas(model)
    assert {name: values.tolist() for name, values in found.items()} == {
        "0.1": [1.0, 2.0, 0.5, 0.25],
        "0.5": [1.0, 1.0, 1.0],
    }
    assert not any(values.requires_grad for values in found.values())


@pytest.mark.parametrize(
    ("percentile", "threshold", "below"), [(0.0, 0.1, 0), (0.3, 0.4, 3), (0.35, 0.4, 3), (0.9, 1.0, 9), (0.99, 1.0, 9)]
)
def test_one_percentile_over_all_layers(percentile: float, threshold: float, below: int) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(6))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([-0.9, 0.2, 0.7, -0.4]))
        model[1].weight.copy_(torch.tensor([0.1, 0.3, -0.5, 0.6, 0.8, 1.0]))
    found = gamma_threshold(model, percentile)
    assert found == pytest.approx(threshold)
    assert sum(int((values < found).sum()) for values in gammas(model).values()) == below


# -- the histogram -----------------------------------------------------------------------------------------------------

TWO_LAYERS = {"a.bn": [0.1, -0.2, 0.3, 0.8], "b<i>": [0.05, 0.0, 0.2]}


def bars(figure: Any) -> dict[str, list[tuple[float, int]]]:
    """Per colour the middle and the count of every bar, the counts read back from its height."""
    return {
        bar.name: [(x, round((base + y) ** 2 - base**2)) for x, y, base in zip(bar.x, bar.y, bar.base, strict=True)]
        for bar in figure.data
    }


def test_the_histogram_counts_every_channel_once_on_its_side_of_the_threshold() -> None:
    pytest.importorskip("plotly")
    figure = gamma_figure(TWO_LAYERS, 0.2)
    found = bars(figure)
    assert [count for _, count in found["below the threshold"]] == [1, 1, 1]
    assert found["stays"] == [(pytest.approx(0.205), 2), (pytest.approx(0.305), 1), (pytest.approx(0.795), 1)]
    assert figure.layout.shapes[0].x0 == 0.2
    assert "threshold 0.2" in figure.layout.annotations[0].text
    assert "percentile 42.9" in figure.layout.annotations[0].text
    assert "3 of 7 channels below" in figure.layout.annotations[0].text


def test_a_bin_that_the_threshold_cuts_shows_both_sides() -> None:
    pytest.importorskip("plotly")
    values = [0.501, 0.502, 0.503, 0.504, 0.505, 1.0]
    found = bars(gamma_figure({"a": values}, 0.504))
    assert found["below the threshold"][0][1] == 3 and found["stays"][0][1] == 2
    assert found["below the threshold"][0][0] == found["stays"][0][0]


def test_ticks_are_round_and_apart() -> None:
    assert _ticks(2558) == [0, 20, 100, 200, 500, 1000, 2000]
    assert _ticks(1) == [0, 1]
    assert _ticks(7) == [0, 1, 2, 5]


def test_the_threshold_of_the_model_is_that_of_the_figure(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    pytest.importorskip("jinja2")
    model = net()
    nn.init.normal_(model[1].weight)
    nn.init.normal_(model[5].weight)
    plain = {name: values.tolist() for name, values in gammas(model).items()}
    page = gamma_histogram(plain, gamma_threshold(model, 0.45), tmp_path / "new" / "gammas.html", title="a <b>")
    text = page.read_text(encoding="utf-8")
    assert "42.9" in text and "a &lt;b&gt;" in text and "7 channels of 2 BatchNorm layers" in text
    assert "would lose every channel" not in text and "<script src" not in text


def test_layers_that_would_be_cut_through_are_named(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    pytest.importorskip("jinja2")
    assert emptied(TWO_LAYERS, 0.25) == ["b<i>"] and emptied(TWO_LAYERS, 0.2) == []
    text = gamma_histogram(TWO_LAYERS, 0.25, tmp_path / "g.html").read_text(encoding="utf-8")
    assert "b&lt;i&gt; would lose every channel at this threshold" in text
    assert "b<i>" not in text.split("<script>")[0]


@pytest.mark.parametrize(
    ("values", "threshold", "message"),
    [
        ({}, 0.1, "no gamma to draw"),
        ({"a": []}, 0.1, "no gamma to draw"),
        ({"a": [math.nan]}, 0.1, "not a finite number: did"),
        ({"a": [1.0]}, math.inf, "threshold is a finite number"),
        ({"a": [1.0]}, -1.0, "threshold is a finite number"),
    ],
)
def test_gammas_that_cannot_be_drawn(values: Any, threshold: float, message: str) -> None:
    pytest.importorskip("plotly")
    with pytest.raises(InputError, match=message):
        gamma_figure(values, threshold)


def test_scales_that_are_all_zero_can_be_drawn() -> None:
    pytest.importorskip("plotly")
    assert bars(gamma_figure({"a": [0.0, 0.0]}, 0.0)) == {"below the threshold": [], "stays": [(0.00625, 2)]}


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH")
def test_the_figure_draws_itself_in_a_browser_without_errors_or_requests(tmp_path: Path) -> None:
    page = gamma_histogram(TWO_LAYERS, 0.2, tmp_path / "gammas.html")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --virtual-time-budget=8000 --enable-logging=stderr --dump-dom"
    )
    command = [str(BROWSER), *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert 'data-drawn="1"' in done.stdout
    assert "CONSOLE" not in done.stderr, done.stderr
    assert done.stdout.count('class="point"') == 6


# -- errors ----------------------------------------------------------------------------------------------------------


def test_a_model_without_targets_is_an_error_at_the_first_step() -> None:
    plain = [(torch.randn(5, 3), torch.arange(5) % 2)]
    with pytest.raises(InputError, match="no BatchNorm with a scale: there is nothing to penalise"):
        fit(nn.Linear(3, 2), plain, PLAIN_SGD, hooks=[GammaPenalty()])
    with pytest.raises(InputError, match="no convolution or linear map"):
        term_of(WeightPenalty(0.1), nn.BatchNorm1d(3))
    with pytest.raises(InputError, match=r"within='7' names no BatchNorm"):
        term_of(GammaPenalty(within=("1", "7")), net())
    with pytest.raises(InputError, match="no gamma to take a percentile of"):
        gamma_threshold(nn.Linear(3, 2), 0.5)


def test_a_graph_of_another_model_is_an_error() -> None:
    graph = sc.trace(net(), batch()[0])
    with pytest.raises(PlanMismatchError):
        term_of(GroupPenalty(graph), nn.Linear(3, 2))
    with pytest.raises(InputError, match="every group of the graph is locked"):
        GroupPenalty(sc.trace(nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 3)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GammaPenalty(-1.0), "strength is a finite number"),
        (lambda: GammaPenalty(float("nan")), "strength is a finite number"),
        (lambda: GammaPenalty(within=()), "within is one or more names"),
        (lambda: GammaPenalty(within=[nn.ReLU()]), "within is one or more names"),
        (lambda: WeightPenalty(0.1, order=3), "order is 1 .* or 2"),
        (lambda: GroupPenalty(None, alpha=-1.0), "alpha is at least 0"),
        (lambda: GroupPenalty(None, every=0), "every is a whole number"),
        (lambda: gamma_threshold(net(), 40), r"in \[0, 1\); got 40. For 40 % pass 0.4"),
        (lambda: gamma_threshold(net(), 1.0), r"in \[0, 1\); got 1.0"),
    ],
)
def test_settings_that_cannot_be_meant(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
