"""Transformers models in a folder: the config that rebuilds one, written beside its tensors and read with distrust.

Only a class of the installed transformers library is ever built, and only on the meta device, where sizes cost
nothing. What a config could make that library fetch or run is never looked at.
"""

from __future__ import annotations

import copy
import math
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from secateur.errors import ArtifactError
from secateur.tensorfiles import DTYPES, clipped, read_json

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"

# Entries that name code or files to fetch (remote classes, kernels, checkpoints), or only a default that the library
# works out again. `num_labels` would make it write out that many labels; configs list the labels themselves.
_NOT_READ = {
    *("auto_map", "custom_pipelines", "name_or_path", "_name_or_path", "quantization_config", "num_labels"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal", "kernel_config"),
    "use_pretrained_backbone",
}
_FETCHED = ("hf-hub:", "hf_hub:", "local-dir:", "http:", "https:", "file:")  # how timm and others name what they fetch
_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}  # as transformers writes them
_LARGEST = 2**24  # more than any vocabulary or context length; lists of this length are still made in a moment
_MOST_LAYERS = 1000  # more than any model has; one with more tensors than this may have as many layers
_REGISTRATIONS = 32  # modules and parameters made per tensor; the models of the library need less than 5


class Saveable(Protocol):
    """A tokenizer, a processor: what can write itself into a folder."""

    def save_pretrained(self, save_directory: str) -> Any:
        """Write the files into that folder."""


def is_pretrained(model: nn.Module) -> bool:
    """Whether this is a model of the transformers library, or of a class derived from one."""
    # By name: whoever has no such model should not wait for the import.
    return any(
        kind.__name__ == "PreTrainedModel" and kind.__module__ == "transformers.modeling_utils"
        for kind in type(model).__mro__
    )


def write_description(model: Any, folder: Path, tokenizer: Saveable | None) -> None:
    """Write what belongs beside the tensors of a transformers model: its config, generation config and tokenizer.

    The config is that of the dense model, and names the model's class. Raises OSError, and ArtifactError where the
    library refuses to write one of them.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [_architecture(type(model))]
    config.dtype = model.dtype
    try:
        config.save_pretrained(str(folder))
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(str(folder))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
    except OSError:
        raise
    except Exception as error:
        raise ArtifactError(
            f"the config or tokenizer of this {type(model).__name__} cannot be saved: {_said(error)}"
        ) from error


def build(folder: Path, shapes: Mapping[str, Any]) -> nn.Module:
    """The model that a folder's config describes, in eval mode on the meta device.

    `shapes` are the tensors it should have; a config that goes far beyond them is stopped. Raises ArtifactError for a
    config that is missing or damaged, asks for an unknown class, or cannot be built.
    """
    path = folder / CONFIG
    raw = read_json(path)
    try:
        config = _checked(raw, path, most_layers=max(len(shapes), _MOST_LAYERS))
        kind = _model_class(raw.get("architectures"), path)
        with _at_most(_REGISTRATIONS * max(len(shapes), _REGISTRATIONS), path), torch.device("meta"):
            model: nn.Module = kind(kind.config_class.from_dict(config))
        if os.path.lexists(folder / GENERATION_CONFIG):
            _read_generation_config(model, folder / GENERATION_CONFIG)
    except ArtifactError:
        raise
    except Exception as error:  # whatever the library makes of a config that someone wrote by hand
        raise ArtifactError(
            f"{path} does not describe a model that transformers can build: {_said(error)} "
            "If you can build the dense model yourself, pass it: load(folder, build_model())."
        ) from error
    return model.eval()


def _architecture(kind: type) -> str:
    # A class of the user's own gets its full name, so that it is never taken for the library's class of that name.
    return kind.__name__ if kind.__module__.startswith("transformers.") else f"{kind.__module__}.{kind.__qualname__}"


def _model_class(architectures: Any, path: Path) -> Any:
    if not isinstance(architectures, list) or len(architectures) != 1 or not isinstance(architectures[0], str):
        raise ArtifactError(f"{path} must name one class as `architectures`; got {clipped(architectures)}.")
    name: str = architectures[0]
    try:
        import transformers
    except ImportError as error:
        raise ArtifactError(f"{path} describes a transformers model: pip install 'secateur[hf]'.") from error
    readable = name.isidentifier() and not name.startswith("_")
    kind: Any = getattr(transformers, name, None) if readable else None
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    if not known or not kind.__module__.startswith("transformers.models."):
        raise ArtifactError(
            f"{path} names the class {clipped(name)!r}, which is no model of the installed transformers "
            f"{transformers.__version__}: pass the dense model, load(folder, build_model())."
        )
    return kind


def _read_generation_config(model: Any, path: Path) -> None:
    raw = _checked(read_json(path), path, most_layers=_LARGEST)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config = type(model.generation_config).from_dict(raw)


def _checked(value: Any, path: Path, *, most_layers: int, key: str = "") -> Any:
    """A config's JSON without the entries that are not read. Raises ArtifactError about what no config says."""
    if isinstance(value, dict):
        if set(value) == {"__float__"} and str(value["__float__"]) in _FLOATS:
            return _FLOATS[str(value["__float__"])]
        return {
            key: _checked(item, path, most_layers=most_layers, key=key)
            for key, item in value.items()
            if key not in _NOT_READ
        }
    if isinstance(value, list):
        return [_checked(item, path, most_layers=most_layers, key=key) for item in value]
    if isinstance(value, str) and value.lower().startswith(_FETCHED):
        raise ArtifactError(
            f"{path} names something to fetch as {clipped(key)!r}: {clipped(value)!r}. Only local parts are built."
        )
    if key in ("dtype", "torch_dtype") and value is not None and str(value) not in _DTYPE_NAMES:
        raise ArtifactError(f"{path} names the {key} {clipped(value)!r}; known: {', '.join(sorted(_DTYPE_NAMES))}.")
    if isinstance(value, int) and abs(value) > _most(key, most_layers):
        raise ArtifactError(
            f"{path} claims {clipped(key)} = {clipped(value)}, far more than the saved tensors can belong to."
        )
    return value


def _most(key: str, most_layers: int) -> float:
    if "theta" in key:  # the base of rotary frequencies: the one number in configs that is large and no size
        return math.inf
    return most_layers if "layer" in key else _LARGEST


_DTYPE_NAMES = {str(dtype).removeprefix("torch.") for dtype in DTYPES.values()}


@contextmanager
def _at_most(registrations: int, path: Path) -> Iterator[None]:
    """Stop, with an ArtifactError, a model that registers more modules and parameters than that."""
    thread, count = threading.get_ident(), 0

    def registered(module: nn.Module, name: str, value: nn.Module | Tensor | None) -> None:
        nonlocal count
        if threading.get_ident() == thread:
            count += 1
        if count > registrations:
            raise ArtifactError(f"{path} describes a model with far more layers than were saved.")

    hooks = [
        register_module_parameter_registration_hook(registered),
        register_module_module_registration_hook(registered),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _said(error: Exception) -> str:
    """An error of another library: a config may have put anything into it."""
    return f"{type(error).__name__}: {clipped(error)}"
