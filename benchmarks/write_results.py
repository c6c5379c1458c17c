"""Write docs/results.md from benchmarks/results/*.json. The same files give the same page, byte for byte.

    python benchmarks/write_results.py [--results FOLDER] [--out FILE]

One function per benchmark renders its file; a file without a function is an error, so that no result goes unseen.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from coupling_tables import headline_lines, protocol_line
from exports import section_lines
from language_tables import gpu_section_lines as gpu_language_lines
from language_tables import section_lines as language_lines
from method_tables import section_lines as method_lines
from observing import section_lines as observing_lines
from repairs import section_lines as repair_lines
from report_size import section_lines as report_lines
from scaling import section_lines as scaling_lines
from study_kills import section_lines as kill_lines
from study_overhead import section_lines as overhead_lines
from tables import number_table
from text_latency import section_lines as text_latency_lines
from vision_tables import section_lines as vision_lines

HERE = Path(__file__).resolve().parent
INTRODUCTION = """\
# Results

This page is written by `python benchmarks/write_results.py` from the files in `benchmarks/results/`, which the commands
below wrote. No number in it was typed by hand. `make results` runs everything again.
"""


def render(folder: Path) -> str:
    """The whole page."""
    files = sorted(folder.glob("*.json"))
    unknown = [file.name for file in files if file.stem not in SECTIONS]
    if unknown or not files:
        raise SystemExit(f"{folder}: " + (f"no section is known for {unknown}" if unknown else "there are no results"))
    sections = (SECTIONS[file.stem](json.loads(file.read_text()), file.name) for file in files)
    return "\n".join([INTRODUCTION, *(line for lines in sections for line in lines)])


def cifar10_resnet20(results: Mapping[str, Any], file: str) -> list[str]:
    """Dense training, then half of the MACs removed by each criterion."""
    protocol, dense, pruned = results["protocol"], results["dense"], results["pruned"]
    seeds = sorted(row["seed"] for row in dense)
    recipe, tuning = protocol["training"], protocol["fine_tuning"]
    command = f"python benchmarks/cifar10_resnet20.py --data-dir DATA --seeds {' '.join(map(str, seeds))}"
    return [
        f"## ResNet-20 on CIFAR-10, pruned to {protocol['max_macs']:.0%} of its MACs",
        "",
        f"Command: `{command}`, where DATA holds the CIFAR-10 parquet files. File: `benchmarks/results/{file}`.",
        "",
        f"Data: {protocol['data']}. Dense training: {_recipe(recipe, protocol['batch_size'])}. After pruning, "
        f"BatchNorm statistics are re-estimated on {protocol['repair_batches']} training batches, then the model is "
        f"fine-tuned: {_recipe(tuning, protocol['batch_size'])}. Nothing is selected on the test set. Accuracies are "
        "on the test set; one column per seed.",
        "",
        *number_table(
            ["", *(f"seed {seed}" for seed in seeds), "mean"],
            [_accuracies("dense", dense, "dense_test_accuracy", seeds), *_pruned_rows(pruned, seeds)],
        ),
        "",
        *number_table(
            ["", "seed", "MACs", "params", "verified difference", "pruning took"],
            [_cost_row(row) for row in _ordered(pruned)],
        ),
        "",
        "The verified difference is the largest one between the pruned model and the original with those channels "
        "zeroed, relative to the largest output, before repair and fine-tuning.",
        "",
        *(_training_line(row) for row in sorted(dense, key=lambda row: row["seed"])),
        "",
    ]


def _pruned_rows(pruned: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> list[list[str]]:
    stages = {"before_repair": "just cut", "after_repair": "repaired", "fine_tuned": "fine-tuned"}
    return [
        _accuracies(f"{setting}, {title}", [row for row in pruned if _setting(row) == setting], key, seeds)
        for setting in sorted({_setting(row) for row in pruned})
        for key, title in ((f"{stage}_test_accuracy", title) for stage, title in stages.items())
    ]


def _setting(row: Mapping[str, Any]) -> str:
    return f"{row['criterion']} (scope {row['scope']})"


def _accuracies(title: str, rows: Sequence[Mapping[str, Any]], key: str, seeds: Sequence[int]) -> list[str]:
    found = {row["seed"]: row[key] for row in rows}
    cells = [f"{found[seed]:.2%}" if seed in found else "" for seed in seeds]
    return [title, *cells, f"{mean(found.values()):.2%}"]


def _cost_row(row: Mapping[str, Any]) -> list[str]:
    (macs, macs_after), (params, params_after) = row["macs"], row["params"]
    return [
        _setting(row),
        str(row["seed"]),
        f"{macs:,} -> {macs_after:,} ({macs_after / macs:.1%})",
        f"{params:,} -> {params_after:,} ({params_after / params:.1%})",
        f"{row['verified_difference']:.1e}",
        f"{row['prune_seconds']:.1f} s",
    ]


def _ordered(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(rows, key=lambda row: (_setting(row), row["seed"]))


def _training_line(row: Mapping[str, Any]) -> str:
    machine, minutes = row["machine"], row["train_seconds"] / 60
    return (
        f"- Dense, seed {row['seed']}: {row['epochs']} epochs in {minutes:.1f} minutes on {machine['cpu']}, "
        f"{machine['threads']} of {machine['cores']} cores, torch {machine['torch']}, Python {machine['python']}."
    )


def _recipe(recipe: Mapping[str, Any], batch_size: int) -> str:
    parts = [
        f"{recipe['epochs']} epochs of {recipe['optimizer'].upper()} at batch size {batch_size}",
        f"learning rate {recipe['lr']:g}, {recipe['schedule']} schedule",
        f"{recipe['warmup_epochs']:g} epochs of warm-up" if recipe["warmup_epochs"] else "",
        f"weight decay {recipe['weight_decay']:g}",
        "bfloat16" if recipe["bf16"] else "",
    ]
    return ", ".join(part for part in parts if part)


def coupling(results: Mapping[str, Any], file: str) -> list[str]:
    """Secateur and Torch-Pruning side by side; the table per model stays beside the figures."""
    return [
        "## Any model: side by side with Torch-Pruning",
        "",
        f"Command: `make coupling`. File: `benchmarks/results/{file}`, and per model "
        "[benchmarks/results/coupling.md](../benchmarks/results/coupling.md).",
        "",
        protocol_line(results),
        "",
        *headline_lines(results),
    ]


def exports(results: Mapping[str, Any], file: str) -> list[str]:
    """Which architectures export, unpruned and pruned."""
    return [
        "## Export: .pt2 and ONNX",
        "",
        f"Command: `python benchmarks/exports.py`. File: `benchmarks/results/{file}`.",
        "",
        "Each file was checked against eager mode at the example's sizes and at others: within 1e-5 of the largest "
        "output, 1e-4 where the model divides by statistics of its activations (attention, LayerNorm and their like).",
        "",
        *section_lines(results),
    ]


def scaling(results: Mapping[str, Any], file: str) -> list[str]:
    """Depth against time, and a model without its weights."""
    return [
        "## Size: long models, and one that does not fit",
        "",
        f"Command: `python benchmarks/scaling.py`. File: `benchmarks/results/{file}`.",
        "",
        "Chains of tiny blocks, half of the channels removed: tracing, selecting and shrinking, in CPU seconds of one "
        "thread. The exponent is the slope of a line through the logarithms: 1 where the cost grows in proportion.",
        "",
        *scaling_lines(results),
        "",
    ]


SECTIONS: dict[str, Callable[[Mapping[str, Any], str], list[str]]] = {
    "cifar10_resnet20": cifar10_resnet20,
    "coupling": coupling,
    "exports": exports,
    "gpu_language_models": gpu_language_lines,
    "language_models": language_lines,
    "methods": method_lines,
    "observing": observing_lines,
    "repairs": repair_lines,
    "report_size": report_lines,
    "scaling": scaling,
    "study_kills": kill_lines,
    "study_overhead": overhead_lines,
    "text_latency": text_latency_lines,
    "vision_transformers": vision_lines,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of JSON files")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "results.md", help="the page")
    options = parser.parse_args()
    options.out.write_text(render(options.results), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
