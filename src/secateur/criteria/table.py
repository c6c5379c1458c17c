"""The one table of criteria, and `score`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from secateur.coupling.groups import Graph, Group
from secateur.criteria.activation import activation_mean, activation_variance, apoz, output_norm, output_norm_pre
from secateur.criteria.controls import random
from secateur.criteria.curvature import hessian, obd
from secateur.criteria.geometry import fpgm
from secateur.criteria.gradient import taylor, taylor_fo
from secateur.criteria.magnitude import bn_scale, group_norm, l1, l2, lamp, slimming
from secateur.criteria.reconstruction import thinet
from secateur.criteria.sequential import Greedy
from secateur.errors import InputError, UnknownNameError
from secateur.evidence import Evidence

Criterion = Callable[[Group, Evidence], Tensor]

CRITERIA: dict[str, Criterion | Greedy] = {
    "activation_mean": activation_mean,
    "activation_variance": activation_variance,
    "apoz": apoz,
    "bn_scale": bn_scale,
    "fpgm": fpgm,
    "group_norm": group_norm,
    "hessian": hessian,
    "l1": l1,
    "l1_greedy": Greedy(l1),
    "l2": l2,
    "lamp": lamp,
    "obd": obd,
    "output_norm": output_norm,
    "output_norm_greedy": Greedy(output_norm),
    "output_norm_pre": output_norm_pre,
    "random": random,
    "slimming": slimming,
    "taylor": taylor,
    "taylor_fo": taylor_fo,
    "thinet": thinet,
}


def resolve(criterion: str | Criterion | Greedy) -> Criterion | Greedy:
    """The criterion of that name; a callable is its own. Raises UnknownNameError, suggesting the nearest name."""
    if isinstance(criterion, str):
        if criterion not in CRITERIA:
            raise UnknownNameError("criterion", criterion, CRITERIA)
        return CRITERIA[criterion]
    if not isinstance(criterion, Greedy) and not callable(criterion):
        raise InputError(f"a criterion is a name or a callable (group, evidence) -> Tensor; got {criterion!r}.")
    return criterion


def needs_of(criterion: str | Criterion | Greedy) -> tuple[str, ...]:
    """The evidence a criterion needs beside the weights: its `needs` attribute."""
    return tuple(getattr(resolve(criterion), "needs", ()))


def is_raw(criterion: str | Criterion | Greedy) -> bool:
    """Whether scores compare between groups as they are, so that scope "global" must not divide by the group's mean."""
    return bool(getattr(resolve(criterion), "raw", False))


def score(graph: Graph, evidence: Evidence, criterion: str | Criterion | Greedy, *, seed: int = 0) -> dict[str, Tensor]:
    """{group name: (channels,)} of every prunable group, higher means keep.

    `criterion`: a name, or any callable `(group, evidence) -> Tensor`. `seed` is for criteria that draw. Raises
    UnknownNameError, and InputError for missing evidence, a greedy criterion, or scores that are not finite or of the
    wrong length.
    """
    function = resolve(criterion)
    if isinstance(function, Greedy):
        raise InputError(f"{criterion!r} measures again after each choice: use `prune`, or `select_in_order`.")
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
