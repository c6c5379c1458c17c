"""What makes the analysis fast must not make it wrong: shared parameters, garbage collection put off, fewer rounds."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from nets_for_tests import Net, assert_shrunk_equals_zeroed, conv, head, outputs_of, pooled
from secateur.coupling import groups, requirements
from secateur.coupling.requirements import classify
from secateur.errors import ExampleInputsError
from secateur.inputs import sharing_copy

BATCH = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def net(function: Callable[[Any, Tensor], Tensor] = lambda s, x: s.head(pooled(F.relu(s.a(x)))), **parts: Any) -> Net:
    torch.manual_seed(0)
    return Net(function, **{"a": conv(3, 8), "head": head(8), **parts}).float().eval()


def _through_a_function(model: Net, x: Tensor) -> Tensor:
    model.a.weight.add_(1.0)
    return model.head(pooled(model.a(x)))


def _through_data(model: Net, x: Tensor) -> Tensor:
    model.a.weight.data.mul_(0.5)
    return model.head(pooled(model.a(x)))


def _through_a_view(model: Net, x: Tensor) -> Tensor:
    model.a.weight.view(-1)[3:5].zero_()
    return model.head(pooled(model.a(x)))


def _through_numpy(model: Net, x: Tensor) -> Tensor:
    model.a.weight.detach().numpy()[0] = 7.0
    return model.head(pooled(model.a(x)))


def _through_setitem_and_a_bare_except(model: Net, x: Tensor) -> Tensor:
    try:
        model.a.weight[0] = 3.0
    except BaseException:  # what somebody's code may do
        return model.head(pooled(model.a(x * 2)))
    return model.head(pooled(model.a(x)))


def _by_another_tensor(model: Net, x: Tensor) -> Tensor:
    model.a.weight.data = torch.ones_like(model.a.weight)
    return model.head(pooled(model.a(x)))


def _as_running_statistics(model: Net, x: Tensor) -> Tensor:
    y = F.batch_norm(model.a(x), model.mean, model.variance, training=True)
    return model.head(pooled(y))


def _by_a_list_of_tensors(model: Net, x: Tensor) -> Tensor:
    torch._foreach_mul_([model.a.weight, model.head.weight], 2.0)
    return model.head(pooled(model.a(x)))


WRITERS = (
    _through_a_function,
    _through_data,
    _through_a_view,
    _through_numpy,
    _through_setitem_and_a_bare_except,
    _by_another_tensor,
    _as_running_statistics,
    _by_a_list_of_tensors,
)


@pytest.mark.parametrize("write", WRITERS)
def test_a_forward_that_writes_to_parameters_leaves_the_callers_alone(
    write: Callable[[Any, Tensor], Tensor],
) -> None:
    statistics = {"mean": nn.Parameter(torch.zeros(8)), "variance": nn.Parameter(torch.ones(8))}
    model = net(write, **statistics).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    graph = sc.trace(model, BATCH)
    assert graph.groups
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == held
    model(BATCH)  # the control: on its own this forward does write
    assert not all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_tracing_does_not_copy_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = net(), {}

    def noted(original: nn.Module) -> nn.Module:
        copied = sharing_copy(original)
        seen.update({name: (p, p.data_ptr()) for name, p in copied.named_parameters()})
        return copied

    monkeypatch.setattr(groups, "sharing_copy", noted)
    sc.trace(model, BATCH)
    own = dict(model.named_parameters())
    assert {name: place for name, (_, place) in seen.items()} == {name: p.data_ptr() for name, p in own.items()}
    assert all(copied is not own[name] for name, (copied, _) in seen.items())


def test_a_sharing_copy_has_buffers_and_odd_parameters_of_its_own() -> None:
    class Odd(nn.Parameter):
        pass

    model = net(bn=nn.BatchNorm2d(8), odd=Odd(torch.ones(8)), tied=nn.Linear(4, 4))
    model.view = nn.Parameter(model.tied.weight.detach()[0])  # another parameter over the same memory
    copied, places = sharing_copy(model), {p.data_ptr() for p in model.state_dict().values()}
    apart = {name for name, tensor in copied.state_dict().items() if tensor.data_ptr() not in places}
    assert apart == {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked", "odd", "tied.weight", "view"}


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_as_it_was(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        sc.prune(net(), BATCH, sparsity=0.5)
        assert gc.isenabled() is enabled
        with pytest.raises(ExampleInputsError):
            sc.trace(net(), torch.randn(2, 5, 6, 6))
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_a_view_whose_memory_is_written_twice_is_not_taken_for_zero() -> None:
    """The first write leaves dead channels zero, the second does not."""

    def forward(model: Net, x: Tensor) -> Tensor:
        y = model.a(x)
        seen = y.detach()
        y.mul_(2.0)
        y.add_(1.0)
        return model.head(pooled(model.b(F.relu(y)))) + seen.sum(1, keepdim=True).mean((2, 3))

    model = net(forward, b=conv(8, 6), head=head(6))
    graph = sc.trace(model, BATCH)
    reasons = {group.name: group.locked for group in graph.groups}
    assert reasons["a"] is not None and reasons["b"] is None


def test_locks_of_many_blocks_are_found_together_and_stay_apart() -> None:
    """Every other block says its width in numbers, and is called twice, so that it has no graph form: those lock."""

    class Block(nn.Module):
        def __init__(self, width: int | None) -> None:
            super().__init__()
            self.up, self.down, self.reader = nn.Linear(4, 6), nn.Linear(6, 4), width is None

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x)
            return x + self.down(y.view(y.shape[0], y.shape[1] if self.reader else 6))

    literal, free = ([Block(width) for _ in range(4)] for width in (6, None))
    middle = [block for pair in zip(literal, free, literal, strict=True) for block in pair]
    model = nn.Sequential(nn.Linear(3, 4), *middle, nn.Linear(4, 2)).eval()
    x = torch.randn(2, 3)
    graph = sc.trace(model, x)
    locked = {group.name: group.locked for group in graph.groups if group.name.endswith("up")}
    assert {name for name, reason in locked.items() if reason} == {f"{1 + 3 * number}.up" for number in range(4)}
    assert all("the code says 6" in reason for reason in locked.values() if reason)
    assert {name for name, reason in locked.items() if not reason} == {f"{2 + 3 * number}.up" for number in range(4)}
    assert sc.prune(model, x, sparsity=0.5).summary.verified_difference < 1e-9


def test_locks_are_found_in_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes are made anew after a round of locks: not once per lock, which made long models slow."""
    rounds = []
    monkeypatch.setattr(requirements, "classify", lambda *given: rounds.append(1) or classify(*given))

    def forward(model: Any, x: Tensor) -> Tensor:
        for layer in model.layers:
            x = x + layer[1](layer[0](x).view(-1, 6))
        return model.head(x)

    layers = nn.ModuleList(nn.ModuleList([nn.Linear(3, 6), nn.Linear(6, 3)]) for _ in range(20))
    graph = sc.trace(net(forward, layers=layers, head=nn.Linear(3, 2)), torch.randn(2, 3))
    assert sum(group.locked is not None for group in graph.groups) >= 20
    assert len(rounds) == 2


