"""Checkpoints: one file per run, replaced whole after every epoch, and read only by the run that wrote it."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.errors import PlanMismatchError, StorageError, TrainingError
from secateur.files import replacing
from secateur.plans import check_shapes, tensor_shapes

FORMAT = 1


def identity(model: nn.Module, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What tells one run from another: the settings of its recipe and the shape of every tensor of its model."""
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    return {"settings": plain, "shapes": {name: list(shape) for name, shape in tensor_shapes(model).items()}}


def write_checkpoint(path: Path, run: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Replace the checkpoint of `run` by one that holds `state`. Raises StorageError; the old one then survives."""
    try:
        with replacing(path) as file:
            torch.save({"format": FORMAT, "run": dict(run), "state": dict(state)}, file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise StorageError(
            f"the checkpoint {path} could not be written: {error}. The one before it, if any, is intact: "
            "make room and start the same run again to go on from there."
        ) from error


def read_checkpoint(path: Path, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state in a checkpoint of `run`; None where there is no file. Never unpickles objects.

    Raises TrainingError where the file is damaged, or was written by another run: names the first difference.
    """
    if not path.exists():
        return None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        known = isinstance(found, dict) and found.get("format") == FORMAT
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise TrainingError(f"{path} is no readable checkpoint ({error}). {_ELSEWHERE}") from error
    if not known:
        raise TrainingError(f"{path} is no checkpoint of this version. {_ELSEWHERE}")
    _check_run(path, found["run"], run)
    state: dict[str, Any] = found["state"]
    return state


_ELSEWHERE = "Delete it to start again, or give another checkpoint path."


def _check_run(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    try:
        check_shapes(ours["shapes"], theirs["shapes"], "the model", "the checkpoint")
    except PlanMismatchError as error:
        raise TrainingError(f"{path} belongs to another architecture: {error} {_ELSEWHERE}") from error
    for name in {**ours["settings"], **theirs["settings"]}:
        here, there = ours["settings"].get(name), theirs["settings"].get(name)
        if here != there:
            raise TrainingError(f"{path} belongs to another run: {name} was {there!r}, is now {here!r}. {_ELSEWHERE}")
