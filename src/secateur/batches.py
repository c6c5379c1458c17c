"""What a batch is: the defaults by which every function that sees data runs a model and computes a loss.

Two forms are understood. A pair `(x, y)`: the model gets `x`, the loss is the cross-entropy of its output against
class indices `y`. A Mapping of keyword arguments (a tokenizer's BatchEncoding): the model gets `**batch` and its
output carries the loss. A bare tensor is an input without labels: it can be run, but has no loss. Anything else takes
the caller's own `forward(model, batch)` and `loss(output, batch)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.errors import InputError
from secateur.tokens import check_batch

Forward = Callable[[nn.Module, Any], Any]
Loss = Callable[[Any, Any], Tensor]


def default_forward(model: nn.Module, batch: Any) -> Any:
    """The output of the model on a batch: `model(x)` for `(x, y)` or a bare tensor, `model(**batch)` for a Mapping.

    Raises InputError for token ids that a language model does not embed, and for more of them than it has positions.
    """
    try:
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(batch if isinstance(batch, Tensor) else _pair(batch)[0])
    except (IndexError, RuntimeError):
        check_batch(model, batch)  # looked at only now: on a GPU it would wait for the numbers
        raise


def default_loss(output: Any, batch: Any, *, label_smoothing: float = 0.0) -> Tensor:
    """The scalar loss of one batch: cross-entropy for `(x, y)`, the output's own `loss` for a Mapping.

    Logits are (N, classes, ...) and `y` (N, ...) of class indices; the cross-entropy is computed in float32 at least.
    """
    if isinstance(batch, Mapping):
        if label_smoothing:
            raise InputError("label_smoothing needs (x, y) batches: a model that computes its own loss must smooth it.")
        return _own_loss(output)
    if isinstance(batch, Tensor):
        raise InputError("a bare tensor has no labels to compute a loss from: pass (x, y) batches, or your own loss=.")
    logits, targets = logits_of(output), _pair(batch)[1]
    if logits is None:
        raise InputError(
            f"the model's output is {type(output).__name__}, not a tensor of logits: "
            "pass loss=, a function (output, batch)."
        )
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return F.cross_entropy(wide, targets, label_smoothing=label_smoothing)


def logits_of(output: Any) -> Tensor | None:
    """The logits in a model's output: the tensor itself, or its `logits`; None where there are none."""
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else None


def labels_of(batch: Any) -> Tensor | None:
    """The class indices in a batch: `y` of a pair, `labels` of a Mapping; None where there are none."""
    if isinstance(batch, Mapping):
        found = batch.get("labels")
    else:
        found = batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
    return found if isinstance(found, Tensor) else None


def size_of(batch: Any) -> int:
    """How many samples a batch holds: the length of the first tensor in it."""
    tensor = first_tensor(batch)
    if tensor is None or tensor.dim() == 0:
        raise InputError(f"a batch of type {type(batch).__name__} holds no tensor with a batch dimension.")
    return tensor.shape[0]


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """The tensors in a batch, depth first."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, tuple, list)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors_of(part)


def first_tensor(batch: Any) -> Tensor | None:
    """The first tensor in a batch, depth first; None where there is none."""
    return next(tensors_of(batch), None)


def move(batch: Any, device: torch.device | str) -> Any:
    """The same batch with every tensor on `device`, whatever its nesting; what is no tensor stays as it is."""
    if isinstance(batch, Tensor):
        # Only copies towards CUDA may overlap with what follows; others would be read before they have arrived.
        return batch.to(device, non_blocking=torch.device(device).type == "cuda")
    if isinstance(batch, Mapping):
        return {name: move(part, device) for name, part in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(part, device) for part in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(move(part, device) for part in batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{f.name: move(getattr(batch, f.name), device) for f in fields(batch) if f.init})
    return batch


def usable_device(device: torch.device | str) -> torch.device:
    """The device of that name. Raises InputError where it does not parse or this machine has none."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"no device named {device!r}: expected cpu, cuda, cuda:0, mps, ...") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {str(device)!r}: this machine has {torch.cuda.device_count()} CUDA devices.")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device 'mps': this machine or this build of torch has no Apple GPU. Use device='cpu'.")
    if found.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"device {str(device)!r} is not supported: use cpu, cuda or mps.")
    return torch.device("cuda", torch.cuda.current_device()) if found == torch.device("cuda") else found


def _pair(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise InputError(
            f"a batch is a pair (x, y) or a Mapping, got {type(batch).__name__}{size}: "
            "for other forms pass forward=, a function (model, batch), and loss=, a function (output, batch)."
        )
    return batch[0], batch[1]


def _own_loss(output: Any) -> Tensor:
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(found, Tensor):
        raise InputError(
            f"the output ({type(output).__name__}) carries no loss: batches that are Mappings need labels in them, "
            "or loss=, a function (output, batch)."
        )
    return found
