"""Runs the rules over a tape: from the leaves' fresh atoms to the labels of every value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from itertools import zip_longest
from operator import index

from secateur.coupling.labels import Algebra, Factor, Ids, Labels
from secateur.coupling.rules import rule_for
from secateur.coupling.rules.state import NotCovered, Requirement, State
from secateur.coupling.sizes import TracedInt
from secateur.coupling.tape import Node, Tape

OUTPUT = "its size is part of the model's output"

Base = dict[tuple[str, int], Ids]

# Calls that scale by a size inside (SDPA) or compute views from a literal head count: opaque until they have rules.
_OPAQUE_CALLS = ("scaled_dot_product_attention", "multi_head_attention_forward")


def propagate(tape: Tape) -> tuple[State, Base, Counter[str]]:
    """The state after the whole tape, the atoms of every (leaf, dim), and the ops that had no rule."""
    state = State(tape, Algebra(), [Labels(value.shape) for value in tape.values])
    base = _label_leaves(state, {ref for node in tape.nodes for ref in node.refs()} | set(tape.outputs))
    unknown: Counter[str] = Counter()
    for number, node in enumerate(tape.nodes):
        state.algebra.place = node.place
        _apply(state, node, number, unknown)
    state.algebra.place = ""
    for value in tape.exported:
        state.algebra.lock(state.labels[value], "leaves torch, as a NumPy array or a list")
    for value in tape.outputs:
        state.algebra.lock(state.labels[value], OUTPUT)
    _tie_remaining(state)
    _pin_unexplained(state)
    return state, base, unknown


def _label_leaves(state: State, used: Collection[int]) -> Base:
    """Fresh atoms along every dimension of the parameters and buffers that the forward pass reads."""
    base: Base = {}
    for number, value in enumerate(state.tape.values):
        named = value.leaf is not None and value.leaf.kind in ("parameter", "buffer")
        if value.leaf is None or not named or not value.dtype.is_floating_point or number not in used:
            continue
        factors = []
        for dim, size in enumerate(value.shape):
            if size > 1:
                ids = state.algebra.atoms.new(size)
                base[value.leaf.name, dim] = ids
                shape = [size if d == dim else 1 for d in range(len(value.shape))]
                factors.append(Factor(ids.reshape(shape), True))
        state.labels[number] = Labels(value.shape, tuple(factors))
        state.origins[number] = value.leaf.name, tuple(range(len(value.shape)))
    return base


def _apply(state: State, node: Node, number: int, unknown: Counter[str]) -> None:
    refs = node.refs()
    if not refs:
        return  # a new tensor: its size is checked by its traced integers
    for ref in refs:
        if _is_stale(state.tape, ref, number):
            _fix(state, ref, "reads memory that was written through another view")
    rule = rule_for(node)
    opaque = node.call is not None and node.call.name in _OPAQUE_CALLS
    results: list[Labels | None] = []
    try:
        if rule is None or opaque or "out" in node.kwargs:
            raise NotCovered
        results = list(rule(state, node))
    except NotCovered:
        unknown[node.call.name if opaque and node.call else node.name] += 1
        for ref in refs:
            state.algebra.lock(state.labels[ref], "no rule for this op")
    for output, labels in zip_longest(node.outputs, results):
        if output is not None and labels is not None:
            state.labels[output] = state.algebra.simplify(labels)
    for ref in refs:
        if state.tape.values[ref].stale_after == number:
            _fix(state, ref, "written through another view")


def _is_stale(tape: Tape, value: int, node: int) -> bool:
    after = tape.values[value].stale_after
    return after is not None and after < node


def _fix(state: State, value: int, why: str) -> None:
    """Lock what a value hangs on; from here on it counts as fixed."""
    state.algebra.lock(state.labels[value], why)
    state.labels[value] = Labels(state.labels[value].shape)


def _tie_remaining(state: State) -> None:
    """A view that split channels, and that no consumer resolved (channel shuffle): tie equal positions of every row."""
    atoms = state.algebra.atoms
    tied = True
    while tied:
        tied = False
        for labels in state.labels:
            if all(len(factor.span) < 2 for factor in labels.factors):
                continue
            for factor in state.algebra.simplify(labels).factors:
                if len(factor.span) > 1:
                    first = factor.ids.take([0], axis=factor.span[0])
                    atoms.unite(first, factor.ids, "shares positions with channels that are fixed")
                    tied = True
    state.labels[:] = [state.algebra.simplify(labels) for labels in state.labels]


def _pin_unexplained(state: State) -> None:
    """Sizes that reached a call no rule accounts for, or left integer arithmetic, must keep their values."""
    seen = set()
    for node in state.tape.nodes:
        call = node.call
        if call is None or id(call) in state.explained or id(call) in seen:
            continue
        seen.add(id(call))
        for number in _traced(call.args) + _traced(tuple(call.kwargs.values())):
            place = f"{node.place}: its size is an argument of {call.name}"
            state.requirements.append(Requirement(number.expression, index(number), place))
    for expression, value in state.tape.escaped:
        state.requirements.append(Requirement(expression, value, "its size is used as a number in forward"))


def _traced(tree: object) -> list[TracedInt]:
    if isinstance(tree, TracedInt):
        return [tree]
    if isinstance(tree, slice):
        return _traced((tree.start, tree.stop, tree.step))
    if isinstance(tree, (list, tuple)):
        return [number for entry in tree for number in _traced(entry)]
    return []
