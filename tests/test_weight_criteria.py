"""Weight masks: every criterion against its formula, exact counts, patterns, SparseGPT, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from nets_for_tests import Net, conv, head, pooled, randomised
from secateur.criteria.weights import WEIGHT_CRITERIA
from secateur.errors import InputError, ModelError, PlanMismatchError, TargetError, UnknownNameError
from secateur.masking import WEIGHT_METHODS, Gradual, ln_structured, threshold_masks
from secateur.sparsegpt import DAMPING, sparsegpt_rows
from secateur.training import Recipe, fit

DATA_NEEDED = ("obd", "snip", "sparsegpt", "synflow", "wanda")


def net() -> nn.Module:
    def forward(s: Net, x: Tensor) -> Tensor:
        return s.head(pooled(F.relu(s.b(F.relu(s.bn(s.a(x)))))))

    parts = {"a": conv(4, 8, bias=False), "bn": nn.BatchNorm2d(8), "b": conv(8, 4), "head": head(4)}
    return randomised(Net(forward, **parts).double()).eval()


def data(count: int = 3, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(size, 4, 6, 6, generator=generator, dtype=torch.float64), torch.arange(size) % 3)
        for _ in range(count)
    ]


def masks(criterion: Any, sparsity: Any = 0.5, model: nn.Module | None = None, **options: Any) -> sc.Masks:
    return sc.make_masks(model or net(), criterion, sparsity, data=data(), **options)


def lowest(scores: np.ndarray, fraction: float) -> np.ndarray:
    """True for what stays, of one unit."""
    keep = np.ones(scores.size, bool)
    keep[np.argsort(scores.ravel(), kind="stable")[: math.floor(fraction * scores.size + 1e-9)]] = False
    return keep.reshape(scores.shape)


def same_state(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


# -- laws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", sorted(WEIGHT_METHODS))
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.75])
def test_exactly_the_share_that_is_asked_for_goes(criterion: str, sparsity: float) -> None:
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    found, again = (masks(criterion, sparsity, model, seed=4) for _ in range(2))
    assert all(torch.equal(keep, again.keep[name]) for name, keep in found.keep.items())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    sizes = {name: keep.numel() for name, keep in found.keep.items()}
    scope = WEIGHT_METHODS[criterion].scopes[0]
    rows = {"a.weight": 8, "b.weight": 4, "head.weight": 3}
    if criterion == "ln_structured":
        expected = sum(math.floor(sparsity * rows[name] + 1e-9) * sizes[name] // rows[name] for name in sizes)
    elif scope == "global":
        expected = math.floor(sparsity * sum(sizes.values()) + 1e-9)
    elif scope == "layer":
        expected = sum(math.floor(sparsity * size + 1e-9) for size in sizes.values())
    else:
        expected = sum(rows[name] * math.floor(sparsity * size / rows[name] + 1e-9) for name, size in sizes.items())
    assert found.counts == (expected, sum(sizes.values()))
    sparse = found.apply(model)
    for name, tensor in sparse.named_parameters():
        if name in found.keep:
            assert bool((tensor[~found.keep[name]] == 0).all())
            if name not in found.values:
                assert torch.equal(tensor[found.keep[name]], model.get_parameter(name)[found.keep[name]])


@pytest.mark.parametrize("criterion", sorted(set(WEIGHT_METHODS) - {"ln_structured"}))
def test_what_is_gone_stays_gone_and_counts(criterion: str) -> None:
    model = net()
    first = masks(criterion, 0.4, model)
    second = masks(criterion, 0.6, first.apply(model), masks=first)
    for name, keep in second.keep.items():
        assert bool((keep <= first.keep[name]).all())
    fresh = masks(criterion, 0.6, model)
    assert second.counts == fresh.counts
    less = masks(criterion, 0.2, first.apply(model), masks=first)
    assert less.counts == first.counts  # nothing comes back


# SparseGPT goes through the columns in their order, which matters.
@pytest.mark.parametrize("criterion", sorted(set(WEIGHT_METHODS) - {"ln_structured", "random", "sparsegpt"}))
def test_permuting_hidden_channels_permutes_masks(criterion: str) -> None:
    model, order = net(), torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    moved = net()
    with torch.no_grad():
        moved.a.weight.copy_(model.a.weight[order])
        moved.b.weight.copy_(model.b.weight[:, order])
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(moved.bn, name).copy_(getattr(model.bn, name)[order])
    one, two = masks(criterion, 0.5, model), masks(criterion, 0.5, moved)
    assert torch.equal(one.keep["a.weight"][order], two.keep["a.weight"])
    assert torch.equal(one.keep["b.weight"][:, order], two.keep["b.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("criterion", sorted(WEIGHT_METHODS))
def test_other_dtypes_are_kept(criterion: str, dtype: torch.dtype) -> None:
    model = net().to(dtype)
    batches = [(x.to(dtype), y) for x, y in data()]
    sparse = sc.make_masks(model, criterion, 0.5, data=batches).apply(model)
    assert {parameter.dtype for parameter in sparse.parameters()} == {dtype}


# -- formulas --------------------------------------------------------------------------------------------------------


def test_magnitude_in_every_scope() -> None:
    model = net()
    weights = {
        name: abs(model.get_parameter(name).detach().numpy()) for name in ("a.weight", "b.weight", "head.weight")
    }
    flat = np.concatenate([weight.ravel() for weight in weights.values()])
    everywhere = np.split(lowest(flat, 0.6), np.cumsum([weight.size for weight in weights.values()])[:-1])
    for (name, weight), part in zip(weights.items(), everywhere, strict=True):
        assert np.array_equal(masks("magnitude", 0.6).keep[name], part.reshape(weight.shape))
        assert np.array_equal(masks("magnitude", 0.6, scope="layer").keep[name], lowest(weight, 0.6))
        rows = np.stack([lowest(row, 0.6) for row in weight])
        assert np.array_equal(masks("magnitude", 0.6, scope="row").keep[name], rows)
        assert np.array_equal(masks("hybrid", 0.6).keep[name], rows)


def test_biases_only_where_asked_for() -> None:
    model = net()
    assert "b.bias" not in masks("magnitude").keep
    found = masks("magnitude", 0.5, biases=True)
    assert {"b.bias", "head.bias"} < set(found.keep) and "bn.bias" not in found.keep
    total = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("bn"))
    assert found.counts == (total // 2, total)


def test_wanda_is_weight_times_the_norm_of_the_input_that_meets_it() -> None:
    model, x = net(), torch.cat([x for x, _ in data()])
    unfolded = F.unfold(x, 3, padding=1)  # (N, 36, L)
    norms = unfolded.square().sum((0, 2)).div(len(x)).sqrt().reshape(1, 4, 3, 3)
    scores = (model.a.weight.detach().abs() * norms).numpy()
    assert np.array_equal(masks("wanda", 0.5).keep["a.weight"], np.stack([lowest(row, 0.5) for row in scores]))
    assert np.array_equal(masks("wanda", 0.5, scope="layer").keep["a.weight"], lowest(scores, 0.5))


def test_wanda_propagates_where_told() -> None:
    model = net()
    clean, paper = masks("wanda", 0.7, model), masks("wanda", 0.7, model, propagate=True)
    assert torch.equal(clean.keep["a.weight"], paper.keep["a.weight"])
    assert not torch.equal(clean.keep["b.weight"], paper.keep["b.weight"])
    sparse = sc.make_masks(model, "wanda", 0.7, data=data(), within=["a"]).apply(model)
    assert torch.equal(masks("wanda", 0.7, sparse, within=["b"]).keep["b.weight"], paper.keep["b.weight"])


def test_grouped_and_transposed_layers_have_rows_of_their_own() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3, groups=2), nn.Flatten())
    model = randomised(model.double()).eval()
    x = data()[0][0]
    found = sc.make_masks(model, "wanda", 0.5, data=[x])
    norms = F.unfold(x, 3).square().sum((0, 2)).div(len(x)).sqrt().reshape(2, 1, 2, 3, 3)
    scores = (model[0].weight.detach().abs().reshape(2, 3, 2, 3, 3) * norms).reshape(6, -1).numpy()
    assert np.array_equal(found.keep["0.weight"].reshape(6, -1), np.stack([lowest(row, 0.5) for row in scores]))
    read = model[1](model[0](x)).detach()
    channel = read.square().sum((0, 2, 3)).div(len(x)).sqrt()
    weighted = (model[2].weight.detach().abs() * channel.reshape(6, 1, 1, 1)).reshape(2, 3, 2, 9)  # in, out of a group
    kept = found.keep["2.weight"].reshape(2, 3, 2, 9)
    for group in range(2):
        for out in range(2):
            assert np.array_equal(kept[group, :, out], lowest(weighted[group, :, out].numpy(), 0.5))


def test_obd_and_snip() -> None:
    model = net()
    fisher, total = torch.zeros_like(model.b.weight), torch.zeros_like(model.b.weight)
    for x, y in data():
        total += torch.autograd.grad(F.cross_entropy(model(x), y), model.b.weight)[0]
        for image, label in zip(x, y, strict=True):
            fisher += torch.autograd.grad(F.cross_entropy(model(image[None]), label[None]), model.b.weight)[0] ** 2
    weight = model.b.weight
    for name, scores in (("obd", fisher * weight**2), ("snip", (total * weight).abs())):
        found = masks(name, 0.5, model, scope="layer").keep["b.weight"]
        assert np.array_equal(found, lowest(scores.detach().numpy(), 0.5))


def test_lamp_ranks_shares_of_each_layer() -> None:
    model, names = net(), ("a.weight", "b.weight", "head.weight")
    shares = []
    for name in names:
        squares = model.get_parameter(name).detach().numpy().ravel() ** 2
        shares.append([value / squares[squares >= value].sum() for value in squares])
    sizes = np.cumsum([len(share) for share in shares])[:-1]
    parts = np.split(lowest(np.concatenate(shares), 0.9), sizes)
    found = masks("lamp", 0.9, model)
    for name, part in zip(names, parts, strict=True):
        assert np.array_equal(found.keep[name].ravel(), part) and part.any()


def test_synflow_is_the_flow_of_magnitudes() -> None:
    layers = [nn.Linear(4, 5), nn.Linear(5, 6, bias=False), nn.Linear(6, 2, bias=False)]
    model = randomised(nn.Sequential(*layers).double()).eval()
    keep = [torch.ones_like(layer.weight) for layer in layers]
    for number in range(1, 101):
        one, two, three = (layer.weight.detach().abs() * mask for layer, mask in zip(layers, keep, strict=True))
        forward = [torch.ones(4, dtype=torch.float64), one.sum(1) + layers[0].bias.detach().abs()]
        forward.append(two @ forward[1])
        backward = [three.sum(0) @ two, three.sum(0), torch.ones(2, dtype=torch.float64)]
        scores = [b[:, None] * w * f[None] for b, w, f in zip(backward, (one, two, three), forward, strict=True)]
        flat = torch.cat([torch.where(k > 0, s, -math.inf).ravel() for s, k in zip(scores, keep, strict=True)])
        stay = lowest(flat.numpy(), 1 - 0.2 ** (number / 100))
        parts = np.split(stay, np.cumsum([s.numel() for s in scores])[:-1])
        keep = [torch.tensor(p.reshape(k.shape)).double() for p, k in zip(parts, keep, strict=True)]
    found = sc.make_masks(model, "synflow", 0.8, data=[torch.randn(3, 4, dtype=torch.float64)])
    for number, mask in enumerate(keep):
        assert torch.equal(found.keep[f"{number}.weight"], mask.bool())


def test_a_criterion_of_ones_own() -> None:
    def ascending(name: str, evidence: sc.Evidence) -> Tensor:
        return torch.arange(evidence.tensors[name].numel()).reshape(evidence.tensors[name].shape)

    found = sc.make_masks(net(), ascending, 0.25, scope="layer")
    assert found.keep["head.weight"].ravel().tolist() == [False] * 3 + [True] * 9
    with pytest.raises(InputError, match=r"scores of 'a.weight' are \[3\], expected"):
        sc.make_masks(net(), lambda name, evidence: torch.ones(3), 0.25)
    with pytest.raises(InputError, match="not finite"):
        sc.make_masks(net(), lambda name, evidence: evidence.tensors[name] * math.nan, 0.25)


# -- SparseGPT -------------------------------------------------------------------------------------------------------


def by_columns(weight: Tensor, gram: Tensor, keep: Tensor) -> Tensor:
    """Optimal brain surgeon, one column after the other, with the Hessian of the columns that are left."""
    weight = weight.clone()
    hessian = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    for column in range(len(gram)):
        inverse = torch.linalg.inv(hessian[column:, column:])
        error = weight[:, column] * ~keep[:, column] / inverse[0, 0]
        weight[:, column:] -= error[:, None] * inverse[0]
    return weight * keep


def test_sparsegpt_makes_up_for_every_weight_with_those_to_its_right() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 10, 1, generator=generator, dtype=torch.float64)
    mixing = torch.randn(10, 10, generator=generator, dtype=torch.float64)
    inputs = torch.randn(50, 10, generator=generator, dtype=torch.float64) @ mixing
    gram = inputs.T @ inputs / 50
    new, keep = sparsegpt_rows(weight, gram[None], 0.5)
    assert int((~keep).sum()) == 30
    assert torch.allclose(new[..., 0], by_columns(weight[..., 0], gram, keep[..., 0]), atol=1e-9)
    hessian = gram + DAMPING * gram.diagonal().mean() * torch.eye(10, dtype=torch.float64)
    costs = torch.stack([weight[:, i, 0] ** 2 / torch.linalg.inv(hessian[i:, i:])[0, 0] for i in range(10)], 1)
    assert np.array_equal(keep[..., 0], lowest(costs.numpy(), 0.5))


@pytest.mark.parametrize("fraction", [0.3, 0.77])
def test_sparsegpt_counts_exactly_over_many_columns(fraction: float) -> None:
    weight = torch.randn(3, 50, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs = torch.randn(600, 450, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, keep = sparsegpt_rows(weight, (inputs.T @ inputs)[None] / 600, fraction)
    assert int((~keep).sum()) == math.floor(fraction * weight.numel() + 1e-9)


def test_sparsegpt_changes_the_outputs_less_than_magnitude() -> None:
    model = net()
    x = torch.cat([x for x, _ in data()])
    errors = []
    for found in (masks("sparsegpt", 0.6, model), masks("magnitude", 0.6, model, scope="layer")):
        sparse = found.apply(model)
        errors.append(float((sparse(x) - model(x)).detach().square().mean()))
    assert errors[0] < 0.7 * errors[1]


# -- patterns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt", "random", "obd"])
def test_n_of_m_consecutive_input_channels_stay_at_every_tap(criterion: str) -> None:
    found = masks(criterion, None, pattern="2:4")
    for keep in found.keep.values():
        groups = keep.reshape(keep.shape[0], keep.shape[1] // 4, 4, -1)
        assert bool((groups.sum(2) == 2).all())
    assert found.sparsity == 0.5 and masks(criterion, 0.75, pattern="1:4").sparsity == 0.75


def test_the_larger_two_of_four_stay() -> None:
    weight = net().a.weight.detach().abs().numpy()
    keep = masks("magnitude", None, pattern="2:4").keep["a.weight"].numpy()
    for out in range(8):
        for tap in np.ndindex(3, 3):
            assert set(np.flatnonzero(keep[out, :, *tap])) == set(np.argsort(weight[out, :, *tap])[2:])


def test_whole_blocks_go_by_their_sum() -> None:
    model = net()
    found = masks("magnitude", 0.5, model, pattern=(4, 2), scope="layer", within=["a", "b"])
    weight = model.a.weight.detach().abs().reshape(2, 4, 2, 2, 9).sum((1, 3)).numpy()
    expected = lowest(weight, 0.5).repeat(4, axis=0).repeat(2, axis=1).reshape(8, 4, 3, 3)
    assert np.array_equal(found.keep["a.weight"], expected)


# -- other masks -----------------------------------------------------------------------------------------------------


def test_a_threshold_keeps_what_reaches_it() -> None:
    model = net()
    found = threshold_masks(model, 0.5, ignore=["head"])
    assert set(found.keep) == {"a.weight", "b.weight"}
    assert all(torch.equal(keep, model.get_parameter(name).abs() >= 0.5) for name, keep in found.keep.items())
    with pytest.raises(InputError, match="threshold"):
        threshold_masks(model, -1)


def test_the_control_masks_filters_of_each_layer_alone_and_shrinks_nothing() -> None:
    model = net()
    found = ln_structured(model, 0.5)
    norms = model.a.weight.detach().flatten(1).norm(dim=1)
    gone = set(norms.argsort()[:4].tolist())
    assert {i for i, keep in enumerate(found.keep["a.weight"].flatten(1)) if not keep.any()} == gone
    sparse = found.apply(model)
    assert sc.count(sparse, data()[0][0]).macs == sc.count(model, data()[0][0]).macs
    assert not hasattr(model.a, "weight_mask") and type(model.a.weight) is nn.Parameter
    assert torch.equal(masks("ln_structured", 0.5, model).keep["b.weight"], found.keep["b.weight"])


# -- in training -----------------------------------------------------------------------------------------------------


def trained(model: nn.Module, hooks: list[object], recipe: Recipe | None = None, **options: Any) -> nn.Module:
    return fit(model, data(), recipe or Recipe(epochs=3, lr=0.1, weight_decay=0.1), hooks=hooks, **options).model


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_masks_hold_through_momentum_and_weight_decay(optimizer: str) -> None:
    model = net()
    found = masks("magnitude", 0.6, model)
    sparse = found.apply(model)
    recipe = Recipe(epochs=3, lr=0.01, optimizer=optimizer, weight_decay=0.1)
    tuned = trained(sparse, [found.hook()], recipe)
    for name, keep in found.keep.items():
        weight = tuned.get_parameter(name)
        assert bool((weight[~keep] == 0).all()) and not torch.equal(weight, sparse.get_parameter(name))
    free = trained(sparse, [], recipe)
    assert any(bool((free.get_parameter(name)[~keep] != 0).any()) for name, keep in found.keep.items())


def test_masks_can_be_held_after_epochs_only() -> None:
    model = net()
    found = masks("magnitude", 0.6, model)
    seen: list[bool] = []

    class Watch:
        def after_step(self, model: nn.Module, optimizer: object) -> None:
            seen.append(all(bool((model.get_parameter(n)[~keep] == 0).all()) for n, keep in found.keep.items()))

    tuned = trained(found.apply(model), [found.hook(every="epoch"), Watch()])
    assert not any(seen)
    assert all(bool((tuned.get_parameter(name)[~keep] == 0).all()) for name, keep in found.keep.items())


def test_a_loop_of_ones_own_holds_masks_too() -> None:
    model = net().train()
    found = masks("magnitude", 0.6, model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    handle = found.hold(model, optimizer)
    for x, y in data():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert all(bool((model.get_parameter(name)[~keep] == 0).all()) for name, keep in found.keep.items())
    handle.remove()
    F.cross_entropy(model(data()[0][0]), data()[0][1]).backward()
    optimizer.step()
    assert any(bool((model.get_parameter(name)[~keep] != 0).any()) for name, keep in found.keep.items())


def gradual(**options: Any) -> Gradual:
    return Gradual("magnitude", 0.8, begin=1, end=7, every=2, **options)


def test_gradual_masks_follow_the_cubic_and_freeze() -> None:
    levels: list[float] = []
    hook = gradual()

    class Watch:
        def after_step(self, model: nn.Module, optimizer: object) -> None:
            levels.append(0.0 if hook.masks is None else hook.masks.sparsity)

    tuned = trained(net(), [hook, Watch()])
    due = [0.8 * (1 - (1 - k / 6) ** 3) for k in (2, 4, 6)]
    expected = [0, 0, due[0], due[0], due[1], due[1], due[2], due[2], due[2]]
    assert np.allclose(levels, expected, atol=1 / 500)
    assert hook.masks is not None
    assert all(bool((tuned.get_parameter(name)[~keep] == 0).all()) for name, keep in hook.masks.keep.items())


def test_gradual_masks_resume_bit_for_bit(tmp_path: Any) -> None:
    class Stop:
        def after_epoch(self, model: nn.Module, optimizer: object) -> None:
            if stop.pop():
                raise KeyboardInterrupt

    whole = trained(net(), [gradual(), Stop()], checkpoint=tmp_path / "one") if (stop := [False] * 9) else None
    stop = [False] * 5 + [True, False]
    with pytest.raises(KeyboardInterrupt):
        trained(net(), [gradual(), Stop()], checkpoint=tmp_path / "two")
    stop = [False] * 9
    again = gradual()
    assert same_state(trained(net(), [again, Stop()], checkpoint=tmp_path / "two"), whole)
    assert again.masks is not None and again.masks.sparsity == pytest.approx(0.8, abs=1 / 500)


# -- the value -------------------------------------------------------------------------------------------------------


def test_masks_are_saved_and_loaded(tmp_path: Any) -> None:
    model = net()
    found = masks("sparsegpt", 0.5, model)
    found.save(tmp_path / "masks.safetensors")
    loaded = sc.Masks.load(tmp_path / "masks.safetensors")
    assert loaded.shapes == found.shapes and same_state(loaded.apply(model), found.apply(model))
    assert repr(loaded) == repr(found) == "Masks(3 tensors, 294 of 588 weights zero, 50.00%)"
    raw = (tmp_path / "masks.safetensors").read_bytes()
    for damage in (b"", raw[:40], raw.replace(b'"secateur.masks":"1"', b'"secateur.masks":"9"'), raw[:-5]):
        (tmp_path / "bad").write_bytes(damage)
        with pytest.raises(sc.SecateurError):
            sc.Masks.load(tmp_path / "bad")


def test_masks_intersect() -> None:
    model = net()
    one, two = masks("magnitude", 0.5, model), masks("random", 0.5, model, within=["a"])
    both = one & two
    assert torch.equal(both.keep["a.weight"], one.keep["a.weight"] & two.keep["a.weight"])
    assert torch.equal(both.keep["b.weight"], one.keep["b.weight"])


# -- bad input -------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown name": ({"criterion": "wandra"}, UnknownNameError, "Did you mean 'wanda'"),
    "no name": ({"criterion": 3}, InputError, "a criterion is a name or a callable"),
    "percent": ({"sparsity": 90}, TargetError, "pass sparsity=0.9"),
    "nothing asked": ({"sparsity": None}, InputError, "pass sparsity="),
    "unknown scope": ({"scope": "rows"}, UnknownNameError, "Did you mean 'row'"),
    "wanda globally": ({"criterion": "wanda", "scope": "global"}, InputError, "makes no sense with scope='global'"),
    "hybrid by layer": ({"criterion": "hybrid", "scope": "layer"}, InputError, "makes no sense with scope='layer'"),
    "sparsegpt by row": ({"criterion": "sparsegpt", "scope": "row"}, InputError, "makes no sense"),
    "pattern of nothing": ({"pattern": "4:2", "sparsity": None}, InputError, "0 < n < m"),
    "pattern that is none": ({"pattern": "two", "sparsity": None}, InputError, "'n:m'"),
    "pattern and sparsity": ({"pattern": "2:4", "sparsity": 0.9}, InputError, "differs"),
    "m does not divide": ({"pattern": "2:3", "sparsity": None}, InputError, r"'a.weight' has \(8, 4\).*ignore="),
    "block does not divide": ({"pattern": (3, 2)}, InputError, r"'a.weight' has \(8, 4\)"),
    "blocks by row": ({"pattern": (4, 2), "scope": "row", "within": ["a"]}, InputError, "not 'row'"),
    "n:m globally": ({"pattern": "2:4", "sparsity": None, "scope": "global"}, InputError, "no meaning"),
    "blocks of sparsegpt": ({"criterion": "sparsegpt", "pattern": (4, 2)}, InputError, "cannot make blocks"),
    "synflow in 2:4": ({"criterion": "synflow", "pattern": "2:4", "sparsity": None}, InputError, "cannot make n:m"),
    "biases of wanda": ({"criterion": "wanda", "biases": True}, InputError, "says nothing about biases"),
    "biases in 2:4": ({"biases": True, "pattern": "2:4", "sparsity": None}, InputError, "biases"),
    "within nothing": ({"within": ["c*"]}, InputError, "matches no prunable weight"),
    "ignore everything": ({"ignore": ["*"]}, InputError, "no weight is left"),
    "unknown layer": ({"sparsity": {"c": 0.5}}, TargetError, "names 'c'"),
    "global in parts": ({"sparsity": {"a": 0.5}, "scope": "global"}, TargetError, "use 'layer'"),
    "propagate globally": ({"criterion": "magnitude", "propagate": True, "scope": "global"}, InputError, "global"),
    "an iterator, again and again": ({"criterion": "sparsegpt", "data": iter([1])}, InputError, "an iterator"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_any_work(case: str) -> None:
    changes, kind, text = BAD[case]

    def refuse(*_: object) -> None:
        raise AssertionError("the model was run")

    model = net()
    model.register_forward_pre_hook(refuse)
    options = {"criterion": "magnitude", "sparsity": 0.5, "data": data(), **changes}
    with pytest.raises(kind, match=text):
        sc.make_masks(model, **options)


@pytest.mark.parametrize("criterion", DATA_NEEDED)
def test_data_that_is_missing_is_asked_for(criterion: str) -> None:
    with pytest.raises(InputError, match=f"criterion '{criterion}' needs .*: pass data="):
        sc.make_masks(net(), criterion, 0.5)
    assert set(DATA_NEEDED) >= {name for name in WEIGHT_CRITERIA if getattr(WEIGHT_CRITERIA[name], "needs", ())}


def test_masks_of_another_model_are_refused() -> None:
    found, other = masks("magnitude"), nn.Sequential(conv(3, 4))
    calls: list[Callable[[], object]] = [
        lambda: found.apply(other),
        lambda: found.hold(other, torch.optim.SGD(other.parameters(), 0.1)),
        lambda: sc.make_masks(other, "magnitude", 0.5, masks=found),
        lambda: found & sc.make_masks(other, "magnitude", 0.5),
        lambda: fit(other, data(), Recipe(epochs=1), hooks=[found.hook()], loss=lambda y, batch: y.sum() * 0),
    ]
    for call in calls[:4]:
        with pytest.raises(PlanMismatchError):
            call()
    with pytest.raises(InputError, match="every 'step' or every 'epoch'"):
        found.hook(every="batch")
    broken = net()
    with torch.no_grad():
        broken.a.weight[0] = math.nan
    with pytest.raises(ModelError, match=r"a\.weight"):
        sc.make_masks(broken, "magnitude", 0.5)
