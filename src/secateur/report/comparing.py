"""Method against method, study against study: differences of trials that share everything else."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING

from secateur.errors import InputError
from secateur.report import format as fmt
from secateur.report.records import Record
from secateur.report.statistics import FEW_SEEDS, Estimate, estimate

if TYPE_CHECKING:
    from rich.table import Table

Value = Callable[[Record], float]
Place = tuple[str, str, str, float, int]  # model, data, target, sparsity, seed
OFF_TARGET = 0.02  # sparsity recounted in the evaluated weights against sparsity asked for, or another method's


@dataclass(frozen=True)
class Duel:
    """What one method gains over another, on average over everything both were tried on."""

    first: str
    second: str
    gain: Estimate  # over seeds, of the first over the second; a fraction
    pairs: int

    @property
    def clear(self) -> bool:
        """Whether the 95 % interval over three seeds or more leaves out zero."""
        return is_clear(self.gain)


@dataclass(frozen=True)
class Difference:
    """One setting in two lists of records; estimates over the seeds that both have."""

    model: str
    data: str
    method: str  # "a against b" where the names differ
    target: str
    sparsity: float
    left: Estimate
    right: Estimate
    difference: Estimate  # right - left, paired by seed

    @property
    def clear(self) -> bool:
        """Whether the 95 % interval over three seeds or more leaves out zero."""
        return is_clear(self.difference)


def accuracy_finetuned(record: Record) -> float:
    """What is compared unless something else is asked for."""
    return record.accuracy_finetuned


def is_clear(gain: Estimate) -> bool:
    """Whether a difference is clear of chance: from three seeds on, its 95 % interval leaves out zero."""
    return gain.seeds >= FEW_SEEDS and (gain.low > 0 or gain.high < 0)


def paired(records: Iterable[Record], a: str, b: str, value: Value = accuracy_finetuned) -> Estimate | None:
    """By how much method `a` exceeds method `b`: the mean difference of pairs of trials, with its interval over seeds.

    A pair shares model, data, target, sparsity and seed; and the scope, where one method has several there. Differences
    are averaged within each seed, so that seeds and not settings make the interval. None where there is no pair.
    """
    by_name = named(records)
    return _over_seeds(pairs(by_name.get(a, ()), by_name.get(b, ())), value)


def duels(records: Iterable[Record], value: Value = accuracy_finetuned) -> list[Duel]:
    """Every method against every other, in order of first appearance; only those that meet."""
    by_name = named(records)
    found = []
    for a, b in permutations(by_name, 2):
        met = pairs(by_name[a], by_name[b])
        gain = _over_seeds(met, value)
        if gain is not None:
            found.append(Duel(a, b, gain, len(met)))
    return found


def named(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records of each method, in order of first appearance."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.name, []).append(record)
    return found


def pairs(left: Iterable[Record], right: Iterable[Record]) -> list[tuple[Record, Record]]:
    """The records of both sides that share model, data, target, sparsity and seed, in the order of the left ones.

    A smaller dense network has no target of its own: it stands beside whatever was pruned to the same fraction. Masked
    models share a sparsity where as many of their weights are left: half of one layer is not half of all.
    """
    left, right = list(left), list(right)
    aimed = all(record.prunes != "nothing" for record in (*left, *right))
    ours, theirs = _placed(left, aimed), _placed(right, aimed)
    found = []
    for place, some in ours.items():
        others = theirs.get(place, [])
        if len(some) == len(others) == 1:
            found.append((some[0], others[0]))
        else:
            by_scope = {record.scope: record for record in others}
            found += [(record, by_scope[record.scope]) for record in some if record.scope in by_scope]
    return [(one, other) for one, other in found if _equally_sparse(one, other)]


def _equally_sparse(one: Record, other: Record) -> bool:
    if one.weights_left is None or other.weights_left is None or {one.prunes, other.prunes} != {"weights"}:
        return True
    return abs(one.weights_left - other.weights_left) <= OFF_TARGET


def differences(left: Sequence[Record], right: Sequence[Record], value: Value = accuracy_finetuned) -> list[Difference]:
    """What changes from the left records to the right ones, setting by setting, in the order of the left ones.

    Trials are matched by model, data, method, target, sparsity and seed. Where each side holds a single method, those
    two are compared, whatever they are called. Raises InputError where nothing matches.
    """
    ours, theirs = named(left), named(right)
    single = len(ours) == len(theirs) == 1
    matched = [(a, b) for a, b in zip(ours, theirs, strict=True)] if single else [(a, a) for a in ours if a in theirs]
    groups: dict[tuple[str, str, str, str, str, float], list[tuple[Record, Record]]] = {}
    for a, b in matched:
        label = a if a == b else f"{b} against {a}"
        for one, other in pairs(ours[a], theirs[b]):
            key = (one.model, one.data, label, one.scope, one.target, one.sparsity)
            groups.setdefault(key, []).append((one, other))
    if not groups:
        raise InputError(
            "no trial of one side matches one of the other: they share no model, data, method, sparsity and seed."
        )
    return [
        Difference(
            model,
            data,
            label,
            target,
            sparsity,
            estimate(value(one) for one, _ in met),
            estimate(value(other) for _, other in met),
            estimate(value(other) - value(one) for one, other in met),
        )
        for (model, data, label, _, target, sparsity), met in groups.items()
    ]


HEADS = ("model", "data", "method", "removed (%)", "left (%)", "right (%)", "difference (points)", "seeds")


def difference_cells(row: Difference) -> tuple[str, ...]:
    """What the table of differences says in one row; a star where the difference is clear of chance."""
    return (
        row.model,
        row.data,
        row.method,
        f"{100 * row.sparsity:.3g}",
        fmt.accuracy(row.left),
        fmt.accuracy(row.right),
        fmt.gain(row.difference) + (" *" if row.clear else ""),
        str(row.difference.seeds),
    )


def difference_markdown(rows: Sequence[Difference]) -> str:
    """The differences as a Markdown table, with a line about what the star means."""
    from secateur.report.tables import markdown_rows

    return markdown_rows(HEADS, map(difference_cells, rows), text=3) + f"\n{difference_note(rows)}\n"


def difference_terminal(rows: Sequence[Difference], title: str) -> Table:
    """The differences as a rich table."""
    from rich.markup import escape

    from secateur.report.tables import plain_table

    table = plain_table(title, difference_note(rows))
    for place, head in enumerate(HEADS):
        table.add_column(head.replace(" (", "\n("), justify="left" if place < 3 else "right")
    for row in rows:
        table.add_row(*map(escape, difference_cells(row)))
    return table


def difference_note(rows: Sequence[Difference]) -> str:
    """The differences in a sentence, and what the star means."""
    clear = sum(row.clear for row in rows)
    return (
        f"Right minus left, paired by seed. * = the 95 % interval over at least {FEW_SEEDS} seeds leaves out zero: "
        f"{clear} of {fmt.several(len(rows), 'setting')}."
    )


def _placed(records: Iterable[Record], aimed: bool) -> Mapping[Place, list[Record]]:
    found: dict[Place, list[Record]] = {}
    for r in records:
        found.setdefault((r.model, r.data, r.target if aimed else "", r.sparsity, r.seed), []).append(r)
    return found


def _over_seeds(met: Iterable[tuple[Record, Record]], value: Value) -> Estimate | None:
    gains: dict[int, list[float]] = {}
    for one, other in met:
        gains.setdefault(one.seed, []).append(value(one) - value(other))
    return estimate(statistics.fmean(found) for found in gains.values()) if gains else None
