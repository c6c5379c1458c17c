"""Save a pruned model and load it again, without pickle.

The file is a plain safetensors file: the shrunk model's tensors, and in its header the plan, which says what model
they fit once it is shrunk, and a checksum. Loading takes a freshly built dense model, shrinks a copy of it by that plan
and fills in the tensors. Nothing in the file is ever executed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from secateur.errors import ArtifactError, InputError, PlanMismatchError, SecateurError
from secateur.files import replacing
from secateur.inputs import check_model
from secateur.plans import Plan, check_shapes, tensor_shapes
from secateur.shrinking import shrink
from secateur.tensorfiles import DTYPES, Entry, check_entries, read_header, read_tensors, with_metadata

FORMAT = "1"
_FORMAT, _PLAN, _CHECKSUM = "secateur.format", "secateur.plan", "secateur.sha256"
_RESERVED = {"format", _FORMAT, _PLAN, _CHECKSUM}  # "format" is what other readers of safetensors files look at


@runtime_checkable
class PlannedModel(Protocol):
    """A shrunk model together with its plan, such as `Pruned` or a `Step`."""

    @property
    def model(self) -> nn.Module:
        """The shrunk model."""

    @property
    def plan(self) -> Plan:
        """The plan it was shrunk by."""


@dataclass(frozen=True)
class Artifact:
    """What a saved file says about itself: `describe` reads it without touching the tensors."""

    plan: Plan
    metadata: Mapping[str, str]  # the texts given to `save`
    tensors: Mapping[str, Entry]


def save(
    model: nn.Module | PlannedModel,
    path: Path | str,
    *,
    plan: Plan | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Save a shrunk model as a safetensors file that `load` can put into a freshly built dense model.

    `model` is what `prune` returned, a step of `prune_steps`, or a shrunk module with the `plan` it was shrunk by; a
    module without a plan is saved as it is and fits only its own architecture. `metadata` is text of your own.
    Parameters and persistent buffers are saved, a tied tensor once. An old file of that name stays until the new one is
    complete on the disk.
    Raises PlanMismatchError when model and plan do not belong together, ArtifactError when the model cannot be saved
    without pickle or the file cannot be written.
    """
    if not isinstance(model, nn.Module) and isinstance(model, PlannedModel):
        # The last step of `prune_steps` has a plan from the step before, and in `total` the one from the dense model.
        plan = getattr(model, "total", model.plan) if plan is None else plan
        model = model.model
    check_model(model)
    tensors = {name: _savable(name, tensor) for name, tensor in _tensors(model).items()}
    _check_no_objects(model)
    shapes = tensor_shapes(model)
    if plan is None:
        plan = Plan(cuts=(), edits=(), shapes=shapes)
    check_shapes(shapes, plan.shapes_after(), "the model", "the plan, once applied,")
    texts = {**_checked_metadata(metadata or {}), "format": "pt", _FORMAT: FORMAT, _PLAN: plan.to_json()}
    _write(Path(path), {**texts, _CHECKSUM: _checksum(texts, tensors)}, to_bytes(_unshared(tensors)))


def load(path: Path | str, model: nn.Module) -> nn.Module:
    """The shrunk model that `save` wrote, built from a dense `model` of the original architecture.

    `model` itself is not changed: a shrunk copy of it gets the file's tensors, on the device and in the train or eval
    mode of `model`. Raises ArtifactError for a file that is missing, damaged or of another kind (a pickle is refused
    unopened), PlanMismatchError, naming the first tensor that differs, when it belongs to another architecture.
    """
    check_model(model)
    texts, entries = read_header(path)
    plan = _plan(texts, path)
    try:
        plan.check(tensor_shapes(model))
    except PlanMismatchError as error:
        raise PlanMismatchError(f"{path} was saved from another architecture than this model: {error}") from error
    small = _shrunk(model, plan, path)
    own = _tensors(small)
    check_entries(entries, {name: Entry(tensor.dtype, tuple(tensor.shape)) for name, tensor in own.items()}, path)
    tensors = read_tensors(path)
    if not _matches(texts, tensors):
        raise ArtifactError(f"{path} is damaged: its content does not match its checksum. Save or copy it again.")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    return small


