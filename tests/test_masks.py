"""Masks as a value: files and their damage, what holds them, and layers of every kind that they are for."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from nets_for_tests import Net, conv, head, pooled, randomised
from secateur.criteria.weights import WEIGHT_CRITERIA
from secateur.errors import ArtifactError, DataError, InputError, PlanMismatchError, TargetError, TrainingError
from secateur.masking import WEIGHT_METHODS, Gradual
from secateur.masks import Masks
from secateur.synflow import synflow_scores
from secateur.training import Recipe, fit


def linears() -> nn.Module:
    return randomised(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double())


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs(*shape: int, count: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(drawn(6, *shape, seed=seed), torch.arange(6) % 3) for seed in range(count)]


def zeros_hold(model: nn.Module, masks: Masks) -> bool:
    return all(bool((model.get_parameter(name)[~keep] == 0).all()) for name, keep in masks.keep.items())


# -- files -----------------------------------------------------------------------------------------------------------


def test_everything_comes_back_from_a_file(tmp_path: Path) -> None:
    for found in (
        sc.make_masks(linears(), "sparsegpt", 0.5, data=pairs(4)),
        sc.make_masks(linears().bfloat16(), "magnitude", {"0": 0.5}),
        Masks({}, {"weight": (3, 2), "steps": ()}),
    ):
        found.save(tmp_path / "masks")
        loaded = Masks.load(tmp_path / "masks")
        assert (loaded.shapes, loaded.parameters) == (found.shapes, found.parameters)
        for one, two in ((loaded.keep, found.keep), (loaded.values, found.values)):
            assert list(one) == sorted(two) and all(torch.equal(one[name], two[name]) for name in two)
            assert all(one[name].dtype == two[name].dtype for name in two)


def written(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    told = {"secateur.masks": "1", "secateur.shapes": '{"w": [2, 3]}', "secateur.parameters": "6"}
    save_file(tensors, path, {**told, **{f"secateur.{name}": text for name, text in metadata.items()}})
    return path


ONES = torch.ones(2, 3, dtype=torch.uint8)
DAMAGE: dict[str, tuple[dict[str, Tensor], dict[str, str]]] = {
    "a mask of another shape": ({"keep.w": ONES.T.contiguous()}, {}),
    "a mask of an unknown tensor": ({"keep.v": ONES}, {}),
    "a scalar mask of an unknown tensor": ({"keep.v": ONES[0, 0].clone()}, {}),
    "a mask of floats": ({"keep.w": ONES.float()}, {}),
    "a mask of twos": ({"keep.w": ONES * 2}, {}),
    "a tensor of neither kind": ({"keep.w": ONES, "w": ONES.clone()}, {}),
    "new weights without a mask": ({"value.w": torch.ones(2, 3)}, {}),
    "new weights of another shape": ({"keep.w": ONES, "value.w": torch.ones(3, 2)}, {}),
    "new weights that are no numbers": ({"keep.w": ONES, "value.w": torch.full((2, 3), math.nan)}, {}),
    "new weights of integers": ({"keep.w": ONES, "value.w": ONES.clone()}, {}),
    "another version": ({"keep.w": ONES}, {"masks": "2"}),
    "shapes that are no JSON": ({"keep.w": ONES}, {"shapes": "{"}),
    "shapes that are a list": ({"keep.w": ONES}, {"shapes": "[]"}),
    "a shape that is a table": ({"keep.w": ONES}, {"shapes": '{"w": {"2": 3}}'}),
    "a negative length": ({"keep.w": ONES}, {"shapes": '{"w": [2, 3], "v": [-1]}'}),
    "a length that is true": ({"keep.w": ONES}, {"shapes": '{"w": [2, 3], "v": [true]}'}),
    "shapes without end": ({"keep.w": ONES}, {"shapes": "[" * 100_000}),
    "a count that is a word": ({"keep.w": ONES}, {"parameters": '"six"'}),
    "a count below zero": ({"keep.w": ONES}, {"parameters": "-6"}),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_file_that_contradicts_itself_is_refused(case: str, tmp_path: Path) -> None:
    sound = Masks.load(written(tmp_path / "sound", {"keep.w": ONES}))
    assert sound.counts == (0, 6) and sound.parameters == 6
    tensors, metadata = DAMAGE[case]
    with pytest.raises(ArtifactError):
        Masks.load(written(tmp_path / "bad", tensors, **metadata))


def test_no_damaged_byte_leads_to_anything_but_masks_or_an_error(tmp_path: Path) -> None:
    sc.make_masks(linears(), "magnitude", 0.5).save(tmp_path / "masks")
    raw, refused = (tmp_path / "masks").read_bytes(), 0
    for place in range(0, len(raw), 7):
        (tmp_path / "bad").write_bytes(raw[:place] + bytes([raw[place] ^ 0x15]) + raw[place + 1 :])
        try:
            Masks.load(tmp_path / "bad").check(linears())
        except (ArtifactError, PlanMismatchError):
            refused += 1
    assert refused > len(raw) // 14
    with pytest.raises(ArtifactError):
        Masks.load(tmp_path / "nowhere")


# -- the value -------------------------------------------------------------------------------------------------------


def test_masks_print_layers_and_what_they_make_of_the_model() -> None:
    found = sc.make_masks(linears(), "magnitude", {"0": 0.5}, scope="layer")
    assert repr(found) == "Masks(2 tensors, 12 of 42 weights zero, 28.57%)"
    rows = str(found).splitlines()[1:]
    assert [row.split() for row in rows[1:3]] == [["0.weight", "24", "50.00%"], ["2.weight", "18", "0.00%"]]
    assert rows[3] == "of all 51 parameters, 23.53% are zero"  # 42 weights, 9 biases
    assert found.sparsity == 12 / 42


def test_masks_that_contradict_themselves_are_refused() -> None:
    keep = {"w": torch.ones(2, 3, dtype=torch.bool)}
    with pytest.raises(PlanMismatchError, match=r"'w' has shape \[2, 3\], expected \[3, 2\]"):
        Masks(keep, {"w": (3, 2)})
    with pytest.raises(PlanMismatchError, match="does not have"):
        Masks(keep, {})
    with pytest.raises(InputError, match="bool tensor"):
        Masks({"w": torch.ones(2, 3)}, {"w": (2, 3)})
    with pytest.raises(InputError, match="only for tensors that have a mask"):
        Masks({}, {"w": (2, 3)}, {"w": torch.ones(2, 3)})


def test_zeros_are_zeros_even_where_a_weight_is_infinite_or_negative() -> None:
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.0, math.inf]]))
    masks = Masks({"weight": torch.zeros(1, 2, dtype=torch.bool)}, {"weight": (1, 2)})
    weight = masks.apply(model).weight
    assert torch.equal(weight, torch.zeros(1, 2)) and not torch.signbit(weight).any()
    assert model.weight[0, 0] == -1  # the model itself is as it was
    masks.apply_(model)
    assert torch.equal(model.weight, torch.zeros(1, 2))


def test_new_weights_of_both_sides_are_not_mixed() -> None:
    one, two = (sc.make_masks(linears(), "sparsegpt", part, data=pairs(4)) for part in (0.5, 0.7))
    with pytest.raises(InputError, match=r"both sets of masks bring new weights for '0\.weight'"):
        _ = one & two
    both = one & sc.make_masks(linears(), "magnitude", 0.5)
    assert torch.equal(both.values["0.weight"], one.values["0.weight"]) and zeros_hold(both.apply(linears()), both)


def test_masks_before_are_zeros_and_bring_no_new_weights() -> None:
    model = linears()
    before = sc.make_masks(model, "sparsegpt", 0.4, data=pairs(4))
    after = sc.make_masks(model, "magnitude", 0.6, scope="layer", masks=before)
    assert not after.values
    for name, keep in after.keep.items():
        ranked = model.get_parameter(name).detach().abs().masked_fill(~before.keep[name], -1).flatten()
        assert set(torch.where(~keep.flatten())[0].tolist()) == set(
            ranked.argsort()[: int(0.6 * keep.numel())].tolist()
        )
    elsewhere = sc.make_masks(model, "magnitude", 0.5, within=["0"], masks=before)
    assert torch.equal(elsewhere.keep["2.weight"], before.keep["2.weight"])


# -- holding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
        lambda parameters: torch.optim.Adam(parameters, 0.1, weight_decay=0.1),
    ],
    ids=["sgd", "adam"],
)
def test_zeros_hold_from_now_until_the_handle_is_removed(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    model = linears()
    masks, optimizer = sc.make_masks(model, "magnitude", 0.5), make(model.parameters())

    def step() -> None:
        x, y = pairs(4)[0]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    handle = masks.hold(model, optimizer)
    assert zeros_hold(model, masks)
    for _ in range(4):
        step()
        assert zeros_hold(model, masks)
    handle.remove()
    step()
    assert not zeros_hold(model, masks)
    with pytest.raises(InputError, match="made for another copy"):
        masks.hold(linears(), optimizer)


def test_masked_weights_have_no_part_in_the_gradients_norm() -> None:
    model, (x, y) = linears(), pairs(4)[0]
    masks = sc.make_masks(model, "magnitude", 0.5)
    masks.apply_(model)
    F.cross_entropy(model(x), y).backward()
    free = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    masks.hook(every="epoch").after_backward(model, optimizer)
    assert all(torch.equal(model.get_parameter(name).grad, grad) for name, grad in free.items())
    masks.hook().after_backward(model, optimizer)
    for name, grad in free.items():
        expected = grad * masks.keep[name] if name in masks.keep else grad
        assert torch.equal(model.get_parameter(name).grad, expected)
    assert any(bool(free[name][~keep].any()) for name, keep in masks.keep.items())


def test_a_hook_looks_at_every_model_it_meets() -> None:
    masks, other = sc.make_masks(linears(), "magnitude", 0.5), nn.Sequential(nn.Linear(4, 5))
    hook, optimizer = masks.hook(), torch.optim.SGD(other.parameters(), 0.1)
    for _ in range(2):
        model = linears()
        hook.after_step(model, optimizer)
        assert zeros_hold(model, masks)
    with pytest.raises(PlanMismatchError):
        hook.after_step(other, optimizer)


# -- layers of every kind --------------------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """A linear map with its weight (in, out), as in GPT-2."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight, self.bias = nn.Parameter(torch.zeros(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


