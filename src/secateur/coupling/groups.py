"""Slot, Group, Graph: what a model's channels hang on. `trace` finds it out from one forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from secateur.attention import replaceable
from secateur.coupling.graphforms import GraphForms
from secateur.coupling.labels import Ids
from secateur.coupling.propagation import Base, propagate
from secateur.coupling.recording import WritesToSharedMemory, record
from secateur.coupling.requirements import Classes, Form, Solution, count, solve
from secateur.coupling.rules.state import State, Work
from secateur.coupling.sizes import Attribute
from secateur.coupling.tape import Tape
from secateur.dotted import ancestors
from secateur.errors import ExampleInputsError, InputError, SecateurError, UnknownNameError
from secateur.inputs import (
    Inputs,
    as_inputs,
    check_devices,
    check_model,
    evaluating,
    private_copy,
    sharing_copy,
    uncollected,
)
from secateur.plans import Replacement, replaced, tensor_shapes
from secateur.tokens import check_batch

IGNORED = "ignored by the caller"
FORMS = ("live", "graph")


def _owner(tensor: str) -> str:
    """The module that holds a tensor, also one behind a parametrization; a model's own parameter stands for itself."""
    return (
        tensor.partition(".parametrizations.")[0]
        if ".parametrizations." in tensor
        else (tensor.rpartition(".")[0] or tensor)
    )


@dataclass(frozen=True, eq=False)
class Slot:
    """The part of one tensor, along one dimension, that belongs to a group."""

    tensor: str
    dim: int
    indices: npt.NDArray[np.int64]  # (channels, k): the positions that go with each channel
    role: str  # output: made by a layer; input: read by one; scale: of a BatchNorm; other: biases, buffers
    size: int  # length of the dimension
    fill: float = 0.0  # what removed entries hold in the zeroed original

    @property
    def layer(self) -> str:
        """The module that owns the tensor."""
        return _owner(self.tensor)


@dataclass(frozen=True, eq=False)
class Group:
    """Channels of several tensors that can only be removed together: removing channel i removes row i of every slot."""

    name: str
    channels: int
    slots: tuple[Slot, ...]
    locked: str | None = None  # why nothing of it can go
    least: int = 1  # channels that must stay: 2 where code would drop a dimension of length 1

    @property
    def outputs(self) -> tuple[Slot, ...]:
        """The slots whose layers make these channels."""
        return tuple(slot for slot in self.slots if slot.role == "output")

    @property
    def weight(self) -> int:
        """How often a channel counts: once per producing tensor."""
        return max(1, len({slot.tensor for slot in self.outputs}))

    @property
    def positions(self) -> int:
        """The output positions of one layer that one channel takes: more than 1 where channels go in blocks."""
        slots = self.outputs or self.slots
        return int(slots[0].indices.shape[1])

    @property
    def signature(self) -> tuple[tuple[str, int], ...]:
        """The dimensions it touches: the same for the same group of a shrunk model."""
        return tuple((slot.tensor, slot.dim) for slot in self.slots)

    @property
    def layers(self) -> tuple[str, ...]:
        """The modules whose outputs these channels are."""
        return tuple(dict.fromkeys(slot.layer for slot in self.outputs))


@dataclass(frozen=True)
class Product:
    """A constant times lengths, each a linear form in the groups' kept counts."""

    constant: int
    lengths: tuple[Form, ...]


