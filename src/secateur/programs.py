"""A model as an exported program, with its batch size, and its sequence length where it has one, left open.

Which dimensions may change is found out by trying: the model itself must run at another size, and the program must take
it. What stays fixed has a reason.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import InputKind, TensorArgument
from torch.utils._pytree import tree_leaves

from secateur.errors import ExportError
from secateur.inputs import Inputs, as_inputs, check_devices, check_model, check_weights, private_copy
from secateur.quiet import quiet

Made = TypeVar("Made")
_REASON_LENGTH = 200  # characters of somebody else's error that still read as one sentence
_DATA_DEPENDENT = " Its forward decides by the values in a tensor: write that with torch.where or torch.cond."


@dataclass(frozen=True)
class Axis:
    """One size that may change from call to call, and where it stands in the inputs."""

    name: str  # "batch", "sequence"; further lengths are "sequence_2", ...
    size: int  # in the example inputs
    other: int  # another size at which the model runs
    places: tuple[tuple[int, int], ...]  # (number of the input tensor, its dimension)

    @property
    def traced(self) -> int:
        """The size to trace at: never 1, for which a tracer draws conclusions that hold for no other size."""
        return self.size if self.size > 1 else self.other


@dataclass(frozen=True)
class Traced:
    """An exported program, the axes it leaves open, and why the others are fixed."""

    program: ExportedProgram
    axes: tuple[Axis, ...]
    fixed: Mapping[str, str]


@torch.inference_mode(False)
def exported_program(model: nn.Module, example_inputs: Any) -> ExportedProgram:
    """`model` in eval mode as a torch.export program, called as the model is called; `model` itself is not changed.

    Batch size and sequence length are open wherever model and exporter allow, sizes are those of `example_inputs`
    elsewhere. Parameters keep their names. Outputs are plain tuples, lists and dicts of tensors whatever containers the
    model returns, so that the program needs none of their classes.
    Raises ExportError, with the innermost reason, for a model that cannot be traced, ModelError for a wrapped one,
    ExampleInputsError for unusable inputs; an error of the model's own forward comes through as it is.
    """
    inputs = as_inputs(example_inputs)
    check_model(model)
    check_weights(model)
    return traced(prepared(model, inputs), inputs).program


def traced(prepared_model: nn.Module, inputs: Inputs) -> Traced:
    """The program of a `prepared` model that leaves the most axes open. Raises ExportError."""
    axes, fixed = open_axes(prepared_model, inputs)
    program, axes, failed = most_open(axes, lambda chosen: program_of(prepared_model, inputs, chosen))
    return Traced(program, axes, {**fixed, **failed})


def prepared(model: nn.Module, inputs: Inputs) -> nn.Module:
    """A private copy of `model` in eval mode whose outputs are plain containers of tensors, tried once.

    Raises ModelError for a wrapped model, ExampleInputsError for inputs elsewhere, ExportError without an output.
    """
    check_model(model)
    check_devices(model, inputs)
    copied = private_copy(model).eval()
    copied.register_forward_hook(lambda module, args, output: plain(output))
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(run(copied, inputs))):
        raise ExportError("the model's output holds no tensor, so there is nothing to export.")
    return copied


def run(prepared_model: nn.Module, inputs: Inputs) -> Any:
    """The outputs of a prepared model, computed as its program computes them: without fused layers or gradients."""
    with torch.no_grad(), _plain_layers():
        return inputs.map(torch.clone).call(prepared_model)


def program_of(prepared_model: nn.Module, inputs: Inputs, axes: Sequence[Axis] = ()) -> ExportedProgram:
    """The program of a prepared model that leaves exactly `axes` open. Raises ExportError where that cannot be."""
    own = resized(inputs, {axis: axis.traced for axis in axes}).map(torch.clone)  # sizes are noted by tensor identity
    tensors = own.tensors()
    shapes = ShapesCollection()  # type: ignore[no-untyped-call]  # the class is untyped
    for number, tensor in enumerate(tensors):
        dims = {dim: Dim.DYNAMIC for axis in axes for place, dim in axis.places if place == number}
        if dims:
            shapes[tensor] = dims
    args, kwargs = own.args, dict(own.kwargs)
    try:
        with torch.no_grad(), _plain_layers(), quiet():
            dynamic = shapes.dynamic_shapes(prepared_model, args, kwargs)  # type: ignore[no-untyped-call]  # untyped too
            program = torch.export.export(prepared_model, args, kwargs, dynamic_shapes=dynamic)
    except Exception as error:
        from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode  # slow to import: brings sympy

        hint = _DATA_DEPENDENT if isinstance(error, GuardOnDataDependentSymNode) else ""
        raise ExportError(f"torch.export cannot trace this model: {innermost(error)}{hint}") from error
    for axis in axes:
        if not all(isinstance(size, torch.SymInt) for size in _sizes(program, axis)):
            raise ExportError(f"torch.export fixed the size of {axis.name!r} while tracing.")
    return program


def nodes(program: ExportedProgram) -> Iterator[torch.fx.Node]:
    """Every node of the program's graph and of the graphs inside it."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            yield from list(module.graph.nodes)  # so that a caller may add nodes


