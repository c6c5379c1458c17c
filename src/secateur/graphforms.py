"""Graph forms: a module's forward as data, and the module that runs it.

Where Python code reads a size off a tensor whose width shrinks (`reshape(B, N, C)`), no attribute can repair it. Such a
module is replaced by its graph form: the calls that its forward made, in order, with lengths taken from the live
tensors, and with one integer attribute for every number that has to follow the widths. Parameters, buffers, submodules,
attributes and the class stay what they were; only `forward` is another.

A program is plain data, as JSON can hold it, because it travels in saved plans. It names operations, which are looked
up in the one table below; nothing in it is ever executed as code. A tree in a program is a number, a text, None, or a
list that begins with a tag:

    ["list", ...] ["tuple", ...] ["dict", [name, tree], ...] ["slice", start, stop, step] ["ellipsis"]
    ["value", n]  a tensor or number by its place in the program     ["leaf", path]  a parameter or buffer
    ["attribute", path, name, entry]  an integer of a module         ["size", tree, dim]  the length of a dimension
    ["add" | "sub" | "mul" | "floordiv" | "mod", left, right]        ["float", "inf" | "-inf" | "nan"]
    ["dtype", name] ["dtype_of", tree] ["device_of", tree]           ["mode", training, evaluation]
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.errors import ModelError, PlanMismatchError

Tree = Any
Values = dict[int, Any]
Read = Callable[[nn.Module, Values], Any]
Write = Callable[[Any, Values], None]

# The operations a program may name, under torch, torch.Tensor, torch.nn.functional and torch.functional.
OPERATIONS = frozenset(
    """
    abs adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d add add_ addcdiv addcmul addmm amax amin arange
    argmax argmin avg_pool1d avg_pool2d baddbmm batch_norm bmm broadcast_to cat celu chunk clamp clamp_ clamp_max
    clamp_min clone concat contiguous conv1d conv2d conv3d conv_transpose1d conv_transpose2d cos cosine_similarity
    cumsum detach diagonal div div_ dropout dropout1d dropout2d einsum elu embedding empty empty_like eq erf exp expand
    expand_as fill_ flatten flip float floor floor_divide fold full full_like gather ge gelu glu group_norm gt
    hardsigmoid hardswish hardtanh index_select instance_norm interpolate layer_norm le leaky_relu lerp linear log
    log_softmax logical_and logical_not logical_or logsigmoid lt masked_fill masked_fill_ matmul max max_pool1d
    max_pool2d maximum mean meshgrid min minimum mish mm movedim mul mul_ narrow ne neg new_empty new_full new_ones
    new_zeros norm normalize one_hot ones ones_like pad permute pixel_shuffle pixel_unshuffle pow prelu prod reciprocal
    relu relu6 relu_ repeat repeat_interleave reshape reshape_as rms_norm roll rsqrt rsub scaled_dot_product_attention
    selu sigmoid sigmoid_ sign silu sin softmax softplus split split_with_sizes sqrt square squeeze stack std sub sub_
    sum swapaxes t take_along_dim tanh tensor_split tile to topk transpose tril triu true_divide type_as unbind
    unflatten unfold unsqueeze upsample var var_mean view view_as where zeros zeros_like double half bfloat16 bool long
    int __getitem__ __setitem__ T mT __and__ __or__ __xor__ __invert__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__
    logaddexp bitwise_not bitwise_and bitwise_or tan atan ceil round rot90 diff
    """.split()  # noqa: SIM905  # a list of two hundred strings reads worse
)
_SPACES: tuple[tuple[str, Any], ...] = (
    ("torch.nn.functional.", F),
    ("torch.functional.", torch.functional),
    ("torch.Tensor.", Tensor),
    ("torch.", torch),
)
_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
}
_RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "keep": lambda now, then: now == then,
    "eq": lambda now, then: (now == 0) == (then == 0),
    "lt": lambda now, then: (now < 0) == (then < 0),
    "le": lambda now, then: (now <= 0) == (then <= 0),
}
_TEXT = re.compile(r"[\w ,.>\-]{0,200}")
_PATH = re.compile(r"\w*(\.\w+)*")
_NAME = re.compile(r"[^\W_]\w*")
_GETTER = ".__get__"


@dataclass(frozen=True)
class Step:
    """One call: of an operation (`torch.Tensor.view`), or of a submodule (`module:attn.qkv`)."""

    target: str
    args: Tree
    kwargs: Tree
    output: Tree  # where the results go: values in tuples and lists


@dataclass(frozen=True)
class Guard:
    """A decision of the recorded code that must come out the same: the expression's value, or its relation to 0."""

    expression: Tree
    value: int
    relation: str  # keep: the value itself; eq, lt, le: whether it is equal to, below, not above 0


