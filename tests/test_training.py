"""fit and evaluate: the caller's model stays as it is, a resumed run ends with the same bits, errors say what to do."""

import copy
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from secateur import batches as batching
from secateur.data import Augmentation, Batches, Dataset
from secateur.errors import DataError, InputError, SecateurError, TrainingError
from secateur.training import Epoch, Recipe, Snapshot, evaluate, fit, learning_rate
from secateur.training import hooks as hooking
from secateur.training import progress as progressing

QUICK = Recipe(epochs=3, lr=0.05)


def net(seed: int = 0, width: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width, 3),
    )


def images(count: int = 30) -> Dataset:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % 3
    pixels = torch.randint(60, (count, 3, 6, 6), generator=generator, dtype=torch.uint8)
    pixels[torch.arange(count), labels] += 120  # the class is a colour
    return Dataset(pixels, labels, ("red", "green", "blue"), (0.3,) * 3, (0.2,) * 3, "colours")


def data(seed: int = 0) -> Batches:
    return Batches(images(), 8, seed=seed, augmentation=Augmentation(crop=1))


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


class Interrupt:
    """Raises in the given step, as Ctrl-C would."""

    def __init__(self, step: int | None) -> None:
        self.left = step

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


# fit


def test_fit_learns_and_reports_what_happened() -> None:
    fitted = fit(net(), data(), Recipe(epochs=12, lr=0.1))
    assert evaluate(fitted.model, data()).accuracy == 1.0
    assert [row.number for row in fitted.history] == list(range(12))
    assert fitted.history[-1].loss < fitted.history[0].loss / 2
    assert all(row.samples == 30 and row.seconds > 0 for row in fitted.history)
    assert str(fitted.history[0]).startswith("epoch 1: loss ")


@pytest.mark.parametrize("loader", [False, True])
def test_fit_leaves_the_callers_model_and_random_numbers_alone(loader: bool) -> None:
    model = net()
    source = DataLoader(TensorDataset(*next(iter(data()))), batch_size=4, shuffle=True) if loader else data()
    model[1].eval()
    before, modes = bits(model), [module.training for module in model.modules()]
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    expected = torch.rand(3), np.random.rand(), random.random()
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    fitted = fit(model, source, QUICK)
    assert torch.equal(torch.rand(3), expected[0])
    assert (np.random.rand(), random.random()) == expected[1:]
    assert same(bits(model), before)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not fitted.model.training
    assert not same(bits(fitted.model), before)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others() -> None:
    one, two = (fit(net(), data(), QUICK) for _ in range(2))
    assert same(bits(one.model), bits(two.model))
    other = fit(net(), data(), replace(QUICK, seed=1))  # dropout differs
    assert not same(bits(one.model), bits(other.model))


def test_one_sgd_step_is_the_textbooks() -> None:
    model = nn.Linear(3, 2)
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])
    recipe = Recipe(epochs=1, lr=0.1, schedule="constant", momentum=0.0, weight_decay=0.01)
    fitted = fit(model, [(x, y)], recipe)
    expected = copy.deepcopy(model)
    nn.functional.cross_entropy(expected(x), y).backward()
    for name, parameter in expected.named_parameters():
        moved = parameter - 0.1 * (parameter.grad + 0.01 * parameter)
        assert torch.allclose(fitted.model.get_parameter(name), moved, atol=1e-7)


def test_one_adamw_step_moves_every_weight_by_the_rate() -> None:
    model = nn.Linear(3, 2)
    recipe = Recipe(epochs=1, lr=0.01, schedule="constant", optimizer="adamw", weight_decay=0.0)
    fitted = fit(model, [(torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1]))], recipe)
    assert torch.allclose((fitted.model.weight - model.weight).abs(), torch.full((2, 3), 0.01), atol=1e-4)