def attentive() -> nn.Module:
    def forward(s: Net, tokens: Tensor) -> Tensor:
        x = s.embedding(tokens)
        x = x + s.attention(x, x, x, need_weights=False)[0]
        return s.unembed(s.widen(x)).mean(1)

    model = Net(
        forward,
        embedding=nn.Embedding(3, 8),
        attention=nn.MultiheadAttention(8, 2, batch_first=True),
        widen=Conv1D(8, 8),
        unembed=nn.Linear(8, 3, bias=False),
    )
    model.unembed.weight = model.embedding.weight
    return randomised(model.double()).eval()


TOKENS = [
    (torch.randint(3, (6, 5), generator=torch.Generator().manual_seed(seed)), torch.arange(6) % 3) for seed in (0, 1)
]


@pytest.mark.parametrize("criterion", sorted(set(WEIGHT_METHODS) - {"ln_structured"}))
def test_attention_products_and_tied_weights_have_masks(criterion: str) -> None:
    model = attentive()
    found = sc.make_masks(model, criterion, 0.5, data=TOKENS)
    sizes = {
        "attention.in_proj_weight": 192,
        "attention.out_proj.weight": 64,
        "widen.weight": 64,
        "embedding.weight": 24,
    }
    assert {name: keep.numel() for name, keep in found.keep.items()} == sizes
    assert found.counts == (172, 344)
    sparse = found.apply(model)
    assert sparse.unembed.weight is sparse.embedding.weight and zeros_hold(sparse, found)
    assert torch.isfinite(sparse(TOKENS[0][0])).all()


