"""Batches: the order, the augmentation and the normalisation of a data set, exact for a given seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from secateur.data.augmenting import Augmentation, augment
from secateur.data.sets import Dataset
from secateur.errors import InputError


class Batches:
    """An iterable of (x, y): x float32 (batch, C, H, W), normalised; y int64 (batch,); both on `device`.

    Iterating twice gives the same batches twice, unless `set_epoch` comes between: the order and the augmentation
    follow from (seed, epoch) alone, so that a resumed run sees what the interrupted one would have seen. `fit` calls
    `set_epoch`; so must a training loop of your own::

        for epoch in range(30):
            batches.set_epoch(epoch)
            for x, y in batches:
                ...
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        augmentation: Augmentation | None = None,
        device: torch.device | str = "cpu",
        drop_last: bool = False,
    ) -> None:
        """Without `augmentation` the images come as they are. Raises InputError on a batch size that yields nothing."""
        if batch_size < 1:
            raise InputError(f"batch_size is at least 1, got {batch_size}.")
        if drop_last and batch_size > len(dataset):
            raise InputError(f"no batch of {batch_size} in {len(dataset)} images: lower batch_size or keep the last.")
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.augmentation = augmentation
        self.device = torch.device(device)
        self.drop_last = drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of the coming iterations."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches per epoch."""
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full if self.drop_last or not rest else full + 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(mixed(self.seed, self.epoch))
        count = len(self.dataset)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            picked = order[start : start + self.batch_size].to(self.dataset.images.device)
            images = self.dataset.images[picked].to(self.device)
            if self.augmentation is not None:
                images = augment(images, generator, self.augmentation)
            yield self.dataset.normalise(images), self.dataset.labels[picked].to(self.device)

    def __repr__(self) -> str:
        return f"Batches({len(self)} of {self.batch_size} from {self.dataset!r}, seed {self.seed}, epoch {self.epoch})"


def mixed(seed: int, epoch: int) -> int:
    """One seed from two."""
    # Neighbouring seeds and epochs must not share a stream: (seed 0, epoch 1) is not (seed 1, epoch 0).
    return (seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9 + 1) % 2**63
