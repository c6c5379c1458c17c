"""Which channels hang together: hand-worked groups of tiny nets, and nets that invite mistakes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import secateur as sc
from nets_for_tests import CASES, TRAPS, Case, Net, Trap, conv, distance, head, pooled, randomised, zeroed_by_hand


@pytest.mark.parametrize("case", CASES, ids=str)
def test_groups_and_locks_are_those_worked_out_by_hand(case: Case) -> None:
    graph = sc.trace(case.model(), case.batch(2))
    assert {group.name: group.channels for group in graph.prunable} == dict(case.free)
    locked = {group.name: group.locked for group in graph.groups if group.locked is not None}
    assert set(locked) == set(case.locked), locked
    for name, part in case.locked.items():
        assert part in locked[name], locked[name]
    assert tuple(graph.unknown) == case.unknown
    assert tuple(graph.balances) == case.balances


@pytest.mark.parametrize("trap", [trap for trap in TRAPS if trap.hidden], ids=str)
def test_what_the_engine_cannot_see_the_verification_finds(trap: Trap) -> None:
    model = randomised(trap.build().double()).eval()
    batch = torch.randn(2, *trap.shape, dtype=torch.float64)
    plan = by_chance(model, batch, sc.Target(sparsity={"a": 0.5}))
    with pytest.raises(sc.VerificationError, match="differs from the zeroed original"):
        sc.verify(model, plan, sc.shrink(model, plan), batch)
    pruned = sc.prune(model, batch, sparsity=0.5)
    assert {row.layer: row.after for row in pruned.plan.widths}["a"] == 8
    assert "a" in pruned.summary.locked
    assert distance(zeroed_by_hand(model, pruned.plan), pruned.model, batch) < 1e-9


def by_chance(model: nn.Module, batch: torch.Tensor, target: sc.Target) -> sc.Plan:
    graph = sc.trace(model, batch)
    return sc.select(graph, sc.score(graph, sc.observe(model, graph), "random"), target)


@pytest.mark.parametrize("trap", [trap for trap in TRAPS if not trap.hidden], ids=str)
def test_a_net_that_invites_a_mistake_is_locked_or_right(trap: Trap) -> None:
    model = randomised(trap.build().double()).eval()
    batch = torch.randn(2, *trap.shape, dtype=torch.float64)
    graph = sc.trace(model, batch)
    if not graph.prunable:
        return
    scores = sc.score(graph, sc.observe(model, graph), "random")
    for target in (sc.Target(sparsity=0.25), sc.Target(sparsity=0.5), sc.Target(sparsity=0.95)):
        for scope in ("global", "layer"):
            plan = sc.select(graph, scores, target, scope=scope)
            assert not {cut.tensor for cut in plan.cuts} & set(trap.tensors)
            small = sc.shrink(model, plan)
            off = distance(zeroed_by_hand(model, plan), small, batch)
            assert off < 1e-9


TRAPS_THAT_STAY_FREE = {
    "largest norm": "a",
    "maxout": "wide",
    "repeated": "a",
    "padded channels": "a",
    "einsum": "a",
    "width guarded": "b",
}


@pytest.mark.parametrize("name", TRAPS_THAT_STAY_FREE)
def test_caution_does_not_lock_what_is_free(name: str) -> None:
    trap = next(trap for trap in TRAPS if trap.name == name)
    graph = sc.trace(trap.build(), torch.randn(2, *trap.shape))
    assert TRAPS_THAT_STAY_FREE[name] in {group.name for group in graph.prunable}


# -- what the caller can say -----------------------------------------------------------------------------------------


def two_stages() -> Net:
    return Net(
        lambda s, x: s.head(pooled(F.relu(s.bn(s.stage[1](F.relu(s.stage[0](F.relu(s.stem(x))))))))),
        stem=conv(3, 8),
        stage=nn.ModuleList([conv(8, 6), conv(6, 4)]),
        bn=nn.BatchNorm2d(4),
        head=head(4),
    )


X = torch.randn(2, 3, 6, 6)


@pytest.mark.parametrize(
    ("ignore", "left"),
    [
        ("stem", {"stage.0", "stage.1"}),
        (["stem", "stage.1"], {"stage.0"}),
        ("stage", {"stem"}),
        ("stage.*", {"stem"}),
        (["*.1"], {"stem", "stage.0"}),
        (["bn"], {"stem", "stage.0"}),
    ],
)
def test_ignored_modules_keep_their_outputs(ignore: str | list[str], left: set[str]) -> None:
    graph = sc.trace(two_stages(), X, ignore=ignore)
    assert {group.name for group in graph.prunable} == left
    reasons = {group.locked for group in graph.groups if group.locked} - {"its size is part of the model's output"}
    assert reasons == {"ignored by the caller"}


def test_a_module_can_be_ignored_by_itself_and_its_input_still_shrinks() -> None:
    model = two_stages()
    pruned = sc.prune(model, X, sparsity=0.5, ignore=[model.stage[0]])
    assert {row.layer: row.after for row in pruned.plan.widths} == {"stem": 4, "stage.0": 6, "stage.1": 2, "head": 3}


def test_a_lock_says_in_which_file_and_line() -> None:
    case = next(case for case in CASES if case.name == "view with a literal size")
    locked = {group.name: group.locked for group in sc.trace(case.model(), case.batch(2)).groups}
    assert "nets_for_tests.py:" in str(locked["a"]) and "view" in str(locked["a"])


def test_a_graph_prints_what_it_found() -> None:
    case = next(case for case in CASES if case.name == "an op without a rule")
    graph = sc.trace(case.model(), case.batch(2))
    assert repr(graph) == "Graph(1 groups with 8 channels, 2 locked, ops without a rule: aten._fft_r2c x1)"
    assert "no rule for this op" in str(graph)


def test_tracing_draws_no_random_numbers_and_leaves_inputs_and_model_alone() -> None:
    def forward(s: Net, x: torch.Tensor) -> torch.Tensor:
        x.mul_(2.0)
        x.sub_(0.1)
        return s.head(pooled(s.drop(s.a(x))))

    model = Net(forward, a=conv(3, 8), drop=nn.Dropout(0.5), head=head(8)).train()
    inputs, state = X.clone(), torch.get_rng_state()
    sc.prune(model, inputs, sparsity=0.5, criterion="random")
    assert torch.equal(inputs, X)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_a_model_that_keeps_its_last_activation_can_be_pruned() -> None:
    def forward(s: Net, x: torch.Tensor) -> torch.Tensor:
        s.__dict__["seen"] = s.a(x)
        return s.head(pooled(F.relu(s.seen)))

    model = Net(forward, a=conv(3, 8), head=head(8))
    model(X)
    assert not model.seen.is_leaf
    pruned = sc.prune(model, X, sparsity=0.5)
    assert pruned.model(X).shape == (2, 3)
    assert model.seen.shape == (2, 8, 6, 6)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_callers_gradient_mode_does_not_matter(context: type) -> None:
    model = two_stages()
    expected = sc.trace(model, X).table()
    with context():
        assert sc.trace(model, X).table() == expected
        pruned = sc.prune(model, X, sparsity=0.5)
    pruned.model(X).sum().backward()
    assert all(parameter.grad is not None for parameter in pruned.model.parameters())


def test_a_checkpointed_block_is_seen_through() -> None:
    def forward(s: Net, x: torch.Tensor) -> torch.Tensor:
        h = checkpoint(lambda t: F.relu(s.a(t)), x, use_reentrant=False)
        return s.head(pooled(h))

    assert [g.name for g in sc.trace(Net(forward, a=conv(3, 8), head=head(8)), X).prunable] == ["a"]


def test_the_number_of_samples_does_not_matter_for_the_groups() -> None:
    for case in CASES:
        one, many = (sc.trace(case.model(), case.batch(size)) for size in (2, 7))
        assert one.table() == many.table()


def test_a_group_norm_with_a_bias_alone_does_not_make_zeros() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(1, 4, 1)
            self.bias = nn.Parameter(torch.randn(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            # Sums over zeros are free. A dead group is 1 + noise of the input here, and so no zero after the norm.
            h = F.group_norm(torch.sigmoid(self.a(x)) * x[:, :1], 4, None, self.bias)
            return self.b(h.sum(1, keepdim=True))

    graph = sc.trace(Net().eval(), torch.randn(2, 3, 6, 6))
    assert not graph.prunable
    assert "reduced by sum" in str(next(group for group in graph.groups if group.name == "a").locked)
