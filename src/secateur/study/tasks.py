"""What networks learn and are judged by: images, or sentences. All else in a study is the same for both."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur.data import Batches, Splits, load_data
from secateur.data.sources import data_folder
from secateur.errors import InputError
from secateur.naming import named_model
from secateur.nets import build
from secateur.study.spec import TEXTS, DataSet, Net, Training

EVALUATION_BATCH = 128  # larger ones leave the caches of a CPU: 500 take 1.4 times as long per image
TRAIN_SAMPLES = 5_000  # on so many training samples, not augmented, the train accuracy is taken
CALIBRATION_BATCH = 250
PARTS = ("train", "validation", "test")
_CALIBRATION_SEED = 1_000_003  # away from the seeds of training


class Task(Protocol):
    """A data set, split, as networks see it. Batches are what `fit`, `evaluate` and `repair` take."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Samples per part."""

    @property
    def digest(self) -> str:
        """Of everything in it."""

    def fresh(self, net: Net, seed: int) -> nn.Module:
        """The network before it is trained, for the classes of this data; what it draws follows from the seed."""

    def training(self, how: Training, seed: int, device: str = "cpu") -> Any:
        """Training batches by that recipe: an iterable with `set_epoch` and a length."""

    def calibration(self, samples: int, seed: int) -> list[Any]:
        """Training samples for criteria and repair: the same for every trial of this data and seed."""

    def part(self, name: str, most: int | None = None) -> Iterable[Any]:
        """The samples of a part in order, not augmented; the first `most` of them."""

    def example(self, samples: int, length: int) -> Any:
        """Inputs for a network: so many validation samples. Of sentences, `length` tokens each."""


def task_of(net: Net, data: DataSet, seed: int, data_dir: Path | None, cache_dir: Path | None) -> Task:
    """The data of a trial. The validation part, and which training samples are used, follow from the seed.

    Raises InputError for a network that cannot learn it, DataError where the data is missing.
    """
    if data.name in TEXTS:
        if not net.name.startswith("hf:"):
            raise InputError(f"{data.name} takes a text classifier, hf:NAME or hf:FOLDER; {net.name!r} is none.")
        return _text_task(net.name, data.model_dump_json(), seed, data_dir)
    if net.name.startswith("hf:"):
        raise InputError(f"{net.name} reads text; {data.name} are images.")
    return _image_task(data.model_dump_json(), seed, data_dir, cache_dir)


