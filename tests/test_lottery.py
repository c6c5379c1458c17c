"""Rewinding and lottery tickets: masks nest, levels are exact, survivors start where they should, and runs resume."""

import copy
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from secateur.data import Augmentation, Batches, Dataset
from secateur.errors import InputError, PlanMismatchError, TrainingError, UnknownNameError
from secateur.masking import make_masks
from secateur.recovery import Snapshot, Ticket, lottery_tickets, rewound
from secateur.training import Recipe, fit, learning_rate

RECIPE = Recipe(epochs=3, lr=0.05, schedule="step", milestones=(1, 2))


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


PRUNABLE = 4 * 3 * 9 + 16 * 3


def data() -> Batches:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(24) % 3
    pixels = torch.randint(256, (24, 3, 6, 6), generator=generator, dtype=torch.uint8)
    images = Dataset(pixels, labels, ("red", "green", "blue"), (0.3,) * 3, (0.2,) * 3, "noise")
    return Batches(images, 8, augmentation=Augmentation(crop=1))


def tickets(model: nn.Module | None = None, recipe: Recipe = RECIPE, **options: Any) -> list[Ticket]:
    settings = {"sparsity": 0.875, "rounds": 3, **options}
    return list(lottery_tickets(model or net(), data(), recipe, **settings))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def same(one: nn.Module, two: nn.Module) -> bool:
    left, right = state(one), state(two)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def assert_under_masks(model: nn.Module, ticket: Ticket, weights: dict[str, Tensor]) -> None:
    """The survivors are these weights, the others are zero."""
    for name, tensor in state(model).items():
        keep = ticket.masks.keep.get(name, torch.ones_like(tensor, dtype=torch.bool))
        assert torch.equal(tensor, torch.where(keep, weights[name], torch.zeros_like(tensor))), name


class Rates:
    """Notes the learning rate of every step, of all runs together."""

    seen: list[float]

    def __init__(self, seen: list[float]) -> None:
        self.seen = seen

    def __deepcopy__(self, memo: Any) -> "Rates":
        return Rates(self.seen)

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


class Interrupt:
    """Raises in the given step of all runs together, as Ctrl-C would."""

    def __init__(self, left: list[int]) -> None:
        self.left = left

    def __deepcopy__(self, memo: Any) -> "Interrupt":
        return Interrupt(self.left)

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.left[0] -= 1
        if self.left[0] == 0:
            raise KeyboardInterrupt


# -- rewinding -------------------------------------------------------------------------------------------------------


def test_rewound_weights_lie_under_the_masks() -> None:
    early, late = net(1), net(2)
    late[1].running_mean.fill_(5)
    masks = make_masks(late, sparsity=0.5, scope="global")
    weights = {name: tensor.detach() for name, tensor in state(early).items()}
    before = copy.deepcopy(late)
    small = rewound(late, masks, weights)
    assert_under_masks(small, Ticket(1, masks, small, small, ()), weights)
    assert not small[1].running_mean.any()
    assert same(late, before) and same(early, net(1))


def test_values_of_the_masks_do_not_take_the_place_of_the_earlier_weights() -> None:
    model = net()
    masks = make_masks(model, sparsity=0.5, scope="global")
    updated = replace(masks, values={"6.weight": torch.full((3, 16), 7.0)})
    assert same(rewound(model, updated, state(model)), rewound(model, masks, state(model)))


def test_weights_of_another_model_are_refused() -> None:
    model = net()
    masks = make_masks(model, sparsity=0.5, scope="global")
    weights = state(model)
    with pytest.raises(PlanMismatchError, match=r"set of earlier weights has no tensor '6\.bias'"):
        rewound(model, masks, {name: tensor for name, tensor in weights.items() if name != "6.bias"})
    with pytest.raises(PlanMismatchError, match=r"'6.bias' has shape \[2\] in the set of earlier weights"):
        rewound(model, masks, {**weights, "6.bias": torch.zeros(2)})


