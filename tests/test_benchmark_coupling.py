"""The judge of the side-by-side benchmark: it must see a shifted index, and must not blame what is right."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

import coupling_tables
import oracle
import patterns

Cuts = Mapping[tuple[str, int], Sequence[int]]


def noisy(model: nn.Module) -> nn.Module:
    """`model` itself in eval mode, with random parameters and statistics."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape) * 0.3 if name.endswith("var") else torch.randn(tensor.shape) * 0.2)
    return model.eval()


def cut(model: nn.Module, cuts: Cuts) -> nn.Module:
    """A copy of `model` that keeps the given positions of (tensor, dim)."""
    small = copy.deepcopy(model)
    for (name, dim), kept in cuts.items():
        owner, _, key = name.rpartition(".")
        module = small.get_submodule(owner)
        tensor = getattr(module, key)
        less = tensor.detach().index_select(dim, torch.tensor(kept))
        setattr(module, key, nn.Parameter(less) if isinstance(tensor, nn.Parameter) else less)
    return small


class Stream(nn.Module):
    """A residual stream under norms: `plain`, or a hand-written RMSNorm."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.enter, self.inner, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.weight, self.bias, self.norm = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8)), norm

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.head(x + torch.tanh(self.inner(self.normed(x))))

    def normed(self, x: Tensor) -> Tensor:
        width = (x.shape[-1],)
        if self.norm == "layer":
            return nn.functional.layer_norm(x, width, self.weight, self.bias)
        if self.norm == "rms":
            return nn.functional.rms_norm(x, width, self.weight, 1e-6)
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight


STREAM: Cuts = {
    (name, dim): (0, 2, 3, 6, 7)
    for name, dims in {"enter.weight": (0,), "inner.weight": (0, 1), "head.weight": (1,)}.items()
    for dim in dims
} | {(name, 0): (0, 2, 3, 6, 7) for name in ("enter.bias", "inner.bias", "weight", "bias")}
TWICE: Cuts = {
    **{(name, 0): (1, 2, 4, 7) for name in ("stem.weight", "stem.bias", "body.weight", "body.bias")},
    **{(f"{bn}.{part}", 0): (1, 2, 4, 7) for bn in ("bn1", "bn2") for part in ("weight", "bias")},
    **{(f"{bn}.running_{part}", 0): (1, 2, 4, 7) for bn in ("bn1", "bn2") for part in ("mean", "var")},
    ("body.weight", 1): (1, 2, 4, 7),
    ("tail.weight", 1): (1, 2, 4, 7),
}


def test_a_right_cut_is_correct_and_one_shifted_index_is_wrong() -> None:
    model, inputs = noisy(patterns.UsedTwice(8)), torch.randn(2, 3, 8, 8)
    good = oracle.judge(model, cut(model, TWICE), inputs)
    assert good.status == oracle.CORRECT and good.difference < 1e-12
    for shifted in TWICE:
        bad = oracle.judge(model, cut(model, {**TWICE, shifted: (1, 2, 5, 7)}), inputs)
        assert bad.status == oracle.WRONG and "off by" in bad.reason, shifted


@pytest.mark.parametrize("norm", ["layer", "rms", "by hand"])
def test_a_stream_under_a_norm_is_judged_over_live_positions(norm: str) -> None:
    model, inputs = noisy(Stream(norm)), torch.randn(2, 4, 5)
    good = oracle.judge(model, cut(model, STREAM), inputs)
    assert (good.status, good.norms) == (oracle.CORRECT, "live") and good.difference < 1e-12
    shifted = {**STREAM, ("head.weight", 1): (0, 2, 4, 6, 7)}
    assert oracle.judge(model, cut(model, shifted), inputs).status == oracle.WRONG


def test_groups_that_keep_different_positions_are_found() -> None:
    before = torch.randn(4, 6, 3, 3)
    after = torch.cat([before[:2, [0, 3, 4]], before[2:, [1, 2, 5]]])
    mask = oracle.kept_mask(before, after)
    assert torch.equal(before[mask], after.flatten())
    assert oracle.kept_indices(before, before[[1, 3]][:, [0, 5]], 1) == [0, 5]


def test_weight_norm_is_judged_although_a_removed_direction_has_no_length() -> None:
    model = noisy(patterns.IMAGES["weight_norm"]())
    first, second = (f"{name}.parametrizations.weight.original" for name in "ab")
    kept = range(0, 16, 2)
    cuts = {(f"{first}0", 0): kept, (f"{first}1", 0): kept, ("a.bias", 0): kept, (f"{second}1", 1): kept}
    assert oracle.judge(model, cut(model, cuts), patterns.image()).status == oracle.CORRECT


def test_what_cannot_be_judged_is_not_called_correct() -> None:
    model, inputs = noisy(patterns.UsedTwice(8)), torch.randn(2, 3, 8, 8)
    assert oracle.judge(model, copy.deepcopy(model), inputs).status == oracle.NOTHING
    changed = cut(model, TWICE)
    with torch.no_grad():
        changed.tail.weight.mul_(1.01)
    verdict = oracle.judge(model, changed, inputs)
    assert verdict.status == oracle.UNDECIDED and "tail.weight" in verdict.reason
    dead = copy.deepcopy(model)
    nn.init.zeros_(dead.head.weight)
    nn.init.constant_(dead.head.bias, 1.0)
    assert "constant" in oracle.judge(dead, cut(dead, TWICE), inputs).reason
    assert "does not run" in oracle.judge(model, cut(model, {("tail.weight", 1): (0, 1)}), inputs).reason
    narrower = cut(model, {("head.weight", 0): (0, 1), ("head.bias", 0): (0, 1)})
    assert oracle.judge(model, narrower, inputs).status == oracle.WRONG


def row(model: str, ours: dict[str, object], peer: dict[str, object] | None, form: str = "live") -> dict[str, object]:
    """One row of the benchmark's file; a found library is correct and runs unless it says otherwise."""
    good = {"status": "correct", "ran": True}
    found = {"secateur": {**good, **ours}} | ({} if peer is None else {"torch_pruning": {**good, **peer}})
    return {"model": model, "form": form, "dense": {"params": 1000, "macs": 1000}, **found}


