"""Greedy choice: one group after another, each scored on the model that the choices before it have left."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.batches import Forward, Loss
from secateur.coupling.groups import Graph
from secateur.criteria.sequential import Greedy
from secateur.criteria.table import check_scores, resolve
from secateur.errors import InputError
from secateur.evidence import Evidence, observe
from secateur.plans import Plan
from secateur.selection import channels_to_keep, make_plan
from secateur.shrinking import zero_channels
from secateur.targets import Target, macs_of, params_of


def select_in_order(
    model: nn.Module,
    graph: Graph,
    criterion: str | Greedy,
    target: Target,
    data: Iterable[Any] | None = None,
    *,
    round_to: int = 1,
    keep_at_least: int = 1,
    dense: Graph | None = None,
    seed: int = 0,
    forward: Forward | None = None,
    loss: Loss | None = None,
) -> Plan:
    """Choose the channels to remove layer by layer, in order of execution; every group loses the same fraction.

    Before each group is scored, the channels chosen so far are zeroed and the criterion's evidence is gathered anew:
    weights of removed input channels are out of the sum, and later layers answer to what is left. The order is that of
    the layers, never global. `data`: iterated once per group that loses channels. The rest is as for `select`.

    Raises InputError for a criterion that is not greedy, DataError for data that can be iterated only once, and what
    `observe` and `select` raise.
    """
    chooser = resolve(criterion)
    if not isinstance(chooser, Greedy):
        raise InputError(
            f"criterion {criterion!r} does not choose in order: pass greedy({criterion!r}), or use `select`."
        )
    even = {group.name: torch.zeros(group.channels) for group in graph.prunable}  # the counts depend on no score
    limits = ("layer", round_to, keep_at_least)
    counts = [
        len(stay) for stay in channels_to_keep(graph, even, target, *limits, normalise=False, dense=dense or graph)
    ]
    macs, params = macs_of(graph), params_of(graph)
    kept = [np.arange(group.channels) for group in graph.groups]
    zeroed = model
    for number, group in enumerate(graph.groups):
        if counts[number] == group.channels:
            continue
        facts = replace(_evidence(zeroed, graph, chooser, data, seed, forward, loss), seed=seed)
        scores = {group.name: chooser.criterion(group, facts)}
        check_scores(replace(graph, groups=(group,)), scores)
        order = np.argsort(scores[group.name].detach().cpu().double().numpy(), kind="stable")
        kept[number] = np.sort(order[group.channels - counts[number] :])
        zeroed = zero_channels(model, make_plan(graph, kept, macs, params))
    return make_plan(graph, kept, macs, params)


def _evidence(
    model: nn.Module,
    graph: Graph,
    criterion: Greedy,
    data: Iterable[Any] | None,
    seed: int,
    forward: Forward | None,
    loss: Loss | None,
) -> Evidence:
    return observe(model, graph, data, criterion.needs, seed=seed, forward=forward, loss=loss)
