"""Recovery: the distillation loss by hand, rewinding to the bit, tickets that nest, and fresh weights."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur import nets
from secateur.batches import default_loss
from secateur.errors import InputError
from secateur.training import Recipe, fit
from secateur.training.distilling import distillation, with_hidden_states
from secateur.training.starting import equal_budget, from_scratch

# -- distillation ----------------------------------------------------------------------------------------------------


def softmax(logits: Any, temperature: float) -> Any:
    powers = np.exp(logits / temperature)
    return powers / powers.sum(-1, keepdims=True)


def by_hand(student: Any, teacher: Any, labels: Any, temperature: float, weight: float) -> float:
    """Sample by sample, class by class."""
    soft = hard = 0.0
    for row, answer, label in zip(student, teacher, labels, strict=True):
        p, q = softmax(answer, temperature), softmax(row, temperature)
        soft += sum(float(p[c] * (np.log(p[c]) - np.log(q[c]))) for c in range(len(p)))
        hard -= float(np.log(softmax(row, 1.0)[label]))
    return ((1 - weight) * hard + weight * temperature**2 * soft) / len(student)


@pytest.mark.parametrize(("temperature", "weight"), [(4.0, 0.9), (1.0, 0.5), (20.0, 1.0), (2.0, 0.0)])
def test_the_loss_by_hand(temperature: float, weight: float) -> None:
    teacher, x = nn.Linear(5, 3).double(), torch.randn(4, 5, dtype=torch.float64)
    student, labels = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    found = distillation(teacher, temperature, weight)(student, (x, labels))
    expected = by_hand(student.numpy(), teacher(x).detach().numpy(), labels.numpy(), temperature, weight)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_its_gradient_at_temperature_one_is_the_difference_of_the_answers() -> None:
    teacher, x = nn.Linear(5, 3), torch.randn(4, 5)
    student = torch.randn(4, 3, requires_grad=True)
    distillation(teacher, temperature=1.0, weight=1.0)(student, (x, torch.zeros(4, dtype=torch.int64))).backward()
    expected = (student.softmax(1) - teacher(x).softmax(1)) / 4
    assert torch.allclose(student.grad, expected, atol=1e-6)


def test_a_student_that_agrees_pays_nothing() -> None:
    teacher, x = nn.Linear(5, 3), torch.randn(4, 5)
    loss = distillation(teacher, weight=1.0)
    assert loss(teacher(x), x).item() == pytest.approx(0, abs=1e-7)
    assert loss(teacher(x) + 3.0, x).item() == pytest.approx(0, abs=1e-6)  # a constant changes no answer
    assert loss(-teacher(x), x).item() > 0.01


class Output(dict):
    """An output in the manner of transformers."""

    __getattr__ = dict.__getitem__


class Tagger(nn.Module):
    """Labels every position of a sequence: logits (N, L, classes); computes its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Output:
        logits = self.linear(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Output(logits=logits, loss=loss)


def test_mappings_have_their_classes_last_and_ignored_positions_do_not_count() -> None:
    teacher, student = Tagger().double(), Tagger().double()
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    labels = torch.tensor([[0, 1, -100, 2], [1, -100, -100, 0]])
    batch = {"x": x, "labels": labels}
    found = distillation(teacher, 3.0, 0.25)(student(**batch), batch)
    counted = labels != -100
    rows = [model.linear(x[counted]).detach().numpy() for model in (student, teacher)]
    assert found.item() == pytest.approx(by_hand(*rows, labels[counted].numpy(), 3.0, 0.25), rel=1e-12)


class Deep(nn.Module):
    """A classifier that tells its hidden states where it is asked."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, width), nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = False) -> Any:
        one = self.first(x)
        two = self.second(one)
        found = {"logits": self.head(two[:, 0])}
        return {**found, "hidden_states": (one, two)} if output_hidden_states else found


@pytest.mark.parametrize("masked", [True, False])
def test_hidden_states_by_hand(masked: bool) -> None:
    teacher, student = Deep().double(), Deep().double()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = {"x": torch.randn(2, 3, 5, dtype=torch.float64)} | ({"attention_mask": mask} if masked else {})
    loss = distillation(teacher, weight=1.0, hidden=3.0, forward=with_hidden_states)
    found = loss(with_hidden_states(student, batch), batch) - distillation(teacher, weight=1.0)(student(**batch), batch)
    keep = mask.bool() if masked else torch.ones(2, 3, dtype=torch.bool)
    parts = []
    for layer in (lambda m: m.first(batch["x"]), lambda m: m.second(m.first(batch["x"]))):
        ours, theirs = (layer(model).detach()[keep].numpy() for model in (student, teacher))
        parts.append(((ours - theirs) ** 2).sum() / (theirs**2).sum())
    assert found.item() == pytest.approx(3.0 * sum(parts) / 2, rel=1e-9)
    assert loss(with_hidden_states(teacher, batch), batch).item() == pytest.approx(0, abs=1e-12)


def test_hidden_states_that_cannot_be_compared() -> None:
    batch = {"x": torch.randn(2, 3, 5)}
    with pytest.raises(InputError, match="hidden multiplies"):
        distillation(Deep(), hidden=-1.0)
    loss = distillation(Deep(), weight=1.0, hidden=1.0, forward=with_hidden_states)
    with pytest.raises(InputError, match=r"do not prune the residual stream"):
        loss(with_hidden_states(Deep(6), batch), batch)
    with pytest.raises(InputError, match=r"the student carries no hidden states: pass forward="):
        loss(Deep()(**batch), batch)


def test_pairs_have_their_classes_second() -> None:
    teacher, x = nn.Conv2d(2, 3, 1).double(), torch.randn(2, 2, 4, 4, dtype=torch.float64)
    student, labels = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randint(3, (2, 4, 4))
    found = distillation(teacher, 3.0, 0.25)(student, (x, labels))
    rows = [t.detach().movedim(1, -1).reshape(-1, 3).numpy() for t in (student, teacher(x))]
    assert found.item() == pytest.approx(by_hand(*rows, labels.flatten().numpy(), 3.0, 0.25), rel=1e-12)


def test_the_teacher_is_a_private_copy_in_eval_mode() -> None:
    teacher = nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.9), nn.Linear(5, 3)).train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    loss = distillation(teacher, weight=1.0)
    batch, student = (torch.randn(4, 5), torch.zeros(4, dtype=torch.int64)), torch.randn(4, 3, requires_grad=True)
    first = loss(student, batch)
    assert torch.equal(first, loss(student, batch))
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert teacher.training and all(p.grad is None and p.requires_grad for p in teacher.parameters())
    nn.init.zeros_(teacher[2].weight)
    assert torch.equal(first, loss(student, batch))
    first.backward()
    assert student.grad is not None and all(p.grad is None for p in teacher.parameters())


def test_own_forward_and_task_loss() -> None:
    teacher = nn.Linear(5, 3)
    batch = {"picture": torch.randn(4, 5), "class": torch.tensor([0, 1, 2, 0])}

    def task(output: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(output, batch["class"])

    student = torch.randn(4, 3)
    loss = distillation(teacher, 2.0, 0.5, task, forward=lambda model, batch: model(batch["picture"]))
    rows = student.numpy(), teacher(batch["picture"]).detach().numpy()
    assert float(loss(student, batch)) == pytest.approx(by_hand(*rows, [0, 1, 2, 0], 2.0, 0.5), rel=1e-5)


def test_label_smoothing_belongs_to_the_task_loss() -> None:
    student, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    loss = distillation(nn.Linear(5, 3), weight=0.0, loss=partial(default_loss, label_smoothing=0.3))
    expected = nn.functional.cross_entropy(student, labels, label_smoothing=0.3)
    assert float(loss(student, (torch.randn(4, 5), labels))) == pytest.approx(float(expected))


@pytest.mark.parametrize("bf16", [False, True])
def test_a_student_learns_what_only_the_teacher_knows(bf16: bool) -> None:
    teacher, student = nn.Linear(5, 3), nn.Linear(5, 3)
    data = [(torch.randn(16, 5), torch.zeros(16, dtype=torch.int64)) for _ in range(4)]
    recipe = Recipe(epochs=40, lr=0.3, weight_decay=0.0, bf16=bf16)
    loss = distillation(teacher, temperature=2.0, weight=1.0)
    trained = fit(student, data, recipe, loss=loss).model
    x = torch.cat([x for x, _ in data])
    assert (trained(x).argmax(1) == teacher(x).argmax(1)).float().mean() > 0.95
    assert (student(x).argmax(1) == teacher(x).argmax(1)).float().mean() < 0.8


def test_infinite_logits_of_the_teacher_are_no_harm_and_nan_of_the_student_is_not_hidden() -> None:
    class Sure(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([[0.0, -math.inf], [0.0, 0.0]])

    loss, x = distillation(Sure(), weight=1.0, temperature=1.0), torch.zeros(2, 1)
    assert float(loss(torch.zeros(2, 2), x)) == pytest.approx(math.log(2) / 2)
    assert math.isnan(float(loss(torch.tensor([[math.nan, 0.0], [0.0, 0.0]]), x)))


def test_distillation_that_cannot_be_meant() -> None:
    for wrong in ({"temperature": 0.0}, {"temperature": math.inf}, {"temperature": True}):
        with pytest.raises(InputError, match="temperature is above 0"):
            distillation(nn.Linear(2, 2), **wrong)
    for wrong in (-0.1, 1.1, True, math.nan):
        with pytest.raises(InputError, match=r"weight is the teacher's part of the loss, in \[0, 1\]"):
            distillation(nn.Linear(2, 2), weight=wrong)
    batch = torch.randn(4, 5), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(InputError, match=r"teacher's logits have shape \[4, 3\], the student's \[4, 2\]"):
        distillation(nn.Linear(5, 3))(torch.randn(4, 2), batch)
    with pytest.raises(InputError, match="output of the student is tuple"):
        distillation(nn.Linear(5, 3), weight=1.0)((torch.randn(4, 3),), batch)
    with pytest.raises(InputError, match="output of the teacher is tuple"):
        distillation(nn.Linear(5, 3), forward=lambda model, batch: (1,))(torch.randn(4, 3), batch)


# -- from scratch ----------------------------------------------------------------------------------------------------


def state(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def same(one: nn.Module, two: nn.Module) -> bool:
    left, right = state(one), state(two)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def built() -> nn.Module:
    convolutions = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2))
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.ModuleDict({"c": convolutions, "t": attention, "e": nn.Embedding(5, 4), "r": nn.LSTM(3, 4)})


def test_fresh_weights_are_those_that_the_constructors_draw() -> None:
    torch.manual_seed(3)
    born = built()
    model = built()
    model["c"](torch.randn(4, 3, 8, 8))
    assert model["c"][1].num_batches_tracked == 1
    assert not same(model, born)
    assert same(from_scratch(model, seed=3), born)


def test_fresh_weights_follow_the_seed_and_nothing_else() -> None:
    model = built().eval()
    before, random = {name: tensor.clone() for name, tensor in state(model).items()}, torch.get_rng_state()
    first = from_scratch(model, seed=1)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[name], tensor) for name, tensor in state(model).items())
    assert same(first, from_scratch(from_scratch(model, seed=5), seed=1))
    assert not same(first, from_scratch(model, seed=2))
    assert not first.training


def test_a_pruned_net_keeps_its_widths() -> None:
    model = nets.digits_net()
    graph = sc.trace(model, torch.randn(2, 1, 8, 8))
    scores = {group.name: torch.arange(group.channels) for group in graph.prunable}
    small = sc.shrink(model, sc.select(graph, scores, sc.Target(sparsity=0.5)))
    fresh = from_scratch(small)
    assert {n: t.shape for n, t in state(fresh).items()} == {n: t.shape for n, t in state(small).items()}
    bound = 1 / math.sqrt(small.conv1.weight[0].numel())  # of torch's own initialisation, for the narrower layer
    assert 0.9 * bound < float(fresh.conv1.weight.detach().abs().max()) <= bound
    assert torch.equal(fresh.bn1.weight, torch.ones(16)) and not fresh.bn1.running_mean.any()
    assert fresh(torch.randn(2, 1, 8, 8)).shape == (2, 10)


class WithToken(nn.Module):
    """Owns a parameter itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.token = nn.Parameter(torch.randn(2))


def test_parameters_that_nobody_resets_are_named() -> None:
    model = nn.Sequential(WithToken(), nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(InputError, match=r"0\.token, 1\.parametrizations\.weight\.original0, .*pass initialise="):
        from_scratch(model)


def test_the_callers_initialisation_has_the_last_word() -> None:
    def initialise(model: nn.Module) -> None:
        nn.init.zeros_(model.linear.bias)
        nn.init.normal_(model.token)

    first, again = (from_scratch(WithToken(), 4, initialise=initialise) for _ in range(2))
    assert same(first, again)
    assert not first.linear.bias.any() and first.token.any() and first.linear.weight.any()


# -- the same cost ---------------------------------------------------------------------------------------------------


def test_scratch_e_and_scratch_b_by_hand() -> None:
    dense = Recipe(epochs=100, lr=0.1, schedule="step", milestones=(50, 75), warmup_epochs=2)
    tuning = Recipe(epochs=20, lr=0.01)
    same_epochs = equal_budget(dense, tuning)
    assert same_epochs == replace(dense, epochs=120, milestones=(60.0, 90.0), warmup_epochs=2.4)
    same_macs = equal_budget(dense, tuning, macs=(300, 200))  # 100 dense epochs pay for 150, and the 20 are small ones
    assert same_macs == replace(dense, epochs=170, milestones=(85.0, 127.5), warmup_epochs=3.4)
    assert equal_budget(dense, tuning, macs=(7, 7)) == same_epochs


@pytest.mark.parametrize("macs", [(100, 200), (100, 0), (0, 0), (100, -5)])
def test_macs_that_grow_are_an_error(macs: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=r"\(before, after\)"):
        equal_budget(Recipe(), Recipe(), macs=macs)
