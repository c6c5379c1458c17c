"""Schedules: progress in [0, 1] -> the fraction of the target that is due. Direct or iterative is one word.

Two names say more than a function of progress can. "geometric" depends on how much is removed in the end. And
"layer_by_layer" is no matter of how much but of where: each step brings the next layer to its full target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import chain

from secateur.coupling.groups import Graph, Group
from secateur.errors import InputError, UnknownNameError

Schedule = Callable[[float], float]

LAYER_BY_LAYER = "layer_by_layer"
WAITING = "not its turn"  # begins the reason why a group is locked in a step that is another's
PART_PER_STEP = 0.005  # of all channels, in "stepwise"


def one_shot(progress: float) -> float:
    """Everything at the first step."""
    return 1.0 if progress > 0 else 0.0


def linear(progress: float) -> float:
    """Equal parts: cumulative levels such as 10/20/30/40 %."""
    return progress


def stepwise(progress: float) -> float:
    """Equal parts of a fixed size, 0.5 % of the channels: `steps_of` says how many that makes."""
    return progress


def cubic(progress: float) -> float:
    """Much at first, little at the end: 1 - (1 - t)^3 (Zhu and Gupta 2017, arXiv 1710.01878, eq. 1)."""
    return 1.0 - (1.0 - progress) ** 3


def geometric(progress: float, final: float) -> float:
    """Each step removes the same fraction of what is left: (1 - (1 - final)^t) / final.

    With `final` = 1 - (1 - p)^n, (1 - p)^k is kept after step k of n: "prune 20 % of what remains, n times".
    Source: Frankle and Carbin 2019, arXiv 1803.03635, section 1.
    """
    if final == 0 or progress in (0, 1):
        return progress
    return min(1.0, -math.expm1(progress * math.log1p(-final)) / final)


SCHEDULES: dict[str, Schedule] = {"cubic": cubic, "linear": linear, "one_shot": one_shot, "stepwise": stepwise}
FINAL_SCHEDULES: dict[str, Callable[[float, float], float]] = {"geometric": geometric}  # (progress, final fraction)
NAMES = tuple(sorted([*SCHEDULES, *FINAL_SCHEDULES, LAYER_BY_LAYER]))


def resolve(schedule: str | Schedule, final: float | None = None) -> Schedule:
    """The schedule of that name, or a callable of the caller's own, checked each time it is asked.

    `final`: the fraction that is gone when all is done, in [0, 1); "geometric" needs it. Raises UnknownNameError, and
    InputError for "layer_by_layer", which `prune_steps` runs by `in_turn`. What is returned raises InputError for
    progress or a fraction outside [0, 1], and for a fraction that falls while progress rises.
    """
    if not isinstance(schedule, str):
        if not callable(schedule):
            raise InputError(f"a schedule is a name or a callable (progress) -> fraction; got {schedule!r}.")
        return _checked(schedule)
    if schedule == LAYER_BY_LAYER:
        raise InputError("'layer_by_layer' is no function of progress: it is for channels, in prune_steps.")
    if schedule in SCHEDULES:
        return _checked(SCHEDULES[schedule])
    if schedule not in FINAL_SCHEDULES:
        raise UnknownNameError("schedule", schedule, NAMES)
    function, whole = FINAL_SCHEDULES[schedule], _final(schedule, final)
    return _checked(lambda progress: function(progress, whole))


def steps_of(schedule: str | Schedule, final: float | None = None, graph: Graph | None = None) -> int | None:
    """How many steps a schedule itself asks for; None where that is the caller's choice.

    "stepwise": as many times 0.5 % of the channels as make `final` (Lee, Li, Li: 8 to 26 steps, 4 to 13 %).
    "layer_by_layer": one for each of `turns(graph)`, the dense model's graph.
    """
    if schedule == "stepwise":
        return max(1, math.ceil(_final(schedule, final) / PART_PER_STEP - 1e-9))
    if schedule == LAYER_BY_LAYER:
        if graph is None:
            raise InputError("the steps of 'layer_by_layer' follow from the model: pass graph=, of the dense model.")
        return max(1, len(turns(graph)))
    return None


def turns(graph: Graph) -> tuple[tuple[str, ...], ...]:
    """The names of the groups of each step of "layer_by_layer", in order of execution.

    Groups that must keep equal counts, or that share every tensor (the heads' parts of one projection), share a step.
    """
    found: list[list[Group]] = []
    for group in graph.prunable:
        related = [turn for turn in found if any(_share_a_turn(graph, group, other) for other in turn)]
        joined = [*chain(*related), group]
        place = found.index(related[0]) if related else len(found)
        found = [*found[:place], joined, *(turn for turn in found[place:] if turn not in related)]
    return tuple(tuple(group.name for group in turn) for turn in found)


def _share_a_turn(graph: Graph, one: Group, other: Group) -> bool:
    return one.signature == other.signature or other.name in graph.together(one.name)


def in_turn(graph: Graph, dense: Graph, number: int) -> Graph:
    """The graph with everything locked but the groups of step `number` (from 1) of "layer_by_layer".

    `dense`: the graph of the model at the start; `graph`: of what earlier steps have left of it. Select on the result
    with scope="layer" and the whole sparsity, and `dense=dense`. A sparsity by patterns: see `named_in`. Where earlier
    steps left nothing of a group (down to one channel), nothing is prunable and the plan is the identity.
    """
    every = turns(dense)
    if not 1 <= number <= len(every):
        raise InputError(f"the steps of 'layer_by_layer' are 1 to {len(every)} for this model; got {number}.")
    names = every[number - 1]
    free = {group.signature for group in dense.groups if group.name in names}
    reason = f"{WAITING} in step {number} of 'layer_by_layer'"
    groups = tuple(
        replace(group, locked=reason) if group.locked is None and group.signature not in free else group
        for group in graph.groups
    )
    locked = {group.name for group in groups if group.locked is not None}
    return replace(graph, groups=groups, balances=tuple(part for part in graph.balances if locked.isdisjoint(part)))


def named_in(patterns: Mapping[str, float], graph: Graph) -> dict[str, float]:
    """Those of {layer pattern: fraction} that name a layer of a prunable group; selection refuses the others."""
    layers = {layer for group in graph.prunable for layer in group.layers}
    return {name: part for name, part in patterns.items() if any(fnmatchcase(layer, name) for layer in layers)}


def _final(schedule: str, final: float | None) -> float:
    if final is None:
        raise InputError(f"the {schedule!r} schedule depends on how much is removed in the end: pass final=.")
    if isinstance(final, bool) or not isinstance(final, (int, float)) or not 0 <= final < 1:
        raise InputError(f"final is the fraction removed in the end, in [0, 1); got {final!r}.")
    return float(final)


def _checked(schedule: Schedule) -> Schedule:
    last = (0.0, 0.0)  # the progress asked for before, and what was due then

    def due(progress: float) -> float:
        nonlocal last
        if not 0 <= progress <= 1:
            raise InputError(f"progress lies in [0, 1]; got {progress!r}.")
        fraction = schedule(progress)
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:
            raise InputError(
                f"a schedule returns the fraction of the target that is due, in [0, 1]; "
                f"at progress {progress:g} it returned {fraction!r}."
            )
        (early, less), (late, more) = sorted([last, (progress, float(fraction))])
        if more < less and early < late:
            raise InputError(
                f"a schedule never falls, as nothing that was removed comes back: it was {less:g} at progress "
                f"{early:g} and is {more:g} at {late:g}."
            )
        last = progress, float(fraction)
        return float(fraction)

    return due
