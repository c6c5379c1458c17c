"""Plan: which positions of which tensors stay. The value that every later step exchanges.

A plan needs neither the graph nor the inputs it came from: it names tensors, dimensions and kept positions, the
attributes that change with them, and the shapes of the model it fits. It prints itself, and round-trips through JSON.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, cast

import numpy as np
from torch import Tensor, nn

from secateur.attention import MultiheadAttention, replaceable
from secateur.errors import PlanMismatchError
from secateur.graphforms import Program, graph_form

FORMAT = 1


@dataclass(frozen=True)
class Cut:
    """The positions kept along one dimension of one tensor."""

    tensor: str
    dim: int
    size: int  # length of the dimension before the cut
    kept: tuple[int, ...]  # ascending positions in [0, size)
    fill: float = 0.0  # what the removed positions hold in the zeroed original: 1 for a running variance, else 0

    def __post_init__(self) -> None:
        if not self.kept or any(b <= a for a, b in zip(self.kept, self.kept[1:], strict=False)):
            raise PlanMismatchError(f"{self.tensor} dim {self.dim}: kept positions must be ascending and not empty.")
        if self.kept[0] < 0 or self.kept[-1] >= self.size:
            raise PlanMismatchError(f"{self.tensor} dim {self.dim}: kept positions must lie in [0, {self.size}).")

    @property
    def removed(self) -> tuple[int, ...]:
        """The positions that go, ascending."""
        others = np.ones(self.size, bool)
        others[list(self.kept)] = False
        return tuple(np.flatnonzero(others).tolist())


@dataclass(frozen=True)
class Edit:
    """The new value of an integer attribute (or of one entry of a tuple attribute) of a module."""

    module: str
    attribute: str
    index: int | None
    before: int
    after: int


@dataclass(frozen=True)
class Replacement:
    """A module that is replaced before tensors are cut, by one with the same parameters that can shrink."""

    module: str
    program: Program | None  # its graph form; None: the attention module that can lose heads


@dataclass(frozen=True)
class Width:
    """One row of the per-layer table: the output width of a layer, before and after."""

    layer: str
    before: int
    after: int
    block: int = 1  # positions that go together: a head's share of a projection


@dataclass(frozen=True)
class Plan:
    """What to remove from a model of the given shapes. Make one with `select`, apply it with `shrink`."""

    cuts: tuple[Cut, ...]
    edits: tuple[Edit, ...]
    shapes: Mapping[str, tuple[int, ...]]  # every parameter and buffer of the model it fits
    widths: tuple[Width, ...] = ()  # per layer, for reading
    channels: tuple[int, int] = (0, 0)  # channels of unlocked groups, each once per producing tensor: before, after
    macs: tuple[int, int] = (0, 0)  # multiply-accumulates of one forward pass on the example inputs: before, after
    params: tuple[int, int] = (0, 0)  # before, after
    groups: tuple[str, ...] = ()  # names of the groups that lose channels
    replacements: tuple[Replacement, ...] = ()
    norms: tuple[Cut, ...] = ()  # what norms over live channels see in the zeroed original (`norms.norm_name`)

    @property
    def is_identity(self) -> bool:
        """Whether nothing is removed."""
        return not self.cuts

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise PlanMismatchError naming the first tensor of `shapes` that is not what this plan was made for."""
        check_shapes(shapes, self.shapes, "the model", "the plan")

    def shapes_after(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of the shrunk model."""
        after = {name: list(shape) for name, shape in self.shapes.items()}
        for cut in self.cuts:
            after[cut.tensor][cut.dim] = len(cut.kept)
        return {name: tuple(shape) for name, shape in after.items()}

    def then(self, later: Plan) -> Plan:
        """The one plan that equals applying this plan and then `later`, which was made for the shrunk model."""
        later.check(self.shapes_after())
        edits = {(e.module, e.attribute, e.index): e for e in self.edits}
        for edit in later.edits:
            attribute = edit.module, edit.attribute, edit.index
            before = edits[attribute].before if attribute in edits else edit.before
            edits[attribute] = Edit(*attribute, before, edit.after)
        widths = {row.layer: row for row in self.widths}
        for row in later.widths:
            first = widths.get(row.layer, row)
            widths[row.layer] = replace(first, after=row.after, block=row.block if row.block == first.block else 1)
        return Plan(
            cuts=_composed(self.cuts, later.cuts),
            edits=tuple(edits.values()),
            shapes=self.shapes,
            widths=tuple(widths.values()),
            channels=(self.channels[0], self.channels[0] - self.removed_channels - later.removed_channels),
            macs=(self.macs[0], later.macs[1]),
            params=(self.params[0], later.params[1]),
            groups=tuple(dict.fromkeys([*self.groups, *later.groups])),
            replacements=_both(self.replacements, later.replacements),
            norms=_composed(self.norms, later.norms),
        )

    @property
    def removed_channels(self) -> int:
        """Channels of unlocked groups that go."""
        return self.channels[0] - self.channels[1]

    def to_json(self) -> str:
        """One line of JSON; `Plan.from_json` gives back an equal plan."""
        replacements = [[r.module, r.program and r.program.to_data()] for r in self.replacements]
        values = {**{f.name: getattr(self, f.name) for f in fields(self)}, "replacements": replacements}
        return json.dumps({"format": FORMAT, **values}, default=asdict, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan written by `to_json`. Raises PlanMismatchError where the text is no plan, or contradicts itself."""
        try:
            plan = _parsed(json.loads(text, parse_constant=_refused))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise PlanMismatchError(f"not a plan: {type(error).__name__}: {error}") from error
        if len({(cut.tensor, cut.dim) for cut in plan.cuts}) < len(plan.cuts):
            raise PlanMismatchError("the plan cuts the same dimension of a tensor twice.")
        for cut in plan.cuts:
            shape = plan.shapes.get(cut.tensor)
            if shape is None or not 0 <= cut.dim < len(shape) or shape[cut.dim] != cut.size:
                raise PlanMismatchError(f"the plan contradicts itself about {cut.tensor} dim {cut.dim}: shape {shape}.")
        return plan

    def __repr__(self) -> str:
        macs, params = (f"{human(before)} -> {human(after)}" for before, after in (self.macs, self.params))
        removed = f"removes {self.removed_channels:,} of {self.channels[0]:,} channels"
        return f"Plan({len(self.groups)} groups, {removed}, MACs {macs}, params {params})"

    def table(self) -> str:
        """The per-layer table: one line per layer, width before -> after, and what these are blocks of: heads."""
        wide = max([len(row.layer) for row in self.widths], default=5)
        lines = [f"{'layer':<{wide}}  before   after  kept"]
        for row in self.widths:
            heads = f"  {row.before // row.block} -> {row.after // row.block} of {row.block}" if row.block > 1 else ""
            lines.append(f"{row.layer:<{wide}}  {row.before:>6}  {row.after:>6}  {row.after / row.before:>4.0%}{heads}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{self!r}\n{self.table()}"


def _composed(first: tuple[Cut, ...], later: tuple[Cut, ...]) -> tuple[Cut, ...]:
    """The cuts that equal cutting first, and then what is left."""
    cuts = {(cut.tensor, cut.dim): cut for cut in first}
    for cut in later:
        before = cuts.get((cut.tensor, cut.dim))
        kept = cut.kept if before is None else tuple(np.array(before.kept)[list(cut.kept)].tolist())
        size = cut.size if before is None else before.size
        cuts[cut.tensor, cut.dim] = Cut(cut.tensor, cut.dim, size, kept, cut.fill)
    return tuple(cuts.values())


def _both(first: tuple[Replacement, ...], later: tuple[Replacement, ...]) -> tuple[Replacement, ...]:
    """A module replaced twice keeps the attributes of both graph forms, and runs the later one."""
    merged = {replacement.module: replacement for replacement in first}
    for replacement in later:
        before = merged.get(replacement.module)
        if before is not None and before.program is not None and replacement.program is not None:
            sizes = {**replacement.program.sizes, **before.program.sizes}
            replacement = replace(replacement, program=replace(replacement.program, sizes=sizes))  # noqa: PLW2901
        merged[replacement.module] = replacement
    return tuple(merged.values())


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name; a tied tensor appears once, under its first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def tensor_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter and buffer; a tied tensor appears once, under its first name."""
    return {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}


def replaced(model: nn.Module, replacements: Collection[Replacement]) -> nn.Module:
    """`model` itself, with modules exchanged for ones of the same parameters that can shrink.

    Raises PlanMismatchError for a module that is not there, or not of the kind that the plan exchanges.
    """
    holders: dict[int, list[tuple[dict[str, Any], str]]] = {}  # id of a module -> where it is held

    def note(module: nn.Module) -> None:
        for name, child in module._modules.items():
            holders.setdefault(id(child), []).append((module._modules, name))

    for module in model.modules() if replacements else ():
        note(module)
    for replacement in replacements:
        try:
            old = model.get_submodule(replacement.module)
        except AttributeError as error:
            raise PlanMismatchError(f"the model has no {replacement.module!r}, which the plan replaces.") from error
        if isinstance(old, MultiheadAttention) and replacement.program is None:
            continue  # in an earlier pruning
        if replacement.program is None and not replaceable(old):
            raise PlanMismatchError(f"{replacement.module!r} is no nn.MultiheadAttention, as the plan expects.")
        program = replacement.program
        new = MultiheadAttention(cast(nn.MultiheadAttention, old)) if program is None else graph_form(old, program)
        model = new if old is model else model
        holders[id(new)] = holders.pop(id(old), [])
        for held, name in holders[id(new)]:
            held[name] = new
        if new._modules is not old._modules:
            note(new)
    return model


def check_shapes(
    actual: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], this: str, that: str
) -> None:
    """Raise PlanMismatchError about the first tensor in which `actual` differs from `expected`."""
    for name, shape in expected.items():
        if name not in actual:
            raise PlanMismatchError(f"{this} has no tensor {name!r}, which {that} expects with shape {list(shape)}.")
        if tuple(actual[name]) != tuple(shape):
            raise PlanMismatchError(f"{name!r} has shape {list(actual[name])} in {this}, {list(shape)} in {that}.")
    for name in actual:
        if name not in expected:
            raise PlanMismatchError(f"{this} has a tensor {name!r} that {that} does not know.")


def human(count: float) -> str:
    """A count with its SI prefix: 1.81 G."""
    for limit, prefix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= limit:
            return f"{count / limit:.2f}{prefix}"
    return f"{count:.0f}"


def _parsed(raw: dict[str, Any]) -> Plan:
    if raw.pop("format") != FORMAT:
        raise PlanMismatchError(f"a plan of another format than {FORMAT}: made by another version.")
    plan = Plan(
        cuts=tuple(_parsed_cut(**cut) for cut in raw.pop("cuts")),
        edits=tuple(_parsed_edit(**edit) for edit in raw.pop("edits")),
        shapes={str(name): tuple(map(_index, shape)) for name, shape in raw.pop("shapes").items()},
        widths=tuple(map(_parsed_width, raw.pop("widths"))),
        channels=_pair(raw.pop("channels")),
        macs=_pair(raw.pop("macs")),
        params=_pair(raw.pop("params")),
        groups=tuple(map(str, raw.pop("groups"))),
        replacements=tuple(_parsed_replacement(*entry) for entry in raw.pop("replacements")),
        norms=tuple(_parsed_cut(**cut) for cut in raw.pop("norms")),
    )
    if raw:
        raise PlanMismatchError(f"not a plan of this version: it also says {', '.join(sorted(raw))}.")
    return plan


def _parsed_width(row: dict[str, Any]) -> Width:
    block = _index(row.get("block", 1))  # plans of earlier versions have none
    return Width(str(row["layer"]), _index(row["before"]), _index(row["after"]), max(block, 1))


def _parsed_cut(tensor: Any, dim: Any, size: Any, kept: Any, fill: Any) -> Cut:
    return Cut(str(tensor), _index(dim), _index(size), tuple(map(_index, kept)), float(fill))


def _parsed_replacement(module: Any, program: Any) -> Replacement:
    return Replacement(str(module), None if program is None else Program.from_data(program))


def _parsed_edit(module: Any, attribute: Any, index: Any, before: Any, after: Any) -> Edit:
    position = None if index is None else _index(index)
    return Edit(str(module), str(attribute), position, _index(before), _index(after))


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of a plan")


def _index(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"expected a whole number, got {value!r}")
    return value


def _pair(value: Any) -> tuple[int, int]:
    before, after = value
    return _index(before), _index(after)
