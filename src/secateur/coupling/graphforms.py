"""Writes a module's graph form from the calls that its forward made while it was recorded."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import index
from typing import Any

import torch
from torch import nn
from torch.overrides import resolve_name

from secateur.coupling.requirements import Override, Solution
from secateur.coupling.rules.state import Path, State
from secateur.coupling.sizes import Arithmetic, Attribute, Escape, Expression, Size, TracedInt, mentioned
from secateur.coupling.tape import Call, Frame, Ref, Tape
from secateur.graphforms import GraphForm, Guard, Program, Step, Tree, operation
from secateur.plans import Replacement

Constants = Mapping[tuple[Call | Frame, Path], Any]  # arguments that another constant stands for in training
Overrides = Mapping[tuple[Call | None, Path | None], str]  # arguments that a size attribute replaces, with its name

# Questions about a tensor that need no step: their answers are constants, or read where they are used.
_QUESTIONS = {
    *("dim", "ndimension", "is_floating_point", "is_contiguous", "is_complex", "get_device", "stride", "element_size"),
    *("is_same_size", "is_nonzero_shape", "type", "is_set_to", "is_inference"),
}
_IN_PLACE = {"__setitem__"}
_SCALE = 6  # its position among the arguments of scaled_dot_product_attention


class NotExpressible(Exception):  # noqa: N818  # a signal, never seen outside
    """This forward does something that no program can say."""


class GraphForms:
    """Which modules of a traced model can be replaced by their graph form; and those graph forms.

    A module is replaced only if it was called once. The model itself is no submodule: `whole` allows it.
    """

    def __init__(self, model: nn.Module, state: State, training: Callable[[], Tape | None], *, whole: bool) -> None:
        self._model, self._state, self._whole = model, state, whole
        self._training = training  # a tape of the same pass in training mode, where there is one
        self._names = _Names(model, state.tape)
        self._escapes: dict[Frame, list[Escape]] = {}
        for escape in state.tape.escaped.entries:
            self._escapes.setdefault(escape.frame, []).append(escape)
        self._known: dict[str, str | None] = {}  # module -> what stands in the way

    def obstacle(self, frame: Frame) -> str | None:
        """What keeps the module of this call from being replaced, or None."""
        if frame.module not in self._known:
            self._known[frame.module] = self._obstacle(frame)
        return self._known[frame.module]

    def sizes(self, module: str) -> int:
        """How many size attributes the module has already, from an earlier pruning."""
        return len(self._sizes(module))

    def _sizes(self, module: str) -> dict[str, int]:
        found = self._model.get_submodule(module)
        return {name: index(vars(found)[name]) for name in found.program.sizes} if isinstance(found, GraphForm) else {}

    def replacements(self, solution: Solution) -> Iterator[tuple[Replacement, frozenset[int]]]:
        """Each module to replace, and the groups that make it necessary."""
        by_frame: dict[Frame, list[Override]] = {}
        for override in solution.overrides:
            if override.requirement.frame is not None:
                by_frame.setdefault(override.requirement.frame, []).append(override)
        training = self._training() if by_frame else None
        for frame, found in by_frame.items():
            names, sizes = {}, self._sizes(frame.module)
            for override in found:
                if override.attribute is not None:
                    names[override.requirement.call, override.requirement.path] = override.attribute.name
                    sizes[override.attribute.name] = override.attribute.value
            program = self._writer(frame, names, solution.attributes, _constants(frame, training)).program()
            yield (
                Replacement(frame.module, replace(program, sizes=sizes)),
                frozenset().union(*(o.groups for o in found)),
            )

    def _obstacle(self, frame: Frame) -> str | None:
        if frame.module == "" and not self._whole:
            return "it is the model itself"
        if self._state.tape.frames.get(frame.module) != [frame]:
            return "it is called more than once"
        try:
            self._writer(frame).program()
        except NotExpressible as reason:
            return str(reason)
        return None

    def _writer(
        self,
        frame: Frame,
        overrides: Overrides | None = None,
        varying: Collection[Attribute] = (),
        in_training: Constants | None = None,
    ) -> _Writer:
        escapes = self._escapes.get(frame, ())
        return _Writer(self._names, self._state, frame, escapes, overrides or {}, varying, in_training or {})


class _Names:
    """The names in a model, in an order in which those inside one module are found at once."""

    def __init__(self, model: nn.Module, tape: Tape) -> None:
        self.modules = {name for name, _ in model.named_modules()}
        values: dict[str, list[int]] = {}
        for number, value in enumerate(tape.values):
            if value.leaf is not None and value.leaf.kind in ("parameter", "buffer"):
                values.setdefault(value.leaf.name, []).append(number)
        first: dict[int, str] = {}  # the name under which a tied tensor was recorded
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        named = [(name, values.get(first.setdefault(id(tensor), name), ())) for name, tensor in tensors]
        self._sorted = sorted((name, place, numbers) for place, (name, numbers) in enumerate(named))

    def inside(self, module: str) -> dict[int, str]:
        """Recorded value -> its name relative to the module, for the module's own parameters and buffers."""
        prefix = f"{module}." if module else ""
        start, stop = (bisect_left(self._sorted, (bound,)) for bound in (prefix, f"{module}/"))  # "/" comes after "."
        entries = self._sorted[start:stop] if module else self._sorted
        found: dict[int, str] = {}
        for name, _, numbers in sorted(entries, key=lambda entry: entry[1]):
            for number in numbers:
                found.setdefault(number, name.removeprefix(prefix))
        return dict(sorted(found.items()))


