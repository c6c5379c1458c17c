"""The small language models that the benchmarks prune: trained once by seed on Shakespeare, kept, and read back.

A byte-level BPE is learnt on the training text; the last tenth of the text validates. An interrupted training goes on
where it stopped, and the last epoch counts: nothing is chosen by the validation text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateur as sc
from secateur.artifacts import describe
from secateur.data.batching import mixed
from secateur.data.sources import data_folder
from secateur.data.text import text_windows
from secateur.errors import DataError
from secateur.files import write_bytes
from secateur.measuring.watching import watched
from secateur.training import Recipe, fit
from zoo import load_torchvision

KINDS = {"llama": "Llama-shaped", "gpt2": "GPT-2-shaped"}
VALIDATION = 0.1  # of the text, at its end


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    vocabulary: int = 2048
    width: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4  # of the Llama
    inner: int = 704  # of the Llama's gated layers; the GPT-2's are four times the width
    length: int = 128  # tokens of a window: in training, calibration and evaluation
    batch_size: int = 16
    epochs: int = 8
    calibration: int = 128  # windows
    scored_tokens: int = 32768  # of each text, the first


TINY = Scale(
    vocabulary=300, width=32, layers=2, heads=4, kv_heads=2, inner=48, length=16, batch_size=4, epochs=1,
    calibration=64, scored_tokens=96,
)  # fmt: skip


def recipe(scale: Scale, seed: int) -> Recipe:
    """How the dense models are trained."""
    return Recipe(
        epochs=scale.epochs, lr=1e-3, optimizer="adamw", weight_decay=0.1, warmup_epochs=0.5, clip_norm=1.0, bf16=True,
        seed=seed,
    )  # fmt: skip


# -- text ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Texts:
    """Tokens, (n,) each."""

    train: Tensor
    scored: dict[str, Tensor]  # name -> what perplexity is measured on
    bytes_per_token: dict[str, float]


def read_texts(data_dir: Path | None, scale: Scale, runs: Path) -> Texts:
    """Shakespeare, and the validation part of WikiText-2 where there is one."""
    root = data_folder(data_dir)
    if root is None:
        raise DataError("pass --data-dir or set SECATEUR_DATA: a folder with text/tinyshakespeare.txt.")
    folder = root / "text"
    shakespeare = (folder / "tinyshakespeare.txt").read_text(encoding="utf-8")
    middle = int(len(shakespeare) * (1 - VALIDATION))
    named = {"shakespeare": shakespeare[middle:]}
    other = folder / "wikitext-2" / "valid.txt"
    if other.exists():
        named["wikitext2"] = other.read_text(encoding="utf-8")
    encoder = _encoder(shakespeare[:middle], scale.vocabulary, runs)
    scored = {name: _tokens(encoder, text) for name, text in named.items()}
    sizes = {name: len(text.encode()) / len(scored[name]) for name, text in named.items()}
    first = {name: tokens[: scale.scored_tokens] for name, tokens in scored.items()}
    return Texts(_tokens(encoder, shakespeare[:middle]), first, sizes)


def _encoder(text: str, size: int, runs: Path) -> Any:
    """A byte-level BPE of this text, kept by what it was learnt from: models depend on it."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer

    path = runs / f"bpe-{size}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
    if not path.exists():
        learnt = ByteLevelBPETokenizer()
        learnt.train_from_iterator([text], vocab_size=size, show_progress=False)
        write_bytes(path, learnt.to_str().encode())
    return Tokenizer.from_file(str(path))


def _tokens(encoder: Any, text: str) -> Tensor:
    return torch.tensor(encoder.encode(text).ids)


class Windows:
    """An epoch of windows at random places of the text, others in each: pairs of tokens and those that follow them."""

    def __init__(self, tokens: Tensor, scale: Scale, seed: int) -> None:
        self.tokens, self.scale, self.seed, self.epoch = tokens, scale, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return max(len(self.tokens) // (self.scale.length * self.scale.batch_size), 1)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count, size = len(self) * self.scale.batch_size, self.scale.batch_size
        draw = partial(text_windows, self.tokens, self.scale.length + 1, count=count, batch_size=size)
        for batch in draw(seed=mixed(self.seed, self.epoch)):
            yield batch[:, :-1], batch[:, 1:]


def calibration(texts: Texts, scale: Scale, seed: int) -> list[Tensor]:
    """Windows of the training text, (16, length) token ids each."""
    return text_windows(texts.train, scale.length, count=scale.calibration, batch_size=16, seed=seed + 1000)


# -- models ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Dense:
    """A trained model, and the facts about it that no one can read off it."""

    model: nn.Module
    digest: str  # of everything it depends on, but the seed
    facts: dict[str, Any]


def library() -> Any:
    """The transformers package."""
    with suppress(ModuleNotFoundError):
        load_torchvision()  # transformers imports it where it is installed, and so it must load
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


def build(kind: str, scale: Scale) -> Any:
    """A fresh model of that kind; weights are drawn from torch's global generator."""
    t = library()
    if kind == "llama":
        shape = {"hidden_size": scale.width, "intermediate_size": scale.inner, "num_hidden_layers": scale.layers}
        heads = {"num_attention_heads": scale.heads, "num_key_value_heads": scale.kv_heads}
        config = t.LlamaConfig(
            **shape, **heads, vocab_size=scale.vocabulary, max_position_embeddings=scale.length,
            tie_word_embeddings=True, use_cache=False,
        )  # fmt: skip
        return t.LlamaForCausalLM(config)
    config = t.GPT2Config(
        vocab_size=scale.vocabulary, n_positions=scale.length, n_embd=scale.width, n_layer=scale.layers,
        n_head=scale.heads, bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    return t.GPT2LMHeadModel(config)


def dense(kind: str, texts: Texts, scale: Scale, seed: int, runs: Path) -> Dense:
    """The trained model of a seed: read back where it is finished, trained from where it stopped otherwise."""
    settings = {"kind": kind, "scale": asdict(scale), "recipe": asdict(replace(recipe(scale, 0), seed=0))}
    known = ("calibration", "scored_tokens")  # matter later only
    settings["scale"] = {name: value for name, value in asdict(scale).items() if name not in known}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    path = runs / f"dense-{kind}-{digest}-seed{seed}.safetensors"
    torch.manual_seed(seed)
    fresh = build(kind, scale)
    if not path.exists():
        with watched() as cost:
            fitted = fit(
                fresh, Windows(texts.train, scale, seed), recipe(scale, seed), forward=_logits,
                checkpoint=path.with_suffix(".pt"), progress=True,
            )  # fmt: skip
        facts = {
            "epochs": scale.epochs,
            "train_loss": round(fitted.history[-1].loss, 4),
            "train_seconds": round(sum(epoch.seconds for epoch in fitted.history), 1),
            "peak_bytes": cost.peak_bytes,
            "params": sum(parameter.numel() for parameter in fresh.parameters()),
        }
        sc.save(fitted.model, path, metadata={"facts": json.dumps(facts)})
    return Dense(sc.load(path, fresh).eval(), digest, json.loads(describe(path).metadata["facts"]))


def _logits(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """(N, vocabulary, length), as the cross-entropy takes them."""
    found: Tensor = model(batch[0]).logits
    return found.transpose(1, 2)
