"""Published numbers beside ours."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from secateur.errors import InputError
from secateur.report import format as fmt
from secateur.report.records import Record, Reference
from secateur.report.statistics import Estimate, estimate

STAGES: Mapping[str, tuple[str, Callable[[Record], float]]] = {
    "dense": ("dense", lambda r: r.accuracy_dense),
    "pruned": ("pruned", lambda r: r.accuracy_pruned),
    "finetuned": ("fine-tuned", lambda r: r.accuracy_finetuned),
}
HEADS = ("model", "data", "method", "removed (%)", "stage", "theirs (%)", "ours (%)", "difference (points)")


@dataclass(frozen=True)
class Beside:
    """One published number, and ours for the same where there is one."""

    reference: Reference
    ours: Estimate | None

    @property
    def difference(self) -> float | None:
        """Ours minus theirs."""
        return None if self.ours is None else self.ours.mean - self.reference.accuracy

    def cells(self, sources: Sequence[str]) -> tuple[str, ...]:
        """What its row says."""
        r = self.reference
        stage = STAGES[r.stage][0] + (f" [{sources.index(r.source) + 1}]" if len(sources) > 1 else "")
        return (
            r.model,
            r.data,
            "" if r.stage == "dense" else r.method,
            "" if r.stage == "dense" else fmt.share(r.sparsity),
            stage + (f" ({r.note})" if r.note else ""),
            f"{r.accuracy * 100:.2f}",
            "-" if self.ours is None else fmt.accuracy(self.ours),
            "-" if self.difference is None else fmt.signed_points(self.difference),
        )


def beside(records: Sequence[Record], references: Sequence[Reference]) -> list[Beside]:
    """Our number for each published one: the mean over seeds of the same model, data, method and sparsity.

    Raises InputError for a stage that is none, and for an accuracy that is no fraction.
    """
    for r in references:
        if r.stage not in STAGES:
            raise InputError(f"a reference's stage is one of {', '.join(STAGES)}; got {r.stage!r} ({r.model}).")
        if not 0 <= r.accuracy <= 1:
            raise InputError(f"a reference's accuracy is a fraction in [0, 1]; got {r.accuracy!r} ({r.model}).")
    return [Beside(r, _ours(records, r)) for r in references]


def _ours(records: Sequence[Record], reference: Reference) -> Estimate | None:
    value = STAGES[reference.stage][1]
    here = [r for r in records if (r.model, r.data) == (reference.model, reference.data)]
    if reference.stage == "dense":
        seeds = {r.seed: value(r) for r in here}
        return estimate(seeds.values()) if seeds else None
    same = [
        value(r)
        for r in here
        if r.name == reference.method and math.isclose(r.sparsity, reference.sparsity, abs_tol=1e-6)
    ]
    return estimate(same) if same else None


def sources_of(rows: Sequence[Beside]) -> list[str]:
    """The documents, each once."""
    return list(dict.fromkeys(row.reference.source for row in rows))


def beside_sentence(rows: Sequence[Beside]) -> str:
    """How ours compare with theirs, stage by stage."""
    said = []
    for stage, (word, _) in STAGES.items():
        found = [row.difference for row in rows if row.reference.stage == stage and row.difference is not None]
        if found:
            mean = fmt.signed_points(statistics.fmean(found))
            said.append(f"{word} {mean} (of {fmt.several(len(found), 'number')})")
    missing = sum(row.ours is None for row in rows)
    text = f"Ours minus theirs, on average, in points: {fmt.listed(said)}." if said else ""
    return text + (f" {fmt.several(missing, 'number').capitalize()} without a counterpart here." if missing else "")