def input_names(program: ExportedProgram) -> list[str]:
    """The names of the input tensors, in their order."""
    specs = program.graph_signature.input_specs
    return [s.arg.name for s in specs if s.kind is InputKind.USER_INPUT and isinstance(s.arg, TensorArgument)]


def symbols(program: ExportedProgram, axis: Axis) -> list[Any]:
    """The program's symbols (of sympy) for the sizes along `axis`; several where they need not agree."""
    found = [size.node.expr for size in _sizes(program, axis) if isinstance(size, torch.SymInt)]
    return list(dict.fromkeys(expression for expression in found if expression.is_Symbol))


def open_axes(prepared_model: nn.Module, inputs: Inputs) -> tuple[tuple[Axis, ...], dict[str, str]]:
    """(axes along which the model itself runs at another size, {name of another axis: why it does not})."""
    axes: list[Axis] = []
    fixed: dict[str, str] = {}
    for name, variants in _candidates(inputs.tensors()).items():
        for places in variants:
            found = _another_size(prepared_model, inputs, name, places)
            if isinstance(found, Axis):
                axes.append(found)
                fixed.pop(name, None)
                break
            fixed.setdefault(name, found)
    return tuple(axes), fixed


def most_open(
    axes: Sequence[Axis], attempt: Callable[[tuple[Axis, ...]], Made]
) -> tuple[Made, tuple[Axis, ...], dict[str, str]]:
    """What `attempt` makes of the most axes that it does not refuse with ExportError; those axes; why not the others.

    Earlier axes are worth more than later ones. Raises the error of the attempt with no axis if all fail.
    """
    refusals: dict[tuple[Axis, ...], ExportError] = {}
    for count in range(len(axes), -1, -1):
        for chosen in itertools.combinations(axes, count):
            try:
                made = attempt(chosen)
            except ExportError as error:
                refusals[chosen] = error
                if not chosen:
                    raise
                continue
            fixed = {}
            for axis in axes:
                if axis not in chosen:  # it was tried together with the chosen ones, since that is one axis more
                    fixed[axis.name] = str(refusals[tuple(a for a in axes if a in chosen or a is axis)])
            return made, chosen, fixed
    raise AssertionError("the attempt without axes either returned or raised")


def resized(inputs: Inputs, sizes: Mapping[Axis, int]) -> Inputs:
    """The inputs with every axis at the given size. New entries are old ones, mirrored, so that none is a copy."""
    numbers = itertools.count()

    def change(tensor: Tensor) -> Tensor:
        number = next(numbers)
        for axis, size in sizes.items():
            for place, dim in axis.places:
                if place == number:
                    tensor = _resized(tensor, dim, size)
        return tensor

    return inputs.map(change)


def plain(output: Any) -> Any:
    """A model's output as nested tuples, lists and dicts of tensors; None where it holds something else.

    Mappings and objects, dataclasses among them, become dicts without what is no tensor.
    """
    return _plain(output, ())


