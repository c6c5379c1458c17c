"""What several seeds say together: means, 95 % intervals, and which results no other one beats."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from secateur.errors import InputError
from secateur.report.records import LayerWeights, LayerWidth, Record, Timing

FEW_SEEDS = 3  # from this many on, a t interval is narrow enough to say something


class Estimate(NamedTuple):
    """A mean over seeds with its 95 % t interval (infinite for one seed) and the range of the values."""

    mean: float
    low: float
    high: float
    least: float
    most: float
    seeds: int

    @property
    def bar(self) -> tuple[float, float]:
        """What an error bar shows: the 95 % interval, or with fewer than three seeds the range of the values.

        With two values a t interval is 12.7 standard errors wide on either side: correct, and of no use to the eye.
        """
        return (self.low, self.high) if self.seeds >= FEW_SEEDS else (self.least, self.most)


@dataclass(frozen=True)
class Summary:
    """All seeds of one setting."""

    method: str
    scope: str
    sparsity: float
    prunes: str  # these three as in Record
    target: str
    control: bool
    seeds: tuple[int, ...]
    epochs: int | None  # None where the trials differ or do not say
    accuracy_dense: Estimate
    accuracy_pruned: Estimate
    accuracy_repaired: Estimate | None  # None where a trial has none
    accuracy_finetuned: Estimate
    train_finetuned: Estimate | None
    drop: Estimate  # accuracy_dense - accuracy_finetuned, paired by seed
    params: float  # means of the pruned models
    params_kept: float
    params_left: float  # those that are not zero: as `params` where nothing is masked
    weights_left: float | None
    macs: float
    macs_kept: float
    macs_ratio: float
    latency_dense_ms: float
    latency_ms: float
    speedup: Estimate
    verified_difference: float | None  # the worst; None where nothing was shrunk
    validation_drop: float | None
    widths: tuple[LayerWidth, ...]  # of the first seed
    layers: tuple[LayerWeights, ...]  # of the first seed
    timings: tuple[Timing, ...]  # means; () where the trials differ in what was timed
    keys: tuple[str, ...]  # of the trials

    @property
    def name(self) -> str:
        """How the setting is called in tables and menus: `l2, 40 %`; `unpruned` needs no number."""
        return self.method if self.unpruned else f"{self.method}, {100 * self.sparsity:.3g} %"

    @property
    def unpruned(self) -> bool:
        """Whether this is the control that was only fine-tuned."""
        return self.prunes == "nothing" and self.sparsity == 0

    @property
    def is_control(self) -> bool:
        """Whether it is there to be compared with, and not to be recommended."""
        return self.control or self.prunes == "nothing"


def estimate(values: Iterable[float]) -> Estimate:
    """Mean, 95 % t interval and range of some values. Raises InputError for no value."""
    found = list(values)
    if not found:
        raise InputError("no value to estimate a mean from.")
    mean = statistics.fmean(found)
    half = math.inf
    if len(found) > 1:
        half = t_quantile(0.975, len(found) - 1) * statistics.stdev(found) / math.sqrt(len(found))
    return Estimate(mean, mean - half, mean + half, min(found), max(found), len(found))


def summarise(records: Iterable[Record]) -> list[Summary]:
    """One summary per method, scope, target and sparsity, in order of first appearance of the method, then by sparsity.

    Raises InputError where the records are of more than one model or data set: those are not comparable.
    """
    groups: dict[tuple[str, str, str, float], list[Record]] = {}
    kinds = set()
    for record in records:
        kinds.add((record.model, record.data))
        groups.setdefault((record.name, record.scope, record.target, record.sparsity), []).append(record)
    if len(kinds) > 1:
        raise InputError(f"records of {len(kinds)} (model, data) pairs do not compare: summarise each by itself.")
    order = {key[:3]: place for place, key in reversed(list(enumerate(groups)))}
    return [_summary(groups[key]) for key in sorted(groups, key=lambda key: (order[key[:3]], key[3]))]


def pareto_front(
    summaries: Iterable[Summary], cost: Callable[[Summary], float] = lambda summary: summary.macs
) -> list[Summary]:
    """The settings that no other beats on both cost (MACs) and mean fine-tuned accuracy, by growing cost."""
    front: list[Summary] = []
    for summary in sorted(summaries, key=lambda s: (cost(s), -s.accuracy_finetuned.mean)):
        if not front or summary.accuracy_finetuned.mean > front[-1].accuracy_finetuned.mean:
            front.append(summary)
    return front


def t_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t distribution for a whole number of degrees of freedom, probability in (0.5, 1).

    Found by bisection on the closed form of the distribution function (Abramowitz and Stegun 26.7.3 and 26.7.4).
    """
    low, high = 0.0, 1.0
    while _t_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def _t_cdf(t: float, freedom: int) -> float:
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, cosine) if odd else (1.0, 1.0)
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    within = 2 / math.pi * (angle + (sine * total if freedom > 1 else 0.0)) if odd else sine * total
    return 0.5 + within / 2