# -- tickets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rewind", ["weights", "learning_rate", "none"])
def test_levels_are_exact_masks_nest_and_zeros_stay(rewind: str) -> None:
    found = tickets(rewind=rewind, rewind_epoch=1)
    assert [ticket.round for ticket in found] == [0, 1, 2, 3]
    kept = [sum(int(keep.sum()) for keep in ticket.masks.keep.values()) for ticket in found]
    assert kept == [PRUNABLE - math.floor(level * PRUNABLE) for level in (0, 0.5, 0.75, 0.875)]
    for before, after in pairwise(found):
        for name, keep in after.masks.keep.items():
            assert not (keep & ~before.masks.keep[name]).any()
    for ticket in found:
        assert not ticket.model.training
        for model in (ticket.start, ticket.model):
            for name, keep in ticket.masks.keep.items():
                assert not model.get_parameter(name)[~keep].any()
                assert model.get_parameter(name)[keep].all()
        assert not same(ticket.start, ticket.model)


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_survivors_start_from_the_weights_they_are_rewound_to(epoch: int) -> None:
    model = net()
    found = tickets(model, rewind_epoch=epoch)
    if epoch:
        kept = Snapshot(epoch)
        fit(model, data(), RECIPE, hooks=[kept])
        weights = dict(kept.weights)
    else:
        weights = {name: tensor.detach() for name, tensor in state(model).items()}
    for ticket in found[1:]:
        assert_under_masks(ticket.start, ticket, weights)
        assert [row.number for row in ticket.history] == list(range(epoch, 3))


@pytest.mark.parametrize("rewind", ["learning_rate", "none"])
def test_without_weight_rewinding_survivors_start_from_where_they_were(rewind: str) -> None:
    found = tickets(rewind=rewind, rewind_epoch=1)
    for before, after in pairwise(found):
        assert_under_masks(after.start, after, {name: t.detach() for name, t in state(before.model).items()})


@pytest.mark.parametrize("rewind", ["weights", "learning_rate", "none"])
@pytest.mark.parametrize("recipe", [RECIPE, Recipe(epochs=3, lr=0.1, warmup_epochs=1)])
def test_rates_replay_the_tail_of_the_recipe_or_stay_at_its_end(recipe: Recipe, rewind: str) -> None:
    seen: list[float] = []
    tickets(recipe=recipe, rewind=rewind, rewind_epoch=1, rounds=2, hooks=[Rates(seen)])
    whole = [learning_rate(recipe, (step + 0.5) / 3) for step in range(9)]
    tail = [learning_rate(recipe, 2.5)] * 6 if rewind == "none" else whole[3:]
    assert seen == pytest.approx([*whole, *tail, *tail])


def test_the_first_ticket_is_the_dense_model() -> None:
    model = net()
    first = next(lottery_tickets(model, data(), RECIPE, sparsity=0.8, rounds=2))
    assert same(first.start, model) and same(first.model, fit(model, data(), RECIPE).model)
    assert all(keep.all() for keep in first.masks.keep.values())
    assert repr(first).startswith("Ticket(round 0, Masks(")


def test_the_weights_that_go_are_the_smallest_of_those_left() -> None:
    found = tickets()
    for before, after in pairwise(found):
        left = torch.cat([before.model.get_parameter(n)[keep].abs() for n, keep in before.masks.keep.items()])
        stays = torch.cat([before.model.get_parameter(n)[keep].abs() for n, keep in after.masks.keep.items()])
        assert torch.equal(stays.sort().values, left.sort().values[-len(stays) :])


def test_the_callers_model_and_generators_stay_as_they_are() -> None:
    model = net()
    source = DataLoader(TensorDataset(*next(iter(data()))), batch_size=4, shuffle=True)  # draws from the global one
    random = torch.get_rng_state()
    list(lottery_tickets(model, source, RECIPE, sparsity=0.5, rounds=1, criterion="snip"))
    assert torch.equal(torch.get_rng_state(), random)
    assert same(model, net()) and model.training


@pytest.mark.parametrize("options", [{"within": "0"}, {"within": ["0"]}, {"ignore": "6"}, {"ignore": ("6",)}])
def test_layers_are_chosen_by_name(options: dict[str, Any]) -> None:
    last = tickets(**options, sparsity=0.5, rounds=1)[-1]
    assert set(last.masks.keep) == {"0.weight"}
    assert int(last.masks.keep["0.weight"].sum()) == 54