def test_wanda_in_rows_of_a_product_and_of_packed_projections() -> None:
    model, tokens = attentive(), torch.cat([tokens for tokens, _ in TOKENS])
    found = sc.make_masks(model, "wanda", 0.5, data=TOKENS)
    x = model.embedding(tokens)
    read = x + model.attention(x, x, x)[0]
    norms = {name: seen.detach().square().sum((0, 1)).sqrt() for name, seen in (("in", x), ("widen", read))}
    rows = {
        "attention.in_proj_weight": (model.attention.in_proj_weight * norms["in"], lambda keep: keep),
        "widen.weight": (model.widen.weight.T * norms["widen"], lambda keep: keep.T),
    }
    for name, (scores, outputs_first) in rows.items():
        for row, kept in zip(scores.abs(), outputs_first(found.keep[name]), strict=True):
            assert set(torch.where(~kept)[0].tolist()) == set(row.argsort()[:4].tolist())


def test_layers_are_chosen_by_name_pattern_module_and_owner() -> None:
    model = attentive()
    every = set(sc.make_masks(model, sparsity=0.5).keep)
    chosen: dict[str, tuple[Any, set[str]]] = {
        "owner": (["attention"], {"attention.in_proj_weight", "attention.out_proj.weight"}),
        "pattern": ("*out_proj*", {"attention.out_proj.weight"}),
        "tensor": (["widen.weight"], {"widen.weight"}),
        "module": (model.widen, {"widen.weight"}),
        "a tied one, by both sides": (["unembed", model.embedding], {"embedding.weight"}),
    }
    for within, names in chosen.values():
        assert set(sc.make_masks(model, sparsity=0.5, within=within).keep) == names
        assert set(sc.make_masks(model, sparsity=0.5, ignore=within).keep) == every - names


