"""Block by block: each method against its definition on the pruned model so far, resumed runs, and bad requests."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pretrained_for_tests import library
from secateur.errors import ArtifactError, DataError, InputError, TargetError
from secateur.layerwise import find_blocks, prune_layerwise, prune_layerwise_
from secateur.plans import named_tensors
from secateur.sparsegpt import COLUMNS
from test_sparsegpt import surgeon

WIDTH, VOCABULARY, LENGTH = 16, 40, 12
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
KINDS = ("gpt2", "opt", "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "gpt_neox")
BLOCKS = {"gpt2": "transformer.h", "opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers"}


def language_model(kind: str = "llama") -> Any:
    t = library()
    t.logging.set_verbosity_error()
    torch.manual_seed(0)
    few = {**SHAPE, **HEADS}
    sliding = {"sliding_window": 4}
    builders = {
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=WIDTH, n_layer=3, n_head=4)
        ),
        "opt": lambda: t.OPTForCausalLM(
            t.OPTConfig(
                vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=3, ffn_dim=24, num_attention_heads=4,
                max_position_embeddings=32, word_embed_proj_dim=WIDTH,
            )
        ),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**few)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**few)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**few, head_dim=4)),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**few, **sliding)),
        "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**few, head_dim=4)),
        "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**few, head_dim=4, **sliding)),
        "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**few, head_dim=4, **sliding)),
        "gpt_neox": lambda: t.GPTNeoXForCausalLM(
            t.GPTNeoXConfig(**SHAPE, num_attention_heads=4, max_position_embeddings=32)
        ),
    }  # fmt: skip
    model = builders[kind]().double().eval()
    with torch.no_grad():  # fresh weights are tiny: attention would not matter
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def text(batches: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (4, LENGTH), generator=generator) for _ in range(batches)]


def inputs_of(model: nn.Module, layer: nn.Module, data: list[Tensor]) -> Tensor:
    """All that a layer reads, (rows, in), by running the whole model."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in data:
            model(batch, use_cache=False)
    handle.remove()
    return torch.cat(seen)


