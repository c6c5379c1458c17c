"""Networks that hypothesis makes up: a stem, blocks drawn from a table, and an end; of images and of sequences.

A block draws its own options through `pick`, so that a failing net shrinks to simple options, and prints them. Every
kind of block is drawn as often as every other one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import nets_of_images
import nets_of_sequences
from nets_for_tests import randomised
from nets_generated_blocks import LENGTH, SIDE, Pick

T = TypeVar("T")

WORDS = 7  # of the vocabulary
IMAGES: dict[str, type[nn.Module]] = nets_of_images.KINDS
SEQUENCES: dict[str, type[nn.Module]] = nets_of_sequences.KINDS


@dataclass(frozen=True)
class Answer:
    """An output of a class of its own."""

    logits: Tensor
    features: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Generated:
    """A net in float64 and eval mode with random tensors, the inputs it takes, and the kinds of its blocks."""

    model: nn.Module
    takes: str  # image, vectors, words, both
    kinds: tuple[str, ...]

    def batch(self, size: int, *, length: int = LENGTH) -> Any:
        generator = torch.Generator().manual_seed(size)

        def noise(*shape: int) -> Tensor:
            return torch.randn(size, *shape, generator=generator, dtype=torch.float64)

        if self.takes == "image":
            return noise(3, SIDE, SIDE)
        if self.takes == "vectors":
            return noise(length, 5)
        if self.takes == "words":
            return torch.randint(0, WORDS, (size, length), generator=generator)
        return (noise(3, SIDE, SIDE), {"extra": noise(5)})[0], noise(5)

    def __repr__(self) -> str:
        return f"Generated(takes={self.takes!r}, model={self.model!r})"


# -- whole nets ------------------------------------------------------------------------------------------------------


class Whole(nn.Module):
    """Stem, blocks, end; `extra`, where there is one, is a second input that goes into the end."""

    def __init__(self, stem: nn.Module, blocks: list[nn.Module], end: nn.Module, extra: nn.Module | None) -> None:
        super().__init__()
        self.stem, self.blocks, self.end, self.extra = stem, nn.ModuleList(blocks), end, extra

    def forward(self, x: Tensor, aside: Tensor | None = None) -> Any:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.end(x) if self.extra is None else self.end(x, F.relu(self.extra(aside)))


class Answering(nn.Module):
    """Gives what the end finds in one of many forms."""

    def __init__(self, pick: Pick) -> None:
        super().__init__()
        self.gives = pick("tensor", "tuple", "dict", "dataclass", "list")

    def answer(self, logits: Tensor, features: Tensor) -> Any:
        if self.gives == "tensor":
            return logits
        if self.gives == "tuple":
            return logits, features.sum(-1)
        if self.gives == "list":
            return [logits, (features * 2).sum(-1)]
        return {"logits": logits} if self.gives == "dict" else Answer(logits, features.sum(-1))

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if k[0] != "_" and isinstance(v, (str, int)))


class Vector(Answering):
    """An image or a sequence becomes one vector, that becomes three numbers."""

    def __init__(self, width: int, places: int, pick: Pick, extra: int = 0) -> None:
        super().__init__(pick)
        self.how = pick("pool", "flatten", "view", "reshape")
        self.flat = width * places
        middle = pick(4, 3, 6)
        self.fc = nn.Linear((width if self.how == "pool" else self.flat) + extra, middle)
        self.head = nn.Linear(middle, 3)

    def forward(self, x: Tensor, aside: Tensor | None = None) -> Any:
        if self.how == "pool":
            x = x.mean((2, 3)) if x.dim() == 4 else x.mean(1)
        elif self.how == "view":
            x = x.contiguous().view(-1, self.flat)
        else:
            x = x.flatten(1) if self.how == "flatten" else x.reshape(x.shape[0], -1)
        features = torch.tanh(self.fc(x if aside is None else torch.cat([x, aside], 1)))
        return self.answer(self.head(features), features)


class PerToken(Answering):
    """Three numbers for every token; or scores of the words, perhaps with the embedding's own matrix."""

    def __init__(self, width: int, pick: Pick, embedding: nn.Embedding | None) -> None:
        super().__init__(pick)
        self.norm = pick(nn.Identity, lambda: nn.LayerNorm(width))()
        self.head = nn.Linear(width, 3 if embedding is None else WORDS, bias=False)
        if embedding is not None and embedding.embedding_dim == width and pick(True, False):
            self.head.weight = embedding.weight

    def forward(self, x: Tensor) -> Any:
        x = self.norm(x)
        return self.answer(self.head(x), torch.tanh(x))


class Words(nn.Module):
    """Embeddings of words, with those of their places."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, width, padding_idx=pick(None, 0))
        self.places = nn.Embedding(9, width) if pick(True, False) else None

    def forward(self, x: Tensor) -> Tensor:
        found = self.words(x)
        return found if self.places is None else found + self.places(torch.arange(x.shape[1]))


class ToTokens(nn.Module):
    """(B, C, H, W) -> (B, H W, C)."""

    def __init__(self, pick: Pick) -> None:
        super().__init__()
        self.how = pick("flatten", "reshape", "view")

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "flatten":
            return x.flatten(2).transpose(1, 2)
        b, c, height, width = x.shape
        if self.how == "view":
            return x.contiguous().view(b, c, -1).permute(0, 2, 1)
        return x.permute(0, 2, 3, 1).reshape(b, height * width, c)


def drawn(pick: Pick, kind: str) -> Generated:
    """A net with at least one block of the kind."""
    image = kind in IMAGES
    table = IMAGES if image else SEQUENCES
    names = [pick(*sorted(table)) for _ in range(pick(0, 1, 2))]
    names.insert(pick(*range(len(names) + 1)), kind)
    width = pick(8, 4, 6)
    takes = pick("image", "both") if image else pick("vectors", "words", "image")
    stem = _stem(takes, width, pick)
    embedding = stem.words if isinstance(stem, Words) else None
    blocks: list[nn.Module] = []
    for name in names:
        blocks.append(table[name](width, pick))
        width = int(blocks[-1].outputs)  # type: ignore[arg-type]  # an attribute of every block
    if image and pick(False, False, True):
        blocks.append(ToTokens(pick))
        names.append("tokens")
    elif image:
        extra = nn.Linear(5, 4) if takes == "both" else None
        end = Vector(width, SIDE * SIDE, pick, 0 if extra is None else 4)
        return _finished(Whole(stem, blocks, end, extra), takes, names, pick)
    takes = "image" if takes == "both" else takes
    places = SIDE * SIDE if takes == "image" else LENGTH
    end = PerToken(width, pick, embedding) if pick(True, False) else Vector(width, places, pick)
    return _finished(Whole(stem, blocks, end, None), takes, names, pick)


def _stem(takes: str, width: int, pick: Pick) -> nn.Module:
    if takes == "words":
        return Words(width, pick)
    if takes == "vectors":
        return nn.Linear(5, width)
    stem = nn.Conv2d(3, width, 3, padding=1)
    return stem
