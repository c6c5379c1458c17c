"""Export a model as `.pt2` or `.onnx` for other programs to run, checked against the model before anything is written.

The file is made in memory, run at the example's sizes and at others, and only then put in its place: what stands there
computes what the model computes.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_flatten_with_path, tree_leaves

from secateur.errors import ExportError, InputError
from secateur.files import write_bytes
from secateur.inputs import Inputs, as_inputs, check_model, check_weights
from secateur.onnxgraphs import feed, onnx_model, open_session, runtime_package
from secateur.programs import (
    Axis,
    innermost,
    input_names,
    most_open,
    nodes,
    open_axes,
    prepared,
    program_of,
    resized,
    run,
    symbols,
)
from secateur.quiet import quiet

# Allowed difference, relative to the largest value of the output: two runtimes add up in different orders.
TOLERANCE = 1e-5
# Ops that divide by a statistic of the activations, as LayerNorm and attention do, magnify that rounding.
MAGNIFYING_TOLERANCE = 1e-4
MAGNIFYING = frozenset(
    {
        "aten::_softmax",
        "aten::group_norm",
        "aten::instance_norm",
        "aten::layer_norm",
        "aten::linalg_vector_norm",
        "aten::native_layer_norm",
        "aten::rms_norm",
        "aten::rsqrt",
        "aten::scaled_dot_product_attention",
        "aten::softmax",
    }
)
_STEPS = 10  # of the output's own precision, for types coarser than the tolerances above
_Run = Callable[[Inputs], list[Tensor]]


@dataclass(frozen=True)
class DynamicAxis:
    """A size that may change from call to call."""

    name: str  # "batch", "sequence"
    least: int
    most: int | None  # None: no limit
    places: tuple[tuple[str, int], ...]  # (input, dimension)

    def __str__(self) -> str:
        sizes = f"{self.least} or more" if self.most is None else f"{self.least} to {self.most}"
        return f"{self.name} {sizes} ({', '.join(f'{name} dim {dim}' for name, dim in self.places)})"


@dataclass(frozen=True)
class ExportReport:
    """What was written, which sizes it takes, and how closely it computes what the model computes."""

    path: Path
    kind: str  # "pt2" or "onnx"
    inputs: tuple[str, ...]  # names of the input tensors, in their order
    dynamic: tuple[DynamicAxis, ...]
    fixed: Mapping[str, str]  # axis that could have been dynamic -> why it keeps the size of the example
    differences: Mapping[
        str, float
    ]  # output -> largest difference to the model, relative to the output's largest value
    tolerance: float
    checked: tuple[Mapping[str, int], ...]  # the sizes it was compared at, {axis: size}
    size_bytes: int
    opset: int | None  # of ONNX; None for .pt2

    @property
    def max_difference(self) -> float:
        """The largest of `differences`."""
        return max(self.differences.values())

    def __str__(self) -> str:
        opset = "" if self.opset is None else f", opset {self.opset}"
        sizes = " and ".join(_sizes_text(sizes) for sizes in self.checked)
        return "\n".join(
            [
                f"{self.path}: {self.size_bytes / 1e6:.2f} MB{opset}",
                *(f"dynamic: {axis}" for axis in self.dynamic),
                *(f"fixed: {name}: {reason}" for name, reason in self.fixed.items()),
                f"checked: within {self.max_difference:.1e} of the model at {sizes} (allowed: {self.tolerance:.0e})",
            ]
        )


@dataclass(frozen=True)
class _File:
    """The content of a file, and a function that runs what was read back from it."""

    content: bytes
    run: _Run
    opset: int | None = None


@dataclass(frozen=True)
class _Checked:
    """A file that computes what the model computes."""

    file: _File
    dynamic: tuple[DynamicAxis, ...]
    inputs: tuple[str, ...]
    differences: Mapping[str, float]
    tolerance: float
    checked: tuple[Mapping[str, int], ...]


@torch.inference_mode(False)
def export(model: nn.Module, example_inputs: Any, path: Path | str, *, tolerance: float | None = None) -> ExportReport:
    """Write `model` in eval mode to a `.pt2` file (torch.export) or a `.onnx` file, and say what came out.

    The batch size is left open, and the sequence length of tokens and of (batch, length, ...) inputs, wherever the
    model and the exporter allow; the report says which are, and why others are not. Read back, the file is compared
    with the model at the sizes of `example_inputs` and at others: in ONNX Runtime on the CPU, or by torch.export.load.
    Allowed are differences of `tolerance` times an output's largest value; by default 1e-5, or 1e-4 where the program
    holds attention or a normalisation by the activations' own statistics, or ten steps of a coarser output type.

    A `.pt2` file holds neither pickled objects nor the example inputs. Outputs are plain tuples, lists and dicts of
    tensors; ONNX names them by their keys. The model is not changed; an old file stays until the new one is complete.

    Raises InputError for another suffix, a missing package or a wrong tolerance; ExportError, with the innermost
    reason, where the model cannot be exported, the file computes something else, or it cannot be written; ModelError
    and ExampleInputsError as `trace` does; an error of the model's own forward comes through as it is.
    """
    target, suffix = _target(path)
    if tolerance is not None and not (isinstance(tolerance, (int, float)) and 0 <= tolerance < math.inf):
        raise InputError(f"tolerance is a number, at least 0, such as 1e-4; got {tolerance!r}.")
    check_model(model)
    check_weights(model)
    inputs = as_inputs(example_inputs)
    net = prepared(model, inputs)
    if suffix == ".onnx":  # it is checked on the CPU, where both compute in full precision
        net, inputs = net.cpu(), inputs.map(Tensor.cpu)
    axes, fixed = open_axes(net, inputs)
    made, _, failed = most_open(axes, lambda chosen: _checked(net, inputs, chosen, FORMATS[suffix], tolerance))
    _write(target, made.file.content)
    return ExportReport(
        path=Path(path),
        kind=suffix.removeprefix("."),
        inputs=made.inputs,
        dynamic=made.dynamic,
        fixed={**fixed, **failed},
        differences=made.differences,
        tolerance=made.tolerance,
        checked=made.checked,
        size_bytes=len(made.file.content),
        opset=made.file.opset,
    )


def _as_pt2(program: ExportedProgram, axes: Sequence[Axis], outputs: Sequence[str]) -> _File:
    program.example_inputs = None  # the user's data, and the one part of the file that would be pickled
    buffer = io.BytesIO()
    try:
        with quiet():
            torch.export.save(program, buffer)
    except Exception as error:
        raise ExportError(f"torch.export cannot save this model: {innermost(error)}") from error
    _check_no_pickle(buffer)
    with quiet():
        loaded = torch.export.load(buffer).module()

    def run_loaded(inputs: Inputs) -> list[Tensor]:
        with torch.no_grad(), quiet():
            return _tensors(inputs.map(torch.clone).call(loaded))

    return _File(buffer.getvalue(), run_loaded)


def _as_onnx(program: ExportedProgram, axes: Sequence[Axis], outputs: Sequence[str]) -> _File:
    names = {str(symbol): axis.name for axis in axes for symbol in symbols(program, axis)}
    model = onnx_model(program, axes=names, outputs=outputs)
    session = open_session(model, threads=torch.get_num_threads())

    def run_session(inputs: Inputs) -> list[Tensor]:
        return [torch.from_numpy(array) for array in session.run(None, feed(session, inputs))]

    return _File(model.content, run_session, model.opset)


_Writer = Callable[[ExportedProgram, Sequence[Axis], Sequence[str]], _File]
FORMATS: dict[str, _Writer] = {".pt2": _as_pt2, ".onnx": _as_onnx}


def _target(path: Path | str) -> tuple[Path, str]:
    """The file behind `path`, through a symbolic link, and the suffix that says what to write."""
    suffix = Path(path).suffix
    if suffix not in FORMATS:
        raise InputError(f"the path ends in .pt2 (PyTorch) or .onnx, which says what is written; got {str(path)!r}.")
    if suffix == ".onnx":
        runtime_package("exporting to .onnx")
    target = Path(path).resolve()
    if target.is_dir():
        raise InputError(f"{path} is a folder: pass the name of a file in it, such as {Path(path) / f'model{suffix}'}.")
    return target, suffix


def _checked(
    net: nn.Module, inputs: Inputs, axes: tuple[Axis, ...], written_as: _Writer, tolerance: float | None
) -> _Checked:
    """The file that leaves `axes` open. Raises ExportError where it cannot be made or computes something else."""
    program = program_of(net, inputs, axes)
    _forget_sources_(program)
    output = run(net, inputs)
    names = _output_names(output, input_names(program))
    allowed = default_tolerance(program, _tensors(output)) if tolerance is None else float(tolerance)
    try:
        file = written_as(program, axes, names)
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(f"the exported model cannot be loaded: {innermost(error)}") from error
    sizes: list[dict[Axis, int]] = [{axis: axis.size for axis in axes}]
    if axes:
        sizes.append({axis: axis.other for axis in axes})
    differences = dict.fromkeys(names, 0.0)
    for at in sizes:
        found = _differences(net, file.run, resized(inputs, at), names, allowed, _sizes_text(_named(at)))
        differences = {name: max(differences[name], found[name]) for name in names}
    dynamic = tuple(_dynamic_axis(program, axis, net, inputs, file.run, names, allowed) for axis in axes)
    return _Checked(file, dynamic, tuple(input_names(program)), differences, allowed, tuple(map(_named, sizes)))


def default_tolerance(program: ExportedProgram, outputs: Sequence[Tensor]) -> float:
    """The difference that rounding explains, relative to an output's largest value."""
    kinds = {node.target._schema.name for node in nodes(program) if isinstance(node.target, torch._ops.OpOverload)}
    rounding = [_STEPS * torch.finfo(t.dtype).eps for t in outputs if t.is_floating_point() or t.is_complex()]
    return max([MAGNIFYING_TOLERANCE if kinds & MAGNIFYING else TOLERANCE, *rounding])