def test_the_control_takes_transposed_and_shared_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ConvTranspose2d(3, 4, 2), nn.Conv2d(4, 3, 1), nn.Linear(3, 2))
    model.append(nn.Conv2d(3, 3, 1))
    model[4].weight = model[0].weight
    found = sc.ln_structured(randomised(model), 0.5, order=1)
    assert set(found.keep) == {"0.weight", "1.weight", "2.weight"}
    norms = model[1].weight.detach().abs().sum((0, 2, 3))
    gone = ~found.keep["1.weight"].transpose(0, 1).flatten(1).any(1)
    assert set(torch.where(gone)[0].tolist()) == set(norms.argsort()[:2].tolist())


def test_wandas_scores_are_per_sample_and_lamps_share_what_is_equal() -> None:
    model, batches = linears(), [x for x, _ in pairs(4)]
    facts = sc.observe(model, None, batches, WEIGHT_CRITERIA["wanda"].needs)
    norms = torch.cat(batches).square().sum(0).div(18).sqrt()
    weight = model.get_parameter("0.weight").detach()
    assert torch.allclose(WEIGHT_CRITERIA["wanda"]("0.weight", facts), weight.abs() * norms)
    lamp = WEIGHT_CRITERIA["lamp"]
    shares = lamp("w", sc.Evidence({"w": torch.tensor([[2.0, -1.0, 1.0], [0.0, 3.0, -2.0]])}))
    expected = [[4 / 17, 1 / 19, 1 / 19], [0, 1, 4 / 17]]  # squares 4 1 1 0 9 4: what is at least as large, summed
    assert torch.allclose(shares, torch.tensor(expected, dtype=torch.float64))
    assert not lamp("w", sc.Evidence({"w": torch.zeros(2, 2)})).any()


# -- synflow ---------------------------------------------------------------------------------------------------------


def test_flow_goes_through_batch_norm_by_its_scale_and_through_what_is_kept() -> None:
    first, norm, last = nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False)
    model = randomised(nn.Sequential(first, norm, nn.ReLU(), last).double())
    keep = {"0.weight": drawn(4, 3, seed=1) > -0.5, "3.weight": torch.ones(2, 4, dtype=torch.bool)}
    scores = synflow_scores(model, keep, drawn(5, 3), lambda net, x: net(x))
    one, two = (np.abs(layer.weight.detach().numpy()) for layer in (first, last))
    one = one * keep["0.weight"].numpy()
    gain = np.abs(norm.weight.detach().numpy()) / np.sqrt(1 + norm.eps)
    shift = np.abs(norm.bias.detach().numpy())
    assert np.allclose(scores["0.weight"], one * (two.sum(0) * gain)[:, None])
    assert np.allclose(scores["3.weight"], two * (one.sum(1) * gain + shift))
    assert (first.weight < 0).any() and model.training  # the model itself keeps its signs and mode


def test_flow_leaves_constants_in_buffers_alone() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        return s.head((x + s.shift).softmax(1))

    model = Net(forward, head=nn.Linear(3, 2, bias=False)).double()
    model.register_buffer("shift", torch.tensor([0.0, 0.0, -math.inf], dtype=torch.float64))
    scores = synflow_scores(
        model, {"head.weight": torch.ones(2, 3, dtype=torch.bool)}, drawn(1, 3), lambda net, x: net(x)
    )
    expected = model.head.weight.detach().abs() * torch.tensor([0.5, 0.5, 0.0])
    assert torch.allclose(scores["head.weight"], expected)


