"""The graph form of a module: the same module in everything but its forward, and programs that nobody can abuse."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from nets_for_tests import assert_shrunk_equals_zeroed, distance, randomised, zeroed_by_hand
from secateur.errors import ModelError, NothingToPruneError, PlanMismatchError
from secateur.graphforms import OPERATIONS, GraphForm, Program, graph_form, operation
from secateur.plans import Replacement

LENGTH, WIDTH, HEADS = 5, 12, 4


class Attention(nn.Module):
    """Reads its width off its input: all heads together are as wide as the stream was before pruning."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS, rate: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.proj, self.drop = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Dropout(rate)
        self.heads, self.rate, self.label = heads, rate, "attention"

    def describe(self) -> str:
        return f"{self.label} with {self.heads} heads"

    def extra_repr(self) -> str:
        return f"heads={self.heads}"

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False, gain: float = 1.0) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal) * gain
        out = F.dropout(out, self.rate, self.training)
        return self.drop(self.proj(out.transpose(1, 2).reshape(b, n, c)))


class Model(nn.Module):
    """A stream of 12 channels with two attentions, of one class."""

    def __init__(self, kind: type[nn.Module] = Attention, **options: Any) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(7, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(kind(**options) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = h + block(h)
        return self.head(h.mean(1))


def batch(size: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randn(size, length, 7, generator=torch.Generator().manual_seed(size), dtype=torch.float64)


def dense(kind: type[nn.Module] = Attention, seed: int = 0, **options: Any) -> Model:
    return randomised(Model(kind, **options).double(), seed).eval()


def plan_for(model: nn.Module, inputs: Any, sparsity: float = 0.5, **options: Any) -> sc.Plan:
    graph = sc.trace(model, inputs, **options)
    scores = sc.score(graph, sc.observe(model, graph), "l2")
    return sc.select(graph, scores, sc.Target(sparsity=sparsity), scope="layer")


def shrunk(model: nn.Module) -> tuple[Any, sc.Plan]:
    """The model with half of its channels and heads, both attentions in graph form; and the plan."""
    plan = plan_for(model, batch())
    assert [replacement.module for replacement in plan.replacements] == ["blocks.0", "blocks.1"]
    return sc.shrink(model, plan), plan


def weights(model: nn.Module) -> dict[str, bytes]:
    return {
        name: tensor.numpy().tobytes() + bytes(str(tensor.shape), "ascii")
        for name, tensor in model.state_dict().items()
    }


# -- the same module -------------------------------------------------------------------------------------------------


def test_it_is_of_the_same_class_with_the_same_attributes_and_methods() -> None:
    small, _ = shrunk(dense())
    block = small.blocks[0]
    assert isinstance(block, Attention) and isinstance(block, GraphForm)
    assert type(block).__name__ == "Attention" and type(block).__doc__ == Attention.__doc__
    assert type(block) is type(small.blocks[1])
    assert type(small) is Model and not isinstance(small, GraphForm)
    assert block.describe() == f"attention with {block.heads} heads"
    assert (block.label, block.rate) == ("attention", 0.0)
    assert "graph form" in repr(block) and "heads=" in repr(block)
    assert [name for name, _ in block.named_modules()] == ["", "qkv", "proj", "drop"]


def test_it_computes_what_the_zeroed_original_computes_at_any_batch_size_and_length() -> None:
    model = dense()
    small, plan = shrunk(model)
    assert small.blocks[0].qkv.weight.shape == (18, 6)  # 3 x 2 heads of 3, and a stream of 6
    assert_shrunk_equals_zeroed(model, plan, small, [batch(), batch(5), batch(3, 9), batch(1, 1)])


def test_the_original_is_left_as_it_was() -> None:
    model = dense()
    before = weights(model)
    shrunk(model)
    assert weights(model) == before
    assert type(model.blocks[0]) is Attention


def test_names_in_the_state_are_those_of_the_original_and_a_state_can_be_loaded() -> None:
    model = dense()
    small, plan = shrunk(model)
    assert list(small.state_dict()) == list(model.state_dict())
    other = sc.shrink(dense(seed=1), plan)
    assert distance(small, other, batch()) > 1e-3
    other.load_state_dict(small.state_dict(), strict=True)
    assert distance(small, other, batch()) == 0.0


def test_a_deep_copy_runs_on_its_own() -> None:
    small, _ = shrunk(dense())
    small(batch())  # so that its program is compiled
    twin = copy.deepcopy(small)
    assert type(twin.blocks[0]) is type(small.blocks[0])
    assert torch.equal(twin(batch()), small(batch()))
    with torch.no_grad():
        twin.blocks[0].proj.weight.mul_(2)
    assert distance(small, twin, batch()) > 1e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_other_precisions(dtype: torch.dtype, tolerance: float) -> None:
    small, _ = shrunk(dense())
    expected = small(batch())
    found = copy.deepcopy(small).to(dtype)(batch().to(dtype))
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() < tolerance * expected.abs().max()


def test_it_moves_to_the_meta_device() -> None:
    small, _ = shrunk(dense())
    found = small.to("meta")(batch().to("meta"))
    assert found.is_meta and found.shape == (2, 3)


def test_it_is_saved_and_loaded_as_an_object() -> None:
    """What a user does with a module of their own; the package itself never loads such a file."""
    small, _ = shrunk(dense())
    expected = small(batch())
    stored = _pickled(small)
    assert type(stored.blocks[0]) is type(small.blocks[0])
    assert torch.equal(stored(batch()), expected)


def _pickled(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_requires_grad_survives() -> None:
    model = dense()
    model.blocks[0].qkv.weight.requires_grad_(False)
    small, _ = shrunk(model)
    assert not small.blocks[0].qkv.weight.requires_grad
    assert small.blocks[1].qkv.weight.requires_grad


# -- how it is called ------------------------------------------------------------------------------------------------


def test_arguments_come_by_position_or_by_name() -> None:
    small, _ = shrunk(dense())
    block, x = small.blocks[0], torch.randn(2, LENGTH, WIDTH // 2).double()
    expected = block(x)
    for found in (block(x=x), block(x, None), block(x, mask=None), block(x, None, False, gain=1.0)):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"causal": True}, "recorded without the argument 'causal'"),
        ({"gain": 2.0}, "recorded without the argument 'gain'"),
        ({"mask": torch.zeros(LENGTH, LENGTH)}, "recorded without the argument 'mask'"),
    ],
)
def test_an_argument_that_the_recording_did_not_have_is_refused(given: dict[str, Any], words: str) -> None:
    small, _ = shrunk(dense())
    with pytest.raises(ModelError, match=words):
        small.blocks[0](torch.randn(2, LENGTH, WIDTH // 2).double(), **given)


class Named(Attention):
    """Called with options of its own."""

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False, gain: float = 1.0) -> Tensor:
        return super().forward(x, mask, causal, gain)


class WithOptions(Model):
    """Calls its attentions by position and by name, with constants."""

    def forward(self, x: Tensor, causal: bool = True, gain: float = 0.5) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = h + block(h, None, causal, gain=gain)
        return self.head(h.mean(1))


def test_a_constant_must_be_what_it_was_in_the_recording() -> None:
    model = randomised(WithOptions(Named).double()).eval()
    small, plan = shrunk(model)
    assert_shrunk_equals_zeroed(model, plan, small, [batch(), batch(3, 8)])
    assert distance(model, dense(), batch()) > 1e-3, "vacuous: the options change nothing"
    with pytest.raises(ModelError, match=r"recorded with True for an argument; it got False now"):
        small(batch(), causal=False)
    with pytest.raises(ModelError, match=r"recorded with 0\.5 for an argument; it got 0\.25 now"):
        small(batch(), gain=0.25)


class Deciding(Attention):
    """Takes another way for sequences of more than 6."""

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False, gain: float = 1.0) -> Tensor:
        out = super().forward(x)
        return out * 3 if x.shape[1] > 6 else out


def test_a_decision_on_a_length_must_come_out_the_same() -> None:
    model = dense(Deciding)
    small, plan = shrunk(model)
    assert_shrunk_equals_zeroed(model, plan, small, [batch(length=length) for length in (1, 5, 6)])
    for length in (7, 20):
        with pytest.raises(ModelError, match="recorded for other sizes") as error:
            small(batch(length=length))
        assert "ignore=" in str(error.value)


def test_a_decision_recorded_on_the_other_side() -> None:
    model = dense(Deciding)
    plan = plan_for(model, batch(length=8))
    small = sc.shrink(model, plan)
    assert_shrunk_equals_zeroed(model, plan, small, [batch(length=length) for length in (7, 8, 20)])
    with pytest.raises(ModelError, match="recorded for other sizes"):
        small(batch(length=6))


# -- training --------------------------------------------------------------------------------------------------------


def test_dropout_is_active_in_training_and_gradients_flow() -> None:
    small, _ = shrunk(dense(rate=0.5))
    assert torch.equal(small(batch()), small(batch()))
    small.train()
    assert not torch.equal(small(batch()), small(batch()))
    small.eval()
    small.blocks[0].train()
    for inside in small.blocks[0].children():
        inside.eval()
    assert not torch.equal(small(batch()), small(batch())), "a dropout called as a function follows its module's mode"
    small.train()(batch()).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())
    assert all(p.grad.abs().max() > 0 for n, p in small.named_parameters() if n != "blocks.0.qkv.bias")


