"""The dense networks that the other benchmarks prune: trained once by seed, kept, and read back.

    python benchmarks/dense.py --data-dir DATA --nets resnet20 vgg16 --seeds 0 1 --threads 1

Every seed trains on 49,000 images and takes the last epoch; 1,000 others validate, and nothing is chosen by the test
set. An interrupted training goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.data import Batches, Splits, load_data
from secateur.nets import build
from secateur.training import Fitted, Recipe, evaluate, fit

RUNS = Path(__file__).parent.parent / "runs"
BATCH_SIZE = 128
VALIDATION = 0.02  # of the training images
RESNET20 = Recipe(epochs=36, lr=0.2, warmup_epochs=3, weight_decay=5e-4, bf16=True, channels_last=True)
VGG16 = replace(RESNET20, epochs=24, lr=0.1)
TUNING = Recipe(epochs=2, lr=0.02, weight_decay=5e-4, bf16=True, channels_last=True)


@dataclass(frozen=True)
class Net:
    """A network of the studies, and how it is trained."""

    build: Callable[[], nn.Module]
    recipe: Recipe
    folder: str  # of its checkpoints, under `runs/`
    title: str


NETS = {
    "resnet20": Net(lambda: build("resnet20"), RESNET20, "cifar10_resnet20", "ResNet-20"),
    "vgg16": Net(lambda: build("vgg16", width=32), VGG16, "cifar10_vgg16_half", "VGG-16-BN at half width"),
}


def splits(data_dir: Path | None, seed: int) -> Splits:
    """CIFAR-10: training, validation (by seed) and test images."""
    return load_data("cifar10", data_dir, seed=seed, validation=VALIDATION)


def training_batches(parts: Splits, seed: int, first_epoch: int = 0) -> Batches:
    """Augmented training batches. With `first_epoch`, those of the epochs from there on."""
    kind = Batches if not first_epoch else _Later
    batches = kind(parts.train, BATCH_SIZE, seed=seed, augmentation=parts.augmentation)
    batches.set_epoch(0)
    if isinstance(batches, _Later):
        batches.first = first_epoch
    return batches


class _Later(Batches):
    """Fine-tuning sees other crops and flips than training did: its epochs count on."""

    first = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        shifted = Batches(self.dataset, self.batch_size, seed=self.seed, augmentation=self.augmentation)
        shifted.set_epoch(self.first + self.epoch)
        return iter(shifted)


def dense(name: str, parts: Splits, seed: int, *, progress: bool | None = None) -> Fitted:
    """The trained network of a seed: read back where it is finished, trained from where it stopped otherwise."""
    net = NETS[name]
    recipe = replace(net.recipe, seed=seed)
    torch.manual_seed(seed)
    checkpoint = RUNS / net.folder / f"dense-seed{seed}-epochs{recipe.epochs}.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    return fit(net.build(), training_batches(parts, seed), recipe, checkpoint=checkpoint, progress=progress)


def accuracy(model: nn.Module, data: Batches) -> float:
    """Accuracy, the forward under bfloat16 autocast: twice as fast, and equal within a few images of 10,000."""

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits: Tensor = model(batch[0].contiguous(memory_format=torch.channels_last))
        return logits.float()

    return evaluate(model, data, forward=forward).accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder of cifar10/*.parquet; default SECATEUR_DATA")
    parser.add_argument("--nets", nargs="+", choices=sorted(NETS), default=sorted(NETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for seed in options.seeds:
        parts = splits(options.data_dir, seed)
        for name in options.nets:
            model = dense(name, parts, seed, progress=True).model
            found = [accuracy(model, Batches(part, 500, shuffle=False)) for part in (parts.validation, parts.test)]
            print(f"{name}, seed {seed}: validation {found[0]:.2%}, test {found[1]:.2%}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