@dataclass(frozen=True)
class Producer:
    """A layer that makes channels: the output dimension of its weight."""

    tensor: str
    dim: int
    copies: Form  # output channels per position: more than 1 for a grouped transposed convolution

    @property
    def layer(self) -> str:
        """The module that owns the tensor."""
        return _owner(self.tensor)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A module that is replaced as soon as one of the groups (by number) loses a channel."""

    replacement: Replacement
    groups: frozenset[int]


@dataclass(frozen=True, eq=False)
class Graph:
    """What `trace` found: groups, ops without a rule, and parts that must keep equal counts."""

    groups: tuple[Group, ...]
    unknown: Mapping[str, int]  # ops without a rule; what they touch is locked
    balances: tuple[tuple[str, ...], ...]  # names of groups that must keep equal counts
    shapes: Mapping[str, tuple[int, ...]]  # every parameter and buffer
    producers: tuple[Producer, ...]  # in order of execution
    attributes: Mapping[Attribute, Form]  # integer attributes that follow the kept counts
    macs: tuple[Product, ...]
    params: Mapping[str, Product]  # per parameter; tied ones once
    replacements: tuple[Candidate, ...] = ()
    norms: tuple[tuple[int, Slot], ...] = ()  # (group, its positions in a norm over live channels)
    open_norms: bool = False  # traced with prune_residual=True

    @property
    def prunable(self) -> tuple[Group, ...]:
        """The groups that are not locked."""
        return tuple(group for group in self.groups if group.locked is None)

    def together(self, name: str) -> tuple[str, ...]:
        """The groups that must keep equal counts with a group, itself among them."""
        return self._parts.get(name, (name,))

    @cached_property
    def _parts(self) -> dict[str, tuple[str, ...]]:
        return {name: part for part in self.balances for name in part}

    def lock(self, name: str, reason: str) -> Graph:
        """The same graph with a group, and those that must keep equal counts with it, locked."""
        together = self.together(name)
        groups = tuple(replace(g, locked=reason) if g.name in together and not g.locked else g for g in self.groups)
        return replace(self, groups=groups, balances=tuple(part for part in self.balances if name not in part))

    def __repr__(self) -> str:
        free = self.prunable
        text = f"Graph({len(free)} groups with {sum(g.channels for g in free):,} channels, "
        text += f"{len(self.groups) - len(free)} locked"
        if self.unknown:
            text += f", ops without a rule: {', '.join(f'{op} x{n}' for op, n in self.unknown.items())}"
        return text + ")"

    def table(self) -> str:
        """One line per group: channels, layers, and why it is locked."""
        wide = max([len(group.name) for group in self.groups], default=5)
        lines = [f"{'group':<{wide}}  channels  layers  locked"]
        for group in self.groups:
            lines.append(
                f"{group.name:<{wide}}  {group.channels:>8}  {len(group.layers):>6}  {group.locked or ''}".rstrip()
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{self!r}\n{self.table()}"


@uncollected()
@torch.inference_mode(False)
def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    ignore: Iterable[str | nn.Module] = (),
    prune_residual: bool = False,
    form: str = "live",
) -> Graph:
    """Find the groups of `model` by running a copy of it once on copies of `example_inputs`, in eval mode.

    What that one forward pass does is what is seen: layers that it does not use keep their shape.

    `ignore`: modules, names or patterns ("head", "layer4.*"): their outputs are locked, their inputs may shrink.
    `prune_residual`: widths under LayerNorm and RMSNorm, such as residual streams, may shrink too; the reference that
    `verify` compares with then takes its norms over the live channels.
    `form`: "live", the shrunk model is of the same class and runs its own forward, only submodules may be replaced by
    their graph form; "graph", the whole model may be.

    Raises ModelError for a model that must be unwrapped first, ExampleInputsError where inputs and model do not fit.
    """
    check_model(model)
    if form not in FORMS:
        raise UnknownNameError("form", form, FORMS)
    inputs = as_inputs(example_inputs)
    check_devices(model, inputs)
    ignored = _ignored_modules(model, ignore)
    attentions = [Replacement(name, None) for name, module in model.named_modules() if replaceable(module)]
    private, tape = _recorded(model, attentions, inputs)
    state, base, unknown = propagate(tape, open_norms=prune_residual)
    for (tensor, dim), ids in base.items():
        if tensor.rpartition(".")[0] in ignored and state.roles.get((tensor, dim)) != "input":
            state.algebra.atoms.lock(ids, IGNORED)
    forms = GraphForms(private, state, lambda: _in_training(private, inputs), whole=form == "graph")
    solution = solve(state, base, forms)
    return _assemble(model, state, base, solution, unknown, attentions, forms)


def _recorded(model: nn.Module, attentions: list[Replacement], inputs: Inputs) -> tuple[nn.Module, Tape]:
    """A private copy of `model`, and the tape of its forward. It has parameters of its own only if forward writes."""
    try:
        private = replaced(sharing_copy(model), attentions)
        return private, _record(private, inputs, model)
    except WritesToSharedMemory:
        private = replaced(private_copy(model), attentions)
        return private, _record(private, inputs, model)


def _in_training(private: nn.Module, inputs: Inputs) -> Tape | None:
    """The tape of a pass in training mode; None for a model that does not run so on these inputs."""
    apart = private_copy(private).train()
    with torch.random.fork_rng(devices=[]):
        try:
            return record(apart, inputs.map(torch.clone))
        except Exception:  # such as statistics over a single value
            return None


def _record(private: nn.Module, inputs: Inputs, model: nn.Module) -> Tape:
    try:
        with evaluating(private):
            return record(private, inputs.map(torch.clone), shared=model.parameters())
    except SecateurError:
        raise
    except Exception as error:
        if isinstance(error, (IndexError, RuntimeError)):
            _explain(model, inputs, error)
        given = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in inputs.tensors())
        raise ExampleInputsError(
            f"the model's forward raised {type(error).__name__} on the example inputs ({given}): {error}"
        ) from error


def _explain(model: nn.Module, inputs: Inputs, error: Exception) -> None:
    """Raise ExampleInputsError where token ids or their number tell why an index was out of range."""
    try:
        check_batch(model, inputs.kwargs or inputs.args)
    except InputError as found:
        raise ExampleInputsError(f"the example inputs do not fit the model: {found}") from error


def _ignored_modules(model: nn.Module, ignore: Iterable[str | nn.Module]) -> set[str]:
    """The names of the ignored modules and everything inside them."""
    names = dict(model.named_modules())
    found: set[str] = set()
    entries = [ignore] if isinstance(ignore, (str, nn.Module)) else list(ignore)
    for entry in entries:
        if isinstance(entry, str):
            roots = [name for name in names if fnmatchcase(name, entry)]
        else:
            roots = [name for name, module in names.items() if module is entry]
        if not roots:
            raise InputError(f"ignore={entry!r} matches no module of the model.")
        found.update(roots)
    return {name for name in names if "" in found or not found.isdisjoint(ancestors(name))}


def _assemble(
    model: nn.Module,
    state: State,
    base: Base,
    solution: Solution,
    unknown: Counter[str],
    attentions: Iterable[Replacement],
    forms: GraphForms,
) -> Graph:
    classes = solution.classes
    slots = _slots(state, base, classes)
    flagged = [classes.of_root[state.algebra.atoms.find(ids)].ravel() for ids in state.at_least_two]
    two = set(np.concatenate(flagged).tolist()) if flagged else set()
    least = [2 if number in two else 1 for number in range(len(classes.members))]
    order: dict[str, int] = {}
    for tensor, _ in state.roles:
        order.setdefault(tensor, len(order))
    listed = [number for number in range(len(classes.members)) if _is_listed(slots[number], classes.locked[number])]
    listed.sort(key=lambda number: min(order.get(slot.tensor, len(order)) for slot in slots[number]))
    position = {number: rank for rank, number in enumerate(listed)}
    names = _names([slots[number] for number in listed])
    groups = tuple(
        Group(names[rank], len(classes.members[number]), slots[number], classes.locked[number], least[number])
        for rank, number in enumerate(listed)
    )

    def renumbered(form: Form) -> Form:
        return Form(form.constant, {position[group]: c for group, c in form.terms.items()})

    inside = _groups_inside(groups)
    candidates = [Candidate(replacement, frozenset(inside.get(replacement.module, ()))) for replacement in attentions]
    for replacement, numbers in forms.replacements(solution):
        candidates.append(Candidate(replacement, frozenset(position[n] for n in numbers)))

    def product(constant: int, lengths: Iterable[tuple[Any, int]]) -> Product:
        forms = [renumbered(count(state, classes, ids, size)) for ids, size in lengths]
        return Product(constant, tuple(forms))

    shapes = tensor_shapes(model)
    parameters = [name for name, _ in model.named_parameters()]
    return Graph(
        groups=groups,
        unknown=dict(unknown),
        balances=tuple(tuple(names[position[number]] for number in sorted(part)) for part in solution.balances),
        shapes=shapes,
        producers=tuple(
            Producer(tensor, dim, renumbered(_copies(state, classes, tensor)))
            for (tensor, dim), role in state.roles.items()
            if role == "output"
        ),
        attributes={attribute: renumbered(form) for attribute, form in solution.attributes.items()},
        macs=tuple(product(work.constant, _live_dims(state, work)) for work in state.work),
        params={
            name: product(1, [(base.get((name, dim)), size) for dim, size in enumerate(shapes[name])])
            for name in parameters
        },
        replacements=tuple(c for c in candidates if c.groups),
        norms=tuple(_norm_slots(state, classes, position)),
        open_norms=state.open_norms,
    )


def _live_dims(state: State, work: Work) -> Iterator[tuple[Ids | None, int]]:
    """The atoms along each dimension that some op works through; None for a dimension that nothing decides over."""
    for labels, dim in work.dims:
        factors = state.algebra.simplify(labels).only(dim).factors
        yield (factors[0].ids if len(factors) == 1 else None), labels.shape[dim]


def _groups_inside(groups: Iterable[Group]) -> dict[str, set[int]]:
    """Module -> the groups, by number, that have to do with its tensors or those of its submodules."""
    found: dict[str, set[int]] = {}
    for number, group in enumerate(groups):
        for slot in group.slots:
            for module in ancestors(slot.tensor):
                found.setdefault(module, set()).add(number)
    return found


def _norm_slots(state: State, classes: Classes, position: Mapping[int, int]) -> Iterator[tuple[int, Slot]]:
    """The positions that groups take in norms: a norm is named like a tensor with one dimension."""
    named = {(name, dim): ids for name, (dim, ids) in state.norms.items()}
    for number, slots in enumerate(_slots(state, named, classes)):
        if classes.locked[number] is None:
            yield from ((position[number], slot) for slot in slots)


def _copies(state: State, classes: Classes, tensor: str) -> Form:
    groups, live = state.copies.get(tensor, (1, None))
    return count(state, classes, live, groups)


def _slots(state: State, base: Base, classes: Classes) -> list[tuple[Slot, ...]]:
    """Per class its slots; row i of every slot belongs to the same root."""
    found: list[list[Slot]] = [[] for _ in classes.members]
    of_root = np.full(int(max([members.max() for members in classes.members], default=0)) + 1, -1, np.int64)
    row = np.zeros_like(of_root)
    for number, members in enumerate(classes.members):
        of_root[members] = number
        row[members] = np.arange(len(members))
    for (tensor, dim), ids in base.items():
        roots = state.algebra.atoms.find(ids)
        inside = roots < len(of_root)
        classes_here = np.where(inside, of_root[np.where(inside, roots, 0)], -1)
        for number in np.unique(classes_here[classes_here >= 0]):
            positions = np.flatnonzero(classes_here == number)
            positions = positions[np.argsort(row[roots[positions]], kind="stable")]
            indices = positions.reshape(len(classes.members[number]), -1)
            role = state.roles.get((tensor, dim), "other")
            found[number].append(Slot(tensor, dim, indices, role, len(ids), state.fills.get((tensor, dim), 0.0)))
    return [tuple(slots) for slots in found]


def _is_listed(slots: tuple[Slot, ...], locked: str | None) -> bool:
    """Locked dimensions that no layer produces (a network's input channels) are nobody's question."""
    return bool(slots) and (locked is None or any(slot.role == "output" for slot in slots))


def _names(slots: list[tuple[Slot, ...]]) -> list[str]:
    """The first producing layer's name; a number is added where a layer's channels fall into several groups."""
    names: list[str] = []
    seen: Counter[str] = Counter()
    for group in slots:
        first = next((slot for slot in group if slot.role == "output"), group[0])
        seen[first.layer] += 1
        names.append(first.layer if seen[first.layer] == 1 else f"{first.layer}#{seen[first.layer]}")
    return names
