"""What the records say, in words: the headline, the facts behind it, and what the reader should be warned about."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from secateur.report import format as fmt
from secateur.report.records import Record
from secateur.report.statistics import FEW_SEEDS, Estimate, Summary, estimate

TOLERANCE = 0.01  # accuracy that one is ready to give up: one percentage point
SMALL_TEST_SET = 1000  # samples, below which one sample weighs more than 0.1 points
NOISE = 0.1  # distance of the quartiles of the timings over their median, above which a latency is noisy


@dataclass(frozen=True)
class Tile:
    """One key figure of the highlighted setting."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class Findings:
    """The answer in words."""

    headline: str
    facts: tuple[str, ...]
    warnings: tuple[str, ...]
    chosen: Summary
    tiles: tuple[Tile, ...]


def find(records: Sequence[Record], summaries: Sequence[Summary]) -> Findings:
    """The findings of one model on one data set; `summaries` are those of `records` and not empty."""
    chosen = choose(summaries)
    return Findings(
        headline=_headline(chosen),
        facts=tuple(filter(None, [_choice(chosen), _repair(chosen), _latency(chosen), _against_random(records)])),
        warnings=tuple(warning for check in WARNINGS for warning in check(records, summaries)),
        chosen=chosen,
        tiles=_tiles(chosen),
    )


def choose(summaries: Sequence[Summary]) -> Summary:
    """The setting to highlight: fewest MACs among those that lose at most TOLERANCE; else the one that loses least.

    The loss is the one on validation data where every setting has it, so that nothing is chosen on test data.
    """
    loss = _loss(summaries)
    good = [s for s in summaries if loss(s) <= TOLERANCE]
    return min(good, key=lambda s: (s.macs, loss(s))) if good else min(summaries, key=loss)


def _loss(summaries: Sequence[Summary]) -> Callable[[Summary], float]:
    if all(s.validation_drop is not None for s in summaries):
        return lambda s: s.validation_drop if s.validation_drop is not None else s.drop.mean
    return lambda s: s.drop.mean


def _headline(chosen: Summary) -> str:
    saved = fmt.percent(1 - chosen.macs_kept, 0)
    drop = chosen.drop.mean
    if drop > TOLERANCE:
        return f"{saved} fewer multiply-accumulates cost {fmt.points(drop)} of accuracy"
    if drop <= 0.0005:
        return f"{saved} fewer multiply-accumulates, at no loss of accuracy"
    return f"{saved} fewer multiply-accumulates for {fmt.points(drop)} of accuracy"


def _choice(chosen: Summary) -> str:
    removed = fmt.percent(chosen.sparsity, 0)
    where = "validation data" if chosen.validation_drop is not None else "the test data themselves"
    lost = chosen.drop.mean if chosen.validation_drop is None else chosen.validation_drop
    rule = (
        "it needs the fewest MACs of all settings that lose at most one point there"
        if lost <= TOLERANCE
        else "no setting stays within one point of the dense model there, and this one loses least"
    )
    return (
        f"The setting shown is {chosen.method} with {removed} of the channels removed. It was chosen on {where}: "
        f"{rule}. All accuracies on this page are on test data."
    )


def _repair(chosen: Summary) -> str:
    if chosen.accuracy_repaired is None:
        return ""
    cut, mended, dense = chosen.accuracy_pruned.mean, chosen.accuracy_repaired.mean, chosen.accuracy_dense.mean
    text = f"Repair, without a gradient step, takes it from {fmt.percent(cut)} to {fmt.percent(mended)}"
    return f"{text}: {fmt.percent((mended - cut) / (dense - cut), 0)} of what was lost." if dense > cut else f"{text}."


def _latency(chosen: Summary) -> str:
    speedup, ratio = chosen.speedup.mean, chosen.macs_ratio
    start = f"MACs fall {fmt.times(ratio)}, measured latency falls {fmt.times(speedup)}."
    if speedup < 1.0:
        return f"{start} This model is not faster on this machine than the dense one."
    if speedup < 0.8 * ratio:
        return f"{start} The rest goes into overhead that pruning does not touch: calls, memory traffic, narrow layers."
    return start


def _against_random(records: Sequence[Record]) -> str:
    names = list(dict.fromkeys(r.name for r in records if r.name != "random"))
    if not names or all(r.name != "random" for r in records):
        return ""
    pruned = [(n, g) for n in names if (g := gain_over_random(records, n, lambda r: r.accuracy_pruned))]
    tuned = [(n, g) for n in names if (g := gain_over_random(records, n, lambda r: r.accuracy_finetuned))]
    if not tuned:
        return ""
    text = (
        "Against removing channels at random, averaged over sparsities, in points: before fine-tuning "
        f"{fmt.listed([f'{n} {fmt.signed_points(g.mean)}' for n, g in pruned])}; "
        f"after it {fmt.listed([f'{n} {fmt.signed_points(g.mean)}' for n, g in tuned])}."
    )
    if min(g.seeds for _, g in tuned) < FEW_SEEDS:
        return text + " With so few seeds, differences of this size after fine-tuning may be chance."
    clear = [n for n, g in tuned if g.low > 0]
    return text + (f" Clear of chance at 95 % after fine-tuning: {fmt.listed(clear) if clear else 'none'}.")


