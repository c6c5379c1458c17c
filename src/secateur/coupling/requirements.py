"""Sizes in the user's code, solved: which attributes follow, which groups must keep equal counts, which are locked.

Every count of live positions is a linear form in the groups' kept counts, since all channels of a group appear equally
often in every counted dimension (that is part of what makes a group). A requirement "this number equals that count" is
then an equation between forms. Where it holds identically, nothing is to do. Where it misses by a multiple of (a - b),
a and b are *balanced*. Where a lone attribute is unknown, it is solved for. Where nothing of that helps, the module
whose code holds the number is replaced by its graph form, in which the number is an attribute of its own. What no graph
form can express locks the groups involved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt

from secateur.coupling.labels import FIXED, SILENT, Ids, Labels
from secateur.coupling.propagation import Base
from secateur.coupling.rules.state import Extent, Path, Requirement, State
from secateur.coupling.sizes import Arithmetic, Attribute, Expression, Size, mentioned
from secateur.coupling.tape import Call, Frame


class Forms(Protocol):
    """What the solver must know of graph forms."""

    def obstacle(self, frame: Frame) -> str | None:
        """What keeps the module of this call from being replaced, or None."""

    def sizes(self, module: str) -> int:
        """How many size attributes the module has already, from an earlier pruning."""


@dataclass(frozen=True)
class Form:
    """constant + sum of coefficient x (channels kept in a group)."""

    constant: Fraction = Fraction(0)
    terms: Mapping[int, Fraction] = field(default_factory=dict)

    def __add__(self, other: Form) -> Form:
        terms = dict(self.terms)
        for group, coefficient in other.terms.items():
            terms[group] = terms.get(group, Fraction(0)) + coefficient
        return Form(self.constant + other.constant, {group: c for group, c in terms.items() if c})

    def __mul__(self, factor: Fraction) -> Form:
        return Form(self.constant * factor, {group: c * factor for group, c in self.terms.items() if c * factor})

    def __sub__(self, other: Form) -> Form:
        return self + other * Fraction(-1)

    def renamed(self, leader: Mapping[int, int]) -> Form:
        """The same form with every group replaced by the leader of its balance."""
        if leader.keys().isdisjoint(self.terms):
            return self
        total = Form(self.constant)
        for group, coefficient in self.terms.items():
            total = total + Form(terms={leader.get(group, group): coefficient})
        return total

    @property
    def is_constant(self) -> bool:
        """Whether it depends on no group."""
        return not self.terms

    @property
    def is_whole(self) -> bool:
        """Whether it is a whole number whatever is kept."""
        return all(c.denominator == 1 for c in (self.constant, *self.terms.values()))

    def at(self, kept: Sequence[int]) -> int:
        """Its value for the given kept counts, one per group."""
        value = self.constant + sum(c * kept[group] for group, c in self.terms.items())
        return int(value)

    @property
    def is_zero(self) -> bool:
        """Whether it is 0 whatever is kept."""
        return not self.terms and not self.constant


@dataclass
class Classes:
    """Atoms sorted into groups: atoms that touch the same dimensions equally often."""

    members: list[Ids]  # per group: its roots
    of_root: npt.NDArray[np.int64]  # root -> group, -1 for locked and unlisted ones
    locked: list[str | None]


@dataclass(frozen=True)
class Override:
    """A requirement that only the graph form of its module meets."""

    requirement: Requirement
    attribute: Attribute | None  # that stands in the number's place; None where the number is no more
    groups: frozenset[int]  # as long as these are whole, the module itself will do


@dataclass(frozen=True)
class Solution:
    """What the requirements say."""

    classes: Classes
    attributes: dict[Attribute, Form]
    balances: list[tuple[int, ...]]
    overrides: list[Override]


def solve(state: State, base: Base, forms: Forms) -> Solution:
    """Sort atoms into groups and satisfy every requirement, locking what cannot be satisfied."""
    requirements = [r for r in dict.fromkeys(state.requirements) if _may_vary(state, r)]
    extents = _extents(state, requirements)
    while True:
        classes = classify(state, base, extents)
        outcome = _satisfy(state, classes, requirements, forms)
        if isinstance(outcome, Solution):
            return outcome
        for group, why in outcome.items():
            state.algebra.atoms.lock(classes.members[group], why)


def count(state: State, classes: Classes, ids: Ids | None, size: int) -> Form:
    """The live positions among `ids` (None: all `size` of them are fixed)."""
    if ids is None:
        return Form(Fraction(size))
    roots = state.algebra.atoms.find(ids)
    inside = roots < len(classes.of_root)  # others belong to no parameter
    groups = np.where(inside, classes.of_root[np.where(inside, roots, 0)], -1)
    found, counts = (entries.tolist() for entries in np.unique(groups, return_counts=True))
    shares = {g: Fraction(n, len(classes.members[g])) for g, n in zip(found, counts, strict=True) if g >= 0}
    return Form(Fraction(counts[0] if found[:1] == [-1] else 0), shares)


def classify(state: State, base: Base, extents: Iterable[Ids]) -> Classes:
    """Group the leaves' atoms by signature: how often each leaf dimension, and each counted extent, holds them."""
    atoms = state.algebra.atoms
    columns = [atoms.find(ids) for ids in [*base.values(), *extents]]
    roots = np.concatenate([*columns, np.zeros(0, np.int64)])
    column = np.repeat(np.arange(len(columns)), [len(c) for c in columns])
    order = np.argsort(roots, kind="stable")  # so that the columns of a root stay ascending
    roots, column = roots[order], column[order]
    starts = np.flatnonzero(np.diff(roots, prepend=-1))
    found = zip(roots[starts].tolist(), atoms.reason_numbers(roots[starts]).tolist(), strict=True)
    bounds = pairwise((np.append(starts, len(roots)) * column.itemsize).tolist())
    entries, silent = column.tobytes(), atoms.reasons.index(SILENT)
    signatures: dict[tuple[bytes, int], list[int]] = {}
    for (root, reason), (start, stop) in zip(found, bounds, strict=True):
        if root != FIXED and reason != silent:
            signatures.setdefault((entries[start:stop], reason), []).append(root)
    members = [np.array(group) for group in signatures.values()]
    locked = [None if reason < 0 else atoms.reasons[reason] for _, reason in signatures]
    of_root = np.full(int(roots.max(initial=0)) + 1, -1, np.int64)
    for number, group in enumerate(members):
        if locked[number] is None:
            of_root[group] = number
    return Classes(members, of_root, locked)