class DroppingWeights(Attention):
    """Drops entries of the weights, as vision transformers write it."""

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False, gain: float = 1.0) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5 if self.training else 0.0)
        return self.proj(out.transpose(1, 2).reshape(b, n, c))


def test_dropout_of_attention_weights_is_active_in_training() -> None:
    model = dense(DroppingWeights)
    assert not torch.equal(model.train()(batch()), model(batch()))
    small, _ = shrunk(model.eval())
    assert torch.equal(small(batch()), small(batch()))
    small.train()
    assert not torch.equal(small(batch()), small(batch()))


class Telling(Attention):
    """Gives and takes more than one tensor."""

    def forward(self, x: Tensor, *, extra: dict[str, Tensor], places: tuple[int, ...] = (0,)) -> Any:
        out = super().forward(x * extra["gain"])
        return {"out": out, "rest": (out.mean(1), x.shape[1], None)}


class WithStructures(Model):
    """Calls its attentions by name only."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            told = block(x=h, extra={"gain": x.mean((1, 2))[:, None, None]}, places=(0, 1))
            h = h + told["out"] * told["rest"][1] + told["rest"][0][:, None]
        return self.head(h.mean(1))


def test_structures_of_tensors_and_numbers_go_in_and_out() -> None:
    model = randomised(WithStructures(Telling).double()).eval()
    small, plan = shrunk(model)
    assert_shrunk_equals_zeroed(model, plan, small, [batch(), batch(3, 8), batch(4, 2)])
    with pytest.raises(ModelError, match="recorded with 1 for an argument; it got 2 now"):
        small.blocks[0](x=torch.randn(1, 5, 6).double(), extra={"gain": torch.ones(1).double()}, places=(0, 2))


def test_gradients_are_those_of_the_zeroed_original() -> None:
    model = dense()
    small, plan = shrunk(model)
    zeroed = zeroed_by_hand(model, plan)
    for net in (small, zeroed):
        net(batch()).square().sum().backward()
    kept = {(cut.tensor, cut.dim): torch.tensor(cut.kept) for cut in plan.cuts}
    for name, parameter in small.named_parameters():
        expected = zeroed.get_parameter(name).grad
        for dim in range(expected.dim()):
            if (name, dim) in kept:
                expected = expected.index_select(dim, kept[name, dim])
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-9)


def test_hooks_of_the_user_survive_and_fire_once() -> None:
    model, seen = dense(), []
    block = model.blocks[0]
    block.register_forward_pre_hook(lambda module, args: seen.append("before"))
    block.register_forward_hook(lambda module, args, output: seen.append(("after", tuple(output.shape))))
    block.qkv.register_forward_hook(lambda module, args, output: seen.append(("inside", tuple(output.shape))))
    small, _ = shrunk(model)
    seen.clear()
    small(batch())
    assert seen == ["before", ("inside", (2, LENGTH, 18)), ("after", (2, LENGTH, 6))]


def test_a_hook_that_changes_the_output_still_does() -> None:
    model = dense()
    model.blocks[0].register_forward_hook(lambda module, args, output: output * 0.5)
    small, plan = shrunk(model)
    assert_shrunk_equals_zeroed(model, plan, small, [batch(), batch(3, 4)])


# -- other programs --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_compiles_into_one_graph() -> None:
    small, _ = shrunk(dense())
    torch._dynamo.reset()
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    for inputs in (batch(), batch(3, 8)):
        assert torch.allclose(compiled(inputs), small(inputs))


def test_it_is_exported_with_open_batch_size_and_length(tmp_path: Path) -> None:
    small, _ = shrunk(dense())
    report = sc.export(small.float(), batch().float(), tmp_path / "small.pt2")
    assert [axis.name for axis in report.dynamic] == ["batch", "sequence"]
    assert report.max_difference < 1e-5


def test_it_is_stored_with_its_plan_and_loaded_into_a_fresh_model(tmp_path: Path) -> None:
    pruned = sc.prune(dense(), batch(), sparsity=0.5)
    sc.save(pruned, tmp_path / "small.safetensors")
    loaded = sc.load(tmp_path / "small.safetensors", Model().double()).eval()
    assert isinstance(loaded.blocks[0], GraphForm) and isinstance(loaded.blocks[0], Attention)
    assert weights(loaded) == weights(pruned.model)
    assert torch.equal(loaded(batch(3, 8)), pruned.model(batch(3, 8)))


def test_a_plan_as_json_replays_on_a_fresh_copy_to_the_same_bits() -> None:
    model = dense()
    small, plan = shrunk(model)
    again = sc.Plan.from_json(plan.to_json())
    assert again == plan
    replayed = sc.shrink(dense(), again)
    assert weights(replayed) == weights(small)
    assert torch.equal(replayed(batch(4, 6)), small(batch(4, 6)))


def test_ten_prunings_in_a_row_and_their_one_plan() -> None:
    """A tenth of the parameters at a time; heads and widths go when it is their turn."""
    model = start = dense(width=WIDTH, heads=HEADS)
    total, rounds = None, 0
    for _ in range(10):
        graph = sc.trace(model, batch())
        scores = sc.score(graph, sc.observe(model, graph), "l2")
        plan = sc.select(graph, scores, sc.Target(max_params=0.9), scope="global")
        small = sc.shrink(model, plan)
        assert_shrunk_equals_zeroed(model, plan, small, [batch(), batch(3, 4)])
        total = plan if total is None else total.then(plan)
        model, rounds = small, rounds + (not plan.is_identity)
    assert rounds == 10
    assert isinstance(model.blocks[0], GraphForm)
    at_once = sc.shrink(start, sc.Plan.from_json(total.to_json()))
    assert weights(at_once) == weights(model)
    assert torch.equal(at_once(batch(3, 8)), model(batch(3, 8)))


# -- what has no graph form ------------------------------------------------------------------------------------------


class Twice(Model):
    """One attention that is called twice."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for _ in range(2):
            h = h + self.blocks[0](h)
        return self.head(h.mean(1))


