"""Traced integers: ints that remember the tensor size or module attribute they were computed from.

`reshape(b, self.groups, c // self.groups, h, w)` reaches the framework as five plain numbers. To know which of them
will follow when channels go, and which attribute must change, the recorded forward pass runs with sizes and attributes
that carry an expression along. An int that lost its expression is a literal, and a literal never follows.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
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
Escapes = list[tuple[Expression, int]]
OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
}


class TracedInt(int):
    """An int with the expression it came from; arithmetic on it stays traced, anything else gives a plain number."""

    expression: Expression
    escaped: Escapes  # what left integer arithmetic, shared by one recording

    def __new__(cls, value: int, expression: Expression, escaped: Escapes) -> TracedInt:
        """`value`, computed by `expression`."""
        traced = super().__new__(cls, value)
        traced.expression = expression
        traced.escaped = escaped
        return traced

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (index(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> int:
        return index(self)

    def _escape(self) -> int:
        """The plain number, noted as one whose further use nobody sees: it must keep its value."""
        self.escaped.append((self.expression, index(self)))
        return index(self)

    def __int__(self) -> int:
        return self._escape()

    def __float__(self) -> float:
        return float(self._escape())

    def __truediv__(self, other: float) -> float:
        return self._escape() / other

    def __rtruediv__(self, other: float) -> float:
        return other / self._escape()

    def __pow__(self, other: Any, modulus: Any = None) -> Any:
        return pow(self._escape(), other, modulus)


def _traced(name: str, *, reflected: bool) -> Callable[[TracedInt, Any], Any]:
    compute = OPERATIONS[name]

    def method(self: TracedInt, other: Any) -> Any:
        if isinstance(other, bool) or not isinstance(other, int):
            if isinstance(other, float):
                self._escape()
            return NotImplemented
        left, right = (other, self) if reflected else (self, other)
        value = compute(index(left), index(right))
        return TracedInt(value, Arithmetic(name, expression_of(left), expression_of(right)), self.escaped)

    return method


for _name in OPERATIONS:
    setattr(TracedInt, f"__{_name}__", _traced(_name, reflected=False))
    setattr(TracedInt, f"__r{_name}__", _traced(_name, reflected=True))


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