@dataclass(frozen=True)
class Program:
    """The calls of one module's forward."""

    args: Tree
    kwargs: Tree
    steps: tuple[Step, ...]
    guards: tuple[Guard, ...]
    output: Tree
    sizes: Mapping[str, int]  # integer attributes that the graph form adds, with the values of the unpruned model

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self  # nothing in it ever changes

    def to_data(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "args": self.args,
            "kwargs": self.kwargs,
            "steps": [[step.target, step.args, step.kwargs, step.output] for step in self.steps],
            "guards": [[guard.expression, guard.value, guard.relation] for guard in self.guards],
            "output": self.output,
            "sizes": dict(self.sizes),
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Program:
        """The program that `to_data` wrote. Raises PlanMismatchError for anything else: every part is checked here."""
        try:
            program = cls(
                data["args"],
                data["kwargs"],
                tuple(Step(*step) for step in data["steps"]),
                tuple(Guard(*guard) for guard in data["guards"]),
                data["output"],
                {str(name): value for name, value in data["sizes"].items()},
            )
            program.compiled()
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
            raise PlanMismatchError(f"not a graph form: {type(error).__name__}: {error}") from error
        return program

    def compiled(self) -> Compiled:
        """The same as closures. Raises ValueError for a tag or an operation that is not known."""
        for name, value in self.sizes.items():
            if not _NAME.fullmatch(name) or type(value) is not int or value < 0:
                raise ValueError(f"no size: {name!r}")
        for guard in self.guards:
            if guard.relation not in _RELATIONS or type(guard.value) is not int:
                raise ValueError(f"no guard: {guard!r}")
        steps = [(_target(s.target), _reader(s.args), _reader(s.kwargs), _writer(s.output)) for s in self.steps]
        guards = tuple((_reader(guard.expression), guard) for guard in self.guards)
        return Compiled(_matcher(self.args), _matcher(self.kwargs), tuple(steps), guards, _reader(self.output))

    def code(self) -> str:
        """The program as text, one line per step."""
        lines = [f"def forward{_text(self.args)}: {_text(self.kwargs)}"]
        for step in self.steps:
            lines.append(f"    {_text(step.output)} = {step.target}{_text(step.args)} {_text(step.kwargs)}".rstrip())
        return "\n".join([*lines, f"    return {_text(self.output)}"])


@dataclass(frozen=True)
class Compiled:
    """A program as closures over the module and the values so far."""

    args: Write
    kwargs: Write
    steps: tuple[tuple[Callable[[nn.Module], Callable[..., Any]], Read, Read, Write], ...]
    guards: tuple[tuple[Read, Guard], ...]
    output: Read


class GraphForm(nn.Module):
    """Mixed into the class of a replaced module: the same module with the recorded forward."""

    program: Program

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original forward computed when it was recorded, on live widths."""
        compiled = self._compiled()
        values: Values = {}
        args, kwargs = self._as_recorded(args, kwargs)
        compiled.args(args, values)
        compiled.kwargs(kwargs, values)
        for target, read_args, read_kwargs, write in compiled.steps:
            write(target(self)(*read_args(self, values), **read_kwargs(self, values)), values)
        for read, guard in compiled.guards:
            if not _RELATIONS[guard.relation](read(self, values), guard.value):
                raise ModelError(
                    f"{type(self).__name__} runs in its graph form, recorded for other sizes: its code took a decision "
                    f"on {_text(guard.expression)} = {guard.value}. Trace with inputs like these, or keep the module "
                    "with ignore=."
                )
        return compiled.output(self, values)

    def _compiled(self) -> Compiled:
        found = self.__dict__.get("_compiled_program")
        if found is None:
            found = self.__dict__["_compiled_program"] = self.program.compiled()
        return cast(Compiled, found)

    def _as_recorded(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's arguments, given by position and by name as they were in the recording."""
        names = [name for name, _ in self.program.kwargs[1:]]
        if len(args) == len(self.program.args) - 1 and sorted(kwargs) == sorted(names):
            return args, kwargs
        signature = inspect.signature(_source_class(type(self)).forward)
        defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
        given = signature.bind(self, *args, **kwargs).arguments
        for parameter in signature.parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                given.update(given.pop(parameter.name, {}))
        own, *positional = list(signature.parameters)[: len(self.program.args)]
        expected = {own, *positional, *names}
        unexpected = [name for name in given if name not in expected and given[name] is not defaults.get(name)]
        if unexpected:
            raise ModelError(
                f"{type(self).__name__} runs in its graph form, recorded without the argument {unexpected[0]!r}."
            )
        complete = {**defaults, **given}
        return tuple(complete[name] for name in positional), {name: complete[name] for name in names}

    def extra_repr(self) -> str:
        """What the original printed, and that this is a graph form."""
        return ", ".join(filter(None, [super().extra_repr(), "graph form"]))

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {key: value for key, value in self.__dict__.items() if key != "_compiled_program"}
        return _empty, (_source_class(type(self)),), state


_CLASSES: dict[type[nn.Module], type[GraphForm]] = {}  # a class is made once, so that types compare


def graph_form(module: nn.Module, program: Program) -> GraphForm:
    """`module` with the forward of `program`: shares its tensors, submodules, hooks and attributes."""
    form = _empty(_source_class(type(module)))
    own = set(module.program.sizes) if isinstance(module, GraphForm) else set()
    taken = [name for name in program.sizes if name not in own and (hasattr(module, name) or name == "program")]
    if taken:
        raise PlanMismatchError(f"a graph form cannot add {', '.join(taken)}: the module has such an attribute.")
    form.__dict__.update(module.__dict__)
    form.__dict__.pop("_compiled_program", None)
    form.__dict__.update(program.sizes)
    form.__dict__["program"] = program
    return form


def _empty(source: type[nn.Module]) -> GraphForm:
    if source not in _CLASSES:
        _CLASSES[source] = type(source.__name__, (GraphForm, source), {"__doc__": source.__doc__})
    return _CLASSES[source].__new__(_CLASSES[source])


def _source_class(cls: type[nn.Module]) -> type[nn.Module]:
    return cast(type[nn.Module], cls.__mro__[2]) if issubclass(cls, GraphForm) else cls


def operation(name: str) -> Callable[..., Any] | None:
    """The function that a program's operation stands for, or None for a name that is not in the table."""
    for prefix, space in _SPACES:
        base = name.removeprefix(prefix)
        if base == name or base.removesuffix(_GETTER) not in OPERATIONS:
            continue
        found = getattr(space, base.removesuffix(_GETTER), None)
        if base.endswith(_GETTER):
            found = getattr(found, "__get__", None)
        return found if callable(found) else None
    return None


# -- trees -----------------------------------------------------------------------------------------------------------


def _tagged(tree: Tree) -> tuple[str, list[Any]]:
    if not isinstance(tree, list) or not tree or not isinstance(tree[0], str):
        raise ValueError(f"no tree: {str(tree)[:40]}")
    return tree[0], tree[1:]


def _is_plain(tree: Tree) -> bool:
    if isinstance(tree, str) and not _TEXT.fullmatch(tree):
        raise ValueError(f"no text of a program: {tree[:40]!r}")
    return tree is None or isinstance(tree, (bool, int, float, str))


def _reader(tree: Tree) -> Read:
    """A function that gives what the tree stands for."""
    if _is_plain(tree):
        return lambda module, values: tree
    tag, rest = _tagged(tree)
    if tag in _ARITHMETIC:
        compute, (left, right) = _ARITHMETIC[tag], map(_reader, rest)
        return lambda module, values: compute(left(module, values), right(module, values))
    if tag not in _READERS:
        raise ValueError(f"no tag of a program: {tag[:40]!r}")
    return _READERS[tag](*rest)


def _read_value(number: int) -> Read:
    _check_index(number)
    return lambda module, values: values[number]


def _read_leaf(path: str) -> Read:
    _check_path(path)
    owner, _, name = path.rpartition(".")

    def read(module: nn.Module, values: Values) -> Any:
        found = getattr(module.get_submodule(owner), name)
        if not isinstance(found, Tensor):
            raise PlanMismatchError(f"{path!r} is no parameter or buffer.")
        return found

    return read


def _read_attribute(path: str, name: str, entry: int | None) -> Read:
    _check_path(path)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"no attribute: {name!r}")
    if entry is not None:
        _check_index(entry)

    def read(module: nn.Module, values: Values) -> Any:
        found: Any = vars(module.get_submodule(path)).get(name)
        found = found if entry is None else found[entry]
        if not isinstance(found, int):
            raise PlanMismatchError(f"{path}.{name} is no integer.")
        return found

    return read


