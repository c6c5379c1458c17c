"""Records one forward pass on a tape.

Two modes watch the pass. The dispatch mode sees every ATen op after all Python control flow, with tensors known by
identity: tied weights and modules used twice come for free. The function mode sees the call in the user's code that
led to the op, with the integers it was given (`coupling.sizes`), and the place in the source.
"""

from __future__ import annotations

import os
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateur.coupling.memory import overlaps
from secateur.coupling.sizes import Attribute, Escapes, Size, TracedInt, TracedSize
from secateur.coupling.tape import Call, Frame, Leaf, Node, Ref, Tape, Value, map_tensors
from secateur.errors import ModelError
from secateur.inputs import Inputs

_TORCH_FOLDER = str(Path(torch.__file__).parent) + os.sep
_OWN_FOLDER = str(Path(__file__).parent.parent) + os.sep
_EXPORTS = (torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.tolist, torch.Tensor.__dlpack__)
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_OPEN_MEMORY = (torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.__dlpack__, torch.Tensor.data_ptr)
_COUNTS = (torch.Tensor.numel, torch.Tensor.nelement, torch.numel)
_GET_SHAPE = torch.Tensor.shape.__get__  # type: ignore[attr-defined]  # a getset descriptor

# Recorded as one op, although the framework may take it apart: the default scale of attention comes from the size of a
# head, and the parts would show that as a number without a history; a norm is known by its call.
_ATOMIC: dict[Callable[..., Any], torch._ops.OpOverload] = {
    F.scaled_dot_product_attention: torch.ops.aten.scaled_dot_product_attention.default,
    F.rms_norm: torch.ops.aten.rms_norm.default,
}


class WritesToSharedMemory(BaseException):
    """The forward is about to write to memory that the copy shares. (No code under way may take it for an error.)"""


def record(model: nn.Module, inputs: Inputs, shared: Iterable[Tensor] = ()) -> Tape:
    """Run `model` once on `inputs` and return the tape. The model must be a private copy: its ints get traced.

    `shared`: tensors that have their memory in common with the caller's; raises WritesToSharedMemory before that
    memory is written to.
    """
    recorder = _Recorder(model, inputs, shared)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), _frames(model, recorder):
            _trace_attributes(model, recorder.tape.escaped)
            with _Calls(recorder), _Ops(recorder):
                output = inputs.call(model)
        if recorder.refused:  # the model's code went on all the same
            raise WritesToSharedMemory
        recorder.tape.outputs = [recorder.ref(leaf).value for leaf in output_tensors(output)]
        if not recorder.tape.outputs:
            raise ModelError(
                f"no tensor was found in the model's output, a {type(output).__name__}: cannot compare it."
            )
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return recorder.tape


def output_tensors(output: Any) -> list[Tensor]:
    """The tensors in a model's output: in tuples, mappings and dataclasses, nested as they come.

    An output that is an object of another class shows its attributes. Inside an output such an object is state that
    the model hands to its own next call (a cache of keys and values): no result, and free to shrink.
    """
    return _output_tensors(output, set(), outermost=True)


def _output_tensors(output: Any, seen: set[int], *, outermost: bool = False) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if id(output) in seen or isinstance(output, (nn.Module, type)):
        return []
    seen.add(id(output))
    if isinstance(output, Mapping):
        parts = list(output.values())
    elif isinstance(output, (tuple, list)):
        parts = list(output)
    elif outermost or is_dataclass(output):
        parts = list(getattr(output, "__dict__", {}).values())
    else:
        parts = []
    return [tensor for part in parts for tensor in _output_tensors(part, seen)]


