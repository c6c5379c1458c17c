"""Networks that hypothesis makes up: a stem, blocks drawn from a table, and an end; of images and of sequences.

A block draws its own options through `pick`, so that a failing net shrinks to simple ones, and prints them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from drawn_blocks import LENGTH, PLACES, SIDE, Block, Pick
from drawn_images import IMAGES
from drawn_sequences import SEQUENCES
from nets_for_tests import conv, randomised

WORDS = 7  # of the vocabulary
KINDS = {**IMAGES, **SEQUENCES}


@dataclass(frozen=True)
class Answer:
    """An output of a class of its own."""

    logits: Tensor
    features: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Drawn:
    """A net in float64 and eval mode with random tensors, the inputs it takes, and the kinds of its blocks."""

    model: nn.Module
    takes: str  # image, both (an image and a vector), vectors, words
    kinds_by_block: dict[int, str]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of its blocks, in order."""
        return tuple(self.kinds_by_block.values())

    def batch(self, size: int, length: int = LENGTH) -> Any:
        """Example inputs."""
        generator = torch.Generator().manual_seed(size)

        def noise(*shape: int) -> Tensor:
            return torch.randn(size, *shape, generator=generator, dtype=torch.float64)

        if self.takes == "words":
            return torch.randint(0, WORDS, (size, length), generator=generator)
        if self.takes == "vectors":
            return noise(length, 5)
        return noise(3, SIDE, SIDE) if self.takes == "image" else (noise(3, SIDE, SIDE), noise(5))

    def __repr__(self) -> str:
        return f"Drawn(takes={self.takes!r}, kinds={self.kinds!r}, model={self.model!r})"


class Whole(nn.Module):
    """Stem, blocks, end; `extra`, where there is one, makes a second input fit for the end."""

    def __init__(self, stem: nn.Module, blocks: list[Block], end: nn.Module, extra: nn.Module | None) -> None:
        super().__init__()
        self.stem, self.blocks, self.end, self.extra = stem, nn.ModuleList(blocks), end, extra

    def forward(self, x: Tensor, aside: Tensor | None = None) -> Any:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.end(x) if self.extra is None else self.end(x, F.relu(self.extra(aside)))


class Answering(Block):
    """Gives what it finds in one of many forms."""

    def __init__(self, pick: Pick) -> None:
        super().__init__()
        self.gives = pick("tensor", "tuple", "dict", "dataclass", "nested")

    def answer(self, logits: Tensor, features: Tensor) -> Any:
        if self.gives == "tensor":
            return logits
        if self.gives == "tuple":
            return logits, features.sum(-1)
        if self.gives == "nested":
            return {"logits": logits, "aside": [features[..., :2].sin()]}
        return {"logits": logits} if self.gives == "dict" else Answer(logits, features.sum(-1))


class Vector(Answering):
    """An image or a sequence becomes one vector, and that three numbers."""

    def __init__(self, width: int, places: int, pick: Pick, extra: int = 0) -> None:
        super().__init__(pick)
        self.how = pick("pool", "flatten", "view", "reshape", "first")
        self.flat = width * places
        middle = pick(4, 3, 6)
        self.fc = nn.Linear((width if self.how in ("pool", "first") else self.flat) + extra, middle)
        self.head = nn.Linear(middle, 3)

    def forward(self, x: Tensor, aside: Tensor | None = None) -> Any:
        if self.how == "pool":
            x = F.adaptive_avg_pool2d(x, 1).flatten(1) if x.dim() == 4 else x.mean(dim=1)
        elif self.how == "first":
            x = x[:, :, 0, 0] if x.dim() == 4 else x[:, 0]
        elif self.how == "view":
            x = x.contiguous().view(-1, self.flat)
        else:
            x = x.flatten(1) if self.how == "flatten" else x.reshape(x.size(0), -1)
        features = torch.tanh(self.fc(x if aside is None else torch.cat([x, aside], 1)))
        return self.answer(self.head(features), features)