def _differences(
    net: nn.Module, run_file: _Run, inputs: Inputs, names: Sequence[str], allowed: float, sizes: str
) -> dict[str, float]:
    """{output: largest relative difference}. Raises ExportError above `allowed`, and where the file does not run."""
    try:
        expected = _tensors(run(net, inputs))
    except Exception as error:
        raise ExportError(f"the model itself does not run at {sizes}: {innermost(error)}") from error
    try:
        actual = run_file(inputs)
    except Exception as error:
        raise ExportError(f"the exported model does not run at {sizes}: {innermost(error)}") from error
    if [t.shape for t in expected] != [t.shape for t in actual]:
        shapes = [list(t.shape) for t in actual], [list(t.shape) for t in expected]
        raise ExportError(f"at {sizes} the exported model's outputs have shapes {shapes[0]}, the model's {shapes[1]}.")
    found = {name: _difference(*pair) for name, *pair in zip(names, expected, actual, strict=True)}
    worst = max(found, key=lambda name: found[name])
    if not found[worst] <= allowed:
        raise ExportError(
            f"at {sizes} the exported model differs from the model by {found[worst]:.1e} of the largest value of "
            f"{worst!r} (allowed: {allowed:.0e}). If that is good enough, pass a larger tolerance=."
        )
    return found


