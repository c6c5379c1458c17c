"""The ways to run a model that `measure` knows: one function each, from a model to a call that runs it once.

A runtime is a function (model in eval mode, inputs, threads) -> callable. To add one, write it and enter it in
`RUNTIMES`; `measure`, the command line and the tests find it there. It must not change the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import InputError, ModelError, UnknownNameError
from secateur.inputs import Inputs, channels_last_copy
from secateur.onnxgraphs import feed, onnx_model, open_session, runtime_package
from secateur.programs import prepared, program_of

Run = Callable[[], object]
Runtime = Callable[[nn.Module, Inputs, int], Run]


def eager(model: nn.Module, inputs: Inputs, threads: int) -> Run:
    """PyTorch as it is: `model(...)`."""
    return lambda: inputs.call(model)


def eager_channels_last(model: nn.Module, inputs: Inputs, threads: int) -> Run:
    """PyTorch with images and conv weights laid out channel by channel, which its CPU convolutions prefer."""

    def lay_out(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

    laid_out = channels_last_copy(model)
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
    """ONNX Runtime on the CPU, from an export that is kept in memory, without fusions that are slow there."""
    runtime_package("the runtime 'onnxruntime'")
    if any(tensor.device.type != "cpu" for tensor in inputs.tensors()):
        raise InputError("the runtime 'onnxruntime' runs on the CPU here: move the model and the inputs with `.cpu()`.")
    program = program_of(prepared(model, inputs), inputs)  # of fixed sizes, which is what the others are timed with
    session = open_session(onnx_model(program), threads=threads)
    fed = feed(session, inputs)
    return lambda: session.run(None, fed)


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
    except (InputError, ModelError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(
            f"the runtime {name!r} cannot run this model ({reason}). Leave it out, or see the cause above."
        ) from error
    return run
