"""What a user hands over: example inputs in their four forms, and a model that must be a plain nn.Module."""

from __future__ import annotations

import copy
import gc
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.prune import BasePruningMethod
from torch.utils._pytree import tree_leaves, tree_map_only

from secateur.errors import ExampleInputsError, ModelError

# By class name, along the ancestors of a module's class: importing the classes would load what nobody uses.
_UNWRAP = {
    "DistributedDataParallel": "a DistributedDataParallel wrapper: pass `model.module`.",
    "DataParallel": "a DataParallel wrapper: pass `model.module`.",
    "FullyShardedDataParallel": "an FSDP wrapper: gather the full parameters and pass the module that was wrapped.",
    "OptimizedModule": "the result of torch.compile: pass `model._orig_mod`, and compile the pruned model afterwards.",
    "GraphModule": "a torch.fx graph: pass the module it was traced from; its sizes are constants.",
}


_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)  # attributes without tensors in them


@dataclass(frozen=True)
class Inputs:
    """Positional and keyword arguments of one call of the model."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments, however nested."""
        return [leaf for leaf in tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Tensor)]

    def map(self, function: Any) -> Inputs:
        """The same inputs with `function` applied to every tensor."""
        args, kwargs = tree_map_only(Tensor, function, (self.args, dict(self.kwargs)))
        return Inputs(args, kwargs)

    def call(self, model: nn.Module) -> Any:
        """`model` called with these inputs."""
        return model(*self.args, **self.kwargs)


def as_inputs(example_inputs: Any) -> Inputs:
    """Example inputs in any accepted form: a tensor, a tuple (positional), a Mapping (keywords), or Inputs.

    Raises ExampleInputsError when there is no tensor in them, or a tensor is empty.
    """
    if isinstance(example_inputs, Inputs):
        inputs = example_inputs
    elif isinstance(example_inputs, Tensor):
        inputs = Inputs((example_inputs,))
    elif isinstance(example_inputs, Mapping):
        inputs = Inputs(kwargs=dict(example_inputs))
    elif isinstance(example_inputs, tuple):
        inputs = Inputs(example_inputs)
    else:
        raise ExampleInputsError(
            f"example inputs must be a tensor, a tuple (positional arguments), a mapping (keyword arguments) or "
            f"secateur.Inputs; got {type(example_inputs).__name__}."
        )
    tensors = inputs.tensors()
    if not tensors:
        raise ExampleInputsError("the example inputs hold no tensor; pass one batch that the model can run on.")
    for tensor in tensors:
        if tensor.numel() == 0:
            raise ExampleInputsError(
                f"an example input is empty: shape {list(tensor.shape)}; pass a batch of at least 1."
            )
    return inputs


def check_model(model: Any) -> None:
    """Raise ModelError, saying how to unwrap it, unless `model` is a plain nn.Module."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}.")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ModelError(f"parameter {name!r} has no shape yet (a lazy module): run the model once first.")
        if type(parameter).__name__ == "DTensor":
            raise ModelError(f"parameter {name!r} is sharded (fully_shard): gather the full parameters first.")
    for name, module in model.named_modules():
        where = f"submodule {name!r} is" if name else "the model is"
        if any(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values()):
            raise ModelError(f"{where} masked by torch.nn.utils.prune: call `prune.remove(module, name)` on it first.")
        kind = type(module).__name__
        for ancestor in type(module).__mro__:
            if ancestor.__name__ in _UNWRAP and ancestor.__module__.startswith("torch."):
                raise ModelError(f"{where} {_UNWRAP[ancestor.__name__]}")
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(f"{where} scripted: prune the Python module first, then script the result.")
        if type(module).__module__.startswith(("torch.ao.nn", "torch.nn.quantized")):
            raise ModelError(f"{where} quantised ({kind}): prune the float model first, then quantise the result.")


def check_weights(model: nn.Module) -> None:
    """Raise ModelError for a model without numbers (on the meta device), or with weights that are not finite."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ModelError("the model is on the meta device: it can be traced, but has no weights to judge.")
        if not _is_finite(parameter.detach()):
            raise ModelError(f"parameter {name!r} holds NaN or infinity: did training diverge?")


