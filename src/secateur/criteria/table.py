"""The one table of criteria, and `score`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from secateur.coupling.groups import Graph, Group
from secateur.criteria.controls import random
from secateur.criteria.gradient import taylor_fo
from secateur.criteria.magnitude import bn_scale, l1, l2
from secateur.errors import InputError, UnknownNameError
from secateur.evidence import Evidence

Criterion = Callable[[Group, Evidence], Tensor]

CRITERIA: dict[str, Criterion] = {
    "bn_scale": bn_scale,
    "l1": l1,
    "l2": l2,
    "random": random,
    "taylor_fo": taylor_fo,
}


def resolve(criterion: str | Criterion) -> Criterion:
    """The criterion of that name; a callable is its own. Raises UnknownNameError, suggesting the nearest name."""
    if not isinstance(criterion, str):
        if not callable(criterion):
            raise InputError(f"a criterion is a name or a callable (group, evidence) -> Tensor; got {criterion!r}.")
        return criterion
    if criterion not in CRITERIA:
        raise UnknownNameError("criterion", criterion, CRITERIA)
    return CRITERIA[criterion]


def needs_of(criterion: str | Criterion) -> tuple[str, ...]:
    """The evidence a criterion needs beside the weights: its `needs` attribute."""
    return tuple(getattr(resolve(criterion), "needs", ()))


def score(graph: Graph, evidence: Evidence, criterion: str | Criterion, *, seed: int = 0) -> dict[str, Tensor]:
    """{group name: (channels,)} of every prunable group, higher means keep.

    `criterion`: a name, or any callable `(group, evidence) -> Tensor`. `seed` is for criteria that draw. Raises
    UnknownNameError, and InputError for missing evidence or scores that are not finite or of the wrong length.
    """
    function = resolve(criterion)
    missing = [need for need in needs_of(criterion) if not evidence.has(need)]
    if missing:
        raise InputError(f"criterion {criterion!r} needs {missing[0]} evidence: pass data= (to `prune` or `observe`).")
    seeded = replace(evidence, seed=seed)
    scores = {group.name: function(group, seeded) for group in graph.prunable}
    check_scores(graph, scores)
    return scores


def check_scores(graph: Graph, scores: Mapping[str, Tensor]) -> None:
    """Raise InputError unless every prunable group has finite scores of the right length."""
    for group in graph.prunable:
        if group.name not in scores:
            raise InputError(f"no scores for group {group.name!r}; `score(graph, evidence, criterion)` makes them.")
        tensor = scores[group.name]
        if not isinstance(tensor, Tensor):
            raise InputError(f"scores of {group.name!r} are {type(tensor).__name__}, expected a tensor.")
        if tuple(tensor.shape) != (group.channels,):
            raise InputError(f"scores of {group.name!r} have shape {list(tensor.shape)}, expected [{group.channels}].")
        if not torch.isfinite(tensor).all():
            raise InputError(f"scores of {group.name!r} are not finite; check the data and the model's weights.")
