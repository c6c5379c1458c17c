"""The ways to run a model that `measure` knows: one function each, from a model to a call that runs it once.

A runtime is a function (model in eval mode, inputs, threads) -> callable. To add one, write it and enter it in
`RUNTIMES`; `measure`, the command line and the tests find it there. It must not change the model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from secateur.errors import InputError, SecateurError, UnknownNameError
from secateur.inputs import Inputs, private_copy

Run = Callable[[], object]
Runtime = Callable[[nn.Module, Inputs, int], Run]


def eager(model: nn.Module, inputs: Inputs, threads: int) -> Run:
    """PyTorch as it is: `model(...)`."""
    return lambda: inputs.call(model)


def eager_channels_last(model: nn.Module, inputs: Inputs, threads: int) -> Run:
    """PyTorch with images and conv weights laid out channel by channel, which its CPU convolutions prefer."""

    def lay_out(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

    laid_out = private_copy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    laid_out_inputs = inputs.map(lay_out)
    return lambda: laid_out_inputs.call(laid_out)


def compiled(model: nn.Module, inputs: Inputs, threads: int) -> Run:
    """torch.compile with fixed shapes. The first call compiles: 10 to 180 seconds, outside the timing."""
    # Recompilations of one class share a limit of 8, beyond which torch runs eagerly and says nothing; and a second
    # width would compile for dynamic shapes. Both would time something else than what the name says.
    options: dict[str, Any] = {"dynamic": False, "isolate_recompiles": True}
    fast: Any = torch.compile(model, **options)
    return lambda: inputs.call(fast)


def onnxruntime(model: nn.Module, inputs: Inputs, threads: int) -> Run:
    """ONNX Runtime on the CPU, from a temporary export of the model."""
    try:
        import onnx  # noqa: F401 - torch.onnx needs both and says so less clearly
        import onnxruntime as ort
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"the runtime 'onnxruntime' needs {error.name}: pip install 'secateur[onnx]'.") from error
    if any(tensor.device.type != "cpu" for tensor in inputs.tensors()):
        raise InputError("the runtime 'onnxruntime' runs on the CPU here: move the model and the inputs with `.cpu()`.")
    flat = _Flat(model, inputs)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(flat, tuple(flat.tensors), path, dynamo=True, verbose=False)
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    feed = {name: tensor.detach().numpy() for name, tensor in zip(names, flat.tensors, strict=True)}
    return lambda: session.run(None, feed)


RUNTIMES: dict[str, Runtime] = {
    "eager": eager,
    "eager_channels_last": eager_channels_last,
    "compiled": compiled,
    "onnxruntime": onnxruntime,
}


def runtime(name: str) -> Runtime:
    """The runtime of that name. Raises UnknownNameError with the nearest known one."""
    if name not in RUNTIMES:
        raise UnknownNameError("runtime", name, RUNTIMES)
    return RUNTIMES[name]


def prepare(name: str, model: nn.Module, inputs: Inputs, threads: int) -> Run:
    """A call that runs `model` once in the runtime `name`, tried once.

    Raises InputError where the runtime cannot take the model; an error of the model's own forward comes out as it is.
    """
    inputs.call(model)  # a model that does not run at all says so itself, not through an exporter
    try:
        run = runtime(name)(model, inputs, threads)
        run()
    except SecateurError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(
            f"the runtime {name!r} cannot run this model ({reason}). Leave it out, or see the cause above."
        ) from error
    return run


class _Flat(nn.Module):
    """The model as a function of its tensors alone, so that an export keeps their order whatever their nesting."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self.training = model.training  # or the exporter warns about a model that is in eval mode already
        leaves, self.spec = tree_flatten((inputs.args, dict(inputs.kwargs)))
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.constants: list[Any] = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def forward(self, *tensors: Tensor) -> Any:
        leaves = list(self.constants)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self.spec)
        return self.model(*args, **kwargs)