def describe(path: Path | str) -> Artifact:
    """The plan, the metadata and the tensors' types and shapes in a saved file. Raises ArtifactError as `load` does."""
    texts, entries = read_header(path)
    return Artifact(_plan(texts, path), {k: text for k, text in texts.items() if k not in _RESERVED}, entries)


def _plan(texts: Mapping[str, str], path: Path | str) -> Plan:
    if _PLAN not in texts:
        raise ArtifactError(
            f"{path} holds tensors but no pruning plan: it was not written by secateur.save. "
            "For a file of plain weights, use safetensors.torch.load_model."
        )
    if texts.get(_FORMAT) != FORMAT:
        raise ArtifactError(
            f"{path} has format {texts.get(_FORMAT)!r}, this version reads {FORMAT!r}: use the version that saved it."
        )
    try:
        return Plan.from_json(texts[_PLAN])
    except (PlanMismatchError, RecursionError, OverflowError) as error:
        raise ArtifactError(f"{path} is damaged: its pruning plan cannot be used: {error}") from error


def _shrunk(model: nn.Module, plan: Plan, path: Path | str) -> nn.Module:
    try:
        return shrink(model, plan)
    except SecateurError as error:
        raise ArtifactError(f"{path}: its pruning plan does not fit this model: {error}") from error
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        # Only a plan that someone wrote by hand gets here: it fits the shapes and yet asks for the impossible.
        raise ArtifactError(f"{path}: its pruning plan cannot be applied ({type(error).__name__}: {error}).") from error


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers; a tied tensor once, under its first name."""
    transient = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }
    buffers = {name: buffer for name, buffer in model.named_buffers() if name not in transient}
    return {**dict(model.named_parameters()), **buffers}


def _savable(name: str, tensor: Tensor) -> Tensor:
    """The tensor's values in the CPU's memory, row by row. Raises ArtifactError where they have no such form."""
    if tensor.is_meta or tensor.layout != torch.strided or tensor.dtype not in DTYPES.values():
        raise ArtifactError(
            f"{name!r} cannot be saved: expected a dense tensor of an ordinary type, "
            f"got {tensor.dtype}, {tensor.layout}, on {tensor.device}."
        )
    return tensor.detach().cpu().resolve_conj().contiguous()


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values with no memory in common, which safetensors asks for: views of one storage become copies."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return apart


def _check_no_objects(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ArtifactError(
                f"module {name!r} ({type(module).__name__}) keeps extra state in Python objects, which only "
                "pickle could save: turn that state into buffers."
            )


def _checked_metadata(metadata: Mapping[str, str]) -> Mapping[str, str]:
    for key, text in metadata.items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise InputError(f"metadata maps texts to texts; got {key!r}: {text!r}. Use json.dumps for other values.")
        if key in _RESERVED:
            raise InputError(f"the metadata key {key!r} is taken by the file format; choose another one.")
    return metadata


def _matches(texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bool:
    others = {key: text for key, text in texts.items() if key != _CHECKSUM}
    return texts.get(_CHECKSUM) == _checksum(others, tensors)


def _checksum(texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the header's texts and every tensor's name, type, shape and bytes, in the order of the names."""
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write(path: Path, texts: Mapping[str, str], content: bytes) -> None:
    """Write a safetensors file that holds the tensors of `content`, and `texts` as its metadata."""
    target = path.resolve()  # through a symbolic link, not over it
    if target.is_dir():
        raise ArtifactError(f"{path} is a folder: pass the name of a file in it, such as {path / 'small.safetensors'}.")
    header, tensors_start = with_metadata(content, texts)
    try:
        with replacing(target) as file:
            file.write(header)
            file.write(memoryview(content)[tensors_start:])
    except OSError as error:
        old = " The file that was there is unchanged." if target.exists() else ""
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}.{old}") from error