@pytest.mark.parametrize("channels_last", [False, True])
def test_adamw_is_the_textbooks_in_any_memory_layout(channels_last: bool) -> None:
    """Kernels of optimisers work on raw memory: parameters, gradients and moments have to lie alike."""
    recipe = Recipe(epochs=1, lr=0.01, schedule="constant", optimizer="adamw", weight_decay=0.1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, (3, 1)), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.LazyLinear(2)
    )
    batches = [(torch.randn(5, 3, 8, 8), torch.tensor([0, 1, 0, 1, 1])) for _ in range(4)]
    model(batches[0][0])
    fitted = fit(model, batches, replace(recipe, channels_last=channels_last))
    expected = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(expected.parameters(), lr=0.01, weight_decay=0.1, foreach=False, fused=False)
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(expected(x), y).backward()
        optimizer.step()
    for name, parameter in expected.named_parameters():
        assert torch.allclose(fitted.model.get_parameter(name), parameter, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_adamw_trains_other_precisions(dtype: torch.dtype) -> None:
    model = nn.Linear(3, 2).to(dtype)
    recipe = Recipe(epochs=1, lr=0.01, schedule="constant", optimizer="adamw", weight_decay=0.0)
    fitted = fit(model, [(torch.randn(5, 3, dtype=dtype), torch.tensor([0, 1, 0, 1, 1]))], recipe)
    assert torch.allclose((fitted.model.weight - model.weight).abs(), torch.full((2, 3), 0.01, dtype=dtype), atol=2e-3)


def test_clipping_bounds_the_step() -> None:
    model, batch = nn.Linear(3, 2), (100 * torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1]))
    recipe = Recipe(epochs=1, lr=1.0, schedule="constant", momentum=0.0, weight_decay=0.0)

    def step(recipe: Recipe) -> float:
        fitted = fit(model, [batch], recipe)
        pairs = zip(fitted.model.parameters(), model.parameters(), strict=True)
        return math.sqrt(sum(float((after - before).detach().square().sum()) for after, before in pairs))

    assert step(recipe) > 1
    assert step(replace(recipe, clip_norm=0.5)) == pytest.approx(0.5, rel=1e-4)


def test_label_smoothing_reaches_the_loss() -> None:
    model, batch = nn.Linear(3, 2), (torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1]))
    found = fit(model, [batch], Recipe(epochs=1, label_smoothing=0.2)).history[0].loss
    expected = nn.functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.2)
    assert found == pytest.approx(expected.item())


def test_frozen_parameters_stay() -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    fitted = fit(model, data(), QUICK)
    assert torch.equal(fitted.model[0].weight, model[0].weight)
    assert not torch.equal(fitted.model[6].weight, model[6].weight)


