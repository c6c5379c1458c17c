"""Dataset and Splits: labelled images as two tensors, the currency of everything that trains or evaluates here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from secateur.data.augmenting import Augmentation
from secateur.errors import DataError, InputError


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images, decoded. Two data sets are equal when their tensors are; use `same_as`."""

    images: Tensor  # uint8 (N, C, H, W), 0 to 255
    labels: Tensor  # int64 (N,), positions in `classes`
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # per image channel, of pixels in [0, 1], measured on the training images
    std: tuple[float, ...]
    name: str

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise DataError(f"{self.name}: images must be uint8 (N, C, H, W), got {_form(self.images)}.")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise DataError(f"{self.name}: labels must be int64 ({len(self.images)},), got {_form(self.labels)}.")
        if not len(self.images):
            raise DataError(f"{self.name}: there is no image in it.")
        if self.labels.min() < 0 or self.labels.max() >= len(self.classes):
            raise DataError(f"{self.name}: labels must lie in [0, {len(self.classes)}): one per class name.")
        if not len(self.mean) == len(self.std) == self.images.shape[1] or min(self.std) <= 0:
            raise DataError(f"{self.name}: mean and (positive) std need one value per image channel.")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def subset(self, indices: Tensor) -> Dataset:
        """The samples at these positions, in this order."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def normalise(self, images: Tensor) -> Tensor:
        """The float32 images a model sees: (pixel / 255 - mean) / std, on the device of `images`."""
        shape = (1, -1, 1, 1)
        mean = torch.tensor(self.mean, device=images.device).mul(255).view(shape)
        std = torch.tensor(self.std, device=images.device).mul(255).view(shape)
        return (images.float() - mean) / std

    def same_as(self, other: Dataset) -> bool:
        """Whether both hold the same samples in the same order under the same classes."""
        return (
            self.classes == other.classes
            and torch.equal(self.images, other.images)
            and torch.equal(self.labels, other.labels)
        )

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.image_shape))
        return f"Dataset({self.name}: {len(self):,} images {shape}, {len(self.classes)} classes)"


@dataclass(frozen=True, eq=False)
class Splits:
    """What to learn from, what to choose by, and what to report: three disjoint data sets."""

    train: Dataset
    validation: Dataset  # taken from the training images; every choice is made on it
    test: Dataset  # looked at once, at the end; nothing is chosen by it
    augmentation: Augmentation = field(default_factory=Augmentation)  # what leaves a label of this data true

    def __repr__(self) -> str:
        name, parts = self.train.name, f"{len(self.train):,} + {len(self.validation):,} + {len(self.test):,}"
        return f"Splits({name}: train + validation + test = {parts})"


def hold_out(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split a data set in two: (the rest, the held-out `fraction`), by class, at random by `seed`.

    Every class loses its share, rounded; the order inside both parts is that of the whole.
    """
    if not 0 < fraction < 1:
        raise InputError(f"the held-out fraction lies in (0, 1); got {fraction}. For a tenth, pass 0.1.")
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(dataset), dtype=torch.bool)
    for label in range(len(dataset.classes)):
        members = (dataset.labels == label).nonzero().flatten()
        chosen = torch.randperm(len(members), generator=generator)[: round(fraction * len(members))]
        held[members[chosen]] = True
    if not held.any() or held.all():
        raise DataError(f"{dataset.name}: {len(dataset)} images are too few to hold out a fraction of {fraction}.")
    return dataset.subset((~held).nonzero().flatten()), dataset.subset(held.nonzero().flatten())


def pixel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each image channel, of pixels in [0, 1]; exact, from the histogram of uint8.

    A constant channel gets the deviation 1, so that dividing by it is defined.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in range(images.shape[1]):
        counts = torch.bincount(images[:, channel].flatten(), minlength=256).double()
        weights = counts / counts.sum()
        mean = float(weights @ values)
        variance = float(weights @ (values - mean) ** 2)
        means.append(mean)
        deviations.append(variance**0.5 or 1.0)
    return tuple(means), tuple(deviations)


@dataclass(frozen=True)
class Decoded:
    """Images and labels of every part that a source has, before anything is split or measured."""

    parts: Mapping[str, tuple[Tensor, Tensor]]  # "train", perhaps "validation" and "test" -> images, labels
    classes: tuple[str, ...]


def make_splits(source: Decoded, name: str, *, validation: float, seed: int, augmentation: Augmentation) -> Splits:
    """Splits of a decoded source. What it does not bring itself is taken from its training images.

    A missing test set is a fifth of them that does not depend on `seed`: runs with different seeds report on the same
    images. A missing validation set is the fraction `validation` of what remains, chosen by `seed`.
    """
    channels = source.parts["train"][0].shape[1]
    unmeasured = (0.0,) * channels, (1.0,) * channels
    found = {part: Dataset(*pair, source.classes, *unmeasured, name) for part, pair in source.parts.items()}
    if "test" not in found:
        found["train"], found["test"] = hold_out(found["train"], 0.2, 0)
    if "validation" not in found:
        found["train"], found["validation"] = hold_out(found["train"], validation, seed)
    mean, std = pixel_statistics(found["train"].images)
    return Splits(
        replace(found["train"], mean=mean, std=std),
        replace(found["validation"], mean=mean, std=std),
        replace(found["test"], mean=mean, std=std),
        augmentation,
    )


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
