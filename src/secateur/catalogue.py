"""Everything that can be pruned by, in one list: what `secateur criteria` prints."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from secateur.collecting import COLLECTORS
from secateur.criteria.sequential import Greedy
from secateur.criteria.table import CRITERIA
from secateur.masking import WEIGHT_METHODS, WeightMethod

# What gathering each need takes, the dearest last.
COSTS = {
    "activation": "a forward pass",
    "input_norm": "a forward pass",
    "gram": "a forward pass, and second moments of layer inputs",
    "gradient": "a backward pass",
    "activation_gradient": "a backward pass",
    "fisher": "gradients of each sample",
    "hessian": "second derivatives",
}


@dataclass(frozen=True)
class Entry:
    """One line of the list."""

    name: str
    prunes: str  # channels or weights
    meaning: str
    needs: str  # nothing, data, gradients, training
    cost: str
    source: str


def catalogue() -> list[Entry]:
    """Every criterion and method by name: channels first, then weights. Each of these names works."""
    channels = [_entry(name, "channels", found) for name, found in sorted(CRITERIA.items())]
    return channels + [_entry(name, "weights", found) for name, found in sorted(WEIGHT_METHODS.items())]


def _entry(name: str, prunes: str, found: Any) -> Entry:
    function = found.criterion if isinstance(found, Greedy) else found
    function = function.about if isinstance(function, WeightMethod) else function
    lines = (inspect.getdoc(function) or "").splitlines()
    source = next((line.removeprefix("Source: ") for line in lines if line.startswith("Source: ")), "")
    needs = tuple(getattr(found, "needs", ()))
    cost = max((COSTS[need] for need in needs), key=list(COSTS.values()).index, default="reads the weights")
    if isinstance(found, Greedy):
        cost += ", once per group"
    if isinstance(found, WeightMethod):
        cost = found.cost
    return Entry(name, prunes, lines[0] if lines else "", _needs(found, needs), cost, source)


def _needs(found: Any, needs: tuple[str, ...]) -> str:
    if getattr(found, "training", False):
        return "training"
    if not needs:
        return "nothing"
    return "gradients" if any(COLLECTORS[need][0].backward for need in needs) else "data"
