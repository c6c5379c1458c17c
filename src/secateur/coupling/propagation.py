"""Runs the rules over a tape: from the leaves' fresh atoms to the labels of every value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from itertools import zip_longest
from operator import index

import numpy as np

from secateur.coupling.labels import SILENT, Algebra, Factor, Ids, Labels
from secateur.coupling.rules import rule_for
from secateur.coupling.rules.reductions import REDUCTIONS
from secateur.coupling.rules.state import NotCovered, Requirement, State, traced_arguments
from secateur.coupling.tape import Node, Ref, Tape

OUTPUT = "its size is part of the model's output"

Base = dict[tuple[str, int], Ids]

# Calls that compute views from a literal head count inside. (An nn.MultiheadAttention is replaced before recording.)
_OPAQUE_CALLS = ("multi_head_attention_forward",)


Propagated = tuple[State, Base, Counter[str]]


def propagate(tape: Tape, *, open_norms: bool = False) -> Propagated:
    """The state after the whole tape, the atoms of every (leaf, dim), and the ops that had no rule.

    A grouped convolution goes by whole groups or by position within them, whichever is finer. Where nothing is left of
    that choice in the end, because the rest of the network goes the other way, the other is tried.
    """
    first = _propagated(tape, open_norms, frozenset())
    state = first[0]
    spent = frozenset(value for value, ids in state.grouped.items() if state.algebra.atoms.locked(ids).all())
    if not spent:
        return first
    second = _propagated(tape, open_norms, spent)
    return second if _free(second) > _free(first) else first


def _free(propagated: Propagated) -> int:
    """The positions along dimensions of parameters that can go."""
    state, base, _ = propagated
    return sum(int((~state.algebra.atoms.locked(ids)).sum()) for ids in base.values())


def _propagated(tape: Tape, open_norms: bool, flipped: frozenset[int]) -> Propagated:
    labels = [Labels(value.shape) for value in tape.values]
    state = State(tape, Algebra(), labels, open_norms=open_norms, flipped=flipped)
    base = _label_leaves(state, {ref for node in tape.nodes for ref in node.refs()} | set(tape.outputs))
    unknown: Counter[str] = Counter()
    needed = _needed(tape)
    for number, node in enumerate(tape.nodes):
        if number in needed or node.name.removeprefix("aten.") not in REDUCTIONS:
            state.algebra.place = node.place
            _apply(state, node, number, unknown)
    state.algebra.place = ""
    for value in tape.exported:
        state.algebra.lock(state.labels[value], "leaves torch, as a NumPy array or a list")
    for value in tape.outputs:
        state.algebra.lock(state.labels[value], OUTPUT)
    _tie_remaining(state)
    _lock_unowned(state, base)
    _pin_unexplained(state)
    return state, base, unknown


def _needed(tape: Tape) -> set[int]:
    """The nodes that the output, or a length read in forward, hangs on; and all that write to memory.

    The others run all the same, and must still fit. Only what they compute does not matter: a mean over the heads that
    nobody reads (the attention weights) need not be exact.
    """
    values, nodes = {*tape.outputs, *tape.exported, *tape.sized}, set()
    for number in range(len(tape.nodes) - 1, -1, -1):
        node = tape.nodes[number]
        if node.op._schema.is_mutable or not values.isdisjoint(node.outputs) or not node.outputs:
            nodes.add(number)
            values.update(node.refs())
    return nodes


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
        state.origins[number] = tuple((value.leaf.name, dim) for dim in range(len(value.shape)))
    state.owned = len(state.algebra.atoms.all())
    return base


def _apply(state: State, node: Node, number: int, unknown: Counter[str]) -> None:
    refs = node.refs()
    if not refs and rule_for(node) is None:
        return  # a new tensor: its size is checked by its traced integers
    for ref in refs:
        if state.stale.get(ref, number) < number:
            _fix(state, ref, "reads memory that was written through another view")
    written = node.args[0] if node.op._schema.is_mutable and node.outputs and node.args else None
    old = state.labels[written.value] if isinstance(written, Ref) else None
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
    if old is None or not _same_labels(state, old, state.labels[node.outputs[0]]):  # else other views stay right
        for value in state.tape.overwritten.get(number, ()):
            state.stale.setdefault(value, number)
    for ref in refs:
        if state.stale.get(ref) == number:
            _fix(state, ref, "written through another view")


def _same_labels(state: State, old: Labels, new: Labels) -> bool:
    """Whether a write changed nothing about what is dead, and about what is zero there."""
    find, old = state.algebra.atoms.find, state.algebra.simplify(old)
    return len(old.factors) == len(new.factors) and all(
        a.ids.shape == b.ids.shape and (b.zero or not a.zero) and np.array_equal(find(a.ids), find(b.ids))
        for a, b in zip(old.factors, new.factors, strict=True)
    )


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


def _lock_unowned(state: State, base: Base) -> None:
    """What no layer makes or reads keeps its size: new tensors, and positions of a table that were not needed."""
    atoms = state.algebra.atoms
    used = [ids for key, ids in base.items() if state.roles.get(key) in ("output", "input")]
    roots = atoms.find(atoms.all())
    owned = np.zeros(len(roots) + 1, bool)
    owned[atoms.find(np.concatenate([np.zeros(0, np.int64), *used]))] = True
    atoms.lock(roots[~owned[roots]], SILENT)


def _pin_unexplained(state: State) -> None:
    """Sizes that reached a call no rule accounts for, or left integer arithmetic, must keep their values."""
    seen = set()
    for node in state.tape.nodes:
        call = node.call
        if call is None or id(call) in state.explained or id(call) in seen:
            continue
        seen.add(id(call))
        for path, number in traced_arguments(call):
            place = f"{node.place}: its size is an argument of {call.name}"
            value = index(number)
            state.requirements.append(Requirement(number.expression, value, place, value, call, path, call.frame))
    for escape in state.tape.escaped.entries:
        differs = not escape.binds and escape.relation == "eq"
        if escape.binds or differs:
            inside = f" in {escape.frame.module!r}" if escape.frame and escape.frame.module else ""
            used = "compared" if differs else "used as a number"
            place = f"its size is {used} in forward{inside} ({escape.where})"
            extent = 0 if differs else escape.value
            state.requirements.append(
                Requirement(
                    escape.expression, extent, place, escape.value, frame=escape.frame, differs=differs, escapes=True
                )
            )