# -- gradual ---------------------------------------------------------------------------------------------------------


def trained(hooks: list[object], **options: Any) -> nn.Module:
    return fit(linears(), pairs(4), Recipe(epochs=3, lr=0.1), hooks=hooks, **options).model


def test_gradual_masks_take_new_weights_once_and_train_on() -> None:
    hook = Gradual("sparsegpt", 0.6, end=4, every=2, data=pairs(4))
    tuned = trained([hook])
    assert hook.masks is not None and not hook.masks.values and hook.masks.counts == (14 + 10, 42)
    assert zeros_hold(tuned, hook.masks)
    applied = hook.masks.apply(tuned)  # changes nothing: no stale weights come back
    assert all(torch.equal(a, b) for a, b in zip(applied.parameters(), tuned.parameters(), strict=True))


def test_gradual_masks_write_new_weights_in_a_loop_of_ones_own() -> None:
    model = linears()
    expected = sc.make_masks(model, "sparsegpt", 0.5, data=pairs(4)).apply(model)
    hook = Gradual("sparsegpt", 0.5, end=1, every=1, data=pairs(4))
    hook.after_step(model, torch.optim.SGD(model.parameters(), 0.1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_gradual_masks_rise_by_layer() -> None:
    hook = Gradual("magnitude", {"0": 0.5}, end=6, every=2, scope="layer", schedule="geometric")
    trained([hook])
    assert hook.masks is not None
    assert {name: int((~keep).sum()) for name, keep in hook.masks.keep.items()} == {"0.weight": 12, "2.weight": 0}


def test_gradual_masks_go_on_only_with_the_same_settings(tmp_path: Path) -> None:
    hook = Gradual(sparsity=0.5, end=9, every=3)
    trained([hook], checkpoint=tmp_path / "run")
    state = hook.state_dict()
    same = Gradual(sparsity=0.5, end=9, every=3)
    same.load_state_dict(state)
    assert same.masks is not None and hook.masks is not None
    assert all(torch.equal(keep, hook.masks.keep[name]) for name, keep in same.masks.keep.items())
    for other in (Gradual(sparsity=0.6, end=9, every=3), Gradual(sparsity=0.5, end=9, every=3, schedule="linear")):
        with pytest.raises(TrainingError, match="give another checkpoint path"):
            other.load_state_dict(state)
        with pytest.raises(TrainingError):
            fit(linears(), pairs(4), Recipe(epochs=3, lr=0.1), hooks=[other], checkpoint=tmp_path / "run")


GRADUAL_BAD: dict[str, tuple[dict[str, Any], str]] = {
    "ends before it begins": ({"begin": 9}, "0 <= begin < end"),
    "unknown criterion": ({"criterion": "wandra"}, "Did you mean 'wanda'"),
    "unknown schedule": ({"schedule": "cubed"}, "Did you mean 'cubic'"),
    "percent": ({"sparsity": 50}, "pass sparsity=0.5"),
    "a pattern with a sparsity of its own": ({"pattern": "2:4"}, "fixes the sparsity"),
    "no data": ({"criterion": "wanda"}, "pass data="),
    "data for one pass": ({"criterion": "wanda", "data": iter(())}, "an iterator"),
    "scope": ({"criterion": "wanda", "scope": "global", "data": []}, "makes no sense"),
    "modules": ({"within": [nn.Linear(2, 2)]}, "by name or pattern"),
}


@pytest.mark.parametrize("case", GRADUAL_BAD)
def test_gradual_pruning_that_makes_no_sense_is_refused_when_it_is_asked_for(case: str) -> None:
    changes, text = GRADUAL_BAD[case]
    with pytest.raises(InputError, match=text):
        Gradual(**{"end": 6, **changes})


def test_gradual_pruning_of_layers_that_are_not_there_is_refused_at_the_first_step() -> None:
    steps: list[int] = []

    class Count:
        def after_step(self, model: nn.Module, optimizer: object) -> None:
            steps.append(1)

    with pytest.raises(InputError, match="matches no prunable weight"):
        trained([Gradual(end=6, every=3, within=["body"]), Count()])
    assert not steps


# -- what is refused -------------------------------------------------------------------------------------------------


def mixed() -> nn.Module:
    def forward(s: Net, x: Tensor) -> Tensor:
        return s.head(pooled(F.relu(s.up(F.relu(s.stem(x))))))

    return Net(forward, stem=conv(3, 4), up=nn.ConvTranspose2d(4, 4, 2), head=head(4))


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "all that cannot be 2:4, at once": (
        mixed,
        {"pattern": "2:4"},
        r"'stem\.weight' has \(4, 3\)\. Pass ignore=\['stem'\]",
    ),
    "blocks without a sparsity": (mixed, {"pattern": (2, 1)}, "nothing to aim for"),
    "a block of three sides": (mixed, {"pattern": (2, 1, 1), "sparsity": 0.5}, "a block"),
    "a pattern that is a number": (mixed, {"pattern": 4, "sparsity": 0.5}, "'n:m' or a block"),
    "sparsegpt of transposed": (mixed, {"criterion": "sparsegpt", "sparsity": 0.5}, r"ignore=\['up'\]"),
    "filters of linear maps": (linears, {"criterion": "ln_structured", "sparsity": 0.5}, "none among the layers"),
    "propagation of nothing": (linears, {"propagate": True, "sparsity": 0.5, "scope": "layer"}, "measures nothing"),
    "layers by share in synflow": (linears, {"criterion": "synflow", "sparsity": {"0": 0.5}}, "use 'layer'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_more_that_makes_no_sense_is_refused_before_any_work(case: str) -> None:
    build, options, text = REFUSED[case]
    model = build()

    def refuse(*_: object) -> None:
        raise AssertionError("the model was run")

    model.register_forward_pre_hook(refuse)
    with pytest.raises((InputError, TargetError), match=text):
        sc.make_masks(model, data=[drawn(2, 4).float()], **options)


def test_a_layer_that_data_does_not_reach_is_named() -> None:
    model = Net(
        lambda s, x: s.last(F.relu(s.first(x))), first=nn.Linear(4, 6), spare=nn.Linear(4, 4), last=nn.Linear(6, 3)
    )
    model = randomised(model.double())
    for criterion in ("wanda", "sparsegpt", "snip"):
        with pytest.raises(InputError, match=r"'spare\.weight'.*ignore="):
            sc.make_masks(model, criterion, 0.5, data=pairs(4))
        assert set(sc.make_masks(model, criterion, 0.5, data=pairs(4), ignore=["spare"]).keep) == {
            "first.weight",
            "last.weight",
        }
    for criterion in ("sparsegpt", "synflow", "wanda"):
        with pytest.raises(DataError, match="no batch"):
            sc.make_masks(linears(), criterion, 0.5, data=[])


def test_one_of_three_agrees_with_the_sparsity_that_is_written_out() -> None:
    model = nn.Linear(6, 4)
    keep = sc.make_masks(model, sparsity=2 / 3, pattern="1:3").keep["weight"]
    assert bool((keep.reshape(4, 2, 3).sum(2) == 1).all())


def test_ties_go_by_position_and_never_all_at_once() -> None:
    model = nn.Linear(5, 4, bias=False)
    nn.init.ones_(model.weight)
    for scope, expected in (("layer", [0, 2, 5, 5]), ("row", [3, 3, 3, 3])):
        keep = sc.make_masks(model, sparsity=0.4, scope=scope).keep["weight"]
        assert int((~keep).sum()) == 8
        assert keep.sum(1).tolist() == ([3] * 4 if scope == "row" else [0, 2, 5, 5]) == expected


@pytest.mark.parametrize("scope", ["layer", "row", "global"])
def test_among_many_equal_scores_the_first_go_as_in_a_stable_sort(scope: str) -> None:
    model = linears()
    scores = {name: drawn(*model.get_parameter(name).shape, seed=3).round() for name in ("0.weight", "2.weight")}
    found = sc.make_masks(model, lambda name, _: scores[name], 0.45, scope=scope)
    units = {
        "layer": [score.flatten() for score in scores.values()],
        "row": [row for score in scores.values() for row in score],
        "global": [torch.cat([score.flatten() for score in scores.values()])],
    }
    flat = np.concatenate([keep.flatten() for keep in found.keep.values()])
    expected = []
    for unit in units[scope]:
        stay = np.ones(len(unit), bool)
        stay[np.argsort(unit.numpy(), kind="stable")[: math.floor(0.45 * len(unit))]] = False
        expected.append(stay)
    assert np.array_equal(flat, np.concatenate(expected))