class Cache:
    """What a model keeps between calls."""

    def __init__(self) -> None:
        self.lengths: list[int] = []


class Remembering(Attention):
    """Is handed an object."""

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        return super().forward(x)


class WithCache(Model):
    """Hands an object to its attentions."""

    def forward(self, x: Tensor) -> Tensor:
        h, cache = self.stem(x), Cache()
        for block in self.blocks:
            h = h + block(h, cache)
        return self.head(h.mean(1))


class Unlisted(Attention):
    """Calls an operation that is not in the table."""

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False, gain: float = 1.0) -> Tensor:
        places = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
        return super().forward(x, torch.cdist(places, places))


class Foreign(Attention):
    """Reads a tensor that is not its own."""

    elsewhere: list[Tensor]

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False, gain: float = 1.0) -> Tensor:
        return super().forward(x) * self.elsewhere[0]


class Reading(Attention):
    """Goes on with a number read out of a tensor."""

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False, gain: float = 1.0) -> Tensor:
        return super().forward(x) * torch.arange(x.shape[1]).sum().item()


def with_foreign_tensor() -> nn.Module:
    model = Model(Foreign)
    model.register_buffer("gain", torch.ones(()))
    for block in model.blocks:
        block.elsewhere = [model.gain]
    return model


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (Twice, "it is called more than once"),
        (lambda: WithCache(Remembering), "it handles a Cache"),
        (lambda: Model(Unlisted), "it calls torch.functional.cdist, which is not in the table of operations"),
        (lambda: Model(Reading), "it needs the result of item, which is no tensor"),
        (with_foreign_tensor, "it reads a tensor that is neither an argument nor a parameter or buffer of its own"),
    ],
)
def test_what_no_program_can_say_is_locked_with_the_reason(build: Callable[[], nn.Module], words: str) -> None:
    model = randomised(build().double()).eval()
    graph = sc.trace(model, batch())
    locked = {group.name: group.locked for group in graph.groups if group.locked}
    assert f"its module has no graph form: {words}" in locked["stem"], graph.table()
    if not graph.prunable:
        with pytest.raises(NothingToPruneError, match="has no graph form"):
            sc.prune(model, batch(), sparsity=0.5)
        return
    plan = plan_for(model, batch())
    assert not plan.replacements
    assert_shrunk_equals_zeroed(model, plan, sc.shrink(model, plan), [batch(), batch(3)])