def _is_finite(tensor: Tensor) -> bool:
    """Whether every entry is a finite number. One that is not makes the sum so too, and a sum is quickly made."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def check_devices(model: nn.Module, inputs: Inputs) -> None:
    """Raise ExampleInputsError when inputs and parameters lie on different devices."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        return  # a model spread over devices moves its inputs itself
    device = next(iter(devices))
    for tensor in inputs.tensors():
        if tensor.device != device:
            raise ExampleInputsError(
                f"the example inputs are on {tensor.device}, the model is on {device}: "
                f"move them with `.to({str(device)!r})`."
            )


def private_copy(model: nn.Module, instead: Mapping[int, Tensor] | None = None) -> nn.Module:
    """A deep copy of `model`. Activations that modules keep as attributes are copied as plain tensors.

    `instead`: tensors that take the place of a copy, by the id of the original, wherever the model holds it.
    """
    memo: dict[int, Any] = dict(instead or {})
    for module in model.modules():
        for value in vars(module).values():
            if type(value) is OrderedDict and not value:
                memo[id(value)] = OrderedDict()  # a module has nine dicts of hooks, mostly empty: slow to copy
            elif not _is_plain(value):
                for tensor in tree_leaves(value):
                    if isinstance(tensor, Tensor) and not tensor.is_leaf:  # deepcopy refuses what autograd computed
                        memo.setdefault(id(tensor), tensor.detach().clone())
    with uncollected():
        return copy.deepcopy(model, memo)


@contextmanager
def uncollected() -> Iterator[None]:
    """Put off garbage collection: among many new objects that all stay, it goes through the whole program in vain."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _is_plain(value: Any) -> bool:
    """Whether an attribute is soon seen to hold no tensor: flattening every attribute of a long model takes seconds."""
    if type(value) in (tuple, list, dict):
        return all(type(entry) in _PLAIN for entry in (value.values() if type(value) is dict else value))
    return type(value) in _PLAIN


def copy_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A private copy on the CPU whose floating-point tensors are of `dtype`."""
    converted: dict[int, Tensor] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if type(tensor) in (nn.Parameter, Tensor) and tensor.is_floating_point():
            new = tensor.detach().to(device="cpu", dtype=dtype, copy=True)
            kept = tensor.requires_grad
            converted[id(tensor)] = (
                nn.Parameter(new, kept) if type(tensor) is nn.Parameter else new.requires_grad_(kept)
            )
    return private_copy(model, converted).to(device="cpu", dtype=dtype)


def channels_last_copy(model: nn.Module) -> nn.Module:
    """A private copy whose conv weights are laid out channel by channel, which convolutions on CPUs prefer."""
    copied: nn.Module = private_copy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    return copied


def sharing_copy(model: nn.Module) -> nn.Module:
    """A private copy whose parameters are new objects over the memory of the model's: nothing may write to them.

    Parameters of a class of their own, or that share memory among themselves, are copied after all.
    """
    plain = [p for p in model.parameters() if type(p) is nn.Parameter and p.layout == torch.strided]
    users = Counter(parameter.untyped_storage()._cdata for parameter in plain)
    shared: dict[int, Tensor] = {}
    for parameter in plain:
        if users[parameter.untyped_storage()._cdata] == 1 and not parameter.is_inference():
            shared[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad)
            vars(shared[id(parameter)]).update(vars(parameter))
    return private_copy(model, shared)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` into eval mode; on leaving, every submodule gets back the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def other_batch(inputs: Inputs) -> Inputs | None:
    """The inputs at batch size + 1, or None where they share no batch dimension.

    The new element is the first plus half of the last, mirrored, so that it is no copy; integers are repeated.
    """
    tensors = inputs.tensors()
    sizes = {tensor.shape[0] if tensor.dim() else 0 for tensor in tensors}
    if len(sizes) != 1 or 0 in sizes:
        return None

    def grow(tensor: Tensor) -> Tensor:
        extra = tensor[:1]
        if tensor.is_floating_point():
            extra = (tensor[:1] + 0.5 * tensor[-1:].flip(-1)) if tensor.dim() > 1 else extra
        return torch.cat([tensor, extra])

    return inputs.map(grow)
