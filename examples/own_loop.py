"""Prune inside a training loop of your own: the network shrinks in five steps while it trains.

    python examples/own_loop.py

Model, data and loop are plain PyTorch; `prune_steps` and `rebind_optimizer_` fit into them.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc


def build_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 16, 10),
    )


def load_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Handwritten digits, 8x8 pixels: 1,400 images to train on, 397 to test."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return images[:1400], labels[:1400], images[1400:], labels[1400:]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, epochs: int) -> None:
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model.eval()(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    torch.manual_seed(0)
    images, labels, test_images, test_labels = load_data()
    model = build_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    train(model, optimizer, images, labels, epochs=4)
    print(f"dense    {sc.count(model, images[:1]).macs:>9,} MACs  {accuracy(model, test_images, test_labels):.1%}")

    # A quarter of the MACs in the end; the cubic schedule removes much at first and little later.
    for step in sc.prune_steps(model, images[:1], sc.Target(max_macs=0.25), criterion="l2", schedule="cubic", steps=5):
        sc.rebind_optimizer_(optimizer, step.previous, step.model, step.plan)  # Adam's moments shrink along
        cut = accuracy(step.model, test_images, test_labels)
        train(step.model, optimizer, images, labels, epochs=1)
        tuned = accuracy(step.model, test_images, test_labels)
        print(f"step {step.number}   {step.summary.macs[1]:>9,} MACs  {cut:.1%} -> {tuned:.1%} after one epoch")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.safetensors"
        sc.save(step, path)
        small = sc.load(path, build_model())
        assert torch.equal(small.eval()(test_images), step.model.eval()(test_images))
        print(f"saved    {path.stat().st_size:>9,} bytes, loaded again: the same outputs, bit for bit")


if __name__ == "__main__":
    sys.exit(main())
