"""What the reader should be warned about: each check looks at one thing and says it in a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from secateur.report import format as fmt
from secateur.report.comparing import OFF_TARGET
from secateur.report.records import Failure, Record
from secateur.report.statistics import FEW_SEEDS, Summary

SMALL_TEST_SET = 1000  # samples, below which one sample weighs more than 0.1 points
NOISE = 0.1  # distance of the quartiles of the timings over their median, above which a latency is noisy
EMPTIED = 50  # times fewer channels in a layer than it had
DEAD = 1000  # times fewer weights


def warnings_about(records: Sequence[Record], summaries: Sequence[Summary]) -> tuple[str, ...]:
    """The warnings of one model on one data set."""
    return tuple(warning for check in WARNINGS for warning in check(records, summaries))


def failure_warning(failures: Sequence[Failure]) -> str:
    """How many trials are missing because they failed; "" for none."""
    if not failures:
        return ""
    return (
        f"{fmt.several(len(failures), 'trial')} failed and {'is' if len(failures) == 1 else 'are'} not in any figure."
    )


def _masked(records: Sequence[Record], summaries: Sequence[Summary]) -> list[str]:
    masked = list(dict.fromkeys(s.method for s in summaries if s.prunes == "weights"))
    if not masked:
        return []
    all_of_them = all(s.prunes == "weights" for s in summaries if s.prunes != "nothing")
    names = "" if all_of_them and len(masked) > 3 else f" ({fmt.listed(masked)})"
    return [
        f"masked: no speed-up. Weights were set to zero{names} and nothing was removed: MACs and latency are those of "
        "the dense model, whatever the sparsity."
    ]


def _unequal_budgets(records: Sequence[Record], summaries: Sequence[Summary]) -> list[str]:
    budgets: dict[int, list[str]] = {}
    for name, epochs in dict.fromkeys((r.name, r.epochs) for r in records if r.epochs is not None):
        budgets.setdefault(epochs, []).append(name)
    if len(budgets) < 2:
        return []
    said = [f"{fmt.several(epochs, 'epoch')} for {fmt.listed(names)}" for epochs, names in sorted(budgets.items())]
    return [f"Fine-tuning was not equally long: {'; '.join(said)}. Part of any difference may come from that."]


def _trained_before(records: Sequence[Record], summaries: Sequence[Summary]) -> list[str]:
    """Methods that train before their last pruning, whose accuracy straight after it is another thing."""
    names = list(dict.fromkeys(r.name for r in records if r.epochs_before))
    if not names:
        return []
    return [
        f"{fmt.listed(names)} trained before the last pruning: accuracy straight after it is not to be compared with "
        "that of methods that had not trained by then."
    ]


def _emptied(records: Sequence[Record], summaries: Sequence[Summary]) -> list[str]:
    """Layers of which next to nothing is left: whatever the others keep has to pass through them."""
    emptied = [(r, w) for r in records for w in r.widths if w.before >= EMPTIED * w.after]
    if not emptied:
        return []
    trials = len({r.key for r, _ in emptied})
    worst, width = min(emptied, key=lambda found: found[1].after / found[1].before)
    return [
        f"In {fmt.several(trials, 'trial')} a layer was all but emptied, and what is left is a bottleneck: "
        f"{width.layer} keeps {width.after} of {width.before} ({worst.name}, {fmt.share(worst.sparsity)} %)."
    ]


def _dead(records: Sequence[Record], summaries: Sequence[Summary]) -> list[str]:
    """Layers of which masks left next to no weight: one threshold for all takes whole layers of small weights."""
    dead = [(r, w) for r in records if r.prunes == "weights" for w in r.layers if w.before >= DEAD * w.left]
    if not dead:
        return []
    trials = len({r.key for r, _ in dead})
    mildest, weights = min(dead, key=lambda found: (found[0].sparsity, found[1].left / found[1].before))
    return [
        f"In {fmt.several(trials, 'trial')} a layer lost all of its weights or nearly, and nothing gets through it any "
        f"more: {weights.layer} keeps {weights.left:,} of {weights.before:,} ({mildest.name}, "
        f"{fmt.share(mildest.sparsity)} %). Leave such layers alone (ignore), or let none compete with others (scope)."
    ]


def _no_random(records: Sequence[Record], summaries: Sequence[Summary]) -> list[str]:
    pruned = {s.prunes for s in summaries if s.prunes != "nothing"}
    lacking = sorted(pruned - {r.prunes for r in records if r.criterion == "random"})
    if not lacking:
        return []
    what = fmt.listed(lacking)
    return [f"No control: {what} were never removed at random here, so no method is shown to be better than chance."]


def _off_target(records: Sequence[Record], summaries: Sequence[Summary]) -> list[str]:
    asked = [r for r in records if r.target == "weights" and r.prunes == "weights" and r.weights_left is not None]
    off = [(abs(1 - (r.weights_left or 0.0) - r.sparsity), r) for r in asked]
    wrong = [(by, r) for by, r in off if by > OFF_TARGET]
    if not wrong:
        return []
    by, worst = max(wrong, key=lambda found: found[0])
    return [
        f"Recounted in the evaluated models, the sparsity is more than {OFF_TARGET * 100:.0f} points off what was "
        f"asked in {len(wrong)} of {fmt.several(len(asked), 'trial')}, at worst {by * 100:.0f} points ({worst.name}, "
        f"asked {fmt.share(worst.sparsity)} %): layers that are left alone, or a pattern of its own. "
        "Methods are only compared where as many weights are left."
    ]


def _few_seeds(records: Sequence[Record], summaries: Sequence[Summary]) -> list[str]:
    least = min(len(s.seeds) for s in summaries)
    if least >= FEW_SEEDS:
        return []
    return [f"{fmt.several(least, 'seed').capitalize()} per setting: read differences between methods as hints only."]


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
        if any(len(values) > 1 for values in _by_seed(records, name).values())
    ]
    if not differing:
        return []
    return [f"The records differ in {fmt.listed(differing)}: compare them with care, latencies above all."]


def _by_seed(records: Sequence[Record], name: str) -> dict[int, set[str]]:
    """What one part of the fingerprint says; data are split by the seed, so they may differ between seeds."""
    found: dict[int, set[str]] = {}
    for record in records:
        found.setdefault(record.seed if name == "data" else 0, set()).add(repr(record.fingerprint.get(name)))
    return found


def _chosen_on_test(records: Sequence[Record], summaries: Sequence[Summary]) -> list[str]:
    if all(s.validation_drop is not None for s in summaries if not s.is_control):
        return []
    return [
        "The setting shown was chosen on test data, as no validation results were recorded: its figures flatter it."
    ]


WARNINGS = (
    _masked,
    _few_seeds,
    _small_test_set,
    _gaps,
    _no_random,
    _unequal_budgets,
    _trained_before,
    _emptied,
    _dead,
    _off_target,
    _noisy_latency,
    _mixed_machines,
    _chosen_on_test,
)