def extent_ids(state: State, extent: Extent) -> Ids | None:
    """The atoms that an extent counts; None where the dimension is fixed."""
    labels: Labels = state.labels[extent.value]
    along = [factor for factor in labels.factors if factor.spans(extent.dim)]
    if not along:
        return None
    if len(along) > 1:
        for factor in along:
            state.algebra.atoms.lock(factor.ids, "several channels decide over one position of a sized dimension")
    return along[0].ids.reshape(-1)[: extent.stop]  # after the propagation a factor spans one dimension


def _extent_of(state: State, size: Size) -> Extent:
    return Extent(size.value, size.dim, state.labels[size.value].shape[size.dim])


def _extents(state: State, requirements: Iterable[Requirement]) -> list[Ids]:
    found: dict[Extent, None] = {}
    for requirement in requirements:
        if isinstance(requirement.extent, Extent):
            found[requirement.extent] = None
        for leaf in mentioned(requirement.expression):
            if isinstance(leaf, Size):
                found[_extent_of(state, leaf)] = None
    ids = [extent_ids(state, extent) for extent in found]
    return [entry for entry in ids if entry is not None]


def _may_vary(state: State, requirement: Requirement) -> bool:
    """Whether anything in the requirement can change at all."""
    leaves = mentioned(requirement.expression)
    extents = [_extent_of(state, leaf) for leaf in leaves if isinstance(leaf, Size)]
    if isinstance(requirement.extent, Extent):
        extents.append(requirement.extent)
    if any(isinstance(leaf, Attribute) for leaf in leaves):
        return True
    return any(state.labels[extent.value].covered(extent.dim) for extent in extents)


def _satisfy(
    state: State, classes: Classes, requirements: list[Requirement], forms: Forms
) -> Solution | dict[int, str]:
    """All requirements met, or the groups to lock, with the reasons."""
    at: dict[tuple[Call | None, Path | None], list[Requirement]] = {}
    for requirement in requirements:
        at.setdefault((requirement.call, requirement.path), []).append(requirement)
    scope = Scope(state, classes, forms, at)
    settled = False
    while not settled and not scope.blamed:
        settled = True
        for requirement in requirements:
            if requirement.differs or scope.is_overridden(requirement):
                continue
            target = scope.target(requirement)
            value = scope.evaluate(requirement.expression)
            if value is not None and (value - target).is_zero:
                continue
            solved = scope.solve_for(requirement.expression, target)
            pairs = None if value is None else _balance(classes, value - target)
            if solved is not None:
                scope.attributes[solved[0]] = solved[1]
            elif pairs is not None:
                _merge_all(scope.leader, scope.followers, pairs)
            elif not scope.override(requirement):
                scope.blame(requirement)
            settled = False
    for requirement in () if scope.blamed else requirements:
        if not scope.is_met(requirement) and not (scope.override(requirement) and scope.target(requirement).is_whole):
            scope.blame(requirement)
    return scope.blamed or scope.solution()