# -- programs as data ------------------------------------------------------------------------------------------------


def program() -> Program:
    _, plan = shrunk(dense(Deciding, rate=0.5))
    found = plan.replacements[0].program
    assert found is not None and found.guards and found.sizes
    return found


def test_a_program_round_trips_through_json() -> None:
    original = program()
    again = Program.from_data(json.loads(json.dumps(original.to_data(), allow_nan=False)))
    assert again == original
    assert again.code() == original.code()
    assert "torch.Tensor.reshape" in original.code() and "scaled_dot_product_attention" in original.code()


def test_every_operation_of_the_table_exists_and_nothing_else_is_found() -> None:
    for name in OPERATIONS:
        spaces = ("torch.", "torch.Tensor.", "torch.nn.functional.", "torch.functional.")
        found = [operation(space + name) or operation(f"{space}{name}.__get__") for space in spaces]
        assert any(found), name
    for name in (
        "torch.load",
        "torch.save",
        "torch.Tensor.__reduce_ex__",
        "torch.Tensor.numpy",
        "builtins.eval",
        "add",
        "",
    ):
        assert operation(name) is None, name


def changed(path: str, value: Any) -> dict[str, Any]:
    """The data of a good program with the value at `path` ("steps.0.1") exchanged."""
    data = json.loads(json.dumps(program().to_data()))
    *outer, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = data
    for part in outer:
        place = place[part]
    place[last] = value
    return data