def test_the_tables_say_what_the_rows_say() -> None:
    def times(analysis: float, whole: float, params: int) -> dict[str, object]:
        return {"analysis_seconds": analysis, "prune_seconds": whole, "params": params, "macs": params}

    wrong = {"status": "wrong", "reason": "off by 3.0e-01 | of the largest output"}
    failed = {"status": "timeout", "ran": False, "reason": "not finished after 120 s"}
    rows = [
        row("own:a", times(1, 3, 250) | {"locked": {"norm": 2}}, times(4, 4, 240)),
        row("own:b", times(2, 8, 400), times(1, 1, 300)),
        row("own:c", times(4, 6, 500), times(8, 8, 100) | wrong),
        row("own:d", times(5, 9, 600), failed),
        row("own:d", times(5, 9, 200), None, form="graph"),
        row("pattern:e", {"status": "nothing removed"}, wrong),
    ]
    lines = coupling_tables.headline_lines({"rows": rows})
    assert (
        "| forward pass runs | 4 | 3 |" in lines and "| correct | 4 | 2 |" in lines and "| timeout | 0 | 1 |" in lines
    )
    assert "| nothing removed | 1 | 0 |" in lines and "| wrong | 0 | 1 |" in lines
    text = "\n".join(lines)
    assert (
        "analysis and shrinking, ours divided by the peer's, on the 3 models that the peer completes: median 0.50"
        in text
    )
    assert (
        "the whole verified call, ours divided by the peer's, on the 3 models that the peer completes: median 0.75"
        in text
    )
    assert "median 3.00 s, worst 5.00 s (own:d); 2 of 4 over 3 s" in text
    assert "smaller on 1; not on own:b." in text  # 25 % is within 5 points of 24 %, 40 % is not of 30 %
    assert "on 0 of 1 models" in text  # 400 of the graph form's 800
    results = {
        "rows": rows,
        "machine": {"cpu": "a CPU"},
        "protocol": {
            "sparsity": 0.5,
            "criterion": "l2",
            "limit_seconds": 120.0,
            "limit_gb": 14.0,
            "repeats": 3,
            "versions": {"torch": "2.13.0"},
        },
    }
    page = coupling_tables.full_tables(results)
    assert "| own:c | correct | 50.0% | 50.0% | 4.00 / 6.00 |  |  |  |  | wrong | 10.0% | 10.0% | 8.00 / 8.00 |" in page
    assert "| own:c (live) | Torch-Pruning | wrong | off by 3.0e-01 / of the largest output |" in page
    assert "| own:a | 2 | 2 x norm |" in page and "| own:d | 60.0% | 20.0% | 50.0% |" in page
