"""Exported programs as ONNX models, and ONNX Runtime to run them. The three packages are imported when needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram

from secateur.errors import ExportError, InputError
from secateur.inputs import Inputs
from secateur.programs import innermost, input_names, nodes
from secateur.quiet import quiet

LARGEST_FILE = 2**31 - 1  # bytes: the limit of protobuf, the format's container


@dataclass(frozen=True)
class OnnxModel:
    """An ONNX model as it stands in a file."""

    content: bytes
    opset: int


def runtime_package(purpose: str) -> Any:
    """The package onnxruntime, once onnx and onnxscript are known to be there too.

    Raises InputError that says what `purpose` needs and how to install it.
    """
    try:
        import onnx  # noqa: F401 - torch.onnx needs both and says so less clearly
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"{purpose} needs {error.name}: pip install 'secateur[onnx]'.") from error
    return onnxruntime


def onnx_model(
    program: ExportedProgram, *, axes: Mapping[str, str] | None = None, outputs: Sequence[str] = ()
) -> OnnxModel:
    """`program` as an ONNX model with the weights inside; its inputs are the program's tensors, in their order.

    Takes `program` over: it is rewritten on the way and not to be used afterwards. `axes` names the open sizes,
    {the program's symbol: name}; `outputs` names the output tensors, in their order.
    Raises ExportError, with the innermost reason, for an op that has no ONNX form and above the 2 GB of one file.
    """
    try:
        _forget_strides_(program)
        with torch.no_grad(), quiet():
            made: Any = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=input_names(program),
                output_names=list(outputs) or None,
            )
            made.rename_axes(dict(axes or {}))
    except Exception as error:
        raise ExportError(f"torch.onnx cannot translate this model: {innermost(error)}") from error
    size = sum(value.const_value.nbytes for value in made.model.graph.initializers.values())
    if size > LARGEST_FILE:
        raise ExportError(f"the weights take {size / 1e9:.1f} GB and an ONNX file holds at most 2 GB: export to .pt2.")
    return OnnxModel(made.model_proto.SerializeToString(), made.model.opset_imports[""])


def _forget_strides_(program: ExportedProgram) -> None:
    """Make every view possible whatever the strides, which ONNX does not know.

    Attention kernels lay their outputs out differently, and the translation passes do not all take the same one: what
    was a view of the one would be refused for the other. The added copies vanish in the translation.
    """
    for node in nodes(program):
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
            node.args, node.kwargs = (*node.args, *node.kwargs.values()), {}  # the two name their argument differently
        elif node.target is torch.ops.aten.scaled_dot_product_attention.default:
            with node.graph.inserting_after(node):
                copied = node.graph.call_function(
                    torch.ops.aten.clone.default, (node,), {"memory_format": torch.contiguous_format}
                )
            copied.meta = dict(node.meta)
            users = [user for user in node.users if user is not copied]
            for user in users:
                user.replace_input_with(node, copied)


# On CPUs a sum and the LayerNorm behind it are slower as one operation than as two: a pruned encoder of 128 tokens took
# 15.1 ms with it and 12.2 without (onnxruntime 1.31, one thread).
SLOW_FUSIONS = ["SkipLayerNormFusion"]


def open_session(model: OnnxModel, *, threads: int) -> Any:
    """An onnxruntime.InferenceSession on the CPU with `threads` threads, without the fusions that are slow there."""
    ort = runtime_package("running an ONNX model")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    providers = ["CPUExecutionProvider"]
    return ort.InferenceSession(model.content, options, providers=providers, disabled_optimizers=SLOW_FUSIONS)


def feed(session: Any, inputs: Inputs) -> dict[str, Any]:
    """What `session.run(None, ...)` takes for these inputs: {input name: array}."""
    names = [entry.name for entry in session.get_inputs()]
    return {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, inputs.tensors(), strict=True)}