def _difference(expected: Tensor, actual: Tensor) -> float:
    """Largest difference over the largest expected value; infinite where they are not finite in the same places."""
    if expected.numel() == 0:
        return 0.0
    wide = torch.complex128 if expected.is_complex() else torch.float64
    left, right = expected.detach().cpu().to(wide), actual.detach().cpu().to(wide)
    finite = torch.isfinite(left)
    # An infinity must be met by the same one; NaN equals nothing, itself included.
    same = (left == right) | (left.isnan() & right.isnan())
    if not bool((finite & torch.isfinite(right) | same).all()):
        return math.inf
    if not bool(finite.any()):
        raise ExportError("the model's output holds no finite number: there is nothing to compare.")
    gap, scale = float((left - right)[finite].abs().max()), float(left[finite].abs().max())
    return gap / scale if scale else gap


def _dynamic_axis(
    program: ExportedProgram,
    axis: Axis,
    net: nn.Module,
    inputs: Inputs,
    run_file: _Run,
    names: Sequence[str],
    allowed: float,
) -> DynamicAxis:
    """The sizes that the program takes along `axis`: 1 only where it gives the model's answer there too."""
    ranges = [program.range_constraints[symbol] for symbol in symbols(program, axis)]
    least = max([2, *(int(found.lower) for found in ranges)])  # a program says 2 where it was not asked about 1
    limits = [int(found.upper) for found in ranges if found.upper.is_Integer]
    if least == 2:
        try:
            _differences(net, run_file, resized(inputs, {axis: 1}), names, allowed, "1")
            least = 1
        except ExportError:
            pass
    tensors = input_names(program)
    places = tuple((tensors[number], dim) for number, dim in axis.places)
    return DynamicAxis(axis.name, least, min(limits, default=None), places)


def _check_no_pickle(archive: io.BytesIO) -> None:
    """Raise ExportError for a .pt2 archive with a tensor or an object in it that only pickle can store."""
    with zipfile.ZipFile(archive) as file:
        for name in file.namelist():
            if name.endswith("_config.json"):
                for tensor, entry in json.loads(file.read(name))["config"].items():
                    if entry["use_pickle"]:
                        raise ExportError(
                            f"{tensor!r} is no ordinary tensor: a .pt2 file could only hold it as a pickle."
                        )
    archive.seek(0)


def _forget_sources_(program: ExportedProgram) -> None:
    """Drop the lines and paths of the user's source files, which have no business in a file that is handed on."""
    for node in nodes(program):
        node.meta.pop("stack_trace", None)


def _output_names(output: Any, taken: Sequence[str]) -> list[str]:
    """One name per output tensor: its keys, joined; `output` before a position. None is in `taken` or occurs twice."""
    names: list[str] = []
    for path, leaf in tree_flatten_with_path(output)[0]:
        if not isinstance(leaf, Tensor):
            continue
        keys = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
        name = "_".join(keys if keys and not keys[0].isdigit() else ["output", *keys])
        while name in names or name in taken:
            name += "_out"
        names.append(name)
    return names


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _named(sizes: Mapping[Axis, int]) -> dict[str, int]:
    return {axis.name: size for axis, size in sizes.items()}


def _sizes_text(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items()) or "the example's sizes"


def _write(path: Path, content: bytes) -> None:
    try:
        write_bytes(path, content)
    except OSError as error:
        old = " The file that was there is unchanged." if path.is_file() else ""
        raise ExportError(f"cannot write {path}: {error.strerror or error}.{old}") from error