class _Recorder:
    """State shared by the two modes while a pass is recorded."""

    def __init__(self, model: nn.Module, inputs: Inputs, shared: Iterable[Tensor]) -> None:
        self.tape = Tape()
        self.tape.escaped.where = _where
        self.frames: list[Frame] = [Frame("")]  # the module calls under way; the first stands for code outside
        self.call: Call | None = None
        self.atomic = False  # inside a call that is recorded as one op
        self._numbers: dict[int, int] = {}  # id of a tensor -> its value; `_alive` keeps ids from being reused
        self._alive: list[Tensor] = []
        self._memory: dict[int, list[int]] = {}  # storage -> values that look into it
        self._protected = {t.untyped_storage()._cdata for t in shared if t.layout == torch.strided}
        self.refused = False
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
            same = known.storage_offset() == tensor.storage_offset() and known.stride() == tensor.stride()
            if self.tape.values[number].leaf is not None and same and known.shape == tensor.shape:
                return number
        return None

    def known(self, tensor: Tensor) -> int | None:
        return self._numbers.get(id(tensor))

    def add_node(self, op: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Node:
        refs = map_tensors(self.ref, (list(args), dict(kwargs)))
        node = Node(op, tuple(refs[0]), refs[1], self.frames[-1].module, self.call)
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
        if tensor.layout != torch.strided:
            return
        storage, node = tensor.untyped_storage()._cdata, len(self.tape.nodes) - 1
        views = [number for number in self._memory.get(storage, []) if self._is_current(number)]
        others = [n for n in views if n != self.known(tensor) and overlaps(self._alive[n], tensor)]
        self.tape.overwritten.setdefault(node, []).extend(others)
        self._memory[storage] = views

    def _is_current(self, number: int) -> bool:
        """Whether code can still get at a value: it has a name, or its tensor was not written to since."""
        return self.tape.values[number].leaf is not None or self.known(self._alive[number]) == number

    def protect(self, written: Sequence[Any]) -> None:
        """Raise WritesToSharedMemory before the caller's own parameters are written to."""
        strided = (t for t in written if isinstance(t, Tensor) and t.layout == torch.strided)
        if self._protected and any(tensor.untyped_storage()._cdata in self._protected for tensor in strided):
            self.refused = True
            raise WritesToSharedMemory

    # -- modules -----------------------------------------------------------------------------------------------------

    def enter(self, module: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A module's forward begins."""
        refs = map_tensors(self.ref, (args, dict(kwargs)))
        frame = Frame(module, *refs)
        self.frames[-1].events.append(frame)
        self.tape.frames.setdefault(module, []).append(frame)
        self._move(self.frames, push=frame)

    def leave(self, output: Any) -> None:
        """A module's forward ends."""
        self.frames[-1].output = map_tensors(self.ref, output)
        self._move(self.frames)

    def _move(self, frames: list[Frame], push: Frame | None = None) -> None:
        if push is None:
            frames.pop()
        else:
            frames.append(push)
        self.tape.escaped.frame = frames[-1]


class _Ops(TorchDispatchMode):  # type: ignore[no-untyped-call]  # the base is untyped
    """Sees every ATen op."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # the base is untyped
        self._recorder = recorder

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self._recorder.atomic:
            return op(*args, **kwargs)
        node = self._recorder.add_node(op, args, kwargs)
        written = _written(op, args, kwargs)
        self._recorder.protect(written)
        if "batch_norm" in node.name:
            self._recorder.protect(args[3:5])  # running statistics, which some of these ops write without saying so
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
        if function in _OPEN_MEMORY:
            self._recorder.protect(args[:1])
        if function is torch.Tensor.__len__:
            return self._length(args[0])
        if function in _COUNTS:
            return self._sizes(torch.Tensor.size(args[0]), args[0], (), {}).numel()
        recorder, outer = self._recorder, self._recorder.call
        known_args, known_kwargs = map_tensors(recorder.ref, (tuple(args), dict(kwargs)))
        name = getattr(function, "__name__", str(function))
        frame = recorder.frames[-1]
        call = Call(name, function, known_args, known_kwargs, _where(), frame)
        frame.events.append(call)
        recorder.call = call
        try:
            with _without_mkldnn() if name in _RECURRENT else nullcontext():
                result = self._as_one_op(function, args, kwargs) if function in _ATOMIC else function(*args, **kwargs)
        finally:
            recorder.call = outer
        call.output = map_tensors(recorder.ref, result)
        return result

    def _as_one_op(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        recorder = self._recorder
        node = recorder.add_node(_ATOMIC[function], args, kwargs)
        recorder.atomic = True
        try:
            result = function(*args, **kwargs)
        finally:
            recorder.atomic = False
        recorder.add_outputs(node, [], result)
        return result

    def _sizes(self, result: Any, tensor: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        number = self._recorder.ref(tensor).value
        escaped = self._recorder.tape.escaped
        self._recorder.tape.sized.add(number)
        if isinstance(result, int):
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            return TracedInt(result, Size(number, dim % tensor.dim()), escaped)
        return TracedSize([TracedInt(size, Size(number, dim), escaped) for dim, size in enumerate(result)])

    def _length(self, tensor: Tensor) -> int:
        """`len(x)` is a plain number, so the size must keep its value."""
        length = int(tensor.shape[0]) if tensor.dim() else 0
        number = self._recorder.ref(tensor).value
        self._recorder.tape.sized.add(number)
        self._recorder.tape.escaped.add(Size(number, 0), length)
        return length


def _written(op: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that an op writes to, as its schema says."""
    if not op._schema.is_mutable:
        return []
    given = {argument.name: value for argument, value in zip(op._schema.arguments, args, strict=False)} | dict(kwargs)
    marked = [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [tensor for tensor in tree_leaves([given.get(name) for name in marked]) if isinstance(tensor, Tensor)]


def _where() -> str:
    """File and line of the innermost frame outside torch and outside this package's tracer."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((_TORCH_FOLDER, _OWN_FOLDER)):
            return f"{os.path.basename(file)}:{frame.f_lineno}"  # noqa: PTH119  # for every call: a Path takes longer
        frame = frame.f_back
    return ""


@contextmanager
def _without_mkldnn() -> Iterator[None]:
    """Record plain ops: mkldnn hides an LSTM behind one fused op. (Elsewhere it only computes what a plain op says.)"""
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
def _frames(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Record the call of every module: what its forward gets (after the user's hooks) and gives (before them)."""
    handles = []
    for name, module in model.named_modules():

        def enter(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            recorder.enter(name, args, kwargs)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            recorder.leave(output)

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, prepend=True, always_call=True))
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
