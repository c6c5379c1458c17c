"""Target: how far to prune. Cost: what a model with given widths costs, counted on the tape."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from secateur.coupling.groups import Graph, Product
from secateur.dotted import is_within
from secateur.errors import TargetError


@dataclass(frozen=True)
class Target:
    """How far to prune: the fraction to remove, or what may at most remain. Give `sparsity`, or one or both budgets.

    A budget is met within one removable step and never exceeded. A float in (0, 1] is a fraction of the dense model,
    an int is absolute. `of`: names or patterns of modules or parameters ("bert.encoder"); `max_params` then counts only
    these, so that embeddings that nothing can shrink are no part of the sum. Raises TargetError for anything that
    cannot be meant.
    """

    sparsity: float | Mapping[str, float] | None = None  # of the channels; or {layer pattern: fraction}, the rest stays
    max_macs: float | int | None = None
    max_params: float | int | None = None
    of: str | tuple[str, ...] | None = None  # what max_params counts; None: everything

    def __post_init__(self) -> None:
        budgets = {"max_macs": self.max_macs, "max_params": self.max_params}
        if self.sparsity is None and all(budget is None for budget in budgets.values()):
            raise TargetError("nothing to aim for: pass sparsity=, max_macs= or max_params=.")
        if self.sparsity is not None and any(budget is not None for budget in budgets.values()):
            raise TargetError("pass either sparsity= or budgets (max_macs=, max_params=), not both.")
        if self.of is not None and (self.max_params is None or self.max_macs is not None):
            raise TargetError("of= says what max_params= counts: pass both, and no max_macs=.")
        if isinstance(self.sparsity, Mapping) and not self.sparsity:
            raise TargetError("sparsity={} names no layer: pass {layer pattern: fraction}.")
        for fraction in self.sparsity.values() if isinstance(self.sparsity, Mapping) else [self.sparsity]:
            if fraction is not None:
                _check_sparsity(fraction)
        for name, budget in budgets.items():
            if budget is not None:
                _check_budget(name, budget)

    @property
    def budgets(self) -> dict[str, float | int]:
        """The budgets that are set, by name."""
        named = {"max_macs": self.max_macs, "max_params": self.max_params}
        return {name: budget for name, budget in named.items() if budget is not None}

    def absolute(self, macs: int, params: int) -> Target:
        """The same target with budgets in absolute numbers, for a dense model of the given cost."""
        return replace(self, max_macs=_absolute(self.max_macs, macs), max_params=_absolute(self.max_params, params))

    def final(self, macs: int, params: int) -> float:
        """The fraction that is gone when the target is met, of a dense model of the given cost; in [0, 1)."""
        if self.sparsity is not None:
            return max(self.sparsity.values()) if isinstance(self.sparsity, Mapping) else self.sparsity
        goal, dense = self.absolute(macs, params), {"max_macs": macs, "max_params": params}
        return max(0.0, *(1 - budget / max(dense[name], 1) for name, budget in goal.budgets.items()))

    def part(self, fraction: float, macs: int, params: int) -> Target:
        """The target when `fraction` in [0, 1] of the way is due, for a dense model of the given cost."""
        if isinstance(self.sparsity, Mapping):
            return replace(self, sparsity={name: value * fraction for name, value in self.sparsity.items()})
        if self.sparsity is not None:
            return replace(self, sparsity=self.sparsity * fraction)
        goal = self.absolute(macs, params)
        return replace(
            goal,
            max_macs=None if goal.max_macs is None else round(macs - fraction * max(0, macs - goal.max_macs)),
            max_params=None if goal.max_params is None else round(params - fraction * max(0, params - goal.max_params)),
        )


def _absolute(budget: float | int | None, dense: int) -> int | None:
    return int(budget * dense) if isinstance(budget, float) else budget


def _check_sparsity(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TargetError(f"sparsity is a number in [0, 1); got {value!r}.")
    if not 0 <= value < 1:
        hint = ""
        if 1 < value < 100:
            hint = f" To remove {value:g} %, pass sparsity={value / 100:g}."
        elif value == 1:
            hint = " A model with every channel removed computes nothing."
        raise TargetError(f"sparsity is the fraction removed, in [0, 1); got {value}.{hint}")


def _check_budget(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise TargetError(f"{name} is what may at most remain, above 0; got {value!r}.")
    if isinstance(value, float) and value > 1:
        raise TargetError(
            f"{name}={value}: a float is a fraction of the dense model, in (0, 1]; "
            f"for an absolute budget pass an int ({name}={int(value)})."
        )


class Cost:
    """MACs or parameters as a function of the groups' kept counts: thousands of plans cost nothing to compare."""

    def __init__(self, products: Sequence[Product]) -> None:
        self._fixed = 0.0  # what no group changes
        factors: list[float] = []  # per product
        starts: list[int] = []  # per product: its first length
        offsets: list[float] = []  # per length, all products one after another
        terms: list[tuple[int, int, float]] = []  # (length, group, coefficient)
        for product in products:
            varying = [form for form in product.lengths if not form.is_constant]
            factor = product.constant * math.prod(float(form.constant) for form in product.lengths if form.is_constant)
            if not varying:
                self._fixed += factor
                continue
            factors.append(factor)
            starts.append(len(offsets))
            for form in varying:
                terms.extend((len(offsets), group, float(share)) for group, share in form.terms.items())
                offsets.append(float(form.constant))
        self._factors, self._starts, self._offsets = np.array(factors), np.array(starts, np.int64), np.array(offsets)
        at, group, share = zip(*terms, strict=True) if terms else ((), (), ())
        self._at, self._group, self._share = np.array(at, np.int64), np.array(group, np.int64), np.array(share)

    def __call__(self, kept: Sequence[int]) -> int:
        """The cost when `kept[g]` channels of group g stay."""
        if not len(self._factors):
            return round(self._fixed)
        shares = self._share * np.asarray(kept, dtype=np.float64)[self._group]
        lengths = self._offsets + np.bincount(self._at, shares, len(self._offsets))
        return round(self._fixed + float((self._factors * np.multiply.reduceat(lengths, self._starts)).sum()))


def macs_of(graph: Graph) -> Cost:
    """Multiply-accumulates of one forward pass on the example inputs of `graph`."""
    return Cost(graph.macs)


def params_of(graph: Graph, of: str | Sequence[str] | None = None) -> Cost:
    """Parameters; tied ones count once. `of`: only those whose name, or a module's that holds them, matches a pattern.

    Raises TargetError for a pattern that matches nothing.
    """
    if of is None:
        return Cost(tuple(graph.params.values()))
    patterns = [of] if isinstance(of, str) else list(of)
    found = {pattern: {name for name in graph.params if is_within(name, pattern)} for pattern in patterns}
    for pattern, names in found.items():
        if not names:
            raise TargetError(f"of={pattern!r} matches no parameter of the model, nor a module that holds one.")
    wanted = set().union(*found.values())
    return Cost([product for name, product in graph.params.items() if name in wanted])
