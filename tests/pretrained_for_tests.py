"""Tiny transformers models, and plans made by hand, so that no test of files depends on pruning."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.plans import Cut, Edit, Plan, named_tensors, tensor_shapes
from zoo import load_torchvision

WIDTH, INNER, VOCABULARY = 32, 48, 50
KEPT = tuple(range(1, INNER, 2))


def library() -> Any:
    """The transformers package, or a skip."""
    with suppress(ModuleNotFoundError):
        load_torchvision()  # transformers imports it where it is installed, and so it must load
    return pytest.importorskip("transformers", reason="needs transformers: pip install 'secateur[hf]'")


def gpt2() -> Any:
    t = library()
    shape = {"n_embd": WIDTH, "n_inner": INNER, "n_layer": 2, "n_head": 4, "n_positions": 16}
    return t.GPT2LMHeadModel(t.GPT2Config(**shape, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2))


def bert() -> Any:
    t = library()
    shape = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": 1, "num_attention_heads": 4}
    return t.BertForMaskedLM(t.BertConfig(**shape, vocab_size=VOCABULARY, max_position_embeddings=16))


def t5() -> Any:
    t = library()
    shape = {"d_model": WIDTH, "d_ff": INNER, "num_layers": 1, "num_heads": 4, "d_kv": 8}
    return t.T5ForConditionalGeneration(t.T5Config(**shape, vocab_size=VOCABULARY, decoder_start_token_id=0))


def llama() -> Any:
    t = library()
    shape = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": 1, "num_attention_heads": 4}
    rope = {"rope_type": "default", "rope_theta": 123.0}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": 16}
    return t.LlamaForCausalLM(t.LlamaConfig(**shape, vocab_size=VOCABULARY, rope_parameters=rope))


BUILDERS: dict[str, Callable[[], Any]] = {"gpt2": gpt2, "bert": bert, "t5": t5, "llama": llama}
# The parameters of an MLP by the end of their names, and the dimension that holds its inner units.
ENDS = {
    **{"mlp.c_fc.weight": 1, "mlp.c_fc.bias": 0, "mlp.c_proj.weight": 0},
    **{"intermediate.dense.weight": 0, "intermediate.dense.bias": 0, "0.output.dense.weight": 1},
    **{"DenseReluDense.wi.weight": 0, "DenseReluDense.wo.weight": 1},
    **{"mlp.gate_proj.weight": 0, "mlp.up_proj.weight": 0, "mlp.down_proj.weight": 1},
}


def randomised(model: Any, seed: int = 0) -> Any:
    """The model in eval mode, every floating-point parameter drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def mlp_plan(model: nn.Module, kept: tuple[int, ...] = KEPT) -> Plan:
    """Keep every second inner unit of every MLP."""
    found = [(name, dim) for name in named_tensors(model) for end, dim in ENDS.items() if name.endswith(end)]
    assert found
    shapes = tensor_shapes(model)
    widths = [name for name, module in model.named_modules() if name.endswith("c_fc")]  # GPT-2 keeps the width as `nf`
    return Plan(
        cuts=tuple(Cut(name, dim, shapes[name][dim], kept) for name, dim in found),
        edits=tuple(Edit(name, "nf", None, shapes[f"{name}.weight"][1], len(kept)) for name in widths),
        shapes=shapes,
        channels=(INNER, len(kept)),
        groups=("mlp",),
    )


def output(model: Any) -> Tensor:
    """What the model says about six tokens."""
    tokens = torch.arange(6)[None] + 3
    options = {"decoder_input_ids": tokens[:, :4]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens, **options).logits
    return logits