class _Writer:
    """Encodes arguments as trees; values are numbered in the order in which the program meets them."""

    def __init__(
        self,
        names: _Names,
        state: State,
        frame: Frame,
        escapes: Sequence[Escape],
        overrides: Overrides,
        varying: Collection[Attribute],
        in_training: Constants,
    ) -> None:
        self._state, self._frame, self._escapes, self._overrides = state, frame, escapes, overrides
        self._varying, self._in_training = varying, in_training
        self._prefix = f"{frame.module}." if frame.module else ""
        self._leaves, self._modules = names.inside(frame.module), names.modules
        self._values: dict[int, int] = {}  # recorded value -> its place in the program
        self._numbers: dict[Expression, int] = {}  # integers that came as arguments
        self._places = 0
        self._dtypes: dict[torch.dtype, Tree] = {}

    def program(self) -> Program:
        """Raises NotExpressible, with what stands in the way."""
        args = self._pattern(self._frame.args)
        kwargs = self._pattern(dict(self._frame.kwargs))
        steps = [step for event in self._frame.events for step in self._steps(event)]
        output = self._tree(self._frame.output)
        guards = [guard for escape in self._escapes for guard in self._guards(escape)]
        return Program(args, kwargs, tuple(steps), tuple(_distinct(guards)), output, {})

    # -- what the frame gets and gives -------------------------------------------------------------------------------

    def _pattern(self, tree: Any) -> Tree:
        """An argument or a result: tensors and traced integers get a place, the rest is as it is."""
        if isinstance(tree, Ref):
            return self._define(tree)
        if isinstance(tree, TracedInt) and not isinstance(tree.expression, int):
            place = self._numbers.setdefault(tree.expression, self._places)
            self._places += place == self._places
            return ["value", place]
        if isinstance(tree, dict):
            return ["dict", *([_name(key), self._pattern(value)] for key, value in tree.items())]
        if type(tree) in (list, tuple):
            return [type(tree).__name__, *(self._pattern(entry) for entry in tree)]
        return self._tree(tree)

    def _define(self, ref: Ref) -> Tree:
        if ref.value not in self._values:
            self._values[ref.value] = self._places
            self._places += 1
        return ["value", self._values[ref.value]]

    # -- steps -------------------------------------------------------------------------------------------------------

    def _steps(self, event: Call | Frame) -> list[Step]:
        if isinstance(event, Frame):
            if not event.module.startswith(self._prefix):
                raise NotExpressible(f"it calls {event.module!r}, which is no part of it")
            target = f"module:{event.module.removeprefix(self._prefix)}"
            return [Step(target, *self._given(event), self._result(event.output))]
        if not _has_refs(event.output) and event.name not in _IN_PLACE:
            return self._answer(event)
        target = resolve_name(event.function)
        if target is None or operation(target) is None:
            raise NotExpressible(f"it calls {target or event.name}, which is not in the table of operations")
        args, kwargs = self._given(event)
        if event.name == "scaled_dot_product_attention" and len(args) <= _SCALE + 1:
            self._write_scale(event, kwargs)
        return [Step(target, args, kwargs, self._result(event.output))]

    def _write_scale(self, call: Call, kwargs: list[Any]) -> None:
        """The scale of the unpruned attention: by default it would follow the size of a head."""
        if call.kwargs.get("scale") is None:
            query = call.args[0] if call.args else call.kwargs["query"]
            scale = self._state.tape.values[query.value].shape[-1] ** -0.5
            kwargs[1:] = [*(pair for pair in kwargs[1:] if pair[0] != "scale"), ["scale", scale]]

    def _answer(self, call: Call) -> list[Step]:
        """A call without tensors in its result: a property, or something only the running code can do."""
        known = call.name == "__get__" or call.name in _QUESTIONS
        if not known or isinstance(call.output, TracedInt):
            raise NotExpressible(f"it needs the result of {call.name}, which is no tensor")
        if isinstance(call.output, torch.dtype):
            self._dtypes.setdefault(call.output, ["dtype_of", self._tree(call.args[0])])
        return []

    def _given(self, event: Call | Frame) -> tuple[list[Any], list[Any]]:
        """The arguments of a call, by position and by name."""
        args = ["tuple", *(self._tree(entry, event, (place,)) for place, entry in enumerate(event.args))]
        kwargs = ["dict", *([_name(k), self._tree(entry, event, (k,))] for k, entry in event.kwargs.items())]
        return args, kwargs

    def _result(self, tree: Any) -> Tree:
        if isinstance(tree, Ref):
            return self._define(tree)
        if isinstance(tree, dict):
            return ["dict", *([_name(key), self._result(value)] for key, value in tree.items())]
        if isinstance(tree, (list, tuple)):
            return ["tuple", *(self._result(entry) for entry in tree)]
        return None

    # -- trees -------------------------------------------------------------------------------------------------------

    def _tree(self, tree: Any, call: Call | Frame | None = None, path: Path = ()) -> Tree:
        if isinstance(call, Call) and (call, path) in self._overrides:
            return ["attribute", "", self._overrides[call, path], None]
        if call is not None and (call, path) in self._in_training:
            return ["mode", self._constant(self._in_training[call, path]), self._constant(tree)]
        if isinstance(tree, Ref):
            return self._read(tree)
        if isinstance(tree, TracedInt):
            return self._expression(tree.expression)
        if isinstance(tree, dict):
            return ["dict", *([_name(key), self._tree(value, call, (*path, key))] for key, value in tree.items())]
        if isinstance(tree, slice):
            bounds = {"start": tree.start, "stop": tree.stop, "step": tree.step}
            return ["slice", *(self._tree(bound, call, (*path, name)) for name, bound in bounds.items())]
        if isinstance(tree, (list, tuple)):  # also torch.Size and traced sizes
            kind = "list" if isinstance(tree, list) else "tuple"
            if hasattr(tree, "_fields"):
                raise NotExpressible(f"it handles a {type(tree).__name__}")
            return [kind, *(self._tree(entry, call, (*path, place)) for place, entry in enumerate(tree))]
        return self._constant(tree)

    def _constant(self, value: Any) -> Tree:
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, int):
            return index(value)
        if isinstance(value, float):
            return value if math.isfinite(value) else ["float", str(value)]
        if value is Ellipsis:
            return ["ellipsis"]
        if isinstance(value, torch.dtype):
            return self._dtypes.get(value, ["dtype", str(value).removeprefix("torch.")])
        if isinstance(value, torch.device):
            return ["device_of", self._any_tensor()]
        if isinstance(value, torch.memory_format):
            return ["memory_format", str(value).removeprefix("torch.")]
        raise NotExpressible(f"it handles a {type(value).__name__}")

    def _any_tensor(self) -> Tree:
        for value in self._values:
            return ["value", self._values[value]]
        for leaf in self._leaves.values():
            return ["leaf", leaf]
        raise NotExpressible("it asks for a device and has no tensor")

    def _read(self, ref: Ref) -> Tree:
        if ref.value in self._values:
            return ["value", self._values[ref.value]]
        if ref.value in self._leaves:
            return ["leaf", self._leaves[ref.value]]
        raise NotExpressible("it reads a tensor that is neither an argument nor a parameter or buffer of its own")

    def _expression(self, expression: Expression) -> Tree:
        if expression in self._numbers:
            return ["value", self._numbers[expression]]
        if isinstance(expression, int):
            return expression
        if isinstance(expression, Arithmetic):
            return [expression.operation, self._expression(expression.left), self._expression(expression.right)]
        if isinstance(expression, Size):
            return ["size", self._read(Ref(expression.value)), expression.dim]
        if expression.module != self._frame.module and not expression.module.startswith(self._prefix):
            return expression.value if expression.module not in self._modules else self._foreign(expression)
        path = expression.module.removeprefix(self._frame.module).removeprefix(".")
        return ["attribute", path, expression.name, expression.index]

    def _foreign(self, attribute: Attribute) -> Tree:
        raise NotExpressible(f"it uses {attribute.module or 'the model'}.{attribute.name}, a number of another module")

    # -- decisions ---------------------------------------------------------------------------------------------------

    def _guards(self, escape: Escape) -> list[Guard]:
        """What was decided on lengths that no channel changes must be decided so again."""
        leaves = mentioned(escape.expression)
        lengths = [leaf for leaf in leaves if isinstance(leaf, Size)]
        fixed = [length for length in lengths if not self._state.labels[length.value].covered(length.dim)]
        if escape.relation is None or not fixed or any(leaf in self._varying for leaf in leaves):
            return []
        return [Guard(self._expression(escape.expression), escape.value, escape.relation)]