def gain_over_random(records: Sequence[Record], criterion: str, value: Callable[[Record], float]) -> Estimate | None:
    """By how much a criterion beats `random`: paired by seed and sparsity, then averaged over sparsities.

    The estimate is over seeds; None where no pair exists.
    """
    random = {(r.scope, r.sparsity, r.seed): value(r) for r in records if r.name == "random"}
    gains: dict[int, list[float]] = {}
    for record in records:
        if record.name == criterion and (record.scope, record.sparsity, record.seed) in random:
            gain = value(record) - random[record.scope, record.sparsity, record.seed]
            gains.setdefault(record.seed, []).append(gain)
    return estimate(statistics.fmean(found) for found in gains.values()) if gains else None


def _tiles(chosen: Summary) -> tuple[Tile, ...]:
    return (
        Tile(
            "Accuracy, fine-tuned",
            fmt.percent(chosen.accuracy_finetuned.mean),
            f"dense {fmt.percent(chosen.accuracy_dense.mean)}, pruned only {fmt.percent(chosen.accuracy_pruned.mean)}"
            + (f", repaired {fmt.percent(chosen.accuracy_repaired.mean)}" if chosen.accuracy_repaired else ""),
        ),
        Tile(
            "Multiply-accumulates",
            fmt.count(chosen.macs),
            f"{fmt.percent(chosen.macs_kept, 0)} of {fmt.count(chosen.macs / chosen.macs_kept)}",
        ),
        Tile(
            "Parameters",
            fmt.count(chosen.params),
            f"{fmt.percent(chosen.params_kept, 0)} of {fmt.count(chosen.params / chosen.params_kept)}",
        ),
        Tile(
            "Measured speed-up",
            fmt.times(chosen.speedup.mean),
            f"{fmt.significant(chosen.latency_dense_ms)} ms to {fmt.significant(chosen.latency_ms)} ms",
        ),
        Tile("Verified difference", fmt.difference(chosen.verified_difference), "shrunk against zeroed original"),
    )


def _few_seeds(records: Sequence[Record], summaries: Sequence[Summary]) -> list[str]:
    least = min(len(s.seeds) for s in summaries)
    if least >= FEW_SEEDS:
        return []
    return [f"{fmt.several(least, 'seed').capitalize()} per setting: read differences between criteria as hints only."]


def _small_test_set(records: Sequence[Record], summaries: Sequence[Summary]) -> list[str]:
    data = records[0].fingerprint.get("data")
    size = data.get("test") if isinstance(data, Mapping) else None
    if not isinstance(size, int) or size >= SMALL_TEST_SET:
        return []
    return [f"The test set holds {size} samples: a single one is worth {fmt.points(1 / size, 2)} of accuracy."]


def _gaps(records: Sequence[Record], summaries: Sequence[Summary]) -> list[str]:
    seeds = {r.seed for r in records}
    missing = sum(len(seeds) - len(s.seeds) for s in summaries)
    return (
        [f"Incomplete: {fmt.several(missing, 'trial')} missing from the grid of settings and seeds."] if missing else []
    )


def _noisy_latency(records: Sequence[Record], summaries: Sequence[Summary]) -> list[str]:
    known = [r.latency_noise for r in records if r.latency_noise is not None]
    noisy = [noise for noise in known if noise > NOISE]
    if not noisy:
        return []
    return [
        f"Latency was noisy in {len(noisy)} of {fmt.several(len(known), 'trial')}: the middle half of the timed "
        f"runs spans more than {NOISE * 100:.0f} %. The machine was probably busy; measure again when it is idle."
    ]


def _mixed_machines(records: Sequence[Record], summaries: Sequence[Summary]) -> list[str]:
    differing = [
        name
        for name in sorted({name for r in records for name in r.fingerprint})
        if len({repr(r.fingerprint.get(name)) for r in records}) > 1
    ]
    if not differing:
        return []
    return [f"The records differ in {fmt.listed(differing)}: compare their latencies with care."]


def _chosen_on_test(records: Sequence[Record], summaries: Sequence[Summary]) -> list[str]:
    if all(s.validation_drop is not None for s in summaries):
        return []
    return [
        "The setting shown was chosen on test data, as no validation results were recorded: its figures flatter it."
    ]


WARNINGS = (_few_seeds, _small_test_set, _gaps, _noisy_latency, _mixed_machines, _chosen_on_test)
