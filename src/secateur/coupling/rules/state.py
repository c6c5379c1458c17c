"""What the rules read and add to, and the table they enter themselves into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, TypeVar

from secateur.coupling.labels import Algebra, Ids, Labels
from secateur.coupling.sizes import Expression, TracedInt, expression_of
from secateur.coupling.tape import Call, Frame, Node, Ref, Tape

Path = tuple[int | str, ...]  # where an argument stands in a call: positions and names, from outside in


class NotCovered(Exception):  # noqa: N818  # a signal between rules and the propagation, never seen outside
    """This form of the op has no rule."""


@dataclass(frozen=True)
class Extent:
    """The number of live positions along `dim` of a value, up to (not including) position `stop`."""

    value: int
    dim: int
    stop: int


@dataclass(frozen=True)
class Requirement:
    """`expression`, evaluated on the shrunk model, must equal `extent` (an int: must keep its value)."""

    expression: Expression
    extent: Extent | int
    place: str
    value: int  # the number now
    call: Call | None = None  # the call that the number was an argument of,
    path: Path | None = None  # and where it stands in it
    frame: Frame | None = None  # the module call whose code used the number
    differs: bool = False  # the expression was compared and found unequal to 0, and must stay so; `extent` is 0
    escapes: bool = False  # whether the number left integer arithmetic, so that nothing recorded depends on it


@dataclass(frozen=True)
class Work:
    """Multiply-accumulates of one op: a constant times the live lengths of some dimensions.

    Which positions of a dimension live is only known when everything has been tied: hence the labels.
    """

    constant: int
    dims: tuple[tuple[Labels, int], ...]


@dataclass
class State:
    """What the rules read and add to."""

    tape: Tape
    algebra: Algebra
    labels: list[Labels]  # by value
    origins: dict[int, tuple[tuple[str, int] | None, ...]] = field(default_factory=dict)  # value -> (leaf, dim) per dim
    roles: dict[tuple[str, int], str] = field(default_factory=dict)  # (leaf, dim) -> output | input | scale
    copies: dict[str, tuple[int, Ids | None]] = field(default_factory=dict)  # leaf -> how often its output dim counts
    fills: dict[tuple[str, int], float] = field(default_factory=dict)  # (leaf, dim) whose removed entries are not zero
    requirements: list[Requirement] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    at_least_two: list[Ids] = field(default_factory=list)  # channels that must not become one
    zeros: dict[Any, bool | None] = field(default_factory=dict)  # answers of pointwise ops on zeros
    owned: int = 0  # the last atom of a parameter or buffer; later ones were made in forward
    stale: dict[int, int] = field(default_factory=dict)  # value -> the node that wrote other labels to its memory
    flipped: frozenset[int] = frozenset()  # grouped convolutions (by value) that go the other way than by default
    grouped: dict[int, Ids] = field(default_factory=dict)  # output value of each grouped convolution -> atoms that go
    open_norms: bool = False  # whether normalised widths may shrink, the norms then being over live channels
    norms: dict[str, tuple[int, Ids]] = field(default_factory=dict)  # name of a norm -> dim, atoms along it
    explained: set[int] = field(default_factory=set)  # calls (by id) whose traced integers a rule has accounted for

    def of(self, argument: Any) -> Labels:
        """The labels of a tensor argument."""
        if not isinstance(argument, Ref):
            raise NotCovered
        return self.labels[argument.value]

    def shape(self, node: Node, output: int = 0) -> tuple[int, ...]:
        """The recorded shape of an output."""
        return self.tape.values[node.outputs[output]].shape

    def role(self, argument: Any, dim: int, role: str) -> None:
        """Note that `dim` of a leaf argument is an output or input dimension of a layer."""
        origin = self.origins.get(argument.value) if isinstance(argument, Ref) else None
        if origin is not None and (leaf := origin[dim]) is not None:
            self.roles.setdefault(leaf, role)

    def require(self, node: Node, number: Any, extent: Extent | int, path: Path | None = None) -> None:
        """The number in the user's code must follow the extent.

        `path` says where it stands among the arguments of the call; a traced number is found without it.
        """
        call = node.call
        if path is None and call is not None and isinstance(number, TracedInt):
            path = next((p for p, found in traced_arguments(call) if found is number), None)
        value = index(number)
        frame = None if call is None else call.frame
        self.requirements.append(Requirement(expression_of(number), extent, node.place, value, call, path, frame))


Rule = Callable[[State, Node], Sequence[Labels | None]]
RULES: dict[str, Rule] = {}


R = TypeVar("R", bound=Rule)


def rule(*names: str) -> Callable[[R], R]:
    """Enter a function into the table under the given op names."""

    def enter(function: R) -> R:
        for name in names:
            RULES[f"aten.{name}"] = function
        return function

    return enter


def traced_arguments(call: Call) -> list[tuple[Path, TracedInt]]:
    """The traced integers among the arguments of a call, and where they stand."""
    return [*_traced(call.args, ()), *_traced(dict(call.kwargs), ())]


def _traced(tree: Any, path: Path) -> list[tuple[Path, TracedInt]]:
    if isinstance(tree, TracedInt):
        return [(path, tree)]
    if isinstance(tree, slice):
        tree = {"start": tree.start, "stop": tree.stop, "step": tree.step}
    if isinstance(tree, dict):
        return [found for key, entry in tree.items() for found in _traced(entry, (*path, key))]
    if isinstance(tree, (list, tuple)):
        return [found for place, entry in enumerate(tree) for found in _traced(entry, (*path, place))]
    return []


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument by position or by name."""
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, default)


def extra_extent(state: State, labels: Labels) -> Extent:
    """The extent of labels that belong to no recorded value."""
    state.labels.append(labels)
    return Extent(len(state.labels) - 1, 0, labels.shape[0])
