"""The tables of docs/results.md about methods, from benchmarks/results/methods.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from secateur.report.statistics import Estimate, estimate
from tables import table

Row = Mapping[str, Any]
DEFAULT = "l2:global"  # what `prune` does with a budget
ENOUGH_LOST = 0.30  # accuracy that unrepaired l1 must have lost for the headline


def section_lines(results: Mapping[str, Any], file: str) -> list[str]:
    """The whole section."""
    protocol = results["protocol"]
    tuning = protocol["tuning"]
    lines = [
        "## Methods on CIFAR-10",
        "",
        "Commands: `python benchmarks/methods.py channels|weights|contest|iterative --data-dir DATA`, then `collect`. "
        f"File: `benchmarks/results/{file}`. Data: {protocol['data']}. Calibration: {protocol['calibration']}. "
        f"Fine-tuning: SGD, learning rate {tuning['lr']} falling along a cosine, batches of {tuning['batch_size']}, "
        f"weight decay {tuning['weight_decay']}. `slimming` starts from {protocol['slimming']}. "
        "Accuracies are on the test set, means over seeds; nothing is selected "
        "on it. Trials that are not finished are left empty.",
        "",
    ]
    for net, title in protocol["titles"].items():
        rows = [row for row in results["channels"] if row["net"] == net]
        if rows:
            dense = [row["dense_test"] for row in results["dense"] if row["net"] == net]
            lines += _headline(title, rows, fmean(dense)) + _channels(title, rows)
    lines += _against_random(results["channels"])
    return lines + _weights(results["weights"]) + _contest(results["contest"]) + _iterative(results["iterative"])


def _headline(title: str, rows: Sequence[Row], dense: float) -> list[str]:
    """How much of the loss repair alone wins back, where unrepaired l1 has first lost much."""
    plain = [row for row in rows if row["stage"] == "direct" and row["criterion"] == "l1" and row["scope"] == "layer"]
    for level in sorted({row["level"] for row in plain}):
        here = [row for row in plain if row["level"] == level]
        cut, repaired = (fmean(row[f"{stage}_test"] for row in here) for stage in ("cut", "repaired"))
        if dense - cut >= ENOUGH_LOST:
            won = (repaired - cut) / (dense - cut)
            seconds = fmean(row["repair_seconds"] for row in here)
            return [
                f"**Repair alone, {title}**: `l1` at {level:.0%} of all channels takes the accuracy from {dense:.2%} "
                f"to {cut:.2%}; repair without a gradient step brings it back to {repaired:.2%}, {won:.0%} of the "
                f"loss, in {seconds:.0f} s on one core ({len(here)} seeds).",
                "",
            ]
    return []


def _channels(title: str, rows: Sequence[Row]) -> list[str]:
    direct, tuned = ([row for row in rows if row["stage"] == stage] for stage in ("direct", "tuned"))
    seeds_of = [{row["seed"] for row in tuned if row["criterion"] == name} for name in {r["criterion"] for r in tuned}]
    shared = set.intersection(*seeds_of) if seeds_of else set()
    tuned = [row for row in tuned if row["seed"] in shared]
    levels, tuned_levels = sorted({row["level"] for row in direct}), sorted({row["level"] for row in tuned})
    header = ["criterion (scope)", "seeds", *(f"{level:.0%}" for level in levels)]
    header += [f"{level:.0%}, fine-tuned" for level in tuned_levels]

    def cells(setting: tuple[str, str]) -> list[str]:
        ours = [_of(part, setting) for part in (direct, tuned)]
        shown = [_pair(_at(ours[0], level, "cut_test"), _at(ours[0], level, "repaired_test")) for level in levels]
        seeds = sorted({row["seed"] for row in ours[0]})
        return [
            ", ".join(map(str, seeds)),
            *shown,
            *(_percent(_at(ours[1], level, "tuned_test")) for level in tuned_levels),
        ]

    settings = sorted({(row["criterion"], row["scope"]) for row in rows})
    return [
        f"### {title}: channels removed, just cut -> repaired",
        "",
        "Levels are fractions of the channels of every group (scope layer), or of all channels (other scopes). "
        f"Fine-tuned: seeds {', '.join(map(str, sorted(shared))) or 'none'}, which all criteria that were have.",
        "",
        *table(header, [[f"{name} ({scope})", *cells((name, scope))] for name, scope in settings]),
        "",
    ]


def _against_random(rows: Sequence[Row]) -> list[str]:
    """The default criterion against the control, paired, over all levels, nets and seeds."""
    lines = []
    for stage, title in (("repaired", "repaired"), ("tuned", "repaired and fine-tuned")):
        part = [row for row in rows if row["scope"] == "layer" and f"{stage}_test" in row]
        sides = [[row for row in part if row["criterion"] == name] for name in ("l2", "random")]
        if all(sides):
            found = paired(*sides, f"{stage}_test")
            lines.append(f"- {title}: {_points(found)}, {found.seeds} pairs")
    return ["`l2` less `random`, paired over levels, nets and seeds:", "", *lines, ""] if lines else []


def _weights(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    levels = sorted({row["level"] for row in rows})
    body = []
    for name in sorted({row["criterion"] for row in rows}):
        mine = [row for row in rows if row["criterion"] == name]
        stages = ("cut_test", "normed_test", "tuned_test")
        body.append([name, *(_chain([_at(mine, level, stage) for stage in stages]) for level in levels)])
    return [
        "### ResNet-20: weights removed, just zeroed -> BatchNorm re-estimated -> 2 epochs under the mask",
        "",
        f"Seeds {', '.join(map(str, sorted({row['seed'] for row in rows})))}.",
        "",
        *table(["criterion", *(f"{level:.2%}" for level in levels)], body),
        "",
    ]


def _contest(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    settings = sorted({row["setting"] for row in rows})
    keys = sorted({(row["checkpoint"], row["seed"]) for row in rows})

    def value(setting: str, key: tuple[int, int], part: str = "test") -> float | None:
        mine = [row for row in rows if row["setting"] == setting and (row["checkpoint"], row["seed"]) == key]
        return mine[0][f"tuned_{part}"] if mine else None

    body = []
    for setting in settings:
        found = [value(setting, key) for key in keys]
        chosen_by = _mean(value(setting, key, "validation") for key in keys)
        title = f"**`{setting}`, our default**" if setting == DEFAULT else f"`{setting}`"
        body.append([title, *map(_percent, found), _percent(_mean(found)), _percent(chosen_by)])
    epochs = sorted({row["epochs"] for row in rows})
    lines = [
        f"### Half of the MACs, equal fine-tuning ({', '.join(map(str, epochs))} epochs), against Torch-Pruning",
        "",
        "One column per checkpoint and seed of the fine-tuning: all rows of a column start from the same dense net. "
        "The last column is what a choice may be made by; Torch-Pruning 1.6.1 ranks globally, in 200 small steps.",
        "",
        *table(["setting", *(f"net {net}, seed {seed}" for net, seed in keys), "mean", "validation"], body),
        "",
    ]
    peers = [setting for setting in settings if setting.startswith("torch_pruning")]
    if peers and DEFAULT in settings:
        best = max(peers, key=lambda setting: _mean([value(setting, key) for key in keys]) or 0.0)
        pairs = [(value(DEFAULT, key), value(best, key)) for key in keys]
        found = estimate([ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None])
        lines += [f"Our default less `{best}`, the better of the two, paired: {_points(found)}.", ""]
    return lines


def _iterative(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    body = [
        [
            setting,
            str(epochs),
            _percent(_mean(row.get("before_last_test") for row in mine)),
            _percent(_mean(row["tuned_test"] for row in mine)),
        ]
        for setting, epochs in sorted({(row["setting"], row["epochs"]) for row in rows})
        if (mine := [row for row in rows if row["setting"] == setting and row["epochs"] == epochs])
    ]
    return [
        "### ResNet-20: 93.75 % of the weights removed, at once or little by little, equal epochs",
        "",
        f"Magnitude, scope global, seeds {', '.join(map(str, sorted({row['seed'] for row in rows})))}. BatchNorm is "
        "re-estimated after every removal; `gradual` raises the sparsity along a cubic during the first half.",
        "",
        *table(["", "epochs in all", "before the last fine-tuning", "after it"], body),
        "",
    ]


def paired(ours: Iterable[Row], theirs: Iterable[Row], value: str) -> Estimate:
    """The paired difference of two kinds of rows, over everything else that tells trials apart."""
    sides = [{(row["net"], row["seed"], row["level"]): row[value] for row in rows} for rows in (ours, theirs)]
    return estimate([sides[0][key] - sides[1][key] for key in sorted(sides[0].keys() & sides[1].keys())])


def _of(rows: Sequence[Row], setting: tuple[str, str]) -> list[Row]:
    return [row for row in rows if (row["criterion"], row["scope"]) == setting]


def _at(rows: Sequence[Row], level: float, key: str) -> float | None:
    return _mean(row.get(key) for row in rows if row["level"] == level)


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return fmean(found) if found else None


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _pair(before: float | None, after: float | None) -> str:
    return _chain([before, after])


def _chain(values: Sequence[float | None]) -> str:
    return " -> ".join(_percent(value) for value in values if value is not None)


def _points(found: Estimate) -> str:
    return f"{100 * found.mean:+.2f} points, 95 % interval [{100 * found.low:+.2f}, {100 * found.high:+.2f}]"