def _summary(records: Sequence[Record]) -> Summary:
    first = records[0]

    def mean(value: Callable[[Record], float]) -> float:
        return statistics.fmean(map(value, records))

    return Summary(
        method=first.name,
        scope=first.scope,
        sparsity=first.sparsity,
        prunes=first.prunes,
        target=first.target,
        control=first.control,
        seeds=tuple(sorted(record.seed for record in records)),
        epochs=first.epochs if len({r.epochs for r in records}) == 1 else None,
        accuracy_dense=estimate(r.accuracy_dense for r in records),
        accuracy_pruned=estimate(r.accuracy_pruned for r in records),
        accuracy_repaired=_where_known([r.accuracy_repaired for r in records]),
        accuracy_finetuned=estimate(r.accuracy_finetuned for r in records),
        train_finetuned=_where_known([r.train_finetuned for r in records]),
        drop=estimate(r.drop for r in records),
        params=mean(lambda r: r.params.after),
        params_kept=mean(lambda r: r.params.kept),
        params_left=mean(params_left),
        weights_left=left.mean if (left := _where_known([r.weights_left for r in records])) else None,
        macs=mean(lambda r: r.macs.after),
        macs_kept=mean(lambda r: r.macs.kept),
        macs_ratio=mean(lambda r: r.macs.ratio),
        latency_dense_ms=mean(lambda r: r.latency_ms.before),
        latency_ms=mean(lambda r: r.latency_ms.after),
        speedup=estimate(r.speedup for r in records),
        verified_difference=max(
            (r.verified_difference for r in records if r.verified_difference is not None), default=None
        ),
        validation_drop=_validation_drop(records),
        widths=first.widths,
        layers=first.layers,
        timings=_timings(records),
        keys=tuple(record.key for record in records),
    )


def _timings(records: Sequence[Record]) -> tuple[Timing, ...]:
    """Means over trials of what was timed in all of them."""
    kinds = {tuple((t.length, t.batch, t.runtime) for t in record.timings) for record in records}
    if len(kinds) > 1:
        return ()
    mean = statistics.fmean
    return tuple(
        one[0]._replace(
            dense_ms=mean(t.dense_ms for t in one),
            pruned_ms=mean(t.pruned_ms for t in one),
            speedup=mean(t.speedup for t in one),
            noise=mean(t.noise for t in one),
        )
        for one in zip(*(record.timings for record in records), strict=True)
    )


def params_left(record: Record) -> float:
    """The parameters that are not zero: in a masked model the dense model's, times the weights left."""
    if record.prunes != "weights" or record.weights_left is None:
        return record.params.after
    return record.params.before * record.weights_left


def _where_known(values: Sequence[float | None]) -> Estimate | None:
    """The estimate, where every trial tells."""
    found = [value for value in values if value is not None]
    return estimate(found) if len(found) == len(values) else None


def _validation_drop(records: Sequence[Record]) -> float | None:
    drops = [
        r.validation_dense - r.validation_finetuned
        for r in records
        if r.validation_dense is not None and r.validation_finetuned is not None
    ]
    return statistics.fmean(drops) if len(drops) == len(records) else None
