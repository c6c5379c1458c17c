"""One decoder block of a large Llama's shape, pruned in one shot: what it takes, and what the whole model would."""

from __future__ import annotations

import multiprocessing
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import secateur as sc
from language_nets import library
from machine import describe
from secateur.measuring.watching import bytes_in, watched

ROOM = 4 << 30  # of memory that is left to others


@dataclass(frozen=True)
class Shape:
    """A block, how many of it the model has, and the calibration."""

    width: int = 4096
    inner: int = 11008
    heads: int = 32
    kv_heads: int = 32
    blocks: int = 32  # of the whole model
    windows: int = 16
    length: int = 512

    @property
    def weights(self) -> int:
        """Of the block's linear layers."""
        keys = self.width * self.width * self.kv_heads // self.heads
        return 2 * self.width**2 + 2 * keys + 3 * self.width * self.inner

    @property
    def expected_bytes(self) -> int:
        """About what SparseGPT takes: the weights, the layers' second moments, one layer's factors and its weights."""
        doubles = 7 * self.inner**2 + 6 * self.width**2 + 5 * self.inner * self.width
        states = 4 * self.windows * self.length * (3 * self.width + 2 * self.inner)
        return 4 * self.weights + 8 * doubles + states


def apart(shape: Shape, method: str, asked: dict[str, Any], *, threads: int = 1, seed: int = 0) -> dict[str, Any]:
    """`measured` in a process of its own, so that the peak is that of this case alone.

    Raises SystemExit where the memory that it is expected to take is not free.
    """
    free = available_bytes()
    if free is not None and shape.expected_bytes + ROOM > free:
        raise SystemExit(f"{shape} takes about {shape.expected_bytes / 1e9:.0f} GB; {free / 1e9:.0f} GB are available.")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found: dict[str, Any] = pool.apply(measured, (shape, method, asked, threads, seed))
        return found


def measured(shape: Shape, method: str, asked: dict[str, Any], threads: int = 1, seed: int = 0) -> dict[str, Any]:
    """One block of random weights on random hidden states: seconds, memory, and 32 times as much.

    A model of many blocks passes the calibration twice through each: once dense, for the masks and positions that every
    block is called with, and once pruned (but for the last), for the hidden states of the next.
    """
    torch.set_num_threads(threads)
    model, data = _block(shape, seed), None if method == "magnitude" else _states(shape, seed)
    with watched() as whole:
        (block,) = sc.prune_layerwise_(model, data, method, **asked, blocks="model.layers", progress=False).blocks
    passing = whole.seconds - block.seconds if data is not None else 0.0
    total = shape.blocks * (block.seconds + passing) + (shape.blocks - 1) * passing
    return {
        "weights": block.weights,
        "sparsity": block.sparsity,
        "block_seconds": round(block.seconds, 3),
        "pass_seconds": round(passing, 3),
        "model_seconds": round(total, 1),
        "peak_bytes": block.peak_bytes,
        "shape": asdict(shape),
        "machine": describe(),
    }


def _block(shape: Shape, seed: int) -> Any:
    """A Llama of one block and hardly any vocabulary."""
    t = library()
    torch.manual_seed(seed)
    config = t.LlamaConfig(
        hidden_size=shape.width, intermediate_size=shape.inner, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, num_hidden_layers=1, vocab_size=8, max_position_embeddings=shape.length,
        use_cache=False,
    )  # fmt: skip
    return t.LlamaForCausalLM(config).eval()


def _states(shape: Shape, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    draw = (torch.randn(1, shape.length, shape.width, generator=generator) for _ in range(shape.windows))
    return [{"inputs_embeds": states} for states in draw]


def available_bytes() -> int | None:
    """The memory of this machine that is free to use; None where it cannot be known."""
    return bytes_in("/proc/meminfo", "MemAvailable:")