@dataclass(frozen=True)
class Scope:
    """What is known while requirements are being satisfied."""

    state: State
    classes: Classes
    forms: Forms
    at: Mapping[tuple[Call | None, Path | None], list[Requirement]]  # requirements by the argument they are about
    attributes: dict[Attribute, Form] = field(default_factory=dict)  # solved so far
    leader: dict[int, int] = field(default_factory=dict)  # group -> the first group of its balance
    followers: dict[int, list[int]] = field(default_factory=dict)  # the first group of a balance -> the others
    blamed: dict[int, str] = field(default_factory=dict)  # groups to lock, with the reasons
    overrides: dict[Requirement, Attribute | None] = field(default_factory=dict)
    replaced: dict[str, int] = field(default_factory=dict)  # module -> size attributes of its graph form so far
    sizes: dict[Extent, Form] = field(default_factory=dict)

    def size(self, extent: Extent) -> Form:
        """The live positions of an extent."""
        if extent not in self.sizes:
            self.sizes[extent] = count(self.state, self.classes, extent_ids(self.state, extent), extent.stop)
        return self.sizes[extent].renamed(self.leader)

    def target(self, requirement: Requirement) -> Form:
        """What the expression of a requirement must come to."""
        extent = requirement.extent
        return Form(Fraction(extent)) if isinstance(extent, int) else self.size(extent)

    def stays_unequal(self, expression: Expression) -> bool:
        """Whether a difference cannot become 0, whatever is kept of each group (at least one channel)."""
        form = self.evaluate(expression)
        if form is None:
            return False
        ends = [sorted((c, c * len(self.classes.members[group]))) for group, c in form.terms.items()]
        least, most = (form.constant + sum(end[side] for end in ends) for side in (0, 1))
        return bool(least > 0 or most < 0)

    def is_overridden(self, requirement: Requirement) -> bool:
        """Whether the graph form of its module has no such requirement any more."""
        frame = requirement.frame
        if requirement in self.overrides:
            return True
        if requirement.path is None and requirement.escapes and frame is not None and frame.module in self.replaced:
            self.overrides[requirement] = None
            return True
        return False

    def is_met(self, requirement: Requirement) -> bool:
        """Whether a requirement that balances and attributes satisfy holds in whole numbers too."""
        if self.is_overridden(requirement):
            return self.target(requirement).is_whole
        if requirement.differs:
            return self.stays_unequal(requirement.expression)
        return self.evaluate(requirement.expression, exactly=True) is not None

    def override(self, requirement: Requirement) -> bool:
        """Put an attribute of a graph form in the number's place, where the module can be replaced."""
        frame, escapes = requirement.frame, requirement.path is None and requirement.escapes
        if frame is None or requirement in self.overrides or not (escapes or requirement.path is not None):
            return False
        same = [requirement] if escapes else self.at[requirement.call, requirement.path]
        targets = [self.target(other) for other in same]
        if any(not (target - targets[0]).is_zero for target in targets):
            return False  # one number cannot follow two lengths
        if self.forms.obstacle(frame) is not None:
            return False
        number, attribute = self.replaced.setdefault(frame.module, self.forms.sizes(frame.module)), None
        if not escapes:
            self.replaced[frame.module] += 1
            attribute = Attribute(frame.module, f"size_{number}", None, requirement.value)
        self.overrides.update(dict.fromkeys(same, attribute))
        return True

    def solution(self) -> Solution:
        """What has been found, all requirements being met."""
        attributes = dict(self.attributes)
        overrides = []
        for requirement, attribute in self.overrides.items():
            if attribute is not None:
                attributes[attribute] = self.target(requirement)
            overrides.append(Override(requirement, attribute, frozenset(self.involved(requirement))))
        varying = {attribute: form.renamed(self.leader) for attribute, form in attributes.items() if form.terms}
        return Solution(self.classes, varying, _balances(self.leader), overrides)

    def evaluate(self, expression: Expression, *, exactly: bool = False) -> Form | None:
        """The expression as a form, None where it is none. An attribute nobody solved for keeps its value.

        `exactly` also refuses a floor division that may leave a rest.
        """
        if isinstance(expression, int):
            return Form(Fraction(expression))
        if isinstance(expression, Attribute):
            return self.attributes.get(expression, Form(Fraction(expression.value))).renamed(self.leader)
        if isinstance(expression, Size):
            return self.size(_extent_of(self.state, expression))
        left = self.evaluate(expression.left, exactly=exactly)
        right = self.evaluate(expression.right, exactly=exactly)
        if left is None or right is None:
            return None
        result = _compute(expression.operation, left, right)
        return None if result is None or (exactly and not result.is_whole) else result

    def solve_for(self, expression: Expression, target: Form) -> tuple[Attribute, Form] | None:
        """The one attribute in the expression that is still open, and the form that meets the target."""
        if isinstance(expression, Attribute):
            return None if expression in self.attributes or not target.is_whole else (expression, target)
        if not isinstance(expression, Arithmetic):
            return None
        for unknown, known, is_left in (
            (expression.left, expression.right, True),
            (expression.right, expression.left, False),
        ):
            other = self.evaluate(known)
            if other is None or not any(isinstance(x, Attribute) for x in mentioned(unknown)):
                continue
            inverse = _invert(expression.operation, target, other, is_left)
            if inverse is not None:
                return self.solve_for(unknown, inverse)
        return None

    def involved(self, requirement: Requirement) -> set[int]:
        """The groups whose channels make a requirement fail."""
        target, value = self.target(requirement), self.evaluate(requirement.expression)
        groups = set(target.terms) if value is None else set((value - target).terms)
        if not groups:
            forms = [self.evaluate(leaf) for leaf in mentioned(requirement.expression)]
            groups = {group for form in forms if form is not None for group in form.terms}
        return groups.union(*(self.followers.get(group, ()) for group in groups))

    def blame(self, requirement: Requirement) -> None:
        """Note the groups to lock for a requirement that cannot be met, with the reason.

        Where it has to do with groups that are blamed already, that waits: with those locked it may be met.
        """
        same = [requirement] if requirement.path is None else self.at[requirement.call, requirement.path]
        if self.blamed and any(not self.blamed.keys().isdisjoint(self._suspects(other)) for other in same):
            return
        frame = requirement.frame
        obstacle = None if frame is None else self.forms.obstacle(frame)
        self.blamed.update(dict.fromkeys(self._suspects(requirement), _why(requirement, obstacle)))

    def _suspects(self, requirement: Requirement) -> set[int]:
        """The groups involved; where none can be named, all that are not locked."""
        everything = range(len(self.classes.locked))
        return self.involved(requirement) or {group for group in everything if self.classes.locked[group] is None}


