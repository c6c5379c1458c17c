"""The story of pruning, top to bottom: trace, score, select, shrink, verify, repair."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.batches import Forward, Loss
from secateur.coupling.groups import Graph, trace
from secateur.criteria.table import Criterion, needs_of, resolve, score
from secateur.errors import InputError, TargetError
from secateur.evidence import observe
from secateur.inputs import check_model, check_weights
from secateur.plans import Plan, human
from secateur.repairing import repair
from secateur.schedules import Schedule
from secateur.schedules import resolve as resolve_schedule
from secateur.selection import select
from secateur.shrinking import shrink
from secateur.targets import Target, macs_of, params_of
from secateur.verification import verify


@dataclass(frozen=True)
class Summary:
    """What pruning did, in numbers."""

    criterion: str
    verified_difference: float  # to the zeroed original, relative to its largest output; before any repair
    repaired: bool  # False: no data was given, so BatchNorm statistics are the dense model's
    channels: tuple[int, int]
    params: tuple[int, int]
    macs: tuple[int, int]  # of one forward pass on the example inputs
    locked: Mapping[str, str]  # group -> why it could not shrink
    unknown: Mapping[str, int]  # ops without a rule

    def __str__(self) -> str:
        (macs, macs_after), (params, params_after) = self.macs, self.params
        lines = [
            f"criterion  {self.criterion}",
            f"channels   {self.channels[0]:,} -> {self.channels[1]:,}",
            f"MACs       {human(macs)} -> {human(macs_after)} ({macs_after / max(macs, 1):.1%})",
            f"params     {human(params)} -> {human(params_after)} ({params_after / max(params, 1):.1%})",
            f"verified   equal to the zeroed original within {self.verified_difference:.1e}",
            f"repaired   {'BatchNorm statistics re-estimated' if self.repaired else 'no: pass data= to repair'}",
        ]
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
    criterion: str | Criterion = "l2",
    sparsity: float | Mapping[str, float] | None = None,
    target: Target | None = None,
    data: Iterable[Any] | None = None,
    scope: str = "layer",
    round_to: int = 1,
    ignore: Iterable[str | nn.Module] = (),
    keep_at_least: int = 1,
    seed: int = 0,
    forward: Forward | None = None,
    loss: Loss | None = None,
) -> Pruned:
    """Remove channels from a copy of `model`, prove the result, and repair it where `data` allows.

    Give `sparsity=` (the fraction of channels to remove, or {layer pattern: fraction}) or `target=`. `data`: training
    batches for criteria that need them and for re-estimating BatchNorm statistics; without it repair is skipped and
    the summary says so. `ignore`: modules whose outputs keep their width. For the rest see `select` and `score`.
    """
    goal = _goal(sparsity, target)
    resolve(criterion)
    check_model(model)
    check_weights(model)
    graph = trace(model, example_inputs, ignore=ignore)
    facts = observe(model, graph, data, needs_of(criterion), forward=forward, loss=loss)
    scores = score(graph, facts, criterion, seed=seed)
    plan = select(graph, scores, goal, scope=scope, round_to=round_to, keep_at_least=keep_at_least)
    small = shrink(model, plan)
    difference = verify(model, plan, small, example_inputs)
    if data is not None:
        small = repair(small, data, forward=forward)
    return Pruned(small, plan, _summary(graph, plan, criterion, difference, repaired=data is not None))


def prune_steps(
    model: nn.Module,
    example_inputs: Any,
    target: Target,
    *,
    criterion: str | Criterion = "l2",
    schedule: str | Schedule = "cubic",
    steps: int = 5,
    data: Iterable[Any] | None = None,
    scope: str = "layer",
    round_to: int = 1,
    ignore: Iterable[str | nn.Module] = (),
    keep_at_least: int = 1,
    seed: int = 0,
    forward: Forward | None = None,
    loss: Loss | None = None,
) -> Iterator[Step]:
    """Prune little by little: yields after each step; train `step.model` in place before asking for the next.

    `schedule` says which part of the target is due after each of `steps` steps: "cubic", "linear", "one_shot", or a
    function of progress in (0, 1]. Targets are about the dense model throughout. Every step is verified.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps is a whole number, at least 1; got {steps!r}.")
    due, needs = resolve_schedule(schedule), needs_of(criterion)
    graph = trace(model, example_inputs, ignore=ignore)
    dense = graph
    full = [group.channels for group in dense.groups]
    macs, params = macs_of(dense)(full), params_of(dense)(full)
    total: Plan | None = None
    for number in range(1, steps + 1):
        facts = observe(model, graph, data, needs, forward=forward, loss=loss)
        scores = score(graph, facts, criterion, seed=seed + number - 1)
        goal = target.part(due(number / steps), macs, params)
        plan = select(graph, scores, goal, scope=scope, round_to=round_to, keep_at_least=keep_at_least, dense=dense)
        small = shrink(model, plan)
        difference = verify(model, plan, small, example_inputs)
        if data is not None:
            small = repair(small, data, forward=forward)
        total = plan if total is None else total.then(plan)
        summary = _summary(graph, total, criterion, difference, repaired=data is not None)
        yield Step(number, steps, small, model, plan, total, summary)
        model = small
        if number < steps:
            graph = trace(model, example_inputs, ignore=ignore)


def _goal(sparsity: float | Mapping[str, float] | None, target: Target | None) -> Target:
    if target is not None and sparsity is not None:
        raise TargetError("pass either sparsity= or target=, not both.")
    if target is None:
        return Target(sparsity=sparsity)
    if not isinstance(target, Target):
        raise TargetError(f"target is a secateur.Target; got {target!r}. For a fraction of channels pass sparsity=.")
    return target


def _summary(graph: Graph, plan: Plan, criterion: str | Criterion, difference: float, *, repaired: bool) -> Summary:
    name = criterion if isinstance(criterion, str) else getattr(criterion, "__name__", repr(criterion))
    return Summary(
        criterion=name,
        verified_difference=difference,
        repaired=repaired,
        channels=plan.channels,
        params=plan.params,
        macs=plan.macs,
        locked={group.name: group.locked for group in graph.groups if group.locked is not None},
        unknown=graph.unknown,
    )
