"""SparseGPT against optimal brain surgeon written out: blocks of columns, groups, dead inputs, layer after layer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from nets_for_tests import randomised
from secateur.sparsegpt import COLUMNS, DAMPING, sparsegpt_rows


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram_of(columns: int, seed: int = 1) -> Tensor:
    inputs = drawn(3 * columns, columns, seed=seed) @ (
        torch.eye(columns) + 0.3 * drawn(columns, columns, seed=seed + 1)
    )
    return inputs.T @ inputs / len(inputs)


def surgeon(
    weight: np.ndarray, gram: np.ndarray, width: int, each: bool, count: int, gone: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Hassibi and Stork's update, one column after the other, the Hessian inverted anew for the columns that are left.

    At every `width`-th column the next `width` choose: `count` of their weights go, in each row or over all rows;
    those that are `gone` are among them.
    """
    weight, columns = weight.copy(), len(gram)
    hessian = gram + DAMPING * np.diag(gram).mean() * np.eye(columns)
    left = [np.linalg.inv(hessian[column:, column:]) for column in range(columns)]
    keep = np.ones(weight.shape, bool)
    for column in range(columns):
        if column % width == 0:
            ahead = range(column, min(column + width, columns))
            costs = np.stack([weight[:, q] ** 2 / left[q][0, 0] for q in ahead], 1)
            if gone is not None:
                costs[gone[:, ahead]] = -1
            for row in costs if each else [costs]:
                row.ravel()[np.argsort(row.ravel(), kind="stable")[:count]] = -1
            keep[:, ahead] = costs >= 0
        error = weight[:, column] * ~keep[:, column] / left[column][0, 0]
        weight[:, column:] -= error[:, None] * left[column][0]
    return weight * keep, keep


def output_error(change: Tensor, gram: Tensor) -> float:
    """The mean squared change of a layer's outputs."""
    return float(((change @ gram) * change).sum())


def test_a_group_of_four_chooses_when_the_sweep_comes_to_it() -> None:
    weight, gram = drawn(5, 12), gram_of(12)
    new, keep = sparsegpt_rows(weight[:, :, None], gram[None], 0.5, (2, 4))
    expected, mask = surgeon(weight.numpy(), gram.numpy(), width=4, each=True, count=2)
    assert np.array_equal(keep[..., 0], mask) and np.allclose(new[..., 0], expected, atol=1e-9)
    at_once = surgeon(weight.numpy(), gram.numpy(), width=12, each=False, count=30)[1]
    assert not np.array_equal(mask, at_once)  # otherwise this says nothing


def test_columns_choose_128_by_128_on_the_weights_as_they_are_by_then() -> None:
    columns = 2 * COLUMNS
    weight, gram = drawn(3, columns), gram_of(columns)
    new, keep = sparsegpt_rows(weight[:, :, None], gram[None], 0.5)
    expected, mask = surgeon(weight.numpy(), gram.numpy(), COLUMNS, each=False, count=3 * COLUMNS // 2)
    assert np.array_equal(keep[..., 0], mask) and np.allclose(new[..., 0], expected, atol=1e-8)


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.8])
def test_the_outputs_change_less_than_without_updates(fraction: float) -> None:
    inputs = drawn(200, 12, seed=1) @ drawn(12, 40, seed=2)  # correlated, as features are
    inputs += 0.5 * drawn(200, 40, seed=3)
    weight, gram = drawn(8, 40), inputs.T @ inputs / 200
    new, keep = sparsegpt_rows(weight[:, :, None], gram[None], fraction)
    smallest = weight.abs() <= weight.abs().flatten().kthvalue(int(fraction * 320)).values
    assert int((~keep).sum()) == int(smallest.sum())
    swept = output_error(new[..., 0] - weight, gram)
    assert swept < 0.8 * output_error(weight * ~keep[..., 0], gram)  # its own zeros, without updates
    assert swept < output_error(weight * smallest, gram)  # the smallest weights


def test_groups_are_pruned_each_on_its_own_inputs_and_nothing_is_lost_to_rounding() -> None:
    weight, grams = drawn(6, 3, 3), torch.stack([gram_of(9, seed) for seed in (3, 7, 11)])
    new, keep = sparsegpt_rows(weight, grams, 0.5)
    assert int((~keep).sum()) == 27  # 3 groups of 18; of 9 columns each
    single = drawn(3, 1, 9)  # depthwise: floor of half of 9 would be 4 in every group
    assert int((~sparsegpt_rows(single, grams, 0.5)[1]).sum()) == 13
    alone = [sparsegpt_rows(weight[2 * g : 2 * g + 2], grams[g : g + 1], 0.5) for g in range(3)]
    assert torch.equal(keep, torch.cat([mask for _, mask in alone]))
    assert torch.allclose(new, torch.cat([value for value, _ in alone]), atol=1e-12)


