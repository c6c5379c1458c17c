"""Causal language models, whole: they generate from caches of fewer heads, are repaired, saved and opened again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from pretrained_for_tests import library
from secateur.data.text import text_windows, wordpiece
from secateur.inputs import copy_in
from secateur.norms import with_live_norms
from secateur.plans import named_tensors
from secateur.shrinking import zero_
from test_layerwise import KINDS, VOCABULARY, language_model, text

NEW = 6  # tokens to generate
TOKENS = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(TOKENS)
MASK[1, :4] = 0  # a batch of two, the shorter one padded on its left
EXAMPLE = {"input_ids": TOKENS}


def zeroed(model: nn.Module, plan: sc.Plan) -> Any:
    """The dense model without the plan's channels, as `verify` compares with it."""
    copied = with_live_norms(copy_in(model, torch.float32), plan.norms)
    zero_(named_tensors(copied), plan)
    return copied


def generated(model: Any) -> tuple[Tensor, Tensor]:
    """(sequences, logits per step) by the library's own greedy search, with a cache."""
    model.generation_config.eos_token_id = None  # or the search would go around that token
    found = model.generate(
        **EXAMPLE, attention_mask=MASK, max_new_tokens=NEW, do_sample=False, use_cache=True,
        return_dict_in_generate=True, output_logits=True, pad_token_id=0,
    )  # fmt: skip
    return found.sequences, torch.stack(found.logits)


@torch.no_grad()
def stepped(model: Any, *, cached: bool) -> tuple[Tensor, Tensor, list[int]]:
    """The same by hand: (tokens, logits per step, heads in the cache per layer); without a cache all over each time."""
    ids, mask, cache, logits, heads = TOKENS, MASK, None, [], []
    for step in range(NEW):
        places = (mask.cumsum(1) - 1).clamp_min(0)
        fresh = slice(-1, None) if cached and step else slice(None)
        output = model(
            ids[:, fresh], attention_mask=mask, position_ids=places[:, fresh], past_key_values=cache, use_cache=cached
        )
        cache = output.past_key_values if cached else None
        logits.append(output.logits[:, -1])
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    if cached:
        heads = [layer.keys.shape[1] for layer in cache.layers]
    return ids, torch.stack(logits), heads


def close(left: Tensor, right: Tensor) -> bool:
    assert torch.isfinite(left).all()
    return float((left - right).abs().max()) <= 1e-5 * float(left.abs().max())


