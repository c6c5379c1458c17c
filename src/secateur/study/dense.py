"""The data and the dense models that trials share: loaded once per process, trained once per store of files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from secateur.data import Batches, Splits, load_data
from secateur.data.sets import Dataset
from secateur.errors import ArtifactError
from secateur.files import write_bytes
from secateur.naming import named_model
from secateur.nets import build
from secateur.plans import tensor_shapes
from secateur.study.spec import DataSet, Net, Training
from secateur.study.trials import Dense
from secateur.tensorfiles import read_header, read_tensors
from secateur.training import Epoch, evaluate, fit

EVALUATION_BATCH = 500
TRAIN_IMAGES = 5_000  # on so many training images, without augmentation, the train accuracy is taken


@dataclass(frozen=True)
class Workplace:
    """Where trials are run: everything about a machine that is none of a trial's business."""

    folder: Path  # checkpoints, dense models; shared by all workers
    data_dir: Path | None = None
    cache_dir: Path | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Scores:
    """Accuracies, fractions in [0, 1]."""

    train: float
    validation: float
    test: float


@dataclass(frozen=True, eq=False)
class Trained:
    """A dense model in eval mode on the CPU, how good it is, and how it got there."""

    model: nn.Module
    scores: Scores
    history: tuple[Epoch, ...]


def splits_of(data: DataSet, seed: int, place: Workplace) -> Splits:
    """The data of a trial. The validation part, and which training images are used, follow from the seed."""
    return _splits(data.model_dump_json(), seed, place.data_dir, place.cache_dir)


def digest_of(data: DataSet, seed: int, place: Workplace) -> dict[str, int | str]:
    """Sizes of the parts, and a digest of every pixel and label in them."""
    return _digest(data.model_dump_json(), seed, place.data_dir, place.cache_dir)


@lru_cache(maxsize=2)  # a worker meets the same data trial after trial
def _splits(text: str, seed: int, data_dir: Path | None, cache_dir: Path | None) -> Splits:
    data = DataSet.model_validate_json(text)
    found = load_data(data.name, data_dir, seed=seed, validation=data.validation, cache_dir=cache_dir, **data.options)
    if data.train_images is None or data.train_images >= len(found.train):
        return found
    chosen = torch.randperm(len(found.train), generator=torch.Generator().manual_seed(seed))[: data.train_images]
    return replace(found, train=found.train.subset(chosen.sort().values))


@lru_cache(maxsize=2)
def _digest(text: str, seed: int, data_dir: Path | None, cache_dir: Path | None) -> dict[str, int | str]:
    splits, total = _splits(text, seed, data_dir, cache_dir), hashlib.sha256()
    parts: dict[str, Dataset] = {name: getattr(splits, name) for name in ("train", "validation", "test")}
    for part in parts.values():
        total.update(part.images.numpy().tobytes())
        total.update(part.labels.numpy().tobytes())
    return {**{name: len(part) for name, part in parts.items()}, "sha256": total.hexdigest()[:16]}


def fresh_net(net: Net, splits: Splits, seed: int) -> nn.Module:
    """The network with weights drawn by the seed, for the classes of that data."""
    if ":" in net.name:
        return named_model(net.name, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(net.name, **{"num_classes": len(splits.train.classes), **net.options})


class FirstBatches:
    """The first batches of every epoch: shorter epochs, each of other images."""

    def __init__(self, batches: Batches, steps: int) -> None:
        self._batches, self._steps = batches, steps

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the coming iteration."""
        self._batches.set_epoch(epoch)

    def __len__(self) -> int:
        return min(self._steps, len(self._batches))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return islice(self._batches, self._steps)


def training_batches(splits: Splits, training: Training, seed: int, device: str = "cpu") -> Batches | FirstBatches:
    """The training images, shuffled by the seed, augmented where the recipe says so."""
    moves = splits.augmentation if training.augment else None
    whole = Batches(splits.train, training.batch_size, seed=seed, augmentation=moves, device=device)
    return whole if training.steps_per_epoch is None else FirstBatches(whole, training.steps_per_epoch)


def calibration_batches(splits: Splits, images: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Augmented training images for criteria and repair: the same ones for every trial of that data and seed."""
    size = min(250, images, len(splits.train))
    drawn = Batches(splits.train, size, seed=seed + 1_000_003, augmentation=splits.augmentation)
    return [batch for batch, _ in zip(drawn, range(-(-images // size)), strict=False)]


def accuracy(model: nn.Module, data: Dataset, device: str) -> float:
    """The fraction of images that are classified right."""
    return evaluate(model, Batches(data, EVALUATION_BATCH, shuffle=False), device=device).accuracy


def scores_of(model: nn.Module, splits: Splits, device: str) -> Scores:
    """Accuracies on the first training images, on validation and on test images."""
    seen = splits.train.subset(torch.arange(min(TRAIN_IMAGES, len(splits.train))))
    return Scores(*(accuracy(model, part, device) for part in (seen, splits.validation, splits.test)))


def trained(dense: Dense, place: Workplace) -> Trained:
    """The dense model: from its file, or trained now and written there. One process trains, others wait for it.

    Interrupted at any moment, the next call goes on from the last epoch. A damaged file is made anew.
    """
    path = place.folder / "dense" / f"{dense.key}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    splits = splits_of(dense.data, dense.seed, place)
    model = fresh_net(dense.net, splits, dense.seed)
    with FileLock(path.with_suffix(".lock")):  # released by the system when its holder dies
        found = _read(model, path)
        return found if found is not None else _train(model, dense, splits, place, path)


def _train(model: nn.Module, dense: Dense, splits: Splits, place: Workplace, path: Path) -> Trained:
    checkpoint = path.with_suffix(".checkpoint")
    fitted = fit(
        model,
        training_batches(splits, dense.training, dense.seed, place.device),
        dense.training.recipe(dense.seed),
        device=place.device,
        checkpoint=checkpoint,
        progress=False,
    )
    small = fitted.model.cpu()
    found = Trained(small, scores_of(small, splits, place.device), fitted.history)
    tensors = {name: tensor.contiguous() for name, tensor in small.state_dict().items()}
    facts = {"scores": asdict(found.scores), "history": [asdict(epoch) for epoch in fitted.history]}
    write_bytes(path, to_safetensors(tensors, {"secateur.dense": json.dumps(facts)}))
    checkpoint.unlink(missing_ok=True)
    return found


def _read(model: nn.Module, path: Path) -> Trained | None:
    """The model with the weights in the file; None, and the model as it was, where there is none that fits."""
    try:
        metadata, entries = read_header(path)
        facts = json.loads(metadata["secateur.dense"])
        scores, history = Scores(**facts["scores"]), tuple(Epoch(**epoch) for epoch in facts["history"])
        if {name: entry.shape for name, entry in entries.items()} != _state_shapes(model):
            return None
        model.load_state_dict(read_tensors(path))
    except (ArtifactError, KeyError, TypeError, ValueError):
        return None
    return Trained(model.eval(), scores, history)


def _state_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    state, shapes = model.state_dict(), tensor_shapes(model)
    return {name: shapes[name] for name in state}
