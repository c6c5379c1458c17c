"""What blocks of made-up networks share: how they draw their options, print them, and are found by kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE, LENGTH = 4, 4  # of an image; of a sequence
PLACES = 18  # that tables of places know: more than any sequence has

T = TypeVar("T")


class Pick(Protocol):
    """One of the options; a failing net is simplified towards the first."""

    def __call__(self, *options: Any) -> Any: ...


class Block(nn.Module):
    """Maps (B, C, H, W), or (B, T, C), to the same with `outputs` channels; the options are drawn when it is made."""

    outputs: int

    def extra_repr(self) -> str:
        plain = {key: value for key, value in vars(self).items() if isinstance(value, (str, int, float))}
        return ", ".join(f"{key}={value!r}" for key, value in plain.items() if key[0] != "_" and key != "training")


Table = dict[str, Callable[[int, Pick], Block]]


def kind(table: Table, name: str) -> Callable[[type[Block]], type[Block]]:
    """Enter a block into a table."""

    def enter(block: type[Block]) -> type[Block]:
        table[name] = block  # type: ignore[assignment]  # every block is made from a width and a pick
        return block

    return enter


class OwnRMSNorm(nn.Module):
    """As the transformers write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class OwnLayerNorm(nn.Module):
    """As the transformers of old wrote it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return self.gain * (x - mean) / (std + 1e-6) + self.bias


class ResponseNorm(nn.Module):
    """The norm of ConvNeXt-V2, on (B, C, H, W)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(p=2, dim=(2, 3), keepdim=True)
        return self.gamma * (x * (size / (size.mean(dim=1, keepdim=True) + 1e-6))) + x


def token_norm(width: int, pick: Pick) -> nn.Module:
    """A norm over the last dimension, or none."""
    return pick(nn.Identity, lambda: nn.LayerNorm(width), lambda: nn.RMSNorm(width), lambda: OwnRMSNorm(width))()


def activation(pick: Pick) -> Callable[[Tensor], Tensor]:
    return pick(F.relu, F.gelu, torch.tanh, F.silu)