@pytest.mark.untraced
@pytest.mark.parametrize("residual", [False, True], ids=["heads and units", "residual stream too"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_it_generates_from_its_cache_is_what_the_zeroed_original_generates(kind: str, residual: bool) -> None:
    dense: Any = language_model(kind).float()
    pruned = sc.prune(dense, EXAMPLE, sparsity=0.5, prune_residual=residual)
    small, reference = pruned.model, zeroed(dense, pruned.plan)
    (ours, logits), (theirs, expected) = generated(small), generated(reference)
    assert torch.equal(ours, theirs) and ours.shape == (2, 9 + NEW) and close(expected, logits)
    assert not close(generated(dense)[1], logits) and not close(logits[0], logits[-1])

    by_hand, steps, heads = stepped(small, cached=True)
    before, expected_steps, all_heads = stepped(reference, cached=True)
    assert torch.equal(by_hand, before) and torch.equal(by_hand, ours) and close(expected_steps, steps)
    assert all_heads == [4 if kind in ("gpt2", "opt", "gpt_neox") else 2] * 3  # the others share keys and values
    assert heads == [count // 2 for count in all_heads]
    again, without, _ = stepped(small, cached=False)
    assert torch.equal(again, ours) and close(without, steps)


@pytest.mark.parametrize(("kind", "first"), [("gpt2", "transformer.h.0.attn*"), ("llama", "model.layers.0.self_attn*")])
def test_caches_may_differ_from_layer_to_layer(kind: str, first: str) -> None:
    dense: Any = language_model(kind).float()
    pruned = sc.prune(dense, EXAMPLE, sparsity={first: 0.5})
    ours, theirs = generated(pruned.model), generated(zeroed(dense, pruned.plan))
    assert torch.equal(ours[0], theirs[0]) and close(theirs[1], ours[1])
    heads = stepped(pruned.model, cached=True)[2]
    assert heads[0] * 2 == heads[1] == heads[2]


def test_heads_that_all_share_one_key_stay_and_units_go() -> None:
    t = library()
    few = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    torch.manual_seed(0)
    dense = t.LlamaForCausalLM(t.LlamaConfig(**few, num_attention_heads=4, num_key_value_heads=1)).eval()
    pruned = sc.prune(dense, EXAMPLE, sparsity=0.5)
    ours, theirs = generated(pruned.model), generated(zeroed(dense, pruned.plan))
    assert torch.equal(ours[0], theirs[0]) and close(theirs[1], ours[1])
    assert {width.after for width in pruned.plan.widths if "mlp.gate" in width.layer} == {12}


def output_error(dense: Any, model: Any, batches: list[Tensor]) -> float:
    """Mean squared difference of the logits, relative to their variance."""
    with torch.no_grad():
        pairs = [(dense(batch).logits, model(batch).logits) for batch in batches]
    left, right = (torch.cat([pair[side].flatten(0, 1) for pair in pairs]) for side in (0, 1))
    return float((left - right).square().mean() / left.var(0).mean())


@pytest.mark.untraced
@pytest.mark.parametrize("residual", [False, True], ids=["heads and units", "residual stream too"])
@pytest.mark.parametrize(
    "kind", [k if k in ("gpt2", "llama") else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)
def test_least_squares_on_calibration_windows_brings_the_outputs_back(kind: str, residual: bool) -> None:
    dense: Any = language_model(kind).float()
    stream = torch.randint(VOCABULARY, (2000,), generator=torch.Generator().manual_seed(1))
    windows = text_windows(stream, 16, count=48, batch_size=8, seed=0)
    calibration, held_out = windows[:4], windows[4:]

    def prune(*steps: str) -> sc.Pruned:
        return sc.prune(
            dense, EXAMPLE, sparsity=0.5, criterion="l2", data=calibration, repair=steps, prune_residual=residual
        )

    plain, folded, scaled, fitted = prune(), prune("fold"), prune("scale"), prune("least_squares")
    assert plain.plan.to_json() == folded.plan.to_json() == scaled.plan.to_json() == fitted.plan.to_json()
    assert fitted.summary.repairs == ("least_squares",) and fitted.summary.verified_difference < 1e-6
    widths = {width.layer.rpartition(".")[2]: (width.before, width.after) for width in fitted.plan.widths}
    assert {name for name, (before, after) in widths.items() if 2 * after == before} >= INNER[kind]
    errors = [output_error(dense, each.model, calibration) for each in (plain, folded, fitted, scaled)]
    assert errors[1] < 1.02 * errors[0] and errors[2] < 0.8 * errors[0] and errors[2] < errors[3] < errors[0]
    if kind in ("gpt2", "opt", "gpt_neox"):  # biases take up what the removed channels gave on average
        assert errors[1] < 0.9 * errors[0]
    assert output_error(dense, fitted.model, held_out) < 0.9 * output_error(dense, plain.model, held_out)


LLAMA = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
INNER = {
    **dict.fromkeys(KINDS, LLAMA),
    "gpt2": {"c_attn", "c_fc"},
    "opt": {"q_proj", "k_proj", "v_proj", "fc1"},
    "gpt_neox": {"query_key_value", "dense_h_to_4h"},
}


def classifier() -> Any:
    t = library()
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    config = t.BertConfig(**shape, vocab_size=VOCABULARY, max_position_embeddings=32, num_labels=3)
    return t.BertForSequenceClassification(config).eval()


def opened(model: Any, folder: Path) -> Any:
    """Written by the model's own `save_pretrained` and opened by the library, with nothing missing."""
    t = library()
    model.save_pretrained(folder)
    kind = t.AutoModelForSequenceClassification if model.config.model_type == "bert" else t.AutoModelForCausalLM
    found, told = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(found) is type(model)
    return found.eval()


@pytest.mark.parametrize("way", ["make_masks", "prune_layerwise"])
@pytest.mark.parametrize("kind", ["bert", *KINDS])
def test_a_masked_model_is_saved_as_it_is(kind: str, way: str, tmp_path: Path) -> None:
    dense: Any = classifier() if kind == "bert" else language_model(kind).float()
    if way == "make_masks":
        masks = sc.make_masks(dense, "magnitude", 0.7)
        sparse: Any = masks.apply(dense)
    else:
        result = sc.prune_layerwise(dense, text(2), "sparsegpt", sparsity=0.7, progress=False)
        masks, sparse = result.masks, result.model
    again = opened(sparse, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, sparse(TOKENS).logits)
        assert not torch.equal(again(TOKENS).logits, dense(TOKENS).logits)
    tensors = dict(again.named_parameters())
    assert all(not tensors[name][~keep].any() for name, keep in masks.keep.items())
    zeros = sum(int((tensors[name] == 0).sum()) for name in masks.keep)
    assert (zeros, sum(tensors[name].numel() for name in masks.keep)) == masks.counts
    assert masks.sparsity == pytest.approx(0.7, abs=0.01)
    if kind in ("gpt2", "opt", "gemma", "gemma2", "gemma3"):
        assert again.lm_head.weight is again.get_input_embeddings().weight
        assert (way == "make_masks") == any(tensors[name] is again.lm_head.weight for name in masks.keep)
    masks.check(again)  # and the masks hold while it trains on


def test_a_masked_model_keeps_its_precision_and_trains_on(tmp_path: Path) -> None:
    dense = language_model("gpt2").to(torch.bfloat16)
    masks = sc.make_masks(dense, "magnitude", 0.5)
    again = opened(masks.apply(dense), tmp_path)
    assert again.dtype == torch.bfloat16 and torch.equal(again(TOKENS).logits, masks.apply(dense)(TOKENS).logits)
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1)
    with masks.hold(again, optimizer):
        again(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    assert all(not dict(again.named_parameters())[name][~keep].any() for name, keep in masks.keep.items())


@pytest.mark.untraced
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "gemma3"])
def test_a_shrunk_model_and_its_tokenizer_come_back_from_their_folder(kind: str, tmp_path: Path) -> None:
    t = library()
    dense: Any = classifier() if kind == "bert" else language_model(kind).float()
    tokenizer = wordpiece(["a fine film", "a dull film"], VOCABULARY)
    pruned = sc.prune(dense, EXAMPLE, sparsity=0.5, prune_residual=True, data=[TOKENS] * 20, repair=("least_squares",))
    sc.save(pruned, tmp_path, tokenizer=tokenizer)
    small: Any = sc.load(tmp_path)
    assert torch.equal(small(TOKENS).logits, pruned.model(TOKENS).logits)
    assert t.AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
    assert t.AutoConfig.from_pretrained(tmp_path).architectures == [type(dense).__name__]
    if kind != "bert":
        assert all(torch.equal(a, b) for a, b in zip(generated(small), generated(pruned.model), strict=True))
        assert (small.lm_head.weight is small.get_input_embeddings().weight) == (kind != "llama")
