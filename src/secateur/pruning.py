"""The story of pruning, top to bottom: trace, score, select, shrink, verify, repair."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from torch import nn
from torch.export import ExportedProgram

from secateur import repairing
from secateur.batches import Forward, Loss
from secateur.coupling.groups import Graph, trace
from secateur.criteria.sequential import Greedy
from secateur.criteria.table import Criterion, is_raw, needs_of, resolve, score
from secateur.errors import CalibrationError, InputError, TargetError, VerificationError
from secateur.evidence import observe
from secateur.inputs import check_model, check_weights
from secateur.ordering import select_in_order
from secateur.plans import Plan, human
from secateur.repairing import DEFAULT_STEPS
from secateur.schedules import LAYER_BY_LAYER, WAITING, Schedule, in_turn, named_in, steps_of
from secateur.schedules import resolve as resolve_schedule
from secateur.selection import make_plan, select
from secateur.shrinking import shrink
from secateur.targets import Target, macs_of, params_of
from secateur.verification import verified_program, verify

_REPAIRS = {
    "batch_norm": "BatchNorm statistics re-estimated",
    "fold": "constants folded",
    "scale": "outputs scaled",
    "least_squares": "layers fitted by least squares",
}
_REPAIR_BATCHES = 100  # of an iterator, which can be read only once


@dataclass(frozen=True)
class Summary:
    """What pruning did, in numbers."""

    criterion: str
    verified_difference: float  # to the zeroed original, relative to its largest output; before any repair
    repairs: tuple[str, ...]  # the steps of `repair` that were taken
    channels: tuple[int, int]
    params: tuple[int, int]
    macs: tuple[int, int]  # of one forward pass on the example inputs
    locked: Mapping[str, str]  # group -> why it could not shrink
    unknown: Mapping[str, int]  # ops without a rule
    left_out: str = ""  # why a step of the repair was left out

    @property
    def repaired(self) -> bool:
        """Whether anything was repaired; without data nothing is."""
        return bool(self.repairs)

    def __str__(self) -> str:
        (macs, macs_after), (params, params_after) = self.macs, self.params
        lines = [
            f"criterion  {self.criterion}",
            f"channels   {self.channels[0]:,} -> {self.channels[1]:,}",
            f"MACs       {human(macs)} -> {human(macs_after)} ({macs_after / max(macs, 1):.1%})",
            f"params     {human(params)} -> {human(params_after)} ({params_after / max(params, 1):.1%})",
            f"verified   equal to the zeroed original within {self.verified_difference:.1e}",
            f"repaired   {', '.join(_REPAIRS[step] for step in self.repairs) or 'no: that takes data='}",
        ]
        if self.left_out:
            lines.append(f"left out   {self.left_out}")
        if self.unknown:
            ops = ", ".join(f"{op} x{count}" for op, count in self.unknown.items())
            lines.append(f"unknown    {ops}: what these ops touch is locked")
        return "\n".join(lines)


@dataclass(frozen=True)
class Pruned:
    """A smaller model, the plan that made it, and what that did."""

    model: nn.Module
    plan: Plan
    summary: Summary
    program: ExportedProgram | None = None  # the model as an exported program, with form="graph"

    def __repr__(self) -> str:
        return f"Pruned({self.plan!r}, verified within {self.summary.verified_difference:.1e})"


@dataclass(frozen=True)
class Step:
    """One step of `prune_steps`: train `model`, then go on."""

    number: int  # from 1
    steps: int
    model: nn.Module
    previous: nn.Module  # the model this step shrank: `rebind_optimizer_(optimizer, previous, model, plan)`
    plan: Plan  # from `previous` to `model`
    total: Plan  # from the dense model to `model`: what `save` stores
    summary: Summary


def prune(
    model: nn.Module,
    example_inputs: Any,
    *,
    criterion: str | Criterion | Greedy = "l2",
    sparsity: float | Mapping[str, float] | None = None,
    target: Target | None = None,
    data: Iterable[Any] | None = None,
    scope: str | None = None,
    round_to: int = 1,
    ignore: Iterable[str | nn.Module] = (),
    prune_residual: bool = False,
    keep_at_least: int = 1,
    repair: Collection[str] | None = None,
    seed: int = 0,
    form: str = "live",
    forward: Forward | None = None,
    loss: Loss | None = None,
) -> Pruned:
    """Remove channels from a copy of `model`, prove the result, and repair it where `data` allows.

    Give `sparsity=` (the fraction of channels to remove, or {layer pattern: fraction}) or `target=`. `data`: training
    batches for criteria that need them and for the repair; without it repair is skipped and the summary says so.
    `repair`: the steps of `secateur.repair` to take; by default least squares, or scales where the data is too little
    for it, and BatchNorm statistics; `()` for none. `ignore`: modules whose outputs keep their width.
    `prune_residual`: widths under LayerNorm and RMSNorm may shrink too (residual streams); the proof then takes norms
    over live channels. For the rest see `select` and `score`.

    `form`: "live" gives the model's own class, in which a submodule may be replaced by its graph form. "graph" may
    replace the model itself, so that nothing is locked because of its Python code, and adds the pruned model as an
    exported program with open batch size and sequence length (`Pruned.program`), checked against it.
    """
    goal = _goal(sparsity, target)
    how = _How(criterion, data, scope, round_to, keep_at_least, forward, loss)
    check_model(model)
    check_weights(model)
    graph = trace(model, example_inputs, ignore=ignore, prune_residual=prune_residual, form=form)
    chosen = how.choice(model, graph, goal, seed)
    graph, plan, small, difference = _proved(model, graph, chosen, example_inputs)
    small, repairs, left_out = _repaired(small, model, plan, data, repair, seed, forward)
    program = verified_program(small, example_inputs) if form == "graph" else None
    return Pruned(small, plan, _summary(graph, plan, criterion, difference, repairs, left_out), program)


def prune_steps(
    model: nn.Module,
    example_inputs: Any,
    target: Target,
    *,
    criterion: str | Criterion | Greedy = "l2",
    schedule: str | Schedule = "cubic",
    steps: int | None = None,
    data: Iterable[Any] | None = None,
    scope: str | None = None,
    round_to: int = 1,
    ignore: Iterable[str | nn.Module] = (),
    prune_residual: bool = False,
    keep_at_least: int = 1,
    repair: Collection[str] | None = None,
    seed: int = 0,
    forward: Forward | None = None,
    loss: Loss | None = None,
) -> Iterator[Step]:
    """Prune little by little: yields after each step; train `step.model` in place before asking for the next.

    `schedule` says which part of the target is due after each of `steps` steps: "one_shot", "linear", "geometric",
    "cubic", "stepwise" (0.5 % of the channels each time), or a function of progress in (0, 1]; "layer_by_layer" brings
    one layer after the other to the whole sparsity. `steps`: by default as many as the schedule asks for, else 5.
    Targets are about the dense model throughout. Every step is verified. For the other arguments see `prune`.
    """
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise InputError(f"steps is a whole number, at least 1; got {steps!r}.")
    goal = _goal(None, target)
    how = _How(criterion, data, scope, round_to, keep_at_least, forward, loss)
    in_layers = schedule == LAYER_BY_LAYER
    if in_layers and goal.sparsity is None:
        raise TargetError("'layer_by_layer' brings each layer to a sparsity: pass Target(sparsity=...), not a budget.")
    graph = dense = trace(model, example_inputs, ignore=ignore, prune_residual=prune_residual)
    full = [group.channels for group in dense.groups]
    macs, params = macs_of(dense)(full), params_of(dense, goal.of)(full)
    final = goal.final(macs, params)
    due = (lambda progress: progress) if in_layers else resolve_schedule(schedule, final)
    asked = steps_of(schedule, final, dense)
    if in_layers and scope not in (None, "layer"):
        raise InputError(f"'layer_by_layer' takes scope='layer', not {scope!r}.")
    if in_layers and steps not in (None, asked):
        raise InputError(f"'layer_by_layer' takes {asked} steps for this model, one per layer; got steps={steps}.")
    steps = steps or asked or 5
    total: Plan | None = None
    for number in range(1, steps + 1):
        open_now = in_turn(graph, dense, number) if in_layers else graph
        part = _turn_of(goal, open_now) if in_layers else goal.part(due(number / steps), macs, params)
        chosen = how.choice(model, open_now, part, seed + number - 1, dense)
        graph, plan, small, difference = _proved(model, open_now, chosen, example_inputs)
        small, repairs, left_out = _repaired(small, model, plan, data, repair, seed, forward)
        total = plan if total is None else total.then(plan)
        summary = _summary(graph, total, criterion, difference, repairs, left_out)
        yield Step(number, steps, small, model, plan, total, summary)
        model = small
        if number < steps:
            graph = trace(model, example_inputs, ignore=ignore, prune_residual=prune_residual)


@dataclass(frozen=True)
class _How:
    """How channels are chosen. Made before any work, so that what cannot be is refused at once."""

    criterion: str | Criterion | Greedy
    data: Iterable[Any] | None
    scope: str | None
    round_to: int
    keep_at_least: int
    forward: Forward | None
    loss: Loss | None

    def __post_init__(self) -> None:
        needs = needs_of(self.criterion)
        if needs and self.data is None:
            raise InputError(f"criterion {self.criterion!r} needs {', '.join(needs)} evidence: pass data=.")
        if isinstance(resolve(self.criterion), Greedy) and self.scope not in (None, "layer"):
            raise InputError(f"{self.criterion!r} goes layer by layer: it takes scope='layer', not {self.scope!r}.")

    def choice(
        self, model: nn.Module, graph: Graph, goal: Target, seed: int, dense: Graph | None = None
    ) -> Callable[[Graph], Plan]:
        """What chooses: by scores, taken now from the model, or in order, measuring again after each group."""
        criterion = resolve(self.criterion)
        limits: dict[str, Any] = {"round_to": self.round_to, "keep_at_least": self.keep_at_least, "dense": dense}
        data: dict[str, Any] = {"seed": seed, "forward": self.forward, "loss": self.loss}
        if isinstance(criterion, Greedy):
            return lambda graph: select_in_order(model, graph, criterion, goal, self.data, **limits, **data)
        facts = observe(model, graph, self.data, needs_of(criterion), **data)
        scores = score(graph, facts, self.criterion, seed=seed)
        limits["normalise"] = not is_raw(criterion)
        return lambda graph: select(graph, scores, goal, scope=self.scope, **limits)


def _turn_of(goal: Target, graph: Graph) -> Target:
    """The target as far as it is about this graph: patterns that name nothing of it are left out."""
    return replace(goal, sparsity=named_in(goal.sparsity, graph) or 0.0) if isinstance(goal.sparsity, Mapping) else goal


def _proved(
    model: nn.Module, graph: Graph, chosen: Callable[[Graph], Plan], example_inputs: Any
) -> tuple[Graph, Plan, nn.Module, float]:
    """The chosen plan, applied and verified. Groups that make the verification fail are locked, and named as such.

    A size can reach the computation in ways that a recording does not see (`0.5 * x.shape[1]`). Then each group is
    tried alone, the ones that fail are locked, and the choice is made once more.
    """
    plan = chosen(graph)
    small = shrink(model, plan)
    try:
        return graph, plan, small, verify(model, plan, small, example_inputs)
    except VerificationError:
        narrowed = _lock_failing(model, graph, example_inputs)
        if narrowed is graph:
            raise
    plan = chosen(narrowed)
    small = shrink(model, plan)
    return narrowed, plan, small, verify(model, plan, small, example_inputs)


def _lock_failing(model: nn.Module, graph: Graph, example_inputs: Any) -> Graph:
    """The graph with every group locked whose first channels cannot go alone."""
    macs, params = macs_of(graph), params_of(graph)
    for group in graph.prunable:
        together = graph.together(group.name)
        kept = [np.arange(g.channels - (g.name in together and g.channels > 1)) for g in graph.groups]
        plan = make_plan(graph, kept, macs, params)
        try:
            verify(model, plan, shrink(model, plan), example_inputs)
        except VerificationError:
            graph = graph.lock(group.name, "removing its channels failed the verification: a size cannot follow")
    return graph


def _goal(sparsity: float | Mapping[str, float] | None, target: Target | None) -> Target:
    if target is not None and sparsity is not None:
        raise TargetError("pass either sparsity= or target=, not both.")
    if target is None:
        return Target(sparsity=sparsity)
    if not isinstance(target, Target):
        raise TargetError(f"target is a secateur.Target; got {target!r}. For a fraction of channels pass sparsity=.")
    return target


def _repaired(
    small: nn.Module,
    dense: nn.Module,
    plan: Plan,
    data: Iterable[Any] | None,
    steps: Collection[str] | None,
    seed: int,
    forward: Forward | None,
) -> tuple[nn.Module, tuple[str, ...], str]:
    """The repaired model, the steps that were taken, and why one was left out: data may be too little for it."""
    if data is None:
        if steps:
            raise InputError(f"repair={tuple(steps)} looks at data: pass data=, an iterable of training batches.")
        return small, (), ""
    again = list(islice(data, _REPAIR_BATCHES)) if isinstance(data, Iterator) else data
    chosen, left_out = DEFAULT_STEPS if steps is None else tuple(steps), ""
    if plan.is_identity:
        chosen = tuple(step for step in chosen if step == "batch_norm")
    try:
        mended = repairing.repair(small, again, dense=dense, plan=plan, steps=chosen, seed=seed, forward=forward)
    except CalibrationError as error:
        if steps is not None:
            raise
        chosen, left_out = repairing.LITTLE_DATA, str(error)
        mended = repairing.repair(small, again, dense=dense, plan=plan, steps=chosen, seed=seed, forward=forward)
    return mended, tuple(step for step in chosen if step != "batch_norm" or repairing.repairable(small)), left_out


def _summary(
    graph: Graph,
    plan: Plan,
    criterion: str | Criterion | Greedy,
    difference: float,
    repairs: tuple[str, ...],
    left_out: str,
) -> Summary:
    name = criterion if isinstance(criterion, str) else getattr(criterion, "__name__", repr(criterion))
    return Summary(
        criterion=name,
        verified_difference=difference,
        repairs=repairs,
        channels=plan.channels,
        params=plan.params,
        macs=plan.macs,
        locked={g.name: g.locked for g in graph.groups if g.locked is not None and not g.locked.startswith(WAITING)},
        unknown=graph.unknown,
        left_out=left_out,
    )