def test_what_is_gone_stays_gone_whatever_the_criterion_says() -> None:
    def largest_go(name: str, evidence: Any) -> Tensor:
        return -evidence.tensors[name].abs()  # zeros come first

    found = tickets(criterion=largest_go)
    for before, after in pairwise(found):
        assert all(not (keep & ~before.masks.keep[name]).any() for name, keep in after.masks.keep.items())
    assert found[-1].masks.sparsity == pytest.approx(0.875, abs=1 / PRUNABLE)


def test_every_round_trains_with_copies_of_the_hooks() -> None:
    kept = Snapshot(2)
    tickets(hooks=[kept])
    with pytest.raises(InputError, match="0 epochs are over"):
        _ = kept.weights


# -- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rewind", "epoch"), [("weights", 0), ("weights", 1), ("learning_rate", 1), ("none", 0)])
@pytest.mark.parametrize("step", [5, 12, 18])
def test_an_interrupted_search_ends_with_the_same_bits(tmp_path: Path, rewind: str, epoch: int, step: int) -> None:
    options: dict[str, Any] = {"rounds": 2, "rewind": rewind, "rewind_epoch": epoch}
    whole = tickets(**options, hooks=[Interrupt([0])])
    with pytest.raises(KeyboardInterrupt):
        tickets(**options, hooks=[Interrupt([step])], checkpoint_dir=tmp_path)
    steps = [0]
    resumed = tickets(**options, hooks=[Interrupt(steps)], checkpoint_dir=tmp_path)
    assert -steps[0] < 9 + 2 * 3 * (3 - epoch)  # something was read back
    for one, two in zip(whole, resumed, strict=True):
        assert same(one.start, two.start) and same(one.model, two.model)
        assert all(torch.equal(keep, two.masks.keep[name]) for name, keep in one.masks.keep.items())
        assert [replace(row, seconds=0) for row in one.history] == [replace(row, seconds=0) for row in two.history]


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_criterion_on_data_sees_the_same_batches_when_resumed(tmp_path: Path, shuffled: bool) -> None:
    pairs = TensorDataset(*next(iter(Batches(data().dataset, 24))))

    def run(left: int, folder: Path | None) -> list[Ticket]:
        source = DataLoader(pairs, batch_size=8, shuffle=True) if shuffled else data()
        options = {"sparsity": 0.6, "rounds": 2, "criterion": "snip", "checkpoint_dir": folder}
        search = lottery_tickets(net(), source, RECIPE, hooks=[Interrupt([left])], **options)
        torch.manual_seed(1 if folder is None else 2)  # the caller's generator must not matter
        return list(search)

    whole = run(0, None)
    with pytest.raises(KeyboardInterrupt):
        run(20, tmp_path)
    for one, two in zip(whole, run(0, tmp_path), strict=True):
        assert all(torch.equal(keep, two.masks.keep[name]) for name, keep in one.masks.keep.items())
        assert same(one.model, two.model)


@pytest.mark.parametrize(
    "other", [{"sparsity": 0.8}, {"rounds": 2}, {"criterion": "random"}, {"rewind": "none"}, {"ignore": "6"}]
)
def test_a_folder_of_another_search_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    tickets(checkpoint_dir=tmp_path)
    with pytest.raises(TrainingError, match="belongs to another run"):
        tickets(**other, checkpoint_dir=tmp_path)


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sparsity": 1.0}, r"in \[0, 1\); got 1.0"),
        ({"sparsity": 30}, r"in \[0, 1\); got 30"),
        ({"rounds": 0}, "rounds is how often to prune"),
        ({"rewind_epoch": 3}, "one of the recipe's 3 epochs"),
        ({"rewind_epoch": -1}, "one of the recipe's 3 epochs"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_before_any_training(wrong: dict[str, Any], message: str) -> None:
    settings = {"sparsity": 0.5, "rounds": 2, **wrong}
    with pytest.raises(InputError, match=message):
        lottery_tickets(net(), data(), RECIPE, **settings)


def test_names_and_iterators_are_checked_before_any_training() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'weights'"):
        lottery_tickets(net(), data(), RECIPE, sparsity=0.5, rounds=2, rewind="weight")
    with pytest.raises(InputError, match="good for one epoch"):
        lottery_tickets(net(), iter(data()), RECIPE, sparsity=0.5, rounds=2)
