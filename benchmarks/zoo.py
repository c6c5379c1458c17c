"""Architectures to prune: torchvision, timm, transformers and hand-written ones, without pretrained weights.

    python benchmarks/zoo.py [PREFIX]       lists the names

    model, inputs = build("timm:levit_128")

Models come in eval mode with random parameters and BatchNorm statistics: several heads start at zero, and a dead
output makes every comparison pass. Needs the extras `vision` and `hf`.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from patterns import OWN, PATTERNS

Built = tuple[nn.Module, Any]

# Side of the square input: small where any side will do, else the one that the architecture is made for.
ANY_SIDE_OF_TORCHVISION = """
    alexnet vgg11_bn resnet18 resnet50 resnext50_32x4d densenet121 mobilenet_v2 mobilenet_v3_small shufflenet_v2_x1_0
    efficientnet_b0 regnet_y_400mf convnext_tiny swin_t fcn_resnet50 squeezenet1_1 googlenet mnasnet1_0"""
ANY_SIDE_OF_TIMM = """
    res2net50_26w_4s seresnet50 cspresnet50 ghostnet_100 eca_nfnet_l0 mobilenetv4_conv_small efficientvit_b0
    poolformer_s12 convnextv2_atto mobilevit_xxs skresnet18 rexnet_100 pvt_v2_b0 convmixer_768_32 dla34 hardcorenas_a"""
SIDE_224_OF_TIMM = """
    mixer_s32_224 resmlp_12_224 gmlp_ti16_224 vit_tiny_patch16_224 deit_tiny_distilled_patch16_224 cait_xxs24_224
    coatnet_0_rw_224 efficientformer_l1 levit_128 beit_base_patch16_224 pit_ti_224"""
TORCHVISION = {**dict.fromkeys(ANY_SIDE_OF_TORCHVISION.split(), 64), "vit_b_16": 224, "maxvit_t": 224}
TIMM = {
    **dict.fromkeys(ANY_SIDE_OF_TIMM.split(), 64),
    **dict.fromkeys(SIDE_224_OF_TIMM.split(), 224),
    "swinv2_tiny_window8_256": 256,
}

TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
VOCABULARY = 120
LABELS = 7
BATCH, LENGTH = 2, 10


def _decoder(**options: Any) -> dict[str, Any]:
    """A causal language model with grouped-query attention: two heads of keys and values for four of queries."""
    return {**TINY, "vocab_size": VOCABULARY, "num_key_value_heads": 2, "pad_token_id": 0, **options}


# name -> (class of the model, class of its config, the config, kind of its inputs)
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "bert": (
        "BertForSequenceClassification",
        "BertConfig",
        {**TINY, "vocab_size": VOCABULARY, "num_labels": LABELS},
        "text",
    ),
    "bert_masked_lm": ("BertForMaskedLM", "BertConfig", {**TINY, "vocab_size": VOCABULARY}, "text"),
    "roberta": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        {**TINY, "vocab_size": VOCABULARY, "num_labels": LABELS},
        "text",
    ),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "vocab_size": VOCABULARY, "num_labels": LABELS},
        "text",
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_inner": 128,
            "vocab_size": VOCABULARY,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "text",
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**TINY, "vocab_size": VOCABULARY}, "text"),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 128,
            "vocab_size": VOCABULARY,
        },
        "text",
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _decoder(), "text"),
    "llama_without_cache": ("LlamaForCausalLM", "LlamaConfig", _decoder(use_cache=False), "text"),
    "mistral": ("MistralForCausalLM", "MistralConfig", _decoder(), "text"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _decoder(head_dim=16), "text"),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _decoder(head_dim=16), "text"),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 64, "num_layers": 2, "num_heads": 4, "d_kv": 16, "d_ff": 128, "vocab_size": VOCABULARY},
        "text to text",
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {**TINY, "image_size": 32, "patch_size": 8, "num_labels": LABELS},
        "image",
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "vocab_size": VOCABULARY,
            "max_source_positions": 20,
            "num_mel_bins": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        "speech",
    ),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {**TINY, "vocab_size": VOCABULARY, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0},
            "vision_config": {**TINY, "image_size": 32, "patch_size": 8},
            "projection_dim": 48,
        },
        "image and text",
    ),
}


def build(name: str, seed: int = 0) -> Built:
    """(model in eval mode, example inputs) of a name of `names()`; the same ones for the same seed.

    Raises KeyError for an unknown name.
    """
    torch.manual_seed(seed)
    model, inputs = BUILDERS[name]()
    return randomise(model.eval(), seed), inputs


def names(prefix: str = "") -> list[str]:
    """Every name that starts with `prefix`, such as "timm:"."""
    return [name for name in BUILDERS if name.startswith(prefix)]


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` itself with noise on every parameter and statistic: nothing is zero, and few values occur twice.

    The values of a tensor of at most 2^17 entries are all distinct, so that a value tells where it comes from.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            # On the scale of the layer: the initial weights of language models leave attention all but uniform.
            scale = max(0.02, 0.5 / parameter[0].numel() ** 0.5) if parameter.dim() > 1 else 0.1
            _add_noise(parameter, scale, generator)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                _add_noise(buffer, 0.1, generator)
            if name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) * 0.5 + 0.75)
                _add_noise(buffer, 0.01, generator)
    return model


def _add_noise(tensor: Tensor, scale: float, generator: torch.Generator) -> None:
    tensor.add_(torch.randn(tensor.shape, generator=generator) * scale)
    while tensor.numel() <= 2**17 and (repeated := _repeated(tensor)).any():
        tensor[repeated] += torch.randn(int(repeated.sum()), generator=generator) * scale


def _repeated(tensor: Tensor) -> Tensor:
    """Which entries hold a value that occurs elsewhere too."""
    _, group, counts = tensor.unique(return_inverse=True, return_counts=True)
    return counts[group] > 1


# -- the libraries ---------------------------------------------------------------------------------------------------


def _torchvision(name: str, side: int) -> Built:
    models = load_torchvision().models
    if name == "fcn_resnet50":
        model = models.segmentation.fcn_resnet50(weights=None, weights_backbone=None)
    else:
        options = {"init_weights": True} if name == "googlenet" else {}
        model = getattr(models, name)(weights=None, **options)
    return model, torch.randn(1, 3, side, side)


def _timm(name: str, side: int) -> Built:
    load_torchvision()
    import timm

    return timm.create_model(name, pretrained=False), torch.randn(1, 3, side, side)


def _transformers(model: str, config: str, options: dict[str, Any], kind: str) -> Built:
    load_torchvision()
    import transformers

    made = getattr(transformers, config)(**options)
    return getattr(transformers, model)(made), _inputs(kind, made)


def _inputs(kind: str, config: Any) -> dict[str, Tensor]:
    """Keyword inputs; token 0 is padding and comes nowhere, every sentence ends with token 2."""
    tokens = torch.randint(3, VOCABULARY, (BATCH, LENGTH))
    tokens[:, -1] = 2
    image = torch.randn(BATCH, 3, 32, 32)
    if kind == "text":
        return {"input_ids": tokens}
    if kind == "text to text":
        return {"input_ids": tokens, "decoder_input_ids": tokens[:, :6].clone()}
    if kind == "image":
        return {"pixel_values": image}
    if kind == "image and text":
        return {"input_ids": tokens, "pixel_values": image}
    if kind == "speech":
        sound = torch.randn(BATCH, config.num_mel_bins, 2 * config.max_source_positions)
        return {"input_features": sound, "decoder_input_ids": tokens[:, :6].clone()}
    raise ValueError(f"no inputs are known for {kind!r}")


_DECLARED: list[torch.library.Library] = []  # a declaration lasts as long as the object


def load_torchvision() -> Any:
    """Import torchvision where its compiled operators do not load, as on a CPU-only torch.

    They are declared instead, without an implementation, one by one as the import asks for them: detection models
    would need them, those of this zoo do not.
    """
    if "torchvision" in sys.modules:
        return sys.modules["torchvision"]
    while True:
        try:
            return importlib.import_module("torchvision")
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            if not _DECLARED:
                _DECLARED.append(torch.library.Library("torchvision", "FRAGMENT"))
            _DECLARED[0].define(f"{missing[1]}(Tensor a) -> Tensor")
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]


def _builders() -> Iterator[tuple[str, Callable[[], Built]]]:
    for name, side in TORCHVISION.items():
        yield f"torchvision:{name}", lambda name=name, side=side: _torchvision(name, side)
    for name, side in TIMM.items():
        yield f"timm:{name}", lambda name=name, side=side: _timm(name, side)
    for name, recipe in TRANSFORMERS.items():
        yield f"transformers:{name}", lambda recipe=recipe: _transformers(*recipe)
    for name, builder in OWN.items():
        yield f"own:{name}", builder
    for name, builder in PATTERNS.items():
        yield f"pattern:{name}", builder


BUILDERS: dict[str, Callable[[], Built]] = dict(_builders())


if __name__ == "__main__":
    print("\n".join(names(*sys.argv[1:2])))