def _compute(operation: str, left: Form, right: Form) -> Form | None:
    if operation == "add":
        return left + right
    if operation == "sub":
        return left - right
    if operation == "mul":
        if left.is_constant or right.is_constant:
            return right * left.constant if left.is_constant else left * right.constant
        return None
    if not right.is_constant or not right.constant:
        return None
    if operation == "mod":
        rest = (left * (1 / right.constant)).is_whole  # then it divides without a rest, whatever is kept
        return Form() if rest else Form(left.constant % right.constant) if left.is_constant else None
    if left.is_constant:
        return Form(Fraction(left.constant // right.constant))
    # a rest is refused at the end: until then a balance may still make the fractions whole
    return left * (1 / right.constant)


def _invert(operation: str, target: Form, known: Form, unknown_is_left: bool) -> Form | None:
    """What the unknown operand must be for the operation to give the target."""
    if operation == "add":
        return target - known
    if operation == "sub":
        return target + known if unknown_is_left else known - target
    if not known.is_constant:
        return None
    if operation == "mul":
        return target * (1 / known.constant) if known.constant else None
    return target * known.constant if operation == "floordiv" and unknown_is_left else None


def _balance(classes: Classes, difference: Form) -> list[tuple[int, int]] | None:
    """Pairs of groups whose equal counts make the difference vanish; None where its terms do not pair up."""
    sides: tuple[list[tuple[Fraction, int, int]], ...] = ([], [])
    for group, coefficient in difference.terms.items():
        sides[coefficient < 0].append((abs(coefficient), len(classes.members[group]), group))
    gains, losses = sorted(sides[0]), sorted(sides[1])
    if difference.constant or [term[:2] for term in gains] != [term[:2] for term in losses]:
        return None
    return [(gain[2], loss[2]) for gain, loss in zip(gains, losses, strict=True)]


def _merge_all(leader: dict[int, int], followers: dict[int, list[int]], pairs: Iterable[tuple[int, int]]) -> None:
    """Unite balances; every group points to the first of its own."""
    for a, b in pairs:
        first, second = sorted((leader.get(a, a), leader.get(b, b)))
        if first == second:
            continue
        joining = [second, *followers.pop(second, ())]
        followers.setdefault(first, []).extend(joining)
        leader.update(dict.fromkeys(joining, first))


def _balances(leader: Mapping[int, int]) -> list[tuple[int, ...]]:
    sets: dict[int, list[int]] = {}
    for group, first in leader.items():
        sets.setdefault(first, [first]).append(group)
    return [tuple(sorted(members)) for members in sets.values()]


def _why(requirement: Requirement, obstacle: str | None) -> str:
    why = f"{requirement.place}: a size there cannot follow"
    if isinstance(requirement.expression, int):
        why = f"{requirement.place}: the code says {requirement.expression}, a number that cannot follow"
    return why if obstacle is None else f"{why}, and its module has no graph form: {obstacle}"