class PerToken(Answering):
    """Three numbers for every token; or scores of the words, perhaps by the embedding's own matrix."""

    def __init__(self, width: int, pick: Pick, words: nn.Embedding | None) -> None:
        super().__init__(pick)
        self.norm = pick(nn.Identity, lambda: nn.LayerNorm(width))()
        self.head = nn.Linear(width, 3 if words is None else WORDS, bias=False)
        if words is not None and words.embedding_dim == width and pick(True, False):
            self.head.weight = words.weight

    def forward(self, x: Tensor) -> Any:
        x = self.norm(x)
        return self.answer(self.head(x), torch.tanh(x))


class Words(Block):
    """Embeddings of words, perhaps with those of their places."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, width, padding_idx=pick(None, 0))
        self.places = nn.Embedding(PLACES, width) if pick(True, False) else None

    def forward(self, x: Tensor) -> Tensor:
        found = self.words(x)
        return found if self.places is None else found + self.places(torch.arange(x.shape[1]))


class ToTokens(Block):
    """(B, C, H, W) -> (B, H W, C)."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        self.how, self.outputs = pick("flatten", "reshape", "view"), width

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "flatten":
            return x.flatten(2).transpose(1, 2)
        b, c, height, width = x.shape
        if self.how == "view":
            return x.contiguous().view(b, c, -1).permute(0, 2, 1)
        return x.permute(0, 2, 3, 1).reshape(b, height * width, c)


class ToImage(Block):
    """(B, H W, C) -> (B, C, H, W)."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        self.how, self.outputs = pick("unflatten", "reshape", "view"), width

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "unflatten":
            return x.mT.unflatten(2, (SIDE, SIDE))
        b, _, c = x.shape
        if self.how == "reshape":
            return x.transpose(1, 2).reshape(b, c, SIDE, SIDE)
        return x.view(b, SIDE, SIDE, -1).permute(0, 3, 1, 2)


def drawn(pick: Pick, kind: str) -> Drawn:
    """A net with at least one block of the kind."""
    names = [pick(*(IMAGES if kind in IMAGES else SEQUENCES)) for _ in range(pick(0, 1, 2))]
    names.insert(pick(*range(len(names) + 1)), kind)
    bridge = pick(False, False, True)
    if bridge:  # a block of the other sort, before or after
        other = pick(*(SEQUENCES if kind in IMAGES else IMAGES))
        names = [*names, other] if kind in IMAGES or pick(True, False) else [other, *names]
    image = names[0] in IMAGES
    takes = pick("image", "both") if image else "image" if bridge else pick("vectors", "words", "image")
    width = pick(8, 4, 6)
    stem, blocks = _stem(takes, width, pick), []
    seen_as_image = takes in ("image", "both")
    places = {}
    for name in names:
        if seen_as_image != (name in IMAGES):
            blocks.append((ToTokens if seen_as_image else ToImage)(width, pick))
            seen_as_image = not seen_as_image
        places[len(blocks)] = name
        blocks.append(KINDS[name](width, pick))
        width = blocks[-1].outputs
    end = _end(width, takes, seen_as_image, stem, pick)
    extra = nn.Linear(5, 4) if takes == "both" else None
    model = randomised(Whole(stem, blocks, end, extra).double(), pick(0, 1, 2)).eval()
    return Drawn(model, takes, places)


def _stem(takes: str, width: int, pick: Pick) -> nn.Module:
    if takes == "words":
        return Words(width, pick)
    return nn.Linear(5, width) if takes == "vectors" else conv(3, width)


def _end(width: int, takes: str, image: bool, stem: nn.Module, pick: Pick) -> nn.Module:
    places = SIDE * SIDE if takes in ("image", "both") else LENGTH
    if image or takes == "both" or pick(True, False):
        return Vector(width, places, pick, 4 if takes == "both" else 0)
    return PerToken(width, pick, stem.words if isinstance(stem, Words) else None)


@st.composite
def nets(draw: st.DrawFn, kind: str) -> Drawn:
    """Nets with at least one block of the kind."""
    return drawn(lambda *options: draw(st.sampled_from(options)), kind)