def _constants(frame: Frame, training: Tape | None) -> Constants:
    """The constants that were others in training mode: probabilities of dropout, and flags that say so.

    Nothing, where the module takes another way in training altogether.
    """
    twins = training.frames.get(frame.module, []) if training is not None else []
    if len(twins) != 1 or len(twins[0].events) != len(frame.events):
        return {}
    found: dict[tuple[Call | Frame, Path], Any] = {}
    for event, twin in zip(frame.events, twins[0].events, strict=True):
        if _callee(event) != _callee(twin):
            return {}
        now, then = ({**dict(enumerate(e.args)), **e.kwargs} for e in (event, twin))
        found.update(((event, path), other) for path, other in _differing(now, then, ()))
    return found


def _callee(event: Call | Frame) -> Any:
    return event.module if isinstance(event, Frame) else event.function


def _differing(now: Any, then: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if isinstance(now, dict) and isinstance(then, dict):
        for key in now.keys() & then.keys():
            yield from _differing(now[key], then[key], (*path, key))
    elif isinstance(now, (list, tuple)) and isinstance(then, (list, tuple)) and len(now) == len(then):
        for place, (a, b) in enumerate(zip(now, then, strict=True)):
            yield from _differing(a, b, (*path, place))
    elif type(now) is type(then) and isinstance(now, (bool, float)) and now != then:
        yield path, then


def _distinct(guards: list[Guard]) -> list[Guard]:
    return list({repr(guard): guard for guard in guards}.values())  # a tree holds lists, which no set takes


def _has_refs(tree: Any) -> bool:
    if isinstance(tree, dict):
        return any(_has_refs(entry) for entry in tree.values())
    if isinstance(tree, (list, tuple)):
        return any(_has_refs(entry) for entry in tree)
    return isinstance(tree, Ref)


def _name(key: Any) -> str:
    if not isinstance(key, str):
        raise NotExpressible(f"it handles a dict with a key {key!r}")
    return key