def nested(depth: int, tag: str = "list") -> list[Any]:
    tree: list[Any] = [tag]
    for _ in range(depth):
        tree = [tag, tree]
    return tree


HOSTILE = {
    "unknown operation": ("steps.0.0", "torch.nonsense"),
    "operation outside the table": ("steps.0.0", "torch.load"),
    "loading from the hub": ("steps.0.0", "torch.hub.load"),
    "a method outside the table": ("steps.0.0", "torch.Tensor.apply_"),
    "a builtin": ("steps.0.0", "builtins.exec"),
    "a dunder": ("steps.0.0", "torch.Tensor.__class__"),
    "a dunder of an operation": ("steps.0.0", "torch.add.__globals__"),
    "a getter of a dunder": ("steps.0.0", "torch.Tensor.__dict__.__get__"),
    "an operation that is no text": ("steps.0.0", 7),
    "its own module": ("steps.0.0", "module:"),
    "a module path with code": ("steps.0.0", "module:a();b"),
    "a step too short": ("steps.0", ["torch.add"]),
    "a step too long": ("steps.0", ["torch.add", ["tuple"], ["dict"], None, None]),
    "no steps": ("steps", 3),
    "unknown tag": ("output", ["exec", "1"]),
    "a tree without a tag": ("output", [["value", 0]]),
    "an empty tree": ("output", []),
    "an object": ("output", {"value": 0}),
    "text with code": ("output", "__import__('os').system('true')"),
    "a long text": ("output", "a" * 1000),
    "an attribute with dunders": ("output", ["attribute", "", "__class__", None]),
    "a private attribute": ("output", ["attribute", "", "_modules", None]),
    "an attribute path with code": ("output", ["attribute", "a b", "heads", None]),
    "an entry that is no index": ("output", ["attribute", "", "heads", "x"]),
    "a leaf path with code": ("output", ["leaf", "qkv[0]"]),
    "a leaf that is no text": ("output", ["leaf", 3]),
    "a value that is no index": ("output", ["value", -1]),
    "a value that is true": ("output", ["value", True]),
    "a value too many": ("output", ["value", 0, 1]),
    "a negative dimension": ("output", ["size", ["value", 0], -1]),
    "a dtype that is none": ("output", ["dtype", "load"]),
    "a dtype with dunders": ("output", ["dtype", "__name__"]),
    "a float that is none": ("output", ["float", "1e5"]),
    "a memory format that is none": ("output", ["memory_format", "load"]),
    "a name of an argument with code": ("output", ["dict", ["a=1", 1]]),
    "arithmetic with three": ("output", ["add", 1, 2, 3]),
    "a power": ("output", ["pow", 10, 10]),
    "endless lists": ("output", nested(50_000)),
    "endless sums": ("output", ["add", 1, nested(50_000)]),
    "a size with dunders": ("sizes", {"__class__": 1}),
    "a private size": ("sizes", {"_parameters": 1}),
    "a size that is no name": ("sizes", {"a b": 1}),
    "a negative size": ("sizes", {"size_0": -1}),
    "a size that is true": ("sizes", {"size_0": True}),
    "a size that is text": ("sizes", {"size_0": "1"}),
    "sizes that are a list": ("sizes", [1]),
    "a guard of another relation": ("guards.0.2", "import"),
    "a guard on text": ("guards.0.1", "1"),
    "a guard too short": ("guards.0", [1]),
    "a result in a number": ("steps.0.3", ["size", ["value", 0], 1]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_refused_when_it_is_read(name: str) -> None:
    with pytest.raises(PlanMismatchError, match="graph form"):
        Program.from_data(changed(*HOSTILE[name]))


@pytest.mark.parametrize("key", ["args", "kwargs", "steps", "guards", "output", "sizes"])
def test_a_program_with_a_part_missing_is_refused(key: str) -> None:
    data = program().to_data()
    del data[key]
    with pytest.raises(PlanMismatchError, match=key):
        Program.from_data(data)


def test_numbers_beyond_all_bounds_do_no_harm() -> None:
    data = changed("sizes", {**program().sizes, "size_9": 10**40})
    small, _ = shrunk(dense(Deciding, rate=0.5))
    form = graph_form(small.blocks[0], Program.from_data(data))
    assert form.size_9 == 10**40


@pytest.mark.parametrize("name", ["heads", "label", "qkv", "describe", "forward", "training", "program", "parameters"])
def test_a_size_must_not_take_the_place_of_anything_else(name: str) -> None:
    hostile = replace(program(), sizes={name: 1})
    with pytest.raises(PlanMismatchError, match=f"cannot add {name}"):
        graph_form(Attention(), hostile)


@pytest.mark.parametrize(
    ("tree", "words"), [(["leaf", "describe"], "no parameter"), (["attribute", "", "label", None], "no integer")]
)
def test_a_program_reads_nothing_but_tensors_and_integers(tree: list[Any], words: str) -> None:
    hostile = replace(program(), steps=(), guards=(), output=tree, sizes={})
    with pytest.raises(PlanMismatchError, match=words):
        graph_form(Attention().double(), hostile)(torch.zeros(1, LENGTH, WIDTH).double())


def test_a_plan_with_a_hostile_program_is_refused_before_anything_runs() -> None:
    """Also where the nesting is in the text itself."""
    _, plan = shrunk(dense())
    text = plan.to_json()
    assert "torch.Tensor.reshape" in text
    for wrong in (
        text.replace("torch.Tensor.reshape", "torch.hub.load"),
        text.replace('["tuple"', '["eval"', 1),
        text.replace('"output":', '"output":' + "[" * 100_000, 1),
    ):
        with pytest.raises(PlanMismatchError):
            sc.Plan.from_json(wrong)


def test_a_plan_that_replaces_a_module_that_is_not_there_is_refused() -> None:
    model = dense()
    _, plan = shrunk(model)
    wrong = replace(plan, replacements=(Replacement("blocks.7", program()),))
    with pytest.raises(PlanMismatchError, match=r"no 'blocks\.7'"):
        sc.shrink(model, wrong)


# -- the whole model -------------------------------------------------------------------------------------------------


class Flat(nn.Module):
    """The model itself reads its width off the stream: one attention without a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.heads = nn.Linear(7, WIDTH), nn.Linear(WIDTH, 3), HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x) + Attention.forward(self, self.stem(x)))

    rate, drop = 0.0, nn.Identity()


def test_the_whole_model_as_a_graph() -> None:
    model = randomised(Flat().double()).eval()
    with pytest.raises(NothingToPruneError, match="it is the model itself"):
        sc.prune(model, batch(), sparsity=0.5)
    pruned = sc.prune(model, batch(), sparsity=0.5, form="graph")
    assert pruned.plan.channels == (4 + 2 * 12, 2 + 2 * 6)  # heads of qkv; the stream counts for stem and for proj
    assert isinstance(pruned.model, Flat) and isinstance(pruned.model, GraphForm)
    assert_shrunk_equals_zeroed(model, pruned.plan, pruned.model, [batch(), batch(3, 8)])
    assert pruned.program is not None
    for inputs in (batch(), batch(3, 8), batch(4, 2)):
        found = pruned.program.module()(inputs)
        assert torch.allclose(found, pruned.model(inputs), rtol=1e-9, atol=1e-9)


def test_a_live_model_has_no_program() -> None:
    pruned = sc.prune(dense(), batch(), sparsity=0.5)
    assert pruned.program is None
    assert type(pruned.model) is Model
