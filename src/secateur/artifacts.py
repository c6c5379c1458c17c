"""Save a pruned model and load it again, without pickle.

The file is a plain safetensors file: the shrunk model's tensors, and in its header the plan, which says what model
they fit once it is shrunk, and a checksum. Loading takes a freshly built dense model, shrinks a copy of it by that plan
and fills in the tensors. Nothing in the file is ever executed. A transformers model can be saved as a folder, with the
config that rebuilds it beside the tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
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
from secateur.pretrained import Saveable, build, is_pretrained, write_description
from secateur.shrinking import shrink
from secateur.tensorfiles import (
    DTYPES,
    Entry,
    add_tensors,
    check_entries,
    clipped,
    read_header,
    read_tensors,
    with_metadata,
)
from secateur.tokens import check_vocabulary

FORMAT = "1"
TENSORS = "model.safetensors"  # in a folder; the name that other tools look for
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
    tokenizer: Saveable | None = None,
) -> None:
    """Save a shrunk model as a safetensors file that `load` can put into a freshly built dense model.

    `model` is what `prune` returned, a step of `prune_steps`, or a shrunk module with the `plan` it was shrunk by; a
    module without a plan is saved as it is and fits only its own architecture. `metadata` is text of your own.
    Parameters and persistent buffers are saved, a tied tensor once. An old file of that name stays until the new one is
    complete on the disk.

    A transformers model is saved as a folder, unless `path` ends in `.safetensors` or is a file: config, generation
    config and `tokenizer` (or processor) by their own `save_pretrained`, and `model.safetensors`, here with the buffers
    that are not persistent too. `load` needs nothing but the folder then.

    Raises PlanMismatchError when model and plan do not belong together, ArtifactError when the model cannot be saved
    without pickle or in this form, or the file cannot be written, InputError for a tokenizer of another model.
    """
    if not isinstance(model, nn.Module) and isinstance(model, PlannedModel):
        # The last step of `prune_steps` has a plan from the step before, and in `total` the one from the dense model.
        plan = getattr(model, "total", model.plan) if plan is None else plan
        model = model.model
    check_model(model)
    as_folder = _as_folder(path, model, tokenizer)
    if tokenizer is not None:
        check_vocabulary(model, tokenizer)
    tensors = {name: _savable(name, tensor) for name, tensor in _tensors(model, transient=as_folder).items()}
    _check_no_objects(model)
    shapes = tensor_shapes(model)
    if plan is None:
        plan = Plan(cuts=(), edits=(), shapes=shapes)
    check_shapes(shapes, plan.shapes_after(), "the model", "the plan, once applied,")
    texts = {**_checked_metadata(metadata or {}), "format": "pt", _FORMAT: FORMAT, _PLAN: plan.to_json()}
    texts[_CHECKSUM] = _checksum(texts, tensors)
    content = to_bytes(_unshared(tensors))
    if as_folder:
        _write_folder(Path(path), texts, content, model, tokenizer)
    else:
        _write(Path(path), texts, content)


def load(path: Path | str, model: nn.Module | None = None) -> nn.Module:
    """The shrunk model that `save` wrote, built from a dense `model` of the original architecture.

    `model` itself is not changed: a shrunk copy of it gets the file's tensors, on the device and in the train or eval
    mode of `model` (a model on the meta device gets them on the CPU). A folder that was saved from a transformers model
    needs no `model`: the installed transformers builds it from the config without allocating the dense weights, in eval
    mode; no code from the folder or the network is ever run.

    Raises ArtifactError for a file that is missing, damaged or of another kind (a pickle is refused unopened),
    PlanMismatchError, naming the first tensor that differs, when it belongs to another architecture.
    """
    if model is not None:
        check_model(model)
    file = _file(path)
    texts, entries = read_header(file)
    plan = _plan(texts, file)
    small = _shrunk(_dense(path, plan) if model is None else model, plan, path)
    own = {**_tensors(small), **{n: t for n, t in _tensors(small, transient=True).items() if n in entries}}
    check_entries(entries, {name: _expected(tensor, entries.get(name)) for name, tensor in own.items()}, file)
    tensors = read_tensors(file)
    if not _matches(texts, tensors):
        raise ArtifactError(f"{file} is damaged: its content does not match its checksum. Save or copy it again.")
    _fill_(small, {id(tensor): tensors[name] for name, tensor in own.items()})
    _check_filled(small, path)
    return small


def describe(path: Path | str) -> Artifact:
    """What a saved file or folder says about itself. Raises ArtifactError as `load` does."""
    texts, entries = read_header(_file(path))
    return Artifact(_plan(texts, path), {k: text for k, text in texts.items() if k not in _RESERVED}, entries)


def _plan(texts: Mapping[str, str], path: Path | str) -> Plan:
    if _PLAN not in texts:
        raise ArtifactError(
            f"{path} holds tensors but no pruning plan: it was not written by secateur.save. "
            "For a file of plain weights, use safetensors.torch.load_model."
        )
    if texts.get(_FORMAT) != FORMAT:
        raise ArtifactError(
            f"{path} has format {clipped(texts.get(_FORMAT))!r}, this version reads {FORMAT!r}: "
            "use the version that saved it."
        )
    try:
        return Plan.from_json(texts[_PLAN])
    except (PlanMismatchError, RecursionError, OverflowError) as error:
        raise ArtifactError(f"{path} is damaged: its pruning plan cannot be used: {clipped(error)}") from error


def _file(path: Path | str) -> Path | str:
    """The file with the tensors: in a folder, the one of the usual name."""
    inside = Path(path) / TENSORS
    return inside if os.path.isdir(path) and os.path.lexists(inside) else path  # noqa: PTH112 - never raises


def _as_folder(path: Path | str, model: nn.Module, tokenizer: Saveable | None) -> bool:
    """Whether to save as a folder. Raises ArtifactError where only one form is possible and the other is asked for."""
    is_folder = os.path.isdir(path) or str(path).endswith(os.sep)  # noqa: PTH112 - never raises
    named_file = Path(path).suffix == ".safetensors" or os.path.exists(path)  # noqa: PTH110 - never raises
    if is_pretrained(model) and (is_folder or not named_file):
        return True
    if is_folder:
        raise ArtifactError(
            f"{path} is a folder: pass the name of a file in it, such as {Path(path) / 'small.safetensors'}. "
            "Only a transformers model, which its config can rebuild, is saved as a folder."
        )
    if tokenizer is not None:
        raise ArtifactError(f"a tokenizer is saved in a folder with its transformers model; {path} becomes a file.")
    return False


def _dense(path: Path | str, plan: Plan) -> nn.Module:
    if not os.path.isdir(path):  # noqa: PTH112 - never raises
        raise InputError(f"{path} is no folder with a config: pass the dense model, load(path, build_model()).")
    return build(Path(path), plan.shapes)


def _shrunk(model: nn.Module, plan: Plan, path: Path | str) -> nn.Module:
    try:
        plan.check(tensor_shapes(model))
    except PlanMismatchError as error:
        raise PlanMismatchError(
            f"{path} was saved from another architecture than this model: {clipped(error)}"
        ) from error
    try:
        return shrink(model, plan)
    except SecateurError as error:
        raise ArtifactError(f"{path}: its pruning plan does not fit this model: {clipped(error)}") from error
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        # Only a plan that someone wrote by hand gets here: it fits the shapes and yet asks for the impossible.
        raise ArtifactError(
            f"{path}: its pruning plan cannot be applied ({type(error).__name__}: {clipped(error)})."
        ) from error


def _expected(tensor: Tensor, found: Entry | None) -> Entry:
    """What a file must hold for this tensor. On the meta device a model says nothing about its precision."""
    free = tensor.is_meta and found is not None and tensor.is_floating_point() and found.dtype.is_floating_point
    return Entry(found.dtype if found is not None and free else tensor.dtype, tuple(tensor.shape))


def _fill_(model: nn.Module, values: Mapping[int, Tensor]) -> None:
    """Put `values` into the tensors of `model` with these ids; what was on the meta device is replaced, tied or not."""
    new: dict[int, Tensor] = {}
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if id(tensor) in values and tensor.is_meta:
                new[id(tensor)] = _materialised(tensor, values[id(tensor)])
            elif id(tensor) in values:
                tensor.copy_(values[id(tensor)])
    for module in model.modules():
        for key, old in [*module._parameters.items(), *module._buffers.items()]:
            if old is not None and id(old) in new:
                setattr(module, key, new[id(old)])  # not into the dict: an LSTM keeps a second list of its weights


def _materialised(tensor: Tensor, value: Tensor) -> Tensor:
    value = value.clone()  # the file is mapped into memory, and might change
    if not isinstance(tensor, nn.Parameter):
        return value
    parameter = nn.Parameter(value, requires_grad=tensor.requires_grad)
    vars(parameter).update(vars(tensor))
    return parameter


def _check_filled(model: nn.Module, path: Path | str) -> None:
    for name, module in model.named_modules():
        for key, value in [*vars(module).items(), *module._parameters.items(), *module._buffers.items()]:
            if isinstance(value, Tensor) and value.is_meta:
                raise ArtifactError(
                    f"{path} has no values for {key!r} of module {name!r}, and nor has a model on the meta device: "
                    "build the dense model with real tensors and pass it: load(path, build_model())."
                )


def _tensors(model: nn.Module, *, transient: bool = False) -> dict[str, Tensor]:
    """Parameters and persistent buffers, or all buffers; a tied tensor once, under its first name."""
    hidden = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }
    buffers = {name: buffer for name, buffer in model.named_buffers() if transient or name not in hidden}
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
    """SHA-256 over the header's texts and the tensors."""
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode())
    add_tensors(digest, tensors)
    return digest.hexdigest()


def _write_folder(
    folder: Path, texts: Mapping[str, str], content: bytes, model: nn.Module, tokenizer: Saveable | None
) -> None:
    """Write a model's description, tokenizer and tensors into a folder, each file taking the place of an old one."""
    target = folder.resolve()
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=target) as name:
            staging = Path(name)
            write_description(model, staging, tokenizer)
            _write(staging / TENSORS, texts, content)
            files = [file for file in staging.rglob("*") if file.is_file()]
            for file in sorted(files, key=lambda file: file.name == TENSORS):  # the tensors last
                place = target / file.relative_to(staging)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, place)  # noqa: PTH105 - over a symbolic link, not through it
    except OSError as error:
        raise ArtifactError(f"cannot write {folder}: {error.strerror or error}.") from error


def _write(path: Path, texts: Mapping[str, str], content: bytes) -> None:
    """Write a safetensors file that holds the tensors of `content`, and `texts` as its metadata."""
    target = path.resolve()  # through a symbolic link, not over it
    header, tensors_start = with_metadata(content, texts)
    try:
        with replacing(target) as file:
            file.write(header)
            file.write(memoryview(content)[tensors_start:])
    except OSError as error:
        old = " The file that was there is unchanged." if target.exists() else ""
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}.{old}") from error
