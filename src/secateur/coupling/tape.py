"""Tape: one forward pass, recorded as ATen ops over named leaves.

Two modes watch the pass. The dispatch mode sees every ATen op after all Python control flow, with tensors known by
identity: tied weights and modules used twice come for free. The function mode sees the call in the user's code that
led to the op, with the integers it was given (`coupling.sizes`), and the place in the source.
"""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateur.coupling.sizes import Attribute, Escapes, Size, TracedInt, TracedSize
from secateur.errors import ModelError
from secateur.inputs import Inputs

_TORCH_FOLDER = str(Path(torch.__file__).parent)
_OWN_FOLDER = str(Path(__file__).parent)
_EXPORTS = (torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.tolist, torch.Tensor.__dlpack__)
_LENGTHS = (torch.Tensor.__len__, torch.Tensor.numel, torch.Tensor.nelement, torch.numel)
_GET_SHAPE = torch.Tensor.shape.__get__  # type: ignore[attr-defined]  # a getset descriptor


@dataclass(frozen=True)
class Ref:
    """A recorded tensor, by number."""

    value: int


@dataclass(frozen=True)
class Leaf:
    """A tensor that no recorded op made: a parameter, a buffer, an input, or a constant."""

    kind: str
    name: str


@dataclass
class Value:
    """What is known of a recorded tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    leaf: Leaf | None = None
    stale_after: int | None = None  # the node that wrote to another view of the same memory


@dataclass(frozen=True)
class Call:
    """A call in Python code: arguments with Ref for tensors and traced integers left as they are."""

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    where: str


@dataclass
class Node:
    """One ATen op."""

    op: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    module: str  # name of the innermost module whose forward was running
    call: Call | None
    outputs: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        """`aten.relu` for the in-place and out-of-place overloads alike; other libraries keep their namespace."""
        space, _, op = self.op._schema.name.partition("::")
        return f"{space}.{op.rstrip('_')}"

    @property
    def place(self) -> str:
        """Where this op stands, for messages."""
        inside = f" in {self.module!r}" if self.module else ""
        return f"{self.name}{inside}" + (f" ({self.call.where})" if self.call and self.call.where else "")

    def refs(self) -> list[int]:
        """Every value among the arguments."""
        leaves = tree_leaves((list(self.args), dict(self.kwargs)), is_leaf=lambda x: isinstance(x, Ref))
        return [leaf.value for leaf in leaves if isinstance(leaf, Ref)]


@dataclass
class Tape:
    """The record of one forward pass."""

    values: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    exported: list[int] = field(default_factory=list)  # values that left torch, as NumPy arrays or lists
    escaped: Escapes = field(default_factory=list)


def record(model: nn.Module, inputs: Inputs) -> Tape:
    """Run `model` once on `inputs` and return the tape. The model must be a private copy: its ints get traced."""
    recorder = _Recorder(model, inputs)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), _without_mkldnn(), _module_stack(model, recorder.modules):
            _trace_attributes(model, recorder.tape.escaped)
            with _Calls(recorder), _Ops(recorder):
                output = inputs.call(model)
        recorder.tape.outputs = [recorder.ref(leaf).value for leaf in output_tensors(output)]
        if not recorder.tape.outputs:
            raise ModelError(
                f"no tensor was found in the model's output, a {type(output).__name__}: cannot compare it."
            )
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return recorder.tape


def output_tensors(output: Any) -> list[Tensor]:
    """The tensors in a model's output: in tuples, mappings and the attributes of objects, nested as they come."""
    return _output_tensors(output, set())


def _output_tensors(output: Any, seen: set[int]) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if id(output) in seen or isinstance(output, (nn.Module, type)):
        return []
    seen.add(id(output))
    if isinstance(output, Mapping):
        parts = list(output.values())
    elif isinstance(output, (tuple, list)):
        parts = list(output)
    else:
        parts = list(getattr(output, "__dict__", {}).values())
    return [tensor for part in parts for tensor in _output_tensors(part, seen)]


