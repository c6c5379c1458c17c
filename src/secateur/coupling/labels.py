"""Labels: which atoms an element of a tensor depends on for being alive, and the exact algebra on them.

Every position along every dimension of every parameter is an *atom*; atoms that can only go together are united. A
tensor carries *factors*: integer arrays of its own rank, each dimension either 1 or full, holding atom ids. An element
is dead iff the atom of any factor at its place is dead. Id 0 stands for "never removed".

A dimension that no factor spans is fixed: it belongs to inputs, outputs and anything the rules do not understand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
FIXED = 0  # the atom that is never removed
SILENT = ""  # the reason of locks that need no explanation, such as the taps of a kernel


class Atoms:
    """A union-find over atom ids, in which a class can be locked for a reason."""

    def __init__(self) -> None:
        self.reasons = ["not prunable", SILENT]
        self._reason_numbers = {reason: number for number, reason in enumerate(self.reasons)}
        self._parent = np.zeros(1 << 12, np.int64)
        self._lock = np.full(1 << 12, -1, np.int64)  # by root: number of the reason, or -1
        self._lock[FIXED] = 0
        self._count = 1

    def new(self, count: int) -> Ids:
        """Ids of `count` new atoms."""
        while self._count + count > len(self._parent):
            self._parent = np.concatenate([self._parent, np.zeros_like(self._parent)])
            self._lock = np.concatenate([self._lock, np.full_like(self._lock, -1)])
        ids = np.arange(self._count, self._count + count)
        self._parent[ids] = ids
        self._count += count
        return ids

    def all(self) -> Ids:
        """Every atom but the fixed one."""
        return np.arange(1, self._count)

    def find(self, ids: Ids) -> Ids:
        """The representative of each atom's class."""
        roots = self._parent[ids]
        higher = self._parent[roots]
        if (higher == roots).all():
            return roots
        while not (higher == roots).all():
            roots, higher = higher, self._parent[higher]
        self._parent[ids] = roots
        return roots

    def unite(self, left: Ids, right: Ids, reason: str) -> None:
        """Unite atoms pairwise (arrays broadcast). `reason` is given to those that meet the fixed atom."""
        left, right = np.broadcast_arrays(left, right)
        a, b = self.find(left.ravel()), self.find(right.ravel())
        fixed = (a == FIXED) | (b == FIXED)
        if fixed.any():
            self.lock(np.maximum(a, b)[fixed], reason)
            a, b = a[~fixed], b[~fixed]
        touched = np.concatenate([a, b])
        while True:
            roots_a, roots_b = self.find(a), self.find(b)
            differ = roots_a != roots_b
            if not differ.any():
                break
            low = np.minimum(roots_a[differ], roots_b[differ])
            high = np.maximum(roots_a[differ], roots_b[differ])
            np.minimum.at(
                self._parent, high, low
            )  # a root hooked twice keeps the lower parent; the rest go round again
            a, b = np.concatenate([a[differ], high]), np.concatenate([b[differ], low])
        locked = touched[self._lock[touched] >= 0]
        np.maximum.at(self._lock, self.find(locked), self._lock[locked])

    def lock(self, ids: Ids, reason: str) -> None:
        """Lock the classes of these atoms; a class keeps its first reason."""
        number = self._reason_numbers.setdefault(reason, len(self.reasons))
        if number == len(self.reasons):
            self.reasons.append(reason)
        roots = self.find(np.asarray(ids).ravel())
        self._lock[roots[self._lock[roots] < 0]] = number

    def locked(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Whether each atom's class is locked."""
        return self.are_locked(self.find(ids))

    def are_locked(self, roots: Ids) -> npt.NDArray[np.bool_]:
        """Whether the classes with these representatives are locked."""
        return np.asarray(self._lock[roots] >= 0)

    def reason_numbers(self, ids: Ids) -> Ids:
        """Per atom the place in `reasons` of why its class is locked, or -1."""
        return self._lock[self.find(ids)]

    def reason(self, atom: int) -> str | None:
        """Why the atom's class is locked, or None."""
        number = int(self.reason_numbers(np.array([atom]))[0])
        return None if number < 0 else self.reasons[number]


@dataclass(frozen=True)
class Factor:
    """One array of atom ids over a tensor; each of its dimensions is 1 or full."""

    ids: Ids
    zero: bool  # whether an element is exactly 0 wherever this factor is dead

    @property
    def span(self) -> tuple[int, ...]:
        """The dimensions along which it varies."""
        return tuple([dim for dim, size in enumerate(self.ids.shape) if size > 1])

    def spans(self, dim: int) -> bool:
        """Whether it varies along `dim`."""
        return bool(self.ids.shape[dim] > 1)

    def on(self, ids: Ids) -> Factor:
        """The same factor with other ids."""
        return Factor(ids, self.zero)


@dataclass(frozen=True)
class Labels:
    """The factors of one tensor."""

    shape: tuple[int, ...]
    factors: tuple[Factor, ...] = ()

    def covered(self, dim: int) -> bool:
        """Whether some factor varies along `dim`."""
        return any(factor.spans(dim) for factor in self.factors)

    def only(self, dim: int) -> Labels:
        """The labels of one dimension as those of a vector: factors of other dimensions are left out."""
        factors = [f.on(f.ids.reshape(-1)) for f in self.factors if f.span == (dim,)]
        return Labels((self.shape[dim],), tuple(factors))

    def with_zero(self, zero: bool) -> Labels:
        """The same labels, all marked as zero where dead or not."""
        return Labels(self.shape, tuple(Factor(factor.ids, zero) for factor in self.factors))


@dataclass(frozen=True)
class Joined:
    """A factor that several aligned operands share."""

    ids: Ids
    zeros: tuple[bool, ...]  # per operand: whether the operand is exactly 0 where this factor is dead

    def factor(self, zero: bool) -> Factor:
        """As the factor of the result."""
        return Factor(self.ids, zero)


class Algebra:
    """Exact operations on labels; `place` names the op under way, for the reasons of locks."""

    def __init__(self) -> None:
        self.atoms = Atoms()
        self.place = ""

    # -- shapes ------------------------------------------------------------------------------------------------------

    def simplify(self, labels: Labels) -> Labels:
        """Drop factors that are all locked, and dimensions along which a factor is constant."""
        kept = []
        for factor in labels.factors:
            ids, roots = factor.ids, self.atoms.find(factor.ids)
            if self.atoms.are_locked(roots).all():
                continue
            for dim in factor.span:
                if (roots == roots.take([0], axis=dim)).all():
                    ids, roots = ids.take([0], axis=dim), roots.take([0], axis=dim)
            if ids.size == 1:
                self.atoms.lock(ids, f"{self.place}: every position hangs on one channel")
                continue
            kept.append(factor.on(ids))
        return Labels(labels.shape, tuple(kept))

    def collapse(self, labels: Labels, dims: Iterable[int], why: str) -> Labels:
        """Tie the positions along `dims` together; a factor that varies along nothing else is locked."""
        dims, kept = tuple(dims), []
        for factor in labels.factors:
            ids = factor.ids
            if set(factor.span) <= set(dims):
                self.atoms.lock(ids, self._because(why))
                continue
            for dim in dims:
                if ids.shape[dim] > 1:
                    first = ids.take([0], axis=dim)
                    self.atoms.unite(first, ids, self._because(why))
                    ids = first
            kept.append(factor.on(ids))
        return Labels(labels.shape, tuple(kept))

    def lock(self, labels: Labels, why: str) -> None:
        """Lock everything these labels mention."""
        for factor in labels.factors:
            self.atoms.lock(factor.ids, self._because(why))

    def lock_dim(self, labels: Labels, dim: int, why: str) -> Labels:
        """Lock the factors that vary along `dim`."""
        for factor in labels.factors:
            if factor.spans(dim):
                self.atoms.lock(factor.ids, self._because(why))
        return Labels(labels.shape, tuple(factor for factor in labels.factors if not factor.spans(dim)))

    def reshape(self, labels: Labels, shape: Sequence[int]) -> Labels:
        """View with another shape: dimensions are matched in blocks of equal product, and only those are expanded."""
        new = tuple(shape)
        if 0 in labels.shape:
            return Labels(new)
        blocks = matching_blocks(labels.shape, new)
        kept = []
        for factor in labels.factors:
            full_old, full_new = [1] * len(labels.shape), [1] * len(new)
            for old_dims, new_dims in blocks:
                if any(factor.spans(dim) for dim in old_dims):
                    for dim in old_dims:
                        full_old[dim] = labels.shape[dim]
                    for dim in new_dims:
                        full_new[dim] = new[dim]
            kept.append(factor.on(np.broadcast_to(factor.ids, full_old).reshape(full_new)))
        return Labels(new, tuple(kept))

    def permute(self, labels: Labels, order: Sequence[int]) -> Labels:
        """Transpose: dimension i of the result is dimension order[i]."""
        factors = tuple(factor.on(factor.ids.transpose(order)) for factor in labels.factors)
        return Labels(tuple(labels.shape[dim] for dim in order), factors)

    def take(self, labels: Labels, dim: int, positions: npt.NDArray[np.int64]) -> Labels:
        """The given positions along `dim`."""
        shape = tuple(len(positions) if d == dim else size for d, size in enumerate(labels.shape))
        kept = []
        for factor in labels.factors:
            ids = factor.ids.take(positions, axis=dim) if factor.spans(dim) else factor.ids
            if ids.size == 1:
                self.atoms.lock(ids, self._because("a single channel is picked out"))
            else:
                kept.append(factor.on(ids))
        return Labels(shape, tuple(kept))

    # -- combining ---------------------------------------------------------------------------------------------------

    def align(self, operands: Sequence[Labels], why: str) -> tuple[list[Joined], tuple[int, ...]]:
        """Broadcast operands against each other and unite their factors; returns the shared factors and the shape.

        Along a dimension that is fixed in one operand the others are tied; where factors span different dimensions
        together, the outermost survives.
        """
        rank = max(len(operand.shape) for operand in operands)
        operands = [self.simplify(_padded(operand, rank)) for operand in operands]
        shape = tuple(_broadcast(operand.shape[dim] for operand in operands) for dim in range(rank))
        while True:
            dims = self._conflict(operands, shape)
            if dims is None:
                break
            operands = [self.collapse(operand, dims, why) for operand in operands]
        joined: dict[tuple[tuple[int, ...], int], Joined] = {}
        for number, operand in enumerate(operands):
            seen: dict[tuple[int, ...], int] = {}
            for factor in operand.factors:
                key = factor.span, seen.get(factor.span, 0)
                seen[factor.span] = key[1] + 1
                before = joined.get(key, Joined(factor.ids, (False,) * len(operands)))
                if key in joined:
                    self.atoms.unite(before.ids, factor.ids, self._because(why))
                zeros = (*before.zeros[:number], factor.zero, *before.zeros[number + 1 :])
                joined[key] = Joined(before.ids, zeros)
        return list(joined.values()), shape

    def _conflict(self, operands: Sequence[Labels], shape: tuple[int, ...]) -> list[int] | None:
        """Dimensions to collapse next, or None when the operands agree."""
        for dim, size in enumerate(shape):
            wide = [operand for operand in operands if operand.shape[dim] > 1]
            if size <= 1 or not any(operand.covered(dim) for operand in wide):
                continue
            if not all(operand.covered(dim) for operand in wide):
                return [dim]
            spans = [sorted(factor.span for factor in operand.factors if factor.spans(dim)) for operand in wide]
            if any(other != spans[0] for other in spans):
                together = sorted({d for operand_spans in spans for span in operand_spans for d in span})
                return together[1:] if len(together) > 1 else [dim]
        return None

    def product(self, left: Labels, right: Labels, why: str = "multiplied with a tensor of fixed size") -> Labels:
        """Elementwise product, broadcast: zero where either operand is zero."""
        joined, shape = self.align([left, right], why)
        return Labels(shape, tuple(j.factor(any(j.zeros)) for j in joined))

    def add(self, left: Labels, right: Labels, why: str = "added to a tensor of fixed size") -> Labels:
        """Elementwise sum, broadcast: zero only where both operands are zero."""
        joined, shape = self.align([left, right], why)
        return Labels(shape, tuple(j.factor(all(j.zeros)) for j in joined))

    def reduce(self, labels: Labels, dims: Sequence[int], *, sums: bool, why: str) -> Labels:
        """Reduce over `dims`, kept at length 1: a sum of exact zeros is free, anything else locks what it spans."""
        kept = []
        for factor in labels.factors:
            inside = [dim for dim in dims if factor.spans(dim)]
            if not inside:
                kept.append(factor)
            elif set(factor.span) <= set(dims):
                if not (sums and factor.zero):
                    self.atoms.lock(factor.ids, self._because(why))
            else:
                kept.extend(self.collapse(Labels(labels.shape, (factor,)), inside, why).factors)
        shape = tuple(1 if dim in dims else size for dim, size in enumerate(labels.shape))
        return Labels(shape, tuple(kept))

    def contract(self, left: Labels, right: Labels, dim: int) -> Labels:
        """Sum over `dim` of the broadcast product, kept at length 1: matrix products, convolutions, attention."""
        why = "summed with entries that are not zero where channels are gone"
        return self.reduce(self.product(left, right, "reads a tensor of fixed size"), [dim], sums=True, why=why)

    def concatenate(self, parts: Sequence[Labels], dim: int) -> Labels:
        """Concatenate along `dim`."""
        why = "concatenated with a tensor of fixed size"
        parts = [self.simplify(part) for part in parts if part.shape != (0,)]
        parts = [self._one_factor(part, dim, why) for part in parts]
        rank = len(parts[0].shape)
        spans = [next((f.span for f in part.factors if f.spans(dim)), None) for part in parts]
        joint = sorted({d for span in spans for d in span or () if d != dim})
        if joint and len(set(spans)) > 1:  # decided together with other dimensions in some parts: the outermost stays
            parts = [self.collapse(part, joint if dim < joint[0] else [dim], why) for part in parts]
            joint = []
        rest = [
            Labels(
                tuple(1 if d == dim else size for d, size in enumerate(part.shape)),
                tuple(f for f in part.factors if not f.spans(dim)),
            )
            for part in parts
        ]
        joined, _ = self.align(rest, why)
        factors = [j.factor(all(j.zeros)) for j in joined]
        along = [next((f for f in part.factors if f.spans(dim)), None) for part in parts]
        if any(along):
            pieces = []
            for part, factor in zip(parts, along, strict=True):
                full = [part.shape[d] if d == dim or d in joint else 1 for d in range(rank)]
                pieces.append(np.zeros(full, np.int64) if factor is None else np.broadcast_to(factor.ids, full))
            factors.append(Factor(np.concatenate(pieces, axis=dim), all(f.zero for f in along if f is not None)))
        total = sum(part.shape[dim] for part in parts)
        shape = tuple(total if d == dim else size for d, size in enumerate(parts[0].shape))
        return Labels(shape, tuple(factors))

    def _one_factor(self, labels: Labels, dim: int, why: str) -> Labels:
        """At most one factor along `dim`; a single position along it takes part as fixed."""
        along = [factor for factor in labels.factors if factor.spans(dim)]
        return self.lock_dim(labels, dim, why) if len(along) > 1 else labels

    def _because(self, why: str) -> str:
        return f"{self.place}: {why}" if self.place and why != SILENT else why


def _padded(labels: Labels, rank: int) -> Labels:
    extra = (1,) * (rank - len(labels.shape))
    factors = tuple(factor.on(factor.ids.reshape(extra + factor.ids.shape)) for factor in labels.factors)
    return Labels(extra + labels.shape, factors)


def _broadcast(sizes: Iterable[int]) -> int:
    wide = {size for size in sizes if size != 1}
    return wide.pop() if wide else 1


def matching_blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Runs of old and new dimensions with equal products, in order: a view never mixes across them."""
    blocks = []
    i = j = 0
    while i < len(old) or j < len(new):
        old_dims, new_dims, left, right = [], [], 1, 1
        if i < len(old):
            old_dims, left, i = [i], old[i], i + 1
        if j < len(new):
            new_dims, right, j = [j], new[j], j + 1
        while left != right:
            if left < right:
                old_dims.append(i)
                left, i = left * old[i], i + 1
            else:
                new_dims.append(j)
                right, j = right * new[j], j + 1
        blocks.append((old_dims, new_dims))
    return blocks