def innermost(error: BaseException) -> str:
    """Type and first sentence of the error at the root of a chain of causes, on one line."""
    seen = {id(error)}
    while (cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        if id(cause) in seen:
            break
        seen.add(id(cause))
        error = cause
    paragraph = str(error).strip().partition("\n\n")[0]
    text = re.sub(r"For more information, run with TORCH_LOGS=\S+ ?", "", " ".join(paragraph.split()))
    text = text if len(text) <= _REASON_LENGTH else f"{text[:_REASON_LENGTH].rstrip()} ..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def _plain_layers() -> Iterator[None]:
    """Attention and transformer layers as separate ops: the fused ones have no counterpart in an exported program."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _sizes(program: ExportedProgram, axis: Axis) -> list[int | torch.SymInt]:
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    names = input_names(program)
    return [values[names[number]].shape[dim] for number, dim in axis.places]


def _candidates(tensors: Sequence[Tensor]) -> dict[str, list[tuple[tuple[int, int], ...]]]:
    """Axes to try: name -> places, the most likely reading first.

    The batch is dimension 0 of the first tensor and of those that agree with it. A sequence is dimension 1 of integers
    (tokens, masks) and of (batch, length, features) or longer; four dimensions are an image. Other inputs may hold the
    same length anywhere, as an attention mask does, or by chance.
    """
    ranked = [(number, tensor) for number, tensor in enumerate(tensors) if tensor.dim() > 0]
    if not ranked:
        return {}
    batch = ranked[0][1].shape[0]
    batched = [(number, tensor) for number, tensor in ranked if tensor.shape[0] == batch]
    found = {"batch": [tuple((number, 0) for number, _ in batched)]}
    sequences = [(number, tensor) for number, tensor in batched if _is_sequence(tensor)]
    for count, length in enumerate(dict.fromkeys(tensor.shape[1] for _, tensor in sequences), start=1):
        places = tuple((number, 1) for number, tensor in sequences if tensor.shape[1] == length)
        taken = set(found["batch"][0])
        anywhere = tuple(
            (number, dim)
            for number, tensor in ranked
            for dim, size in enumerate(tensor.shape)
            if size == length and (number, dim) not in taken
        )
        found["sequence" if count == 1 else f"sequence_{count}"] = list(dict.fromkeys([anywhere, places]))
    return found


def _is_sequence(tensor: Tensor) -> bool:
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.dim() == 3 or tensor.dim() > 4
    return tensor.dim() > 1


def _another_size(model: nn.Module, inputs: Inputs, name: str, places: tuple[tuple[int, int], ...]) -> Axis | str:
    """The axis, with a size other than the example's at which the model runs, or why there is none."""
    number, dim = places[0]
    size = inputs.tensors()[number].shape[dim]
    reason = ""
    # One more; twice as many, for lengths that must divide; less, where the example is the longest that fits.
    for other in dict.fromkeys((size + 1, 2 * size, size - 1, size // 2)):
        if other < 2 or other == size:
            continue
        axis = Axis(name, size, other, places)
        try:
            run(model, resized(inputs, {axis: other}))
        except Exception as error:
            reason = reason or f"the model itself does not run at {other} instead of {size}: {innermost(error)}"
            continue
        return axis
    return reason


def _resized(tensor: Tensor, dim: int, size: int) -> Tensor:
    old = tensor.shape[dim]
    if size <= old:
        return tensor.narrow(dim, 0, size)
    added = tensor.index_select(dim, torch.arange(size - old, device=tensor.device) % old)
    if dim != tensor.dim() - 1:
        added = added.flip(-1)
    return torch.cat([tensor, added], dim)


def _plain(output: Any, above: tuple[int, ...]) -> Any:
    if isinstance(output, Tensor):
        return output
    if id(output) in above or isinstance(output, (nn.Module, type)):
        return None
    above = (*above, id(output))
    if isinstance(output, (tuple, list)) and not hasattr(output, "_fields"):
        parts = [_plain(part, above) for part in output]
        kind = list if isinstance(output, list) else tuple
        return kind(parts) if any(part is not None for part in parts) else None
    if isinstance(output, Mapping):
        entries = {str(key): value for key, value in output.items()}
    else:
        entries = output._asdict() if hasattr(output, "_fields") else getattr(output, "__dict__", {})
    tensors = {key: part for key, value in entries.items() if (part := _plain(value, above)) is not None}
    return tensors or None
