"""What the records say, in words: the headline, the facts behind it, and what the reader should be warned about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from secateur.report import format as fmt
from secateur.report.checks import warnings_about
from secateur.report.comparing import accuracy_finetuned, named, paired
from secateur.report.records import Record
from secateur.report.statistics import FEW_SEEDS, Summary

TOLERANCE = 0.01  # accuracy that one is ready to give up: one percentage point


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
        warnings=warnings_about(records, summaries),
        chosen=chosen,
        tiles=_tiles(chosen),
    )


def choose(summaries: Sequence[Summary]) -> Summary:
    """The setting to highlight: fewest MACs among those that lose at most TOLERANCE; else the one that loses least.

    The loss is the one on validation data where every setting has it, so that nothing is chosen on test data. Among
    settings of the same MACs, as masked ones are, the one with fewest parameters left counts. A control is chosen only
    where there is nothing else.
    """
    choices = [s for s in summaries if not s.is_control] or [s for s in summaries if not s.unpruned] or summaries
    loss = _loss(choices)
    good = [s for s in choices if loss(s) <= TOLERANCE]
    return min(good, key=lambda s: (s.macs, s.params_left, loss(s))) if good else min(choices, key=loss)


def _loss(summaries: Sequence[Summary]) -> Callable[[Summary], float]:
    if all(s.validation_drop is not None for s in summaries):
        return lambda s: s.validation_drop if s.validation_drop is not None else s.drop.mean
    return lambda s: s.drop.mean


def _headline(chosen: Summary) -> str:
    if chosen.prunes == "weights":
        zero = chosen.sparsity if chosen.weights_left is None else 1 - chosen.weights_left
        saved = f"{fmt.percent(zero, 0)} fewer weights"
    else:
        saved = f"{fmt.percent(1 - chosen.macs_kept, 0)} fewer multiply-accumulates"
    drop = chosen.drop.mean
    if drop > TOLERANCE:
        return f"{saved} cost {fmt.points(drop)} of accuracy"
    if drop <= 0.0005:
        return f"{saved}, at no loss of accuracy"
    return f"{saved} for {fmt.points(drop)} of accuracy"


THINGS = {"channels": "channels", "weights": "weights", "macs": "MACs", "params": "parameters"}


def _choice(chosen: Summary) -> str:
    removed = f"{fmt.share(chosen.sparsity)}{fmt.THIN}%"
    where = "validation data" if chosen.validation_drop is not None else "the test data themselves"
    lost = chosen.drop.mean if chosen.validation_drop is None else chosen.validation_drop
    fewest = "weights" if chosen.prunes == "weights" else "MACs"
    rule = (
        f"it needs the fewest {fewest} of all settings that lose at most one point there"
        if lost <= TOLERANCE
        else "no setting stays within one point of the dense model there, and this one loses least"
    )
    return (
        f"The setting shown is {chosen.method} with {removed} of the {THINGS.get(chosen.target, chosen.target)} "
        f"{'set to zero' if chosen.prunes == 'weights' else 'removed'}. It was chosen on {where}: "
        f"{rule}. All accuracies on this page are on test data."
    )


def _repair(chosen: Summary) -> str:
    if chosen.accuracy_repaired is None:
        return ""
    cut, mended, dense = chosen.accuracy_pruned.mean, chosen.accuracy_repaired.mean, chosen.accuracy_dense.mean
    text = f"Repair, without a gradient step, takes it from {fmt.percent(cut)} to {fmt.percent(mended)}"
    return f"{text}: {fmt.percent((mended - cut) / (dense - cut), 0)} of what was lost." if dense > cut else f"{text}."


def _latency(chosen: Summary) -> str:
    if chosen.prunes == "weights":
        return "Its zeros are still multiplied: MACs and latency are those of the dense model."
    speedup, ratio = chosen.speedup.mean, chosen.macs_ratio
    start = f"MACs fall {fmt.times(ratio)}, measured latency falls {fmt.times(speedup)}."
    if speedup < 1.0:
        return f"{start} This model is not faster on this machine than the dense one."
    if speedup < 0.8 * ratio:
        return f"{start} The rest goes into overhead that pruning does not touch: calls, memory traffic, narrow layers."
    return start


def _against_random(records: Sequence[Record]) -> str:
    by_name = named(records)
    chance = {rows[0].prunes: name for name, rows in by_name.items() if rows[0].criterion == "random"}
    rivals = [
        (name, chance[rows[0].prunes])
        for name, rows in by_name.items()
        if rows[0].prunes in chance and rows[0].criterion != "random"
    ]
    untrained = [(a, b) for a, b in rivals if not any(r.epochs_before for r in by_name[a])]
    pruned = [(a, gain) for a, b in untrained if (gain := paired(records, a, b, lambda r: r.accuracy_pruned))]
    tuned = [(a, gain) for a, b in rivals if (gain := paired(records, a, b, accuracy_finetuned))]
    if not tuned:
        return ""
    said = [
        f"{when} {fmt.listed([f'{n} {fmt.signed_points(g.mean)}' for n, g in gains])}"
        for when, gains in (("before fine-tuning", pruned), ("after it", tuned))
        if gains
    ]
    text = f"Against removing at random, averaged over sparsities, in points: {'; '.join(said)}."
    if min(g.seeds for _, g in tuned) < FEW_SEEDS:
        return text + " With so few seeds, a difference of a point or two may be chance."
    clear = [n for n, g in tuned if g.low > 0]
    return text + (f" Clear of chance at 95 % after fine-tuning: {fmt.listed(clear) if clear else 'none'}.")


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
            _part(chosen.macs_kept, chosen.macs / chosen.macs_kept),
        ),
        _size(chosen),
        Tile(
            "Measured speed-up",
            fmt.times(chosen.speedup.mean),
            f"{fmt.significant(chosen.latency_dense_ms)} ms to {fmt.significant(chosen.latency_ms)} ms",
        ),
        Tile("Verified difference", fmt.difference(chosen.verified_difference), "shrunk against zeroed original")
        if chosen.prunes != "weights"
        else Tile("Layers made smaller", "none", "masked: no speed-up"),
    )


def _size(chosen: Summary) -> Tile:
    if chosen.prunes == "weights":
        kept = chosen.params_left / chosen.params
        return Tile("Parameters not zero", fmt.count(chosen.params_left), _part(kept, chosen.params))
    return Tile("Parameters", fmt.count(chosen.params), _part(chosen.params_kept, chosen.params / chosen.params_kept))


def _part(kept: float, whole: float) -> str:
    return f"{fmt.percent(kept, 0)} of {fmt.count(whole)}"
