"""Chains of tiny blocks, for timing the analysis of models that are long rather than wide."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, LENGTH, SIDE, CLASSES = 8, 2, 4, 4, 3


class ResidualBlock(nn.Module):
    """x + conv(relu(norm(conv(x)))): two widths of its own beside the stream's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.second = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.norm(self.first(x))))


class TransformerBlock(nn.Module):
    """Attention with a packed projection, and a perceptron; the number of heads is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_width = HEADS, WIDTH // HEADS
        self.attention_norm, self.perceptron_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.packed, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        packed = self.packed(self.attention_norm(x)).view(batch, length, 3, self.heads, self.head_width)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        x = x + self.out(mixed.reshape(batch, length, self.heads * self.head_width))
        return x + self.down(F.gelu(self.up(self.perceptron_norm(x))))


class StreamReadingBlock(nn.Module):
    """Its code reads a size off the residual stream, so that only a graph form of it can lose heads."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_width = HEADS, WIDTH // HEADS
        self.norm, self.packed, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        packed = self.packed(self.norm(x)).reshape(batch, length, 3, self.heads, self.head_width)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        return x + self.out(mixed.reshape(batch, length, width))


class Pooled(nn.Module):
    """The mean over positions, to classes."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)) if x.dim() == 4 else x.mean(1))


def _images(blocks: int) -> tuple[nn.Module, Tensor]:
    stem = nn.Conv2d(3, WIDTH, 3, padding=1)
    return nn.Sequential(stem, *(ResidualBlock() for _ in range(blocks)), Pooled()), torch.randn(1, 3, SIDE, SIDE)


def _tokens(block: Callable[[], nn.Module], blocks: int) -> tuple[nn.Module, Tensor]:
    stem = nn.Linear(5, WIDTH)
    return nn.Sequential(stem, *(block() for _ in range(blocks)), Pooled()), torch.randn(1, LENGTH, 5)


CHAINS: dict[str, Callable[[int], tuple[nn.Module, Tensor]]] = {
    "residual blocks": _images,
    "transformer blocks": lambda blocks: _tokens(TransformerBlock, blocks),
    "a graph form per block": lambda blocks: _tokens(StreamReadingBlock, blocks),
}


def build(name: str, blocks: int) -> tuple[nn.Module, Tensor]:
    """(a chain of `CHAINS` in eval mode with random weights, one input)."""
    torch.manual_seed(0)
    model, inputs = CHAINS[name](blocks)
    return model.eval(), inputs
