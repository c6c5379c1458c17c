"""The tables of docs/results.md about vision transformers, from benchmarks/results/vision_transformers.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from tables import table

Row = Mapping[str, Any]
STAGES = ("cut_test", "repaired_test", "tuned_test")


def section_lines(results: Mapping[str, Any], file: str) -> list[str]:
    """The whole section."""
    protocol = results["protocol"]
    scale, training, tuning = protocol["scale"], protocol["training"], protocol["tuning"]
    lines = [
        "## Vision transformers on CIFAR-10",
        "",
        "Command: `python benchmarks/vision_transformers.py --data-dir DATA`, with `--levels 0.5` and with `--levels "
        "0.25 --no-tune`, then `--collect`. File: "
        f"`benchmarks/results/{file}`. Data: {protocol['data']}. Models: {scale['depth']} blocks of width "
        f"{scale['width']}, {scale['heads']} heads, {scale['inner']} hidden units, patches of {scale['patch']}; "
        f"{scale['epochs']} epochs of AdamW, learning rate {training['lr']:g}. Of every layer the given fraction goes, "
        f"by `{protocol['criterion']}`; repair: least squares on {scale['calibration']:,} augmented training images; "
        f"fine-tuning, where there is a figure: {scale['tuning_epochs']} x the training images, learning rate "
        f"{tuning['lr']:g}. Accuracies are on the test set, means over seeds. Latency: of one thread, the dense model "
        "measured in turn.",
        "",
    ]
    for net, title in protocol["titles"].items():
        dense, pruned = ([row for row in results[part] if row["net"] == net] for part in ("dense", "pruned"))
        lines += _net(title, dense, pruned) if dense else []
    return lines


def _net(title: str, dense: Sequence[Row], pruned: Sequence[Row]) -> list[str]:
    order = list(dict.fromkeys(row["what"] for row in pruned))
    settings = sorted({(row["what"], row["level"]) for row in pruned}, key=lambda one: (order.index(one[0]), one[1]))
    groups = [[row for row in pruned if (row["what"], row["level"]) == setting] for setting in settings]
    seeds = ", ".join(str(row["seed"]) for row in sorted(dense, key=lambda row: row["seed"]))
    macs, params = dense[0]["macs"], dense[0]["params"]
    timed = list(dict.fromkeys((one["runtime"], one["batch"]) for row in pruned for one in row["latency"]))
    body = [
        [
            f"{what}, {level:.0%}",
            f"{fmean(row['macs'] for row in rows) / macs:.1%}",
            f"{fmean(row['params'] for row in rows) / params:.1%}",
            *(_percent(row[stage] for row in rows if stage in row) for stage in STAGES),
        ]
        for (what, level), rows in zip(settings, groups, strict=True)
    ]
    times = [
        [f"{what}, {level:.0%}", *(_time(rows, runtime, batch) for runtime, batch in timed)]
        for (what, level), rows in zip(settings, groups, strict=True)
    ]
    return [
        f"### ViT of {title}",
        "",
        f"Dense: {_percent(row['dense_test'] for row in dense)} %, {params / 1e6:.2f} M parameters, {macs / 1e6:.1f} M "
        f"MACs, trained in {fmean(row['train_seconds'] for row in dense) / 60:.0f} minutes; seeds {seeds}.",
        "",
        *table(["removed", "MACs", "params", "just cut", "repaired", "fine-tuned"], body),
        "",
        "Milliseconds of a batch after pruning, and how many times as fast as the dense model in the same runtime:",
        "",
        *table(["removed", *(f"{runtime}, batch {batch}" for runtime, batch in timed)], times),
        "",
    ]


def _time(rows: Sequence[Row], runtime: str, batch: int) -> str:
    found = [one for row in rows for one in row["latency"] if (one["runtime"], one["batch"]) == (runtime, batch)]
    if not found:
        return ""
    return f"{fmean(one['median_ms'] for one in found):.2f} ({fmean(one['speedup'] for one in found):.2f}x)"


def _percent(values: Iterable[float]) -> str:
    found = list(values)
    return f"{100 * fmean(found):.1f}" if found else ""