def _read_mode(training: Tree, evaluation: Tree) -> Read:
    chosen = _reader(training), _reader(evaluation)
    return lambda module, values: chosen[not module.training](module, values)


def _read_size(tree: Tree, dim: int) -> Read:
    tensor = _reader(tree)
    _check_index(dim)
    return lambda module, values: tensor(module, values).shape[dim]


def _read_sequence(kind: Callable[[Iterator[Any]], Any]) -> Callable[..., Read]:
    def reader(*trees: Tree) -> Read:
        entries = [_reader(tree) for tree in trees]
        return lambda module, values: kind(entry(module, values) for entry in entries)

    return reader


def _read_dict(*pairs: Sequence[Any]) -> Read:
    entries = [(_argument_name(name), _reader(tree)) for name, tree in pairs]
    return lambda module, values: {name: read(module, values) for name, read in entries}


def _read_slice(*bounds: Tree) -> Read:
    start, stop, step = (_reader(bound) for bound in bounds)
    return lambda module, values: slice(start(module, values), stop(module, values), step(module, values))


def _read_dtype(name: str) -> Read:
    found = getattr(torch, name) if _NAME.fullmatch(name) else None
    if not isinstance(found, torch.dtype):
        raise ValueError(f"no dtype: {name!r}")
    return lambda module, values: found