@dataclass(frozen=True, eq=False)
class ImageTask:
    """Images and their classes."""

    splits: Splits
    digest: str

    @property
    def sizes(self) -> Mapping[str, int]:
        """Images per part."""
        return {name: len(getattr(self.splits, name)) for name in PARTS}

    def fresh(self, net: Net, seed: int) -> nn.Module:
        """One of Secateur's networks, or one by a name that says where it is from."""
        if ":" in net.name:
            return named_model(net.name, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build(net.name, **{"num_classes": len(self.splits.train.classes), **net.options})

    def training(self, how: Training, seed: int, device: str = "cpu") -> Any:
        """Shuffled; augmented where the recipe says so."""
        moves = self.splits.augmentation if how.augment else None
        batches = Batches(self.splits.train, how.batch_size, seed=seed, augmentation=moves, device=device)
        return _shortened(batches, how.steps_per_epoch)

    def calibration(self, samples: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        """Augmented, as in training."""
        train, moves = self.splits.train, self.splits.augmentation
        size = min(CALIBRATION_BATCH, samples, len(train))
        drawn = Batches(train, size, seed=seed + _CALIBRATION_SEED, augmentation=moves)
        return list(islice(drawn, -(-samples // size)))

    def part(self, name: str, most: int | None = None) -> Batches:
        """In order."""
        data = getattr(self.splits, name)
        chosen = data if most is None or most >= len(data) else data.subset(torch.arange(most))
        return Batches(chosen, EVALUATION_BATCH, shuffle=False)

    def example(self, samples: int, length: int) -> Tensor:
        """(samples, C, H, W); the first images again where there are not as many."""
        validation = self.splits.validation
        return validation.normalise(validation.images[torch.arange(samples) % len(validation)])


@dataclass(frozen=True, eq=False)
class TextTask:
    """Sentences and their classes, as the tokenizer of one network cuts them."""

    splits: Any  # TextSplits
    digest: str
    max_length: int
    data_dir: Path | None

    @property
    def sizes(self) -> Mapping[str, int]:
        """Sentences per part."""
        return {name: len(getattr(self.splits, name)) for name in PARTS}

    def fresh(self, net: Net, seed: int) -> nn.Module:
        """The pretrained encoder with a new head."""
        from secateur.language import text_classifier

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            classes = self.splits.train.classes
            return text_classifier(_model_place(net.name, self.data_dir), classes, max_length=self.max_length)[0]

    def training(self, how: Training, seed: int, device: str = "cpu") -> Any:
        """Shuffled, sentences of similar length together."""
        from secateur.data.text import TextBatches

        return _shortened(TextBatches(self.splits.train, how.batch_size, seed=seed), how.steps_per_epoch)

    def calibration(self, samples: int, seed: int) -> list[dict[str, Tensor]]:
        """Drawn from the training sentences."""
        from secateur.data.text import TextBatches

        size = min(64, samples)
        drawn = TextBatches(self.splits.train, size, seed=seed + _CALIBRATION_SEED)
        return list(islice(drawn, -(-samples // size)))

    def part(self, name: str, most: int | None = None) -> Any:
        """In order."""
        from secateur.data.text import TextBatches

        data = getattr(self.splits, name)
        chosen = data if most is None or most >= len(data) else data.subset(torch.arange(most))
        return TextBatches(chosen, EVALUATION_BATCH, shuffle=False)

    def example(self, samples: int, length: int) -> dict[str, Tensor]:
        """input_ids and attention_mask (samples, length): validation sentences in a row, without padding."""
        tokens = self.splits.validation.tokens
        picked = torch.arange(samples * length) % len(tokens)
        ids = tokens[picked].long().reshape(samples, length)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class FirstBatches:
    """The first batches of every epoch: shorter epochs, each of other samples."""

    def __init__(self, batches: Any, steps: int) -> None:
        self._batches, self._steps = batches, steps

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the coming iteration."""
        self._batches.set_epoch(epoch)

    def __len__(self) -> int:
        return min(self._steps, len(self._batches))

    def __iter__(self) -> Iterator[Any]:
        return islice(self._batches, self._steps)


def _shortened(batches: Any, steps: int | None) -> Any:
    return batches if steps is None else FirstBatches(batches, steps)


@lru_cache(maxsize=2)  # a worker meets the same data trial after trial
def _image_task(text: str, seed: int, data_dir: Path | None, cache_dir: Path | None) -> ImageTask:
    data = DataSet.model_validate_json(text)
    found = load_data(data.name, data_dir, seed=seed, validation=data.validation, cache_dir=cache_dir, **data.options)
    if data.train_samples is not None and data.train_samples < len(found.train):
        order = torch.randperm(len(found.train), generator=torch.Generator().manual_seed(seed))
        found = replace(found, train=found.train.subset(order[: data.train_samples].sort().values))
    parts = [getattr(found, name) for name in PARTS]
    return ImageTask(found, _digest([tensor for part in parts for tensor in (part.images, part.labels)]))


@lru_cache(maxsize=2)
def _text_task(name: str, text: str, seed: int, data_dir: Path | None) -> TextTask:
    from secateur.data.text import sst2
    from secateur.language import text_tokenizer

    data = DataSet.model_validate_json(text)
    length = data.options.get("max_length", 128)
    if set(data.options) - {"max_length"} or isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise InputError(f"{data.name} takes the option max_length, a whole number; got {data.options}.")
    found = sst2(
        text_tokenizer(_model_place(name, data_dir)),
        data_dir,
        seed=seed,
        validation=data.validation,
        sentences=data.train_samples,
        max_length=length,
    )
    parts = [getattr(found, name) for name in PARTS]
    tensors = [tensor for part in parts for tensor in (part.tokens, part.starts, part.labels)]
    return TextTask(found, _digest(tensors), length, data_dir)


def _digest(tensors: Iterable[Tensor]) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


def _model_place(name: str, data_dir: Path | None) -> str:
    """Where a model of `transformers` is: a folder inside that of the data sets, or what its name says."""
    place, root = name.removeprefix("hf:"), data_folder(data_dir)
    return str(root / place) if root is not None and (root / place).is_dir() else place