class _Recorder:
    """State shared by the two modes while a pass is recorded."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.tape = Tape()
        self.modules: list[str] = []
        self.call: Call | None = None
        self._numbers: dict[int, int] = {}  # id of a tensor -> its value; `_alive` keeps ids from being reused
        self._alive: list[Tensor] = []
        self._memory: dict[int, list[int]] = {}  # storage -> values that look into it
        for name, parameter in model.named_parameters():
            self._add(parameter, Leaf("parameter", name))
        for name, buffer in model.named_buffers():
            self._add(buffer, Leaf("buffer", name))
        for number, tensor in enumerate(inputs.tensors()):
            self._add(tensor, Leaf("input", str(number)))

    def _add(self, tensor: Tensor, leaf: Leaf | None) -> int:
        if leaf is not None and id(tensor) in self._numbers:
            return self._numbers[id(tensor)]
        number = len(self.tape.values)
        self.tape.values.append(Value(tuple(tensor.shape), tensor.dtype, leaf))
        self._numbers[id(tensor)] = number
        self._alive.append(tensor)
        if tensor.layout == torch.strided:
            self._memory.setdefault(tensor.untyped_storage()._cdata, []).append(number)
        return number

    def ref(self, tensor: Tensor) -> Ref:
        """The number of a tensor; one never seen before is a constant."""
        number = self._numbers.get(id(tensor))
        if number is None:
            number = self._alias(tensor)
        return Ref(self._add(tensor, Leaf("constant", "")) if number is None else number)

    def _alias(self, tensor: Tensor) -> int | None:
        """The leaf that an unseen tensor is another handle of, as `parameter.data` is."""
        if tensor.layout != torch.strided:
            return None
        for number in self._memory.get(tensor.untyped_storage()._cdata, []):
            known = self._alive[number]
            same = known.data_ptr() == tensor.data_ptr() and known.stride() == tensor.stride()
            if self.tape.values[number].leaf is not None and same and known.shape == tensor.shape:
                return number
        return None

    def known(self, tensor: Tensor) -> int | None:
        return self._numbers.get(id(tensor))

    def add_node(self, op: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Node:
        module = self.modules[-1] if self.modules else ""
        refs = _map_tensors(self.ref, (list(args), dict(kwargs)))
        node = Node(op, tuple(refs[0]), refs[1], module, self.call)
        self.tape.nodes.append(node)
        return node

    def add_outputs(self, node: Node, written: list[Tensor], result: Any) -> None:
        for tensor in written:
            self._overwrite(tensor)
        results = result if isinstance(result, (tuple, list)) else [result]
        for tensor in tree_leaves(list(results)):
            if isinstance(tensor, Tensor):
                node.outputs.append(self._add(tensor, None))

    def _overwrite(self, tensor: Tensor) -> None:
        target = self.known(tensor)
        for number in self._memory.get(tensor.untyped_storage()._cdata, []):
            value = self.tape.values[number]
            if number != target and value.stale_after is None:
                value.stale_after = len(self.tape.nodes) - 1


class _Ops(TorchDispatchMode):  # type: ignore[no-untyped-call]  # the base is untyped
    """Sees every ATen op."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # the base is untyped
        self._recorder = recorder

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        node = self._recorder.add_node(op, args, kwargs)
        written = []
        if op._schema.is_mutable:
            given = {argument.name: value for argument, value in zip(op._schema.arguments, args, strict=False)} | kwargs
            for argument in op._schema.arguments:
                value = given.get(argument.name)
                if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                    written.append(value)
        result = op(*args, **kwargs)
        self._recorder.add_outputs(node, written, result)
        return result


class _Calls(TorchFunctionMode):
    """Sees every torch function that Python code calls; hands out traced sizes."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function == _GET_SHAPE or function is torch.Tensor.size:
            return self._sizes(function(*args, **kwargs), args[0], args, kwargs)
        if function in _EXPORTS and (number := self._recorder.known(args[0])) is not None:
            self._recorder.tape.exported.append(number)
        if function in _LENGTHS:
            return self._length(function(*args, **kwargs), args[0], first_only=function is torch.Tensor.__len__)
        refs = _map_tensors(self._known, (list(args), dict(kwargs)))
        name = getattr(function, "__name__", str(function))
        outer = self._recorder.call
        self._recorder.call = Call(name, tuple(refs[0]), refs[1], _where())
        try:
            return function(*args, **kwargs)
        finally:
            self._recorder.call = outer

    def _known(self, tensor: Tensor) -> Any:
        number = self._recorder.known(tensor)
        return None if number is None else Ref(number)

    def _sizes(self, result: Any, tensor: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        number = self._recorder.known(tensor)
        if number is None:
            return result
        escaped = self._recorder.tape.escaped
        if isinstance(result, int):
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            return TracedInt(result, Size(number, dim % tensor.dim()), escaped)
        return TracedSize([TracedInt(size, Size(number, dim), escaped) for dim, size in enumerate(result)])

    def _length(self, result: int, tensor: Tensor, *, first_only: bool) -> int:
        """`len(x)` and `x.numel()`: plain numbers, so the sizes in them must keep their values."""
        number = self._recorder.known(tensor)
        if number is not None:
            for dim in range(1 if first_only else tensor.dim()):
                self._recorder.tape.escaped.append((Size(number, dim), tensor.shape[dim]))
        return result


def _map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """`function` of every tensor in nested lists, tuples and dicts. Slices and traced integers stay as they are."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: _map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_map_tensors(function, value) for value in tree]
    return tree


def _where() -> str:
    """File and line of the innermost frame outside torch and outside this package's tracer."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((_TORCH_FOLDER, _OWN_FOLDER)):
            return f"{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


@contextmanager
def _without_mkldnn() -> Iterator[None]:
    """Record plain ops: mkldnn hides an LSTM behind one fused op."""
    flags = torch.backends.mkldnn.flags(enabled=False)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="TF32 acceleration"
        )  # the switch warns about hardware nobody asked for
        flags.__enter__()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="TF32 acceleration")
            flags.__exit__(None, None, None)


@contextmanager
def _module_stack(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep `stack` at the names of the modules whose forward is running."""
    handles = []
    for name, module in model.named_modules():

        def enter(module: nn.Module, args: Any, name: str = name) -> None:
            stack.append(name)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            stack.pop()

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _trace_attributes(model: nn.Module, escaped: Escapes) -> None:
    """Replace the integer attributes of every module, and those in tuples and lists, by traced integers."""
    for name, module in model.named_modules():
        for attribute, value in list(vars(module).items()):
            if attribute.startswith("_") or attribute == "training":
                continue
            if type(value) is int and value > 1:
                module.__dict__[attribute] = TracedInt(value, Attribute(name, attribute, None, value), escaped)
            elif type(value) in (tuple, list) and value and all(type(entry) is int for entry in value):
                module.__dict__[attribute] = type(value)(
                    TracedInt(entry, Attribute(name, attribute, index, entry), escaped)
                    for index, entry in enumerate(value)
                )
