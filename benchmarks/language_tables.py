"""The tables of docs/results.md about language models, from language_models.json and gpu_language_models.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from tables import table

Row = Mapping[str, Any]
ORDER = ("sparsegpt", "wanda", "magnitude")  # by the perplexity that is expected of them
METHODS = ORDER[::-1]
PATTERNS = ("unstructured", "2:4", "4:8")
TEXTS = {"shakespeare": "Shakespeare, held out", "wikitext2": "WikiText-2"}


def section_lines(results: Mapping[str, Any], file: str) -> list[str]:
    """The whole section."""
    protocol = results["protocol"]
    lines = ["## Language models in one shot", ""]
    lines += [
        "Commands: `python benchmarks/language_models.py train|oneshot|structured|block --data-dir DATA`, then "
        f"`collect`. File: `benchmarks/results/{file}`.",
        "",
    ]
    if results["dense"]:
        lines += [_trained(results["dense"], protocol), ""]
    for kind, title in protocol["titles"].items():
        dense, shots, widths = ([row for row in results[part] if row["net"] == kind] for part in _PARTS)
        lines += _shots(title, dense, shots) + _widths(title, dense, widths)
    return lines + _blocks(results["block"])


_PARTS = ("dense", "oneshot", "structured")


def _trained(dense: Sequence[Row], protocol: Mapping[str, Any]) -> str:
    scale, recipe, tokens = dense[0]["scale"], protocol["training"], dense[0]["tokens"]
    params = sorted({row["params"] for row in dense})
    sizes = ", ".join(f"{size:.2f} for {TEXTS[name]}" for name, size in dense[0]["bytes_per_token"].items())
    scored = ", ".join(f"{tokens[name]:,} of {TEXTS[name]}" for name in TEXTS if name in tokens)
    return (
        f"Models of {' and '.join(f'{count / 1e6:.1f} M' for count in params)} parameters ({scale['layers']} blocks of "
        f"width {scale['width']}) trained on the first {1 - protocol['validation']:.0%} of tinyshakespeare: "
        f"{scale['epochs']} epochs of AdamW, learning rate {recipe['lr']:g}, batches of {scale['batch_size']} windows "
        f"of {scale['length']} tokens, bfloat16, last epoch; a byte-level BPE of {scale['vocabulary']:,} tokens learnt "
        f"on that text (bytes per token: {sizes}). Calibration: {scale['calibration']} windows of the training text. "
        f"Perplexity per token, in windows of {scale['length']} that move on by half of that, float32, on the first "
        f"tokens ({scored}). The models have never seen text like WikiText-2: where the dense ones are lost, anything "
        "that makes a model less sure of itself lowers its perplexity, so those columns say how far a method moves it "
        "rather than how good it is. Means over seeds, which draw weights, batches and calibration alike. Trials that "
        "are not finished are left empty."
    )


def _shots(title: str, dense: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    patterns = [name for name in PATTERNS if any(row["pattern"] == name for row in rows)]
    texts = _texts(rows)
    head = ["method", *(f"{TEXTS[text]}, {pattern}" for text in texts for pattern in patterns), "seconds", "peak"]
    body = [["dense", *(_number(_mean(dense, text)) for text in texts for _ in patterns), "", ""]]
    for method in METHODS:
        mine = [row for row in rows if row["method"] == method]
        values = [_mean([r for r in mine if r["pattern"] == pattern], text) for text in texts for pattern in patterns]
        seconds = f"{fmean(row['seconds'] for row in mine):.1f}" if mine else ""
        body.append([method, *map(_number, values), seconds, _gigabytes(row["peak_bytes"] for row in mine)])
    seeds = ", ".join(map(str, sorted({row["seed"] for row in rows})))
    return [
        f"### {title}: half of the weights of every block removed, perplexity",
        "",
        f"Seeds {seeds}. No training afterwards. Seconds and the process's peak memory are of a whole call on "
        f"{_threads(rows)}, means over patterns.",
        "",
        *table(head, body),
        "",
        *_ranks(rows, patterns, texts),
        "",
    ]


def _ranks(rows: Sequence[Row], patterns: Sequence[str], texts: Sequence[str]) -> list[str]:
    """In how many seeds the methods come in the expected order."""
    lines = []
    for text in texts:
        counts = []
        for pattern in patterns:
            complete = [found for found in _by_seed(rows, pattern, text) if len(found) == len(ORDER)]
            ordered = sum(found[ORDER[0]] < found[ORDER[1]] < found[ORDER[2]] for found in complete)
            counts.append(f"{ordered} of {len(complete)} seeds ({pattern})")
        lines.append(f"- {TEXTS[text]}: SparseGPT < Wanda < magnitude in {', '.join(counts)}")
    return lines


def _by_seed(rows: Sequence[Row], pattern: str, text: str) -> list[dict[str, float]]:
    seeds = sorted({row["seed"] for row in rows})
    here = [row for row in rows if row["pattern"] == pattern and text in row["perplexity"]]
    return [{row["method"]: row["perplexity"][text] for row in here if row["seed"] == seed} for seed in seeds]


def _widths(title: str, dense: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    texts, levels = _texts(rows), sorted({row["sparsity"] for row in rows})
    repairs = list(dict.fromkeys(row["repair"] for row in rows))
    head = ["channels removed", "params left", "text", "dense", *(_REPAIRS.get(name, name) for name in repairs)]
    body = []
    for level in levels:
        here = [row for row in rows if row["sparsity"] == level]
        left = fmean(row["params"][1] / row["params"][0] for row in here)
        for text in texts:
            values = [_mean([row for row in here if row["repair"] == name], text) for name in repairs]
            cells = [_number(_mean(dense, text)), *map(_number, values)]
            body.append([f"{level:.0%}", f"{left:.1%}", TEXTS[text], *cells])
    worst = max(row["verified_difference"] for row in rows)
    seconds = fmean(row["seconds"] for row in rows)
    mending = [row["repair_seconds"] for row in rows if row["repair"] == repairs[-1]]
    return [
        f"### {title}: heads and hidden units removed, perplexity",
        "",
        f"By {rows[0]['criterion']}, the same fraction of every layer; seeds "
        f"{', '.join(map(str, sorted({row['seed'] for row in rows})))}. Repair takes calibration windows and no "
        "gradient; layers without a bias have nothing to fold into. Pruned models equal the zeroed original within "
        f"{worst:.1e}; pruning took {seconds:.1f} s with that proof, the last repair {fmean(mending):.1f} s on "
        f"{_threads(rows)}.",
        "",
        *table(head, body),
        "",
    ]


_REPAIRS = {"none": "just cut", "fold": "biases folded", "scale": "outputs scaled"}


def _blocks(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    body = [
        [
            f"{row['shape']['width']:,} x {row['shape']['inner']:,}",
            row["method"],
            row["pattern"],
            f"{row['block_seconds']:.1f} s",
            f"{row['pass_seconds']:.1f} s" if row["pass_seconds"] else "",
            _gigabytes([row["peak_bytes"]]),
            _duration(row["model_seconds"]),
        ]
        for row in rows
    ]
    shape, machine = rows[-1]["shape"], rows[-1]["machine"]
    return [
        "### One block of a large Llama's shape",
        "",
        f"Random weights in float32, random hidden states of {shape['windows']} windows of {shape['length']} tokens, "
        f"one process per row; {_threads(rows)} of {machine['cpu']} (load {machine['load_average_1min']}). The whole "
        f"model is {shape['blocks']} such blocks, through each of which the calibration passes twice, once dense and "
        "once pruned; it is reckoned, not run. Magnitude needs no calibration.",
        "",
        *table(["width x inner", "method", "pattern", "pruning", "one pass", "peak", "whole model"], body),
        "",
    ]


def gpu_section_lines(results: Mapping[str, Any], file: str) -> list[str]:
    """The section of what was measured on a GPU."""
    scale, machine, rows = results["scale"], results["machine"], results["oneshot"]
    body = [
        [
            row["method"],
            row["pattern"],
            f"{row['blocks']} of {row['of']}",
            f"{fmean(row['block_seconds']):.2f} s",
            f"{row['model_seconds']:.0f} s",
            _gigabytes([row["peak_bytes"]]),
        ]
        for row in rows
    ]
    lines = [
        "## Language models on a GPU",
        "",
        f"Command: `python benchmarks/gpu_language_models.py`. File: `benchmarks/results/{file}`. "
        f"{machine['cuda'] or machine['cpu']}, torch {machine['torch']}. A Llama of {rows[0]['params'] / 1e9:.2f} "
        f"billion random weights, calibrated on {scale['windows']} windows of {scale['length']} random tokens; the "
        "whole model is reckoned where not all blocks were run.",
        "",
        *table(["method", "pattern", "blocks run", "per block", "whole model", "peak"], body),
        "",
    ]
    if "skipped" in results:
        return [*lines, f"Kernels: {results['skipped']}.", ""]
    lines += [f"- {name}: {found}" for name, found in results["backends"].items()]
    lines += [
        "",
        "2:4 weights in bfloat16, dense against torch's semi-structured kernels in eager mode with default settings, "
        "in turn; medians of the ratios of their times, above 1 where sparse is faster. Layers take copies of a weight "
        "in turn, so that no cache holds it.",
        "",
    ]
    kernels = [
        [row["backend"], f"{row['inputs']:,} -> {row['outputs']:,}", f"{row['tokens']:,}", *_times(row)]
        for row in results["kernels"]
    ]
    models = [[row["backend"], "whole model", f"{row['tokens']:,}", *_times(row)] for row in results["models"]]
    head = ["backend", "layer", "tokens", "dense", "sparse", "ratio (range)", "difference"]
    return [*lines, *table(head, kernels + models), ""]


def _times(row: Row) -> list[str]:
    low, high = row["ratio_range"]
    times = [f"{row[kind]:.3f} ms" for kind in ("dense_ms", "sparse_ms")]
    return [*times, f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})", f"{row['difference']:.0e}"]


def _texts(rows: Sequence[Row]) -> list[str]:
    return [text for text in TEXTS if any(text in row["perplexity"] for row in rows)]


def _mean(rows: Iterable[Row], text: str) -> float | None:
    found = [row["perplexity"][text] for row in rows if text in row["perplexity"]]
    return fmean(found) if found else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def _gigabytes(found: Iterable[int | None]) -> str:
    known = [value for value in found if value is not None]
    return f"{max(known) / 1e9:.2f} GB" if known else ""


def _threads(rows: Sequence[Row]) -> str:
    counts = " or ".join(map(str, sorted({row["threads"] for row in rows})))
    return f"{counts} thread{'' if counts == '1' else 's'}"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
