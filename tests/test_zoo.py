"""Real architectures, end to end: pruned, proved, replayed from JSON, pruned again, saved and loaded.

The small ones run always; the whole zoo of the benchmarks runs with `make slow`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur as sc

zoo = pytest.importorskip("zoo", reason="the zoo stands in benchmarks/")
for package in ("torchvision", "timm", "transformers"):
    if __import__("importlib.util", fromlist=["util"]).find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

SMALL = (
    *("transformers:bert", "transformers:llama", "transformers:t5", "transformers:gpt2", "transformers:whisper"),
    *("own:lstm_language_model", "own:transformer_encoder", "own:unet", "own:used_twice", "own:two_inputs"),
    *("timm:efficientvit_b0", "torchvision:shufflenet_v2_x1_0"),
)


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def same(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    a, b = state(left), state(right)
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def check(name: str, folder: Path, *, prune_residual: bool) -> float:
    """Every law on one architecture; returns the fraction of the parameters that is left."""
    model, inputs = zoo.build(name)
    before = copy.deepcopy(model.state_dict())
    try:
        pruned = sc.prune(model, inputs, sparsity=0.5, prune_residual=prune_residual)
    except sc.SecateurError as error:
        assert "prune_residual=True" in str(error) and not prune_residual
        return 1.0
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert type(pruned.model).__name__ == type(model).__name__
    again = sc.shrink(model, sc.Plan.from_json(pruned.plan.to_json()))
    assert same(again, pruned.model)
    twice = sc.prune(pruned.model, inputs, sparsity=0.25, prune_residual=prune_residual)
    assert same(sc.shrink(model, pruned.plan.then(twice.plan)), twice.model)
    sc.save(pruned, folder / "small.safetensors")
    assert same(sc.load(folder / "small.safetensors", fresh(name)), pruned.model)
    before_params, after = pruned.plan.params
    assert after < before_params
    return after / before_params


def fresh(name: str) -> Any:
    return zoo.build(name, seed=1)[0]


@pytest.mark.untraced
@pytest.mark.parametrize("name", SMALL)
def test_a_real_architecture(name: str, tmp_path: Path) -> None:
    closed = check(name, tmp_path, prune_residual=False)
    opened = check(name, tmp_path, prune_residual=True)
    assert opened <= closed < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.names())
def test_the_whole_zoo(name: str, tmp_path: Path) -> None:
    closed = check(name, tmp_path, prune_residual=False)
    opened = check(name, tmp_path, prune_residual=True)
    assert opened <= closed and opened < 1
