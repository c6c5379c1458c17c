"""A criterion of your own beside the built-in ones, repair without training, and weights pruned while you train.

    python examples/own_criterion.py

A criterion is a function: a group of channels and the evidence in, one score per channel out, higher means keep.
"""

from __future__ import annotations

import sys

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc

Batch = tuple[Tensor, Tensor]


def loud_and_strong(group: sc.Group, evidence: sc.Evidence) -> Tensor:
    """How much a channel says (its mean activation) times how loudly its filter says it (its L2 norm)."""
    says = evidence.activations(group, "absolute")
    norms = torch.stack([evidence.norms(slot, 2) for slot in group.outputs]).mean(0)
    return says * norms


loud_and_strong.needs = ("activation",)  # what `observe` must gather for it


def build_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 48, 3, stride=2, padding=1),
        nn.BatchNorm2d(48),
        nn.ReLU(),
        nn.Conv2d(48, 48, 3, padding=1),
        nn.BatchNorm2d(48),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(192, 10),
    )


def load_data() -> tuple[list[Batch], list[Batch]]:
    """Handwritten digits, 8x8 pixels, in batches: 1,400 images to train on, 397 to test."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = (order[:1400].split(50), order[1400:].split(100))
    train, test = ([(images[rows], labels[rows]) for rows in part] for part in parts)
    return train, test


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    train, test = load_data()
    dense = sc.fit(build_model(), train, sc.Recipe(epochs=6, lr=0.05), progress=False).model
    example = train[0][0][:1]
    print(f"dense               {sc.evaluate(dense, test).accuracy:.1%}")

    for criterion in ("l2", loud_and_strong, sc.ensemble("l2", loud_and_strong)):
        plain, mended = (
            sc.prune(dense, example, criterion=criterion, target=sc.Target(max_macs=0.4), data=train, repair=steps)
            for steps in ((), None)
        )
        cut, repaired = (sc.evaluate(pruned.model, test).accuracy for pruned in (plain, mended))
        print(f"{mended.summary.criterion}: cut {cut:.1%}, repaired without training {repaired:.1%}")

    # Single weights, in a training loop of your own: the masks hold after every step of the optimizer.
    model = sc.from_scratch(dense, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    epochs = 6
    gradual = sc.Gradual("magnitude", 0.9, end=len(train) * epochs // 2, every=10)
    for _ in range(epochs):
        model.train()
        for x, y in train:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            gradual.after_backward(model, optimizer)
            optimizer.step()
            gradual.after_step(model, optimizer)
    print(f"pruned while training: {sc.evaluate(model.eval(), test).accuracy:.1%} with {gradual.masks!r}")


if __name__ == "__main__":
    sys.exit(main())
