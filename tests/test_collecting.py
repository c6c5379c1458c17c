"""Every statistic of the streaming pass against an independent computation."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from nets_for_tests import Net, randomised
from secateur.collecting import COLLECTORS
from secateur.errors import ArtifactError, DataError, InputError, UnknownNameError
from secateur.evidence import NEEDS

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

CONVS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "plain": (nn.Conv2d(4, 6, 3, padding=1), (4, 7, 7)),
    "strided": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 7, 7)),
    "dilated": (nn.Conv2d(4, 6, 3, dilation=2), (4, 7, 7)),
    "same": (nn.Conv2d(4, 6, (2, 3), padding="same"), (4, 7, 6)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (4, 6, 6)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), (4, 6, 6)),
    "circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (4, 6, 6)),
    "one dimension": (nn.Conv1d(4, 6, 3, stride=2), (4, 11)),
    "three dimensions": (nn.Conv3d(4, 6, (1, 2, 3), padding=(0, 1, 1)), (4, 3, 4, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (4, 5, 5)),
    "transposed, grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 5, 5)),
    "linear": (nn.Linear(4, 6), (4,)),
    "linear on tokens": (nn.Linear(4, 6), (5, 4)),
}


def wrapped(layer: nn.Module) -> nn.Module:
    """The layer, and something behind it that makes logits of whatever comes, writing over what the layer made."""

    def forward(s: Net, x: Tensor) -> Tensor:
        made = s.layer(x).tanh_()
        rows = made.flatten(1)
        return torch.stack([rows.sum(1), rows.square().sum(1), rows[:, 0]], 1)

    return randomised(Net(forward, layer=layer).double()).eval()


def batches(shape: tuple[int, ...], sizes: tuple[int, ...] = (3, 2)) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, *shape, generator=generator, dtype=torch.float64), torch.arange(size) % 3) for size in sizes
    ]


def seen(layer: nn.Module, shape: tuple[int, ...], need: str, **options: Any) -> tuple[nn.Module, sc.Evidence]:
    model = wrapped(layer)
    return model, sc.observe(model, None, batches(shape), (need,), positions=None, **options)


@pytest.mark.parametrize("name", CONVS)
def test_fisher_is_the_sum_of_squared_gradients_of_each_sample(name: str) -> None:
    layer, shape = CONVS[name]
    model, facts = seen(layer, shape, "fisher")
    expected = torch.zeros_like(model.layer.weight)
    for x, y in batches(shape):
        for image, label in zip(x, y, strict=True):
            loss = F.cross_entropy(model(image[None]), label[None])
            expected += torch.autograd.grad(loss, model.layer.weight)[0] ** 2
    assert torch.allclose(facts.sums["fisher"]["layer.weight"], expected.detach(), rtol=1e-9)
    assert facts.samples == 5 and facts.batches == 2


def test_fisher_goes_through_large_batches_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, shape = CONVS["grouped"]
    whole = seen(layer, shape, "fisher")[1].sums["fisher"]["layer.weight"]
    monkeypatch.setattr("secateur.collecting.CHUNK_BYTES", 1)
    assert torch.allclose(seen(layer, shape, "fisher")[1].sums["fisher"]["layer.weight"], whole, rtol=1e-12)


def test_fisher_takes_windows_of_one_sample_together() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        windows = x.reshape(len(x) * 2, 3, 4)  # two windows of each sample stand next to each other
        return torch.tanh(s.layer(windows)).reshape(len(x), 2, 3, 3).sum((1, 2))

    model = randomised(Net(forward, layer=nn.Linear(4, 3)).double()).eval()
    data = [(x.reshape(len(x), 6, 4), y) for x, y in batches((24,))]
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for x, y in data:
        for row, label in zip(x, y, strict=True):
            expected += torch.autograd.grad(F.cross_entropy(model(row[None]), label[None]), model.layer.weight)[0] ** 2
    facts = sc.observe(model, None, data, ("fisher",))
    assert torch.allclose(facts.sums["fisher"]["layer.weight"], expected, rtol=1e-9)


def patches_of(layer: nn.Module, x: Tensor) -> Tensor:
    """(groups, samples * positions, k): by the layer itself, with each entry of a filter 1 alone."""
    probe = copy.deepcopy(layer)
    k, groups = layer.weight[0].numel(), getattr(layer, "groups", 1)
    ones = torch.eye(k, dtype=x.dtype).reshape(k, *layer.weight.shape[1:])
    probe.weight, probe.bias = nn.Parameter(ones.repeat(groups, *[1] * (ones.dim() - 1))), None
    with torch.no_grad():
        made = probe(x)
    rows = made.flatten(0, -2) if isinstance(layer, nn.Linear) else made.movedim(1, -1).flatten(0, -2)
    return rows.unflatten(1, (groups, k)).transpose(0, 1)


@pytest.mark.parametrize("name", [name for name in CONVS if "transposed" not in name])
def test_gram_is_the_second_moment_of_patches(name: str) -> None:
    layer, shape = CONVS[name]
    model, facts = seen(layer, shape, "gram")
    patches = torch.cat([patches_of(model.layer, x) for x, _ in batches(shape)], 1)
    assert torch.allclose(facts.sums["gram"]["layer.weight"], patches.mT @ patches, rtol=1e-9)
    assert int(facts.sums["gram_rows"]["layer.weight"]) == patches.shape[1]


@pytest.mark.parametrize("name", [name for name in CONVS if "transposed" not in name])
def test_taps_are_the_diagonal_of_the_gram(name: str) -> None:
    layer, shape = CONVS[name]
    model, facts = seen(layer, shape, "gram")
    taps = seen(layer, shape, "input_norm")[1].sums["taps"]["layer.weight"]
    gram = facts.sums["gram"]["layer.weight"]
    diagonal = gram.diagonal(dim1=1, dim2=2)  # (groups, k)
    each = diagonal.repeat_interleave(model.layer.weight.shape[0] // gram.shape[0], 0)
    assert torch.allclose(taps.expand(model.layer.weight.shape).flatten(1), each, rtol=1e-9)


def test_a_gram_of_few_positions_estimates_that_of_all() -> None:
    layer, shape = CONVS["plain"]
    model = wrapped(layer)
    data = batches(shape, sizes=(400,))
    full, few = (sc.observe(model, None, data, ("gram",), positions=p, seed=3) for p in (None, 8))
    means = [f.sums["gram"]["layer.weight"] / f.sums["gram_rows"]["layer.weight"] for f in (full, few)]
    assert int(few.sums["gram_rows"]["layer.weight"]) == 3200
    assert torch.allclose(means[0], means[1], atol=0.15) and not torch.equal(means[0], means[1])


@pytest.mark.parametrize("name", CONVS)
def test_activations_are_moments_of_both_sides(name: str) -> None:
    layer, shape = CONVS[name]
    model, facts = seen(layer, shape, "activation")
    with torch.no_grad():
        sides = {"input": [x for x, _ in batches(shape)], "output": [model.layer(x) for x, _ in batches(shape)]}
    for side, values in sides.items():
        if name == "circular" and side == "input":
            continue  # the layer reads the padded input
        last = isinstance(model.layer, nn.Linear)
        maps = [(v.reshape(len(v), -1, v.shape[-1]).mT if last else v.flatten(2)) for v in values]
        stacked = torch.cat(maps)  # (samples, channels, positions)

        def sums(kind: str, side: str = side) -> Tensor:
            return facts.sums[f"{side}.{kind}"]["layer.weight"]

        assert torch.allclose(sums("sum"), stacked.sum((0, 2)))
        assert torch.allclose(sums("square"), stacked.square().sum((0, 2)))
        assert torch.allclose(sums("absolute"), stacked.abs().sum((0, 2)))
        assert torch.allclose(sums("zeros"), (stacked == 0).double().sum((0, 2)))
        assert torch.allclose(sums("norm"), stacked.norm(dim=2).sum(0))
        assert int(sums("samples")) == 5 and int(sums("count")) == 5 * stacked.shape[2]


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("name", [name for name in CONVS if name != "circular"])  # it reads a padded input
def test_taylor_is_the_absolute_mean_over_positions_of_each_sample(name: str, side: str) -> None:
    layer, shape = CONVS[name]

    def forward(s: Net, x: Tensor) -> Tensor:
        made = F.hardswish(s.layer(torch.tanh(s.scale * x)), inplace=True)  # writes over what the layer made
        return torch.stack([made.flatten(1).sum(1), made.flatten(1).square().sum(1), made.flatten(1)[:, 0]], 1)

    scale = nn.Parameter(torch.ones(1))  # so that the layer's input has a gradient, too
    model = randomised(Net(forward, layer=layer, scale=scale).double()).eval()
    facts = sc.observe(model, None, batches(shape), ("activation_gradient",))
    expected = torch.zeros(())
    for x, y in batches(shape):
        for image, label in zip(x, y, strict=True):
            read = torch.tanh(model.scale * image[None]).detach()
            read.requires_grad_()
            made = layer(read)
            after = F.hardswish(made).flatten(1)
            logits = torch.stack([after.sum(1), after.square().sum(1), after[:, 0]], 1)
            values = read if side == "input" else made
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, label[None]), values)
            effect = (gradient * values)[0].detach()
            maps = effect.reshape(-1, effect.shape[-1]).T if isinstance(layer, nn.Linear) else effect.flatten(1)
            expected = expected + maps.mean(1).abs()
    assert torch.allclose(facts.sums[f"{side}.taylor"]["layer.weight"], expected, rtol=1e-9)
    assert int(facts.sums[f"{side}.taylor_samples"]["layer.weight"]) == 5


def test_a_flattened_map_has_one_norm_and_one_taylor() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        return s.head(torch.tanh(s.a(x)).flatten(1))

    model = randomised(Net(forward, a=nn.Conv2d(3, 4, 3), head=nn.Linear(4 * 16, 3)).double()).eval()
    data = batches((3, 6, 6))
    facts = sc.observe(model, sc.trace(model, data[0][0]), data, ("activation", "activation_gradient"))
    norms, effects = torch.zeros(4), torch.zeros(4)
    for x, y in data:
        for image, label in zip(x, y, strict=True):
            read = torch.tanh(model.a(image[None])).detach().requires_grad_()
            loss = F.cross_entropy(model.head(read.flatten(1)), label[None])
            (gradient,) = torch.autograd.grad(loss, read)
            norms = norms + read.detach()[0].flatten(1).norm(dim=1)
            effects = effects + (gradient * read)[0].mean((1, 2)).abs().detach()
    for statistic, expected in (("norm", norms), ("taylor", effects)):
        found = facts.sums[f"input.{statistic}"]["head.weight"].reshape(4, 16)
        assert torch.allclose(found, expected[:, None].expand(4, 16), rtol=1e-9)


def test_zeros_are_counted() -> None:
    model = wrapped(nn.Conv2d(2, 2, 1))
    x = torch.ones(2, 2, 3, 3, dtype=torch.float64)
    x[0, 1, 0] = 0
    facts = sc.observe(model, None, [(x, torch.tensor([0, 1]))], ("activation",))
    assert facts.sums["input.zeros"]["layer.weight"].tolist() == [0, 3]


def test_the_hessian_of_a_quadratic_is_exact_in_the_mean() -> None:
    model = Net(lambda s, x: s.layer(x), layer=nn.Linear(3, 1, bias=False)).double().eval()
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = (x.T @ x / 7 * 2).diagonal()

    def loss(output: Tensor, batch: Tensor) -> Tensor:
        return output.square().mean()

    facts = sc.observe(model, None, [x] * 500, ("hessian",), loss=loss)
    assert torch.allclose(facts.sums["hessian"]["layer.weight"][0] / 500, exact, rtol=0.2)


def test_a_hessian_that_is_diagonal_is_exact_and_merges() -> None:
    model = Net(lambda s, x: s.scale * x, scale=nn.Parameter(torch.ones(3))).double().eval()
    data = [x for x, _ in batches((3,), (3, 2, 4))]

    def loss(output: Tensor, batch: Tensor) -> Tensor:
        return output.square().sum(1).mean()

    whole, one, other = (sc.observe(model, None, part, ("hessian",), loss=loss) for part in (data, data[:1], data[1:]))
    exact = torch.stack([2 * x.square().mean(0) for x in data]).sum(0)
    assert torch.allclose(whole.sums["hessian"]["scale"], exact)
    assert torch.allclose(one.merge(other).sums["hessian"]["scale"], exact)


# -- the pass --------------------------------------------------------------------------------------------------------


def residual() -> nn.Module:
    def forward(s: Net, x: Tensor) -> Tensor:
        h = F.relu(s.bn(s.a(x)), inplace=True)
        return s.head((h + s.b(h)).mean((2, 3)))

    return randomised(
        Net(
            forward, a=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4), b=nn.Conv2d(4, 4, 3, padding=1), head=nn.Linear(4, 3)
        ).double()
    ).train()


@pytest.mark.parametrize("need", sorted(set(NEEDS) - {"hessian"}))  # its signs are drawn along the pass; see above
def test_two_halves_merge_into_the_whole(need: str) -> None:
    model, data = residual(), batches((3, 6, 6), (3, 2, 4))
    graph = sc.trace(model, data[0][0])
    whole, first, second = (
        sc.observe(model, graph, part, (need,), positions=None) for part in (data, data[:1], data[1:])
    )
    merged = first.merge(second)
    assert merged.samples == whole.samples == 9 and merged.batches == 3
    assert whole.has(need) and set(merged.sums) == set(whole.sums)
    for kind, totals in whole.sums.items():
        for name, total in totals.items():
            assert torch.allclose(merged.sums[kind][name], total, rtol=1e-10)


def test_all_needs_in_one_pass_give_what_each_gives_alone() -> None:
    model, data = residual(), batches((3, 6, 6))
    graph = sc.trace(model, data[0][0])
    together = sc.observe(model, graph, data, NEEDS, seed=2)
    assert set(COLLECTORS) == {need for need in NEEDS if together.has(need)}
    for need in NEEDS:
        alone = sc.observe(model, graph, data, (need,), seed=2)
        for kind, totals in alone.sums.items():
            if kind in ("gram", "hessian"):
                continue  # drawn from one generator, in another order
            assert all(torch.allclose(together.sums[kind][name], total) for name, total in totals.items())


def test_nothing_is_left_behind_on_the_model() -> None:
    model, data = residual(), batches((3, 6, 6))
    model.a.weight.grad = torch.ones_like(model.a.weight)
    model.b.bias.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    state = torch.get_rng_state()
    sc.observe(model, sc.trace(model, data[0][0]), data, NEEDS)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert model.training and bool((model.a.weight.grad == 1).all()) and not model.b.bias.requires_grad
    assert torch.equal(state, torch.get_rng_state())


def test_memory_does_not_grow_with_the_data() -> None:
    model = residual()
    graph = sc.trace(model, batches((3, 6, 6))[0][0])

    def held(count: int) -> int:
        facts = sc.observe(model, graph, batches((3, 6, 6)) * count, NEEDS)
        return sum(total.numel() for totals in facts.sums.values() for total in totals.values())

    assert held(1) == held(5)


def test_only_the_layers_that_are_asked_for() -> None:
    model, data = residual(), batches((3, 6, 6))
    facts = sc.observe(model, None, data, ("gram", "activation"), layers=["b.weight"])
    assert all(set(totals) == {"b.weight"} for totals in facts.sums.values())


def test_a_matrix_product_with_a_parameter_is_a_layer() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        return torch.addmm(s.bias, torch.tanh(x @ s.first), s.second)

    parts = {"first": nn.Parameter(torch.randn(4, 5)), "second": nn.Parameter(torch.randn(5, 3))}
    model = randomised(Net(forward, **parts, bias=nn.Parameter(torch.randn(3))).double()).eval()
    data = batches((4,))
    facts = sc.observe(model, None, data, ("gram", "input_norm", "fisher"))
    inputs = torch.cat([x for x, _ in data])
    assert torch.allclose(facts.sums["gram"]["first"][0], inputs.T @ inputs)
    assert facts.sums["taps"]["first"].shape == (4, 1)
    expected = torch.zeros(5, 3, dtype=torch.float64)
    for x, y in data:
        for row, label in zip(x, y, strict=True):
            expected += torch.autograd.grad(F.cross_entropy(model(row[None]), label[None]), model.second)[0] ** 2
    assert torch.allclose(facts.sums["fisher"]["second"], expected)


def test_bad_data_is_refused() -> None:
    model, data = residual(), batches((3, 6, 6))
    broken = [(data[0][0] * float("nan"), data[0][1])]
    for need in NEEDS:
        with pytest.raises(DataError, match="NaN"):
            sc.observe(model, None, broken, (need,))
        with pytest.raises(DataError, match="no batch"):
            sc.observe(model, None, [], (need,))
        with pytest.raises(InputError, match="pass data="):
            sc.observe(model, None, None, (need,))
    with pytest.raises(UnknownNameError, match="Did you mean 'fisher'"):
        sc.observe(model, None, data, ("fischer",))
    with pytest.raises(InputError, match="scalar"):
        sc.observe(model, None, data, ("fisher",), loss=lambda output, batch: output)


_GATHER = """
import sys, torch
import secateur as sc
sys.path.insert(0, {tests!r})
from test_collecting import batches, residual
model, data = residual(), batches((3, 6, 6), (3, 2, 4))
part = data[:1] if sys.argv[1] == "0" else data[1:]
sc.observe(model, sc.trace(model, data[0][0]), part, ("gradient", "activation"), positions=None).save(sys.argv[2])
"""


def test_evidence_of_several_processes_merges(tmp_path: Path) -> None:
    script = _GATHER.format(tests=str(Path(__file__).parent))
    for number in ("0", "1"):
        subprocess.run([sys.executable, "-c", script, number, str(tmp_path / number)], check=True)
    model, data = residual(), batches((3, 6, 6), (3, 2, 4))
    graph = sc.trace(model, data[0][0])
    parts = [sc.Evidence.load(tmp_path / number, model) for number in ("0", "1")]
    whole = sc.observe(model, graph, data, ("gradient", "activation"), positions=None)
    for name in ("taylor_fo", "activation_variance", "l2"):
        expected, found = (sc.score(graph, facts, name) for facts in (whole, parts[0].merge(parts[1])))
        assert all(torch.allclose(expected[group], found[group], rtol=1e-10) for group in expected)
    for content in (b"", (tmp_path / "0").read_bytes()[:200]):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(ArtifactError):
            sc.Evidence.load(tmp_path / "bad", model)
    with pytest.raises(InputError, match="different needs"):
        parts[0].merge(sc.observe(model, graph, data, ("gram",)))


def test_second_derivatives_go_through_attention() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = randomised(nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3)).double()).eval()
    facts = sc.observe(model, None, batches((3, 8)), ("hessian",))
    assert float(facts.sums["hessian"]["0.linear1.weight"].abs().sum()) > 0


def test_a_model_without_second_derivatives_is_told_so() -> None:
    model = randomised(nn.Sequential(nn.Linear(4, 5), nn.Hardsigmoid(), nn.Linear(5, 3)).double()).eval()
    with pytest.raises(InputError, match=r"no second derivative.*hardsigmoid.*'obd'"):
        sc.observe(model, None, batches((4,)), ("hessian",))