def test_weights_of_inputs_that_were_always_zero_go_first() -> None:
    weight, gram = drawn(4, 10), gram_of(10) * 1e-4
    gram[[2, 7]] = 0
    gram[:, [2, 7]] = 0
    new, keep = sparsegpt_rows(weight[:, :, None], gram[None], 0.2)
    assert not keep[:, [2, 7], 0].any() and int((~keep).sum()) == 8
    others = [column for column in range(10) if column not in (2, 7)]
    assert torch.equal(new[:, others, 0], weight[:, others])  # nothing that they fed has to be made up for
    assert torch.isfinite(sparsegpt_rows(weight[:, :, None], torch.zeros(1, 10, 10), 0.5)[0]).all()


@pytest.mark.parametrize("fraction", [0.25, 0.6])
def test_what_is_gone_counts_however_unevenly_it_went(fraction: float) -> None:
    columns = COLUMNS + 20
    weight, gram = drawn(4, columns), gram_of(columns)
    gone = torch.zeros(4, columns, 1, dtype=torch.bool)
    gone[:, :60] = True  # 240 of 592, all of them in the first block
    weight[gone[..., 0]] = 0
    new, keep = sparsegpt_rows(weight[:, :, None], gram[None], fraction, gone=gone)
    assert not keep[gone].any() and not new[~keep].any()
    assert int((~keep).sum()) == max(240, math.floor(fraction * 4 * columns + 1e-9))


def test_a_group_of_four_that_lost_three_keeps_the_one() -> None:
    weight, gram = drawn(3, 8), gram_of(8)
    gone = torch.zeros(3, 8, 1, dtype=torch.bool)
    gone[:, [4, 6, 7]] = True  # behind columns whose errors they would take up
    weight[gone[..., 0]] = 0
    new, keep = sparsegpt_rows(weight[:, :, None], gram[None], 0.5, (2, 4), gone)
    expected, mask = surgeon(weight.numpy(), gram.numpy(), 4, each=True, count=2, gone=gone[..., 0].numpy())
    assert np.array_equal(keep[..., 0], mask) and np.allclose(new[..., 0], expected, atol=1e-9)
    assert keep[:, 5].all() and not keep[gone].any() and not new[~keep].any()
    assert keep[:, :4].sum(1).flatten().tolist() == [2, 2, 2]


def test_a_convolutions_columns_are_those_of_its_unfolded_input() -> None:
    layer, x = nn.Conv2d(4, 6, 3, padding=1, stride=2, bias=False).double(), drawn(5, 4, 7, 7)
    layer = randomised(layer)
    found = sc.make_masks(layer, "sparsegpt", pattern="2:4", data=[x[:2], x[2:]])
    patches = F.unfold(x, 3, padding=1, stride=2).transpose(1, 2).reshape(-1, 4, 9).transpose(1, 2).flatten(1)
    gram = (patches.T @ patches / len(patches)).numpy()
    by_tap = layer.weight.detach().reshape(6, 4, 9).transpose(1, 2).flatten(1).numpy()
    expected, mask = surgeon(by_tap, gram, width=4, each=True, count=2)
    assert np.array_equal(found.keep["weight"].reshape(6, 4, 9).transpose(1, 2).flatten(1), mask)
    value = found.values["weight"].reshape(6, 4, 9).transpose(1, 2).flatten(1)
    assert np.allclose(value, expected, atol=1e-9)


def test_later_layers_answer_to_what_the_pruned_ones_before_them_give() -> None:
    model = randomised(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)).double())
    x = drawn(40, 6)
    found = sc.make_masks(model, "sparsegpt", 0.5, data=[x])
    first = sc.make_masks(model, "sparsegpt", 0.5, data=[x], within=["0"])
    second = sc.make_masks(first.apply(model), "sparsegpt", 0.5, data=[x], within=["2"])
    clean = sc.make_masks(model, "sparsegpt", 0.5, data=[x], within=["2"])
    assert torch.equal(found.values["0.weight"], first.values["0.weight"])
    assert torch.equal(found.values["2.weight"], second.values["2.weight"])
    assert not torch.equal(found.values["2.weight"], clean.values["2.weight"])
    assert torch.equal(found.apply(model)[2].weight, found.values["2.weight"])
