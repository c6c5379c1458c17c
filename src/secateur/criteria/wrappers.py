"""Criteria made of criteria."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from secateur.coupling.groups import Group
from secateur.criteria.sequential import Greedy
from secateur.criteria.table import Criterion, needs_of, resolve
from secateur.errors import InputError
from secateur.evidence import Evidence


def normalised(criterion: str | Criterion) -> Criterion:
    """The criterion divided by its group's mean magnitude, so that groups of different width and scale compare."""
    inner = _plain(criterion)

    def scores(group: Group, evidence: Evidence) -> Tensor:
        return _by_mean(inner(group, evidence))

    return _named(scores, f"normalised({_name(criterion)})", [criterion])


def ensemble(*criteria: str | Criterion, weights: Sequence[float] | None = None) -> Criterion:
    """The weighted mean of several criteria, each divided by its group's mean magnitude first.

    `weights`: one per criterion, by default equal. Raises InputError for none at all, or weights that do not fit.
    """
    if not criteria:
        raise InputError("an ensemble takes at least one criterion.")
    shares = [1.0] * len(criteria) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(criteria) or any(share < 0 for share in shares) or not sum(shares) > 0:
        raise InputError(f"weights are at least 0, one per criterion ({len(criteria)}), not all 0; got {weights!r}.")
    inner = [_plain(criterion) for criterion in criteria]

    def scores(group: Group, evidence: Evidence) -> Tensor:
        parts = [share * _by_mean(one(group, evidence)).double() for share, one in zip(shares, inner, strict=True)]
        return torch.stack([part.cpu() for part in parts]).sum(0) / sum(shares)

    return _named(scores, f"ensemble({', '.join(map(_name, criteria))})", criteria)


def greedy(criterion: str | Criterion | Greedy) -> Greedy:
    """The greedy form: groups in order of execution, each scored with the channels chosen before it zeroed."""
    found = resolve(criterion)
    return found if isinstance(found, Greedy) else Greedy(found)


def _by_mean(scores: Tensor) -> Tensor:
    return scores / scores.abs().mean().clamp_min(torch.finfo(scores.dtype).tiny)


def _plain(criterion: str | Criterion) -> Criterion:
    found = resolve(criterion)
    if isinstance(found, Greedy):
        raise InputError(f"{_name(criterion)} chooses in order and gives no scores: it cannot be wrapped.")
    return found


def _named(function: Criterion, name: str, parts: Sequence[str | Criterion]) -> Criterion:
    described: Callable[..., Tensor] = function
    described.__name__ = name
    described.needs = tuple(dict.fromkeys(need for part in parts for need in needs_of(part)))  # type: ignore[attr-defined]
    described.raw = True  # type: ignore[attr-defined]  # already divided by the group's mean
    return described


def _name(criterion: str | Criterion) -> str:
    return criterion if isinstance(criterion, str) else str(getattr(criterion, "__name__", criterion))