def written_out(model: Any, data: list[Tensor], method: str, pattern: tuple[int, int] | None) -> dict[str, Tensor]:
    """The weights of every layer after the method, each block on what the pruned ones before it give; (out, in)."""
    found = {}
    for name, block in model.get_submodule(find_blocks(model)).named_children():
        layers = {n: m for n, m in block.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
        news = {}
        for part, layer in layers.items():
            x = inputs_of(model, layer, data).numpy()
            weight = layer.weight.detach().numpy()
            weight = weight.T if type(layer).__name__ == "Conv1D" else weight
            news[part] = pruned(weight, x, method, pattern)
        with torch.no_grad():
            for part, layer in layers.items():
                new = torch.from_numpy(news[part])
                layer.weight.copy_(new.T if type(layer).__name__ == "Conv1D" else new)
                found[f"{name}.{part}"] = new
    return found


def pruned(weight: np.ndarray, x: np.ndarray, method: str, pattern: tuple[int, int] | None) -> np.ndarray:
    rows, columns = weight.shape
    if method == "sparsegpt":
        width, each, count = (
            (pattern[1], True, pattern[1] - pattern[0]) if pattern else (COLUMNS, False, weight.size // 2)
        )
        assert columns <= COLUMNS
        return surgeon(weight, x.T @ x / len(x), width, each, count)[0]
    scores = np.abs(weight) * (np.sqrt((x**2).mean(0)) if method == "wanda" else 1)
    if pattern:
        units, gone = scores.reshape(rows, -1, pattern[1]), pattern[1] - pattern[0]
    else:
        units = scores if method == "wanda" else scores.reshape(1, -1)
        gone = units.shape[-1] // 2
    keep = np.ones(units.shape, bool)
    np.put_along_axis(keep, np.argsort(units, axis=-1, kind="stable")[..., :gone], False, axis=-1)
    return weight * keep.reshape(rows, columns)


@pytest.mark.parametrize("pattern", [None, (2, 4), (4, 8)], ids=["unstructured", "2:4", "4:8"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_block_is_pruned_on_what_the_pruned_ones_before_it_give(
    kind: str, method: str, pattern: tuple[int, int] | None
) -> None:
    model, data = language_model(kind), text()
    asked: dict[str, Any] = {"pattern": f"{pattern[0]}:{pattern[1]}"} if pattern else {"sparsity": 0.5}
    result = prune_layerwise(model, data, method, **asked, progress=False)
    expected = written_out(model, data, method, pattern)  # changes `model`
    blocks = result.model.get_submodule(find_blocks(model))
    for name, weight in expected.items():
        layer = blocks.get_submodule(name)
        ours = layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight
        assert torch.allclose(ours, weight, rtol=0, atol=1e-5 * float(weight.abs().max())), name
    assert all(abs(block.sparsity - 0.5) < 0.01 for block in result.blocks) and len(result.blocks) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_is_pruned_and_only_inside_its_blocks(kind: str) -> None:
    model, data = language_model(kind), text(2)
    before = {name: tensor.clone() for name, tensor in named_tensors(model).items()}
    result = prune_layerwise(model, data, "sparsegpt", sparsity=0.5, progress=False)
    assert find_blocks(model) == BLOCKS.get(kind, "model.layers")
    assert all(torch.equal(before[name], tensor) for name, tensor in named_tensors(model).items())  # on a copy
    inside, after = find_blocks(model) + ".", named_tensors(result.model)
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == set(result.masks.keep) and all(name.startswith(inside) for name in changed)
    assert all(not after[name][~keep].any() for name, keep in result.masks.keep.items())
    with torch.no_grad():
        wanda = prune_layerwise(model, data, "magnitude", sparsity=0.5, progress=False).model
        dense, ours, theirs = (m(data[0]).logits for m in (model, result.model, wanda))
    assert (ours - dense).square().mean() < (theirs - dense).square().mean()


def test_the_cache_switch_and_the_modes_are_as_before() -> None:
    model = language_model()
    model.train()
    model.config.use_cache = True
    prune_layerwise_(model, text(1), "wanda", sparsity=0.5, progress=False)
    assert model.training and model.model.layers[0].training and model.config.use_cache is True


def test_memory_does_not_keep_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur import layerwise

    kept: list[int] = []
    pass_on = layerwise._pass_on

    def counted(block: nn.Module, calls: Any, following: Any) -> None:
        pass_on(block, calls, following)
        kept.append(sum(call.hidden is not None for call in calls))

    monkeypatch.setattr(layerwise, "_pass_on", counted)
    result = prune_layerwise(language_model(), text(), "wanda", sparsity=0.5, progress=False)
    assert kept == [0, 0]
    assert all(block.seconds > 0 and (block.peak_bytes or 1) > 0 for block in result.blocks)


def test_a_run_that_was_cut_goes_on_after_the_last_finished_block(tmp_path: Path) -> None:
    model, data = language_model(), text()
    whole = prune_layerwise(model, data, "sparsegpt", pattern="2:4", progress=False)

    def stop(number: int, total: int, block: Any) -> None:
        if number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_layerwise(model, data, "sparsegpt", pattern="2:4", checkpoint=tmp_path, progress=stop)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    times = [file.stat().st_mtime_ns for file in files]
    again = prune_layerwise(model, data, "sparsegpt", pattern="2:4", checkpoint=tmp_path, progress=False)
    assert [file.stat().st_mtime_ns for file in files] == times
    for name, tensor in named_tensors(whole.model).items():
        assert torch.equal(tensor, named_tensors(again.model)[name])
    assert all(torch.equal(whole.masks.keep[name], keep) for name, keep in again.masks.keep.items())


def test_a_run_in_place_that_was_cut_goes_on_too(tmp_path: Path) -> None:
    model, data = language_model(), text()
    whole = prune_layerwise(model, data, "sparsegpt", pattern="2:4", progress=False)

    def stop(number: int, total: int, block: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_layerwise_(model, data, "sparsegpt", pattern="2:4", checkpoint=tmp_path, progress=stop)
    again = prune_layerwise_(model, data, "sparsegpt", pattern="2:4", checkpoint=tmp_path, progress=False)
    assert again.model is model
    for name, tensor in named_tensors(whole.model).items():
        assert torch.equal(tensor, named_tensors(model)[name])


def test_finished_blocks_of_another_run_are_not_taken(tmp_path: Path) -> None:
    model, data = language_model(), text()

    def run(model: nn.Module = model, data: Any = data, method: str = "wanda") -> None:
        prune_layerwise(model, data, method, pattern="2:4", checkpoint=tmp_path, progress=False)

    run()
    run(data=iter(data))
    inside, outside = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        inside.model.layers[2].mlp.up_proj.weight[0, 0] += 1
        outside.model.embed_tokens.weight[0, 0] += 1
    for other in ({"method": "sparsegpt"}, {"data": data[:1]}, {"model": inside}, {"model": outside}):
        with pytest.raises(ArtifactError, match="another run"):
            run(**other)


def test_progress_is_told_block_by_block(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[int, int]] = []
    prune_layerwise(
        language_model(), None, "magnitude", sparsity=0.5, progress=lambda n, total, block: told.append((n, total))
    )
    assert told == [(1, 3), (2, 3), (3, 3)]
    prune_layerwise(language_model(), None, "magnitude", sparsity=0.5, progress=True)
    assert "[3/3] model.layers.2: 50.0% of" in capsys.readouterr().err


class Skipping(nn.Module):
    """Blocks that do not feed one another."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](x) + self.blocks[0](x)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"sparsity": 30}, TargetError, "fraction removed"),
        ({}, TargetError, "nothing to aim for"),
        ({"sparsity": 0.5, "scope": "global"}, InputError, "globally"),
        ({"pattern": "2:5"}, InputError, "divides"),
        ({"sparsity": 0.5, "method": "wandaa"}, InputError, "Did you mean 'wanda'"),
        ({"sparsity": 0.5, "blocks": "model.nothing"}, InputError, "no such module"),
        ({"sparsity": 0.5, "blocks": "model.embed_tokens"}, InputError, "not a list of blocks"),
        ({"sparsity": 0.5, "blocks": [nn.Linear(2, 2)]}, InputError, "modules of the model"),
        ({"sparsity": 0.5, "data": None}, InputError, "needs"),
        ({"sparsity": 0.5, "data": []}, DataError, "no batch"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(options: dict[str, Any], error: type[Exception], said: str) -> None:
    model = language_model()
    before = {name: tensor.clone() for name, tensor in named_tensors(model).items()}
    with pytest.raises(error, match=said):
        prune_layerwise_(model, **{"data": text(1), "method": "wanda", "progress": False, **options})
    assert all(torch.equal(before[name], tensor) for name, tensor in named_tensors(model).items())


def test_blocks_that_do_not_feed_one_another_are_refused() -> None:
    with pytest.raises(InputError, match=r"not fed by 'blocks\.[01]' alone"):
        prune_layerwise(Skipping(), [torch.randn(2, 4)], "wanda", sparsity=0.5)
    with pytest.raises(InputError, match="no list of blocks"):
        prune_layerwise(nn.Linear(3, 3), [torch.randn(2, 3)], "wanda", sparsity=0.5)