def test_bf16_and_channels_last_train_float32_weights() -> None:
    seen: list[Any] = []

    class Look:
        def after_backward(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            seen.append(model[0].weight.is_contiguous(memory_format=torch.channels_last))

    def forward(model: nn.Module, batch: Any) -> Tensor:
        output = model(batch[0])
        seen.append((output.dtype, batch[0].is_contiguous(memory_format=torch.channels_last)))
        return output

    recipe = Recipe(epochs=2, lr=0.1, bf16=True, channels_last=True)
    fitted = fit(net(), [(x.contiguous(), y) for x, y in data()], recipe, forward=forward, hooks=[Look()])
    assert set(seen) == {(torch.bfloat16, True), True}
    assert all(p.dtype == torch.float32 and p.is_contiguous() for p in fitted.model.parameters())


def test_data_may_be_any_iterable() -> None:
    loader = DataLoader(TensorDataset(torch.randn(12, 3), torch.arange(12) % 2), batch_size=4, shuffle=True)

    class Unsized:
        def __iter__(self) -> Iterator[Any]:
            return iter(loader)

    for source in (loader, list(loader), Unsized()):
        assert fit(nn.Linear(3, 2), source, QUICK).history[-1].samples == 12
    assert len(fit(nn.Linear(3, 2), iter(loader), replace(QUICK, epochs=1)).history) == 1


def test_the_order_of_batches_follows_the_epoch() -> None:
    told: list[int] = []

    class Told(Batches):
        def set_epoch(self, epoch: int) -> None:
            told.append(epoch)
            super().set_epoch(epoch)

    fit(net(), Told(images(), 8), QUICK)
    assert told == [0, 1, 2]


# forward and loss


class Output(dict):
    """An output in the manner of transformers: fields by name and by key."""

    __getattr__ = dict.__getitem__


class OwnLoss(nn.Module):
    """A model that takes keywords and computes its own loss where it is given labels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Output:
        logits = self.linear(x)
        return Output(logits=logits, loss=None if labels is None else nn.functional.cross_entropy(logits, labels))


def mappings() -> list[dict[str, Tensor]]:
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    return [{"x": part, "labels": (part[:, 0] > 0).long()} for part in x.split(4)]


def test_mappings_are_keywords_and_carry_their_loss() -> None:
    fitted = fit(OwnLoss(), mappings(), Recipe(epochs=20, lr=0.5))
    assert fitted.history[-1].loss < fitted.history[0].loss
    assert evaluate(fitted.model, mappings()).accuracy >= 0.9


def test_own_forward_and_loss_serve_any_batch() -> None:
    triples = [(torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 2)) for _ in range(3)]

    def forward(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0] + batch[1])

    def loss(output: Tensor, batch: Any) -> Tensor:
        return (output - batch[2]).square().mean()

    fitted = fit(nn.Linear(3, 2), triples, Recipe(epochs=30, lr=0.05), forward=forward, loss=loss)
    assert fitted.history[-1].loss < fitted.history[0].loss
    found = evaluate(fitted.model, triples, forward=forward, loss=loss)
    assert math.isnan(found.accuracy)
    assert found.samples == 12


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.zeros(2, 3),) * 3, "pair .* or a Mapping, got tuple of 3.*forward="),
        ("text", "got str"),
        (torch.zeros(2, 3), "no labels"),
        ({"x": torch.zeros(2, 3)}, "carries no loss"),
    ],
)
def test_batches_nobody_understands_say_what_to_pass(batch: Any, message: str) -> None:
    model = OwnLoss() if isinstance(batch, dict) else nn.Linear(3, 2)
    with pytest.raises(InputError, match=message):
        fit(model, [batch], QUICK)


def test_outputs_nobody_understands_say_what_to_pass() -> None:
    with pytest.raises(InputError, match="not a tensor of logits: pass loss="):
        fit(OwnLoss(), [(torch.zeros(2, 3), torch.zeros(2))], QUICK, forward=lambda model, batch: (model(batch[0]),))


@pytest.mark.parametrize("wrong", [lambda output, batch: 3.0, lambda output, batch: output])
def test_a_loss_is_a_tensor_of_one_value(wrong: Any) -> None:
    with pytest.raises(InputError, match="tensor of one value"):
        fit(net(), data(), QUICK, loss=wrong)


def test_smoothing_a_loss_that_is_not_the_default_is_refused() -> None:
    recipe = Recipe(label_smoothing=0.1)
    with pytest.raises(InputError, match="smooth in your own"):
        fit(net(), data(), recipe, loss=lambda output, batch: output.sum())
    with pytest.raises(InputError, match="must smooth it"):
        fit(OwnLoss(), mappings(), recipe)


def test_moving_keeps_the_nesting() -> None:
    batch = {"x": [torch.zeros(2), (torch.ones(1), "text")], "n": 3}
    moved = batching.move(batch, "meta")
    assert moved["x"][0].is_meta
    assert moved["x"][1][0].is_meta
    assert moved["x"][1][1] == "text"
    assert moved["n"] == 3
    assert isinstance(moved["x"][1], tuple)


# evaluate


def test_evaluate_counts_by_hand_and_weighs_batches_by_their_size() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    labels = torch.tensor([0, 1, 1])
    found = evaluate(nn.Identity(), [(logits[:2], labels[:2]), (logits[2:], labels[2:])])
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)))
    assert found.samples == 3
    assert str(found).startswith("accuracy 66.67%")


def test_evaluate_runs_in_eval_mode_and_restores_every_mode() -> None:
    model = net().train()
    model[3].eval()
    before, modes = bits(model), [module.training for module in model.modules()]
    assert evaluate(model, data()) == evaluate(model, data())  # dropout is off
    assert same(bits(model), before)  # BatchNorm did not move
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(RuntimeError):
        evaluate(model, [(torch.zeros(1, 5, 6, 6), torch.zeros(1, dtype=torch.int64))])
    assert [module.training for module in model.modules()] == modes


def test_evaluate_computes_no_gradients() -> None:
    seen: list[bool] = []
    evaluate(net(), data(), forward=lambda model, batch: seen.append(torch.is_grad_enabled()) or model(batch[0]))
    assert seen and not any(seen)


def test_no_data_is_an_error() -> None:
    with pytest.raises(DataError, match="no batch"):
        evaluate(net(), [])
    with pytest.raises(DataError, match="no batch in epoch 1"):
        fit(net(), [], QUICK)


def test_an_iterator_is_refused_before_it_runs_dry() -> None:
    with pytest.raises(InputError, match="good for one epoch"):
        fit(net(), iter(data()), QUICK)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta"])
def test_a_device_that_is_not_there_is_an_error(device: str) -> None:
    for call in (lambda: fit(net(), data(), QUICK, device=device), lambda: evaluate(net(), data(), device=device)):
        with pytest.raises(InputError, match=device):
            call()


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(InputError, match="nothing to train"):
        fit(nn.ReLU(), data(), QUICK)


# Resuming


@pytest.mark.parametrize("recipe", [QUICK, replace(QUICK, optimizer="adamw", bf16=True, channels_last=True)])
@pytest.mark.parametrize("step", [2, 4, 5, 11])  # 4 steps make an epoch
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path, recipe: Recipe, step: int) -> None:
    whole = fit(net(), data(), recipe, hooks=[Interrupt(None)])
    file = tmp_path / "run" / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(net(), data(), recipe, hooks=[Interrupt(step)], checkpoint=file)
    assert file.exists() == (step > 4)
    start = net(seed=9) if file.exists() else net()  # where there is a checkpoint, the weights come from it
    resumed = fit(start, data(), recipe, hooks=[Interrupt(None)], checkpoint=file)
    assert same(bits(whole.model), bits(resumed.model))
    assert [replace(row, seconds=0) for row in whole.history] == [replace(row, seconds=0) for row in resumed.history]


def test_a_shuffling_data_loader_resumes_exactly_too(tmp_path: Path) -> None:
    pairs = TensorDataset(torch.randn(20, 3), torch.arange(20) % 2)
    model = nn.Linear(3, 2)

    def run(step: int | None, checkpoint: Path | None) -> dict[str, Tensor]:
        loader = DataLoader(pairs, batch_size=4, shuffle=True)
        return bits(fit(model, loader, QUICK, hooks=[Interrupt(step)], checkpoint=checkpoint).model)

    with pytest.raises(KeyboardInterrupt):
        run(7, tmp_path / "c.pt")
    assert same(run(None, tmp_path / "c.pt"), run(None, None))


def test_numpy_and_python_draws_resume_exactly(tmp_path: Path) -> None:
    def noisy(model: nn.Module, batch: Any) -> Tensor:
        np.random.normal()  # leaves a second value cached
        return model(batch[0] * np.random.rand() * random.gauss(1, 0.1))

    def run(step: int | None, checkpoint: Path | None) -> dict[str, Tensor]:
        return bits(fit(net(), data(), QUICK, forward=noisy, hooks=[Interrupt(step)], checkpoint=checkpoint).model)

    with pytest.raises(KeyboardInterrupt):
        run(6, tmp_path / "c.pt")
    assert same(run(None, tmp_path / "c.pt"), run(None, None))


def test_a_finished_run_is_read_back_without_training(tmp_path: Path) -> None:
    whole = fit(net(), data(), QUICK, checkpoint=tmp_path / "c.pt")
    again = fit(net(seed=3), [], QUICK, checkpoint=tmp_path / "c.pt")
    assert same(bits(whole.model), bits(again.model))
    assert again.history == whole.history


def test_hooks_with_state_get_it_back(tmp_path: Path) -> None:
    class Decay(Interrupt):
        """Shrinks the first weight a little more in every epoch."""

        def __init__(self, step: int | None) -> None:
            super().__init__(step)
            self.strength = torch.ones(())

        def after_epoch(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            self.strength = self.strength * 0.9
            model[0].weight.data.mul_(self.strength)

        def state_dict(self) -> dict[str, Any]:
            return {"strength": self.strength}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.strength = state["strength"]

    whole = fit(net(), data(), QUICK, hooks=[Decay(None)])
    with pytest.raises(KeyboardInterrupt):
        fit(net(), data(), QUICK, hooks=[Decay(9)], checkpoint=tmp_path / "c.pt")
    resumed = fit(net(), data(), QUICK, hooks=[Decay(None)], checkpoint=tmp_path / "c.pt")
    assert same(bits(whole.model), bits(resumed.model))


def test_a_checkpoint_of_another_architecture_names_the_first_tensor(tmp_path: Path) -> None:
    fit(net(), data(), QUICK, checkpoint=tmp_path / "c.pt")
    with pytest.raises(TrainingError, match=r"another architecture: '0.weight' has shape \[5, 3, 3, 3\].*Delete it"):
        fit(net(width=5), data(), QUICK, checkpoint=tmp_path / "c.pt")


def test_a_checkpoint_of_another_run_names_the_first_setting(tmp_path: Path) -> None:
    fit(net(), data(), QUICK, checkpoint=tmp_path / "c.pt")
    with pytest.raises(TrainingError, match=r"another run: lr was 0.05, is now 0.2"):
        fit(net(), data(), replace(QUICK, lr=0.2), checkpoint=tmp_path / "c.pt")
    with pytest.raises(TrainingError, match=r"hooks was \[\], is now \['Interrupt'\]"):
        fit(net(), data(), QUICK, hooks=[Interrupt(None)], checkpoint=tmp_path / "c.pt")


def test_milestones_survive_the_round_trip(tmp_path: Path) -> None:
    recipe = Recipe(epochs=2, schedule="step", milestones=(1,))
    fit(net(), data(), recipe, checkpoint=tmp_path / "c.pt")
    assert len(fit(net(), data(), recipe, checkpoint=tmp_path / "c.pt").history) == 2


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "truncated", "other"])
def test_a_damaged_checkpoint_is_an_error(tmp_path: Path, content: bytes | str) -> None:
    file = tmp_path / "c.pt"
    if content == "other":
        torch.save({"weights": torch.zeros(2)}, file)
    elif content == "truncated":
        fit(net(), data(), QUICK, checkpoint=file)
        file.write_bytes(file.read_bytes()[:-200])
    else:
        assert isinstance(content, bytes)
        file.write_bytes(content)
    with pytest.raises(TrainingError, match="Delete it to start again"):
        fit(net(), data(), QUICK, checkpoint=file)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_is_never_executed(tmp_path: Path) -> None:
    import pickle

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "exploded",))

    for number, save in enumerate((torch.save, lambda thing, file: file.write_bytes(pickle.dumps(thing)))):
        file = tmp_path / f"{number}.pt"
        save(Bomb(), file)
        with pytest.raises(TrainingError):
            fit(net(), data(), QUICK, checkpoint=file)
    assert not (tmp_path / "exploded").exists()


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(net(), data(), QUICK, hooks=[Interrupt(6)], checkpoint=file)
    good, write = file.read_bytes(), torch.save

    def full(thing: Any, target: Any) -> None:
        target.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match=r"No space left.*is intact"):
        fit(net(), data(), QUICK, hooks=[Interrupt(None)], checkpoint=file)
    assert file.read_bytes() == good
    assert list(tmp_path.iterdir()) == [file]
    monkeypatch.setattr(torch, "save", write)
    resumed = fit(net(), data(), QUICK, hooks=[Interrupt(None)], checkpoint=file)
    assert same(bits(resumed.model), bits(fit(net(), data(), QUICK, hooks=[Interrupt(None)]).model))


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    calls = 0

    def loss(output: Tensor, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return nn.functional.cross_entropy(output, batch[1]) * (math.nan if calls == 6 else 1.0)

    with pytest.raises(TrainingError, match=r"nan in epoch 2, step 2, at learning rate .* lower lr"):
        fit(net(), data(), QUICK, loss=loss, checkpoint=tmp_path / "c.pt")
    assert len(fit(net(), data(), QUICK, checkpoint=tmp_path / "c.pt").history) == 3  # the first epoch is not lost


def test_a_rate_far_too_high_is_reported_as_such() -> None:
    with pytest.raises(TrainingError, match=r"learning rate 1e\+30"):
        fit(net(), data(), Recipe(epochs=3, lr=1e30, schedule="constant"))


# Hooks


def test_hooks_are_called_at_their_moments_and_see_what_they_should() -> None:
    calls: list[str] = []

    class Watch:
        def after_backward(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            assert all(parameter.grad is not None for parameter in model.parameters())
            self.weight = model[0].weight.detach().clone()
            calls.append("backward")

        def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            assert not torch.equal(model[0].weight, self.weight)
            calls.append("step")

        def after_epoch(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            calls.append("epoch")

    fit(net(), data(), replace(QUICK, epochs=2), hooks=[Watch()])
    assert calls == (["backward", "step"] * 4 + ["epoch"]) * 2


def test_a_hook_can_hold_weights_at_zero() -> None:
    class Mask:
        def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            model[0].weight.data[0] = 0

    assert not fit(net(), data(), QUICK, hooks=[Mask()]).model[0].weight[0].any()


def test_a_hook_without_a_known_method_is_refused() -> None:
    class Typo:
        def after_steps(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None: ...

    with pytest.raises(InputError, match="after_backward, after_step, after_epoch"):
        fit(net(), data(), QUICK, hooks=[Typo()])


def test_a_frozen_dataclass_hook_is_its_settings_in_a_checkpoint(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Push:
        strength: float
        shape: Any = field(default=math.sin)

        def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            pass

    fit(net(), data(), QUICK, hooks=[Push(0.5)], checkpoint=tmp_path / "c.pt")
    assert len(fit(net(), data(), QUICK, hooks=[Push(0.5)], checkpoint=tmp_path / "c.pt").history) == 3
    with pytest.raises(TrainingError, match=r"hooks was .*strength=0.5.*is now .*strength=0.25"):
        fit(net(), data(), QUICK, hooks=[Push(0.25)], checkpoint=tmp_path / "c.pt")


def test_where_a_hooks_function_lies_does_not_matter() -> None:
    @dataclass(frozen=True)
    class Push:
        function: Any

    assert hooking.names([Push(lambda: 1)]) == hooking.names([Push(copy.copy(lambda: 1))])
    assert "at 0x" not in hooking.names([Push(object())])[0]


# Starting in the middle of a recipe


@pytest.mark.parametrize("start", [0, 1, 2])
@pytest.mark.parametrize("recipe", [QUICK, Recipe(epochs=3, lr=0.1, schedule="step", milestones=(1, 2))])
def test_a_later_start_replays_the_tail_of_the_recipe(recipe: Recipe, start: int) -> None:
    told: list[int] = []

    class Told(Batches):
        def set_epoch(self, epoch: int) -> None:
            told.append(epoch)
            super().set_epoch(epoch)

    class Look:
        def __init__(self) -> None:
            self.rates: list[float] = []

        def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            self.rates.append(optimizer.param_groups[0]["lr"])

    whole, tail = Look(), Look()
    fit(net(), data(), recipe, hooks=[whole])
    fitted = fit(net(), Told(images(), 8), recipe, hooks=[tail], start_epoch=start)
    assert tail.rates == whole.rates[4 * start :]
    assert told == [row.number for row in fitted.history] == list(range(start, 3))


def test_a_run_without_momentum_or_chance_may_be_cut_anywhere() -> None:
    recipe = replace(QUICK, momentum=0.0)
    model, source = nn.Linear(3, 2), [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1])) for _ in range(3)]
    kept = Snapshot(2)
    whole = fit(model, source, recipe, hooks=[kept])
    middle = copy.deepcopy(model)
    middle.load_state_dict(kept.weights)
    assert same(bits(fit(middle, source, recipe, start_epoch=2).model), bits(whole.model))


@pytest.mark.parametrize("step", [5, 7, 8])
def test_a_later_start_resumes_exactly(tmp_path: Path, step: int) -> None:
    recipe = replace(QUICK, epochs=4)
    whole = fit(net(), data(), recipe, hooks=[Interrupt(None)], start_epoch=1)
    with pytest.raises(KeyboardInterrupt):
        fit(net(), data(), recipe, hooks=[Interrupt(step)], checkpoint=tmp_path / "c.pt", start_epoch=1)
    resumed = fit(net(9), data(), recipe, hooks=[Interrupt(None)], checkpoint=tmp_path / "c.pt", start_epoch=1)
    assert same(bits(whole.model), bits(resumed.model))
    assert [row.number for row in resumed.history] == [1, 2, 3]
    with pytest.raises(TrainingError, match="another run: start_epoch was 1, is now 2"):
        fit(net(), data(), recipe, hooks=[Interrupt(None)], checkpoint=tmp_path / "c.pt", start_epoch=2)
    with pytest.raises(TrainingError, match="another run: start_epoch was 1"):
        fit(net(), data(), recipe, hooks=[Interrupt(None)], checkpoint=tmp_path / "c.pt")


@pytest.mark.parametrize("start", [-1, 3, True, 0.5])
def test_an_epoch_that_the_recipe_does_not_have_is_refused(start: Any) -> None:
    with pytest.raises(InputError, match="one of the recipe's 3 epochs, from 0; got"):
        fit(net(), data(), QUICK, start_epoch=start)


def test_the_last_epoch_alone_takes_an_iterator() -> None:
    assert len(fit(net(), iter(data()), QUICK, start_epoch=2).history) == 1


# Snapshots


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_snapshot_is_what_a_shorter_run_ends_with(epoch: int) -> None:
    recipe = replace(QUICK, schedule="constant")
    kept = Snapshot(epoch)
    whole = fit(net(), data(), recipe, hooks=[kept])
    assert same(dict(kept.weights), bits(fit(net(), data(), replace(recipe, epochs=epoch)).model))
    assert same(bits(whole.model), bits(fit(net(), data(), recipe).model))
    assert same(dict(kept.weights), bits(whole.model)) == (epoch == 3)


@pytest.mark.parametrize("step", [3, 6, 11])  # before, in and after the epoch that is kept
def test_a_snapshot_survives_an_interruption(tmp_path: Path, step: int) -> None:
    whole, cut, resumed = Snapshot(2), Snapshot(2), Snapshot(2)
    fit(net(), data(), QUICK, hooks=[whole, Interrupt(None)])
    with pytest.raises(KeyboardInterrupt):
        fit(net(), data(), QUICK, hooks=[cut, Interrupt(step)], checkpoint=tmp_path / "c.pt")
    fit(net(), data(), QUICK, hooks=[resumed, Interrupt(None)], checkpoint=tmp_path / "c.pt")
    assert same(dict(whole.weights), dict(resumed.weights))
    again = Snapshot(2)
    fit(net(), [], QUICK, hooks=[again, Interrupt(None)], checkpoint=tmp_path / "c.pt")
    assert same(dict(whole.weights), dict(again.weights))
    with pytest.raises(TrainingError, match="after epoch 2, this run those after 1"):
        fit(net(), data(), QUICK, hooks=[Snapshot(1), Interrupt(None)], checkpoint=tmp_path / "c.pt")


def test_a_snapshot_that_is_not_there_yet() -> None:
    kept = Snapshot(5)
    fit(net(), data(), QUICK, hooks=[kept])
    with pytest.raises(InputError, match="3 epochs are over, the snapshot is due after 5"):
        _ = kept.weights
    for wrong in (0, -1, True, 1.5):
        with pytest.raises(InputError, match="at least 1; got"):
            Snapshot(wrong)  # type: ignore[arg-type]  # what a user may write


# Recipe and learning rate


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"lr": 0.0},
        {"lr": math.inf},
        {"optimizer": "adam"},
        {"momentum": 1.0},
        {"weight_decay": -1.0},
        {"schedule": "linear"},
        {"schedule": "step"},
        {"milestones": (3,)},
        {"schedule": "step", "milestones": (5, 3)},
        {"gamma": 0.0},
        {"warmup_epochs": 11},
        {"label_smoothing": 1.0},
        {"clip_norm": 0.0},
    ],
)
def test_an_impossible_recipe_cannot_be_made(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"Recipe: .*; got"):
        Recipe(**wrong)


def test_rates_by_hand() -> None:
    cosine = Recipe(epochs=12, lr=0.4, warmup_epochs=2)
    found = [learning_rate(cosine, epoch) for epoch in (0, 1, 2, 7, 12)]
    assert found == pytest.approx([0, 0.2, 0.4, 0.2, 0])
    step = Recipe(epochs=10, lr=1.0, schedule="step", milestones=(4, 8), gamma=0.1)
    assert [learning_rate(step, epoch) for epoch in (0, 3.9, 4, 8)] == pytest.approx([1, 1, 0.1, 0.01])
    constant = Recipe(epochs=10, lr=1.0, schedule="constant", warmup_epochs=1)
    assert [learning_rate(constant, epoch) for epoch in (0.25, 1, 9)] == pytest.approx([0.25, 1, 1])


@given(
    st.integers(1, 50),
    st.floats(0, 1),
    st.sampled_from(["cosine", "constant"]),
    st.lists(st.floats(0, 1), min_size=2, max_size=2),
)
@settings(deadline=None)
def test_rates_rise_to_the_peak_and_then_never_rise(
    epochs: int, warmup: float, schedule: Any, moments: list[float]
) -> None:
    recipe = Recipe(epochs=epochs, lr=0.3, schedule=schedule, warmup_epochs=warmup * epochs)
    early, late = (moment * epochs for moment in sorted(moments))
    first, second = learning_rate(recipe, early), learning_rate(recipe, late)
    assert min(first, second) >= 0 and max(first, second) <= 0.3 + 1e-12
    if late < recipe.warmup_epochs:
        assert first <= second + 1e-12
    elif early >= recipe.warmup_epochs:
        assert first >= second - 1e-12


def test_every_step_is_made_at_the_rate_of_its_middle() -> None:
    rates: list[float] = []

    class Look:
        def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    recipe = Recipe(epochs=2, lr=0.1, warmup_epochs=1)
    fitted = fit(net(), data(), recipe, hooks=[Look()])
    assert rates == pytest.approx([learning_rate(recipe, (step + 0.5) / 4) for step in range(8)])
    assert [row.lr for row in fitted.history] == pytest.approx([rates[3], rates[7]])


# Progress


def test_progress_is_silent_off_a_terminal_and_a_line_per_epoch_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    fit(net(), data(), QUICK)
    fit(net(), data(), QUICK, progress=False)
    assert capsys.readouterr() == ("", "")
    fit(net(), data(), QUICK, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(":")[0] for line in err.splitlines()] == ["epoch 1", "epoch 2", "epoch 3"]


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progressing.showing(None, epochs=2, done=1, steps=3) as display:
        display.step(0.1)
        display.epoch("epoch 2: loss 0.1")
    out, err = capsys.readouterr()
    assert out == ""
    assert "epoch 2: loss 0.1" in err
    assert "4/6" in err


def test_epochs_print_on_one_line() -> None:
    row = Epoch(number=4, loss=0.5, accuracy=0.9, lr=0.1, samples=1000, seconds=2.0)
    assert str(row) == "epoch 5: loss 0.5000, accuracy 90.00%, 500 samples/s"


def test_errors_belong_to_the_one_tree() -> None:
    for kind in (DataError, InputError, TrainingError):
        assert issubclass(kind, SecateurError)