def _read_property(name: str) -> Callable[[Tree], Read]:
    def reader(tree: Tree) -> Read:
        tensor = _reader(tree)
        return lambda module, values: getattr(tensor(module, values), name)

    return reader


def _read_memory_format(name: str) -> Read:
    found = {"contiguous_format": torch.contiguous_format, "channels_last": torch.channels_last}[name]
    return lambda module, values: found


def _read_float(name: str) -> Read:
    value = {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}[name]
    return lambda module, values: value


_READERS: dict[str, Callable[..., Read]] = {
    "value": _read_value,
    "leaf": _read_leaf,
    "attribute": _read_attribute,
    "size": _read_size,
    "list": _read_sequence(list),
    "tuple": _read_sequence(tuple),
    "dict": _read_dict,
    "slice": _read_slice,
    "ellipsis": lambda: lambda module, values: ...,
    "dtype": _read_dtype,
    "dtype_of": _read_property("dtype"),
    "device_of": _read_property("device"),
    "memory_format": _read_memory_format,
    "float": _read_float,
    "mode": _read_mode,
}


def _writer(tree: Tree) -> Write:
    """A function that puts results where the program's next steps look for them."""
    if _is_plain(tree):
        return lambda result, values: None
    return _taking_apart(tree, _writer)


def _matcher(tree: Tree) -> Write:
    """A function that takes a call's arguments apart; what was a constant in the recording must be the same again."""
    if not _is_plain(tree) and _tagged(tree)[0] in ("value", "list", "tuple", "dict"):
        return _taking_apart(tree, _matcher)
    read = _reader(tree)

    def compare(given: Any, values: Values) -> None:
        expected = read(cast(nn.Module, None), values)
        if given is not expected and given != expected:
            raise ModelError(
                f"a module in its graph form was recorded with {expected!r} for an argument; it got {given!r} now."
            )

    return compare


def _taking_apart(tree: Tree, part: Callable[[Tree], Write]) -> Write:
    tag, rest = _tagged(tree)
    if tag == "value":
        (number,) = rest
        _check_index(number)
        return lambda given, values: values.__setitem__(number, given)
    if tag == "dict":
        named = {_argument_name(name): part(entry) for name, entry in rest}

        def write_named(given: Any, values: Values) -> None:
            for name, write in named.items():
                write(given[name], values)

        return write_named
    if tag not in ("list", "tuple"):
        raise ValueError(f"no place for a result: {tag[:40]!r}")
    entries = [part(entry) for entry in rest]

    def write_all(given: Any, values: Values) -> None:
        for write, entry in zip(entries, given, strict=True):
            write(entry, values)

    return write_all


def _target(name: str) -> Callable[[nn.Module], Callable[..., Any]]:
    if name.startswith("module:"):
        path = name.removeprefix("module:")
        _check_path(path)
        if not path:
            raise ValueError("a program that calls its own module")
        return lambda module: module.get_submodule(path)
    found = operation(name)
    if found is None:
        raise ValueError(f"no operation of a graph form: {name!r}")
    return lambda module: found


def _argument_name(name: Any) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name):
        raise ValueError(f"no name of an argument: {name!r}")
    return name


def _check_path(path: Any) -> None:
    if not isinstance(path, str) or not _PATH.fullmatch(path):
        raise ValueError(f"no path: {path!r}")


def _check_index(number: Any) -> None:
    if type(number) is not int or number < 0:
        raise ValueError(f"no index: {number!r}")


def _text(tree: Tree) -> str:
    """A tree for people."""
    if not isinstance(tree, list):
        return repr(tree)
    tag, rest = tree[0], tree[1:]
    if tag == "value":
        return f"%{rest[0]}"
    if tag == "attribute":
        return ".".join(filter(None, ["self", *rest[:2]])) + ("" if rest[2] is None else f"[{rest[2]}]")
    if tag == "leaf":
        return f"self.{rest[0]}"
    if tag == "size":
        return f"{_text(rest[0])}.shape[{rest[1]}]"
    if tag == "dict":
        return ", ".join(f"{name}={_text(entry)}" for name, entry in rest)
    inside = ", ".join(map(_text, rest))
    return f"({inside})" if tag in ("list", "tuple") else f"{tag}({inside})"
