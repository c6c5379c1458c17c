"""The dense models that trials share: trained once per folder of checkpoints, whoever asks first."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import save as to_safetensors
from torch import nn

from secateur.errors import ArtifactError
from secateur.files import write_bytes
from secateur.inputs import channels_last_copy
from secateur.plans import tensor_shapes
from secateur.study.spec import Training
from secateur.study.tasks import TRAIN_SAMPLES, Task, task_of
from secateur.study.trials import Dense
from secateur.tensorfiles import read_header, read_tensors
from secateur.training import Epoch, evaluate, fit


@dataclass(frozen=True)
class Workplace:
    """Where trials are run: everything about a machine that is none of a trial's business."""

    folder: Path  # checkpoints, dense models; shared by all workers
    data_dir: Path | None = None
    cache_dir: Path | None = None
    device: str = "cpu"

    def task(self, dense: Dense) -> Task:
        """The data that this model learns."""
        return task_of(dense.net, dense.data, dense.seed, self.data_dir, self.cache_dir)


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


def accuracy(model: nn.Module, task: Task, part: str, device: str, how: Training) -> float:
    """The fraction of samples of that part that are classified right; of the training part, of the first ones.

    In the precision and the memory layout of `how`, which is the training of the dense model.
    """
    most = TRAIN_SAMPLES if part == "train" else None
    if how.channels_last:
        model = channels_last_copy(model)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=how.bf16):
        return evaluate(model, task.part(part, most), device=device).accuracy


def scores_of(model: nn.Module, task: Task, device: str, how: Training) -> Scores:
    """Accuracies on training, validation and test samples."""
    return Scores(*(accuracy(model, task, part, device, how) for part in ("train", "validation", "test")))


def trained(dense: Dense, place: Workplace) -> Trained:
    """The dense model: from its file, or trained now and written there. One process trains, others wait for it.

    Interrupted at any moment, the next call goes on from the last epoch. A damaged file is made anew.
    """
    path = place.folder / "dense" / f"{dense.key}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    task = place.task(dense)
    model = task.fresh(dense.net, dense.seed)
    with FileLock(path.with_suffix(".lock")):  # released by the system when its holder dies
        found = _read(model, path)
        return found if found is not None else _train(model, dense, task, place, path)


def _train(model: nn.Module, dense: Dense, task: Task, place: Workplace, path: Path) -> Trained:
    checkpoint = path.with_suffix(".checkpoint")
    fitted = fit(
        model,
        task.training(dense.training, dense.seed, place.device),
        dense.training.recipe(dense.seed),
        device=place.device,
        checkpoint=checkpoint,
        progress=False,
    )
    small = fitted.model.cpu()
    found = Trained(small, scores_of(small, task, place.device, dense.training), fitted.history)
    tensors = {name: tensor.clone().contiguous() for name, tensor in small.state_dict().items()}  # tied ones apart
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
