"""Traced integers: ints that remember the tensor size or module attribute they were computed from.

`reshape(b, self.groups, c // self.groups, h, w)` reaches the framework as five plain numbers. To know which of them
will follow when channels go, and which attribute must change, the recorded forward pass runs with sizes and attributes
that carry an expression along. An int that lost its expression is a literal, and a literal never follows.

What leaves integer arithmetic (a division by the width, a comparison with it) *escapes*: it is noted with its value,
and must keep that value in the shrunk model. Two numbers found equal must stay equal. Each escape is noted with the
call of a module in which it happened, because a module that is replaced by its graph form has no such code any more.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import index
from typing import Any, SupportsIndex


@dataclass(frozen=True)
class Attribute:
    """An integer attribute of a module, or one entry of a tuple attribute."""

    module: str
    name: str
    index: int | None
    value: int


@dataclass(frozen=True)
class Size:
    """The length of one dimension of a recorded value."""

    value: int
    dim: int


@dataclass(frozen=True)
class Arithmetic:
    """`left operation right` on expressions."""

    operation: str
    left: Expression
    right: Expression


Expression = int | Attribute | Size | Arithmetic


@dataclass(frozen=True)
class Escape:
    """An expression that must keep its value, and the frame (`tape.Frame`) whose code used it."""

    expression: Expression
    value: int
    frame: Any
    where: str  # file and line
    binds: bool  # whether the shrunk model must keep the value
    relation: str | None  # what a graph form must find again: the value ("keep"), or its relation to 0


@dataclass
class Escapes:
    """The escapes of one recording. The recorder keeps `frame` at the module call under way."""

    entries: list[Escape] = field(default_factory=list)
    frame: Any = None
    where: Callable[[], str] = str  # tells file and line of the code under way

    def add(self, expression: Expression, value: int, *, binds: bool = True, relation: str | None = "keep") -> None:
        """Note that the code under way used this number."""
        if not isinstance(expression, int):
            self.entries.append(Escape(expression, value, self.frame, self.where(), binds, relation))


OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
}


class TracedInt(int):
    """An int with the expression it came from; arithmetic on it stays traced, anything else escapes."""

    expression: Expression
    escaped: Escapes  # shared by one recording

    def __new__(cls, value: int, expression: Expression, escaped: Escapes) -> TracedInt:
        """`value`, computed by `expression`."""
        traced = super().__new__(cls, value)
        traced.expression = expression
        traced.escaped = escaped
        return traced

    def escape(self) -> int:
        """The plain number, noted as one whose further use nobody sees."""
        self.escaped.add(self.expression, index(self))
        return index(self)

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (index(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> int:
        return index(self)

    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        equal = int.__eq__(self, other)
        if equal is not NotImplemented and isinstance(other, int) and not _says_nothing("eq", self, other):
            difference = Arithmetic("sub", self.expression, expression_of(other))
            self.escaped.add(difference, index(self) - index(other), binds=equal, relation="eq")
        return bool(equal) if equal is not NotImplemented else equal

    def __ne__(self, other: object) -> bool:
        equal = self.__eq__(other)
        return equal if equal is NotImplemented else not equal

    def __neg__(self) -> TracedInt:
        return TracedInt(-index(self), Arithmetic("sub", 0, self.expression), self.escaped)


def _traced(name: str, *, reflected: bool) -> Callable[[TracedInt, Any], Any]:
    compute = OPERATIONS[name]

    def method(self: TracedInt, other: Any) -> Any:
        if isinstance(other, bool) or not isinstance(other, int):
            if isinstance(other, float):
                self.escape()
            return NotImplemented
        left, right = (other, self) if reflected else (self, other)
        value = compute(index(left), index(right))
        return TracedInt(value, Arithmetic(name, expression_of(left), expression_of(right)), self.escaped)

    return method


def _says_nothing(relation: str, left: TracedInt, right: int) -> bool:
    """Whether the comparison holds for every length: no dimension that shrinks ever reaches 0."""
    literal = not isinstance(right, TracedInt) and index(left) > 0 and _stays_positive(left.expression)
    return literal and (index(right) <= 0 or (relation == "lt" and index(right) == 1))


def _stays_positive(expression: Expression) -> bool:
    if isinstance(expression, Arithmetic):
        grows = expression.operation in ("add", "mul")
        return grows and _stays_positive(expression.left) and _stays_positive(expression.right)
    return not isinstance(expression, int) or expression > 0


def _comparing(name: str, relation: str) -> Callable[..., Any]:
    """A decision: the shrunk model keeps both numbers, a graph form only how they compare."""
    compute = getattr(int, name)

    def method(self: TracedInt, other: Any) -> Any:
        if not isinstance(other, int):
            return compute(self.escape(), other)
        if _says_nothing(relation, self, other):
            return compute(index(self), index(other))
        difference = Arithmetic("sub", self.expression, expression_of(other))
        self.escaped.add(difference, index(self) - index(other), binds=False, relation=relation)
        for number in (self, other):
            if isinstance(number, TracedInt):
                self.escaped.add(number.expression, index(number), relation=None)
        return compute(index(self), index(other))

    return method


def _escaping(name: str) -> Callable[..., Any]:
    compute = getattr(int, name)

    def method(self: TracedInt, *others: Any) -> Any:
        plain = [other.escape() if isinstance(other, TracedInt) else other for other in others]
        return compute(self.escape(), *plain)

    return method


for _name in OPERATIONS:
    setattr(TracedInt, f"__{_name}__", _traced(_name, reflected=False))
    setattr(TracedInt, f"__r{_name}__", _traced(_name, reflected=True))
_ESCAPING = (
    *("int", "float", "abs", "truediv", "rtruediv", "pow", "rpow", "divmod", "rdivmod"),
    *("lshift", "rlshift", "rshift", "rrshift", "and", "rand", "or", "ror", "xor", "rxor", "invert", "round"),
)
for _name, _relation in (("lt", "lt"), ("ge", "lt"), ("le", "le"), ("gt", "le")):
    setattr(TracedInt, f"__{_name}__", _comparing(f"__{_name}__", _relation))
for _name in _ESCAPING:
    setattr(TracedInt, f"__{_name}__", _escaping(f"__{_name}__"))


class TracedSize(tuple[int, ...]):
    """A shape of traced integers, in place of a torch.Size (which cannot be subclassed)."""

    __slots__ = ()

    def __getitem__(self, key: Any) -> Any:
        entry = super().__getitem__(key)
        return TracedSize(entry) if isinstance(key, slice) else entry

    def numel(self) -> int:
        """The product of the entries."""
        return math.prod(self)


def expression_of(value: SupportsIndex) -> Expression:
    """The expression a number carries; a plain number is its own."""
    return value.expression if isinstance(value, TracedInt) else index(value)


def mentioned(expression: Expression) -> list[Attribute | Size]:
    """The attributes and sizes in an expression."""
    if isinstance(expression, int):
        return []
    if isinstance(expression, Arithmetic):
        return mentioned(expression.left) + mentioned(expression.right)
    return [expression]