def test_a_model_without_weights_can_be_planned_and_cut() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(5, 10**6), nn.ReLU(), nn.Linear(10**6, 10**6), nn.GELU(), nn.Linear(10**6, 3))
        inputs = torch.randn(2, 5)
    graph = sc.trace(model.eval(), inputs)
    plan = sc.select(
        graph, {g.name: torch.arange(float(g.channels)) for g in graph.prunable}, sc.Target(sparsity=0.999)
    )
    small = sc.shrink(model, plan)
    assert [tuple(p.shape) for p in small.parameters()] == [(1000, 5), (1000,), (1000, 1000), (1000,), (3, 1000), (3,)]
    assert all(p.is_meta for p in small.parameters())


def test_a_tensor_that_is_cut_replaces_the_old_one_wherever_the_model_holds_it() -> None:
    def forward(model: Net, x: Tensor) -> Tensor:
        return model.head(pooled(F.conv2d(x, model.filters["first"], padding=1)))

    model = net(forward)
    model.filters = {"first": model.a.weight}  # a plain attribute, not only a registered parameter
    pruned = sc.prune(model, BATCH, sparsity=0.5)
    assert pruned.model.filters["first"] is pruned.model.a.weight
    assert_shrunk_equals_zeroed(model.double(), pruned.plan, sc.shrink(model, pruned.plan), [BATCH.double()])
    assert outputs_of(pruned.model, BATCH)[0].shape == (2, 3)
