"""How the cost of the analysis grows with the depth of a model; and a model of 6.7 billion weights without its weights.

    python benchmarks/scaling.py [--blocks 10 30 100 300 1000] [--fresh]

Chains of tiny blocks, so that the number of operations is all there is to measure, and a Llama of 7B shape on the meta
device. Every case has a process of its own, whose peak memory is noted. Figures are CPU seconds of one thread: the
machine may have other things to do. Every row is kept as soon as it is there. Results: one JSON file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import chains
from machine import describe
from secateur.files import write_bytes

HERE = Path(__file__).resolve().parent
SPARSITY = 0.5
REPEATS = 3  # of each case, up to this many seconds; the least counts
ENOUGH_SECONDS = 5.0
PARTS = ("trace", "select", "shrink")
LLAMA = "Llama of 7B shape"
LLAMA_CONFIG = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
LLAMA_TOKENS = 16
Row = dict[str, Any]
Made = TypeVar("Made")


def main() -> None:
    options = _options()
    if options.child is not None:
        print(json.dumps(_measured(options.child, options.blocks[0])))
        return
    cases = [(name, blocks) for name in chains.CHAINS for blocks in options.blocks] + [(LLAMA, 0)]
    for name, blocks in cases:
        done = any((row["model"], row["blocks"]) == (name, blocks) for row in _read(options.out))
        if options.fresh or not done:
            row = _row(name, blocks)
            rows = [old for old in _read(options.out) if (old["model"], old["blocks"]) != (name, blocks)]
            write_bytes(options.out, (json.dumps({"rows": [*rows, row]}, indent=1) + "\n").encode())
            parts = ", ".join(f"{part} {row['seconds'][part]:.3f} s" for part in PARTS)
            print(f"{name:24} {blocks or '':>5}  {parts}", flush=True)
    print("\n".join(section_lines({"rows": _read(options.out)})))


def exponent(blocks: Sequence[int], seconds: Sequence[float]) -> float:
    """The slope of log(seconds) over log(blocks), by least squares: 1 for a cost that grows in proportion."""
    x, y = [math.log(count) for count in blocks], [math.log(value) for value in seconds]
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    shared = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True))
    return shared / sum((a - middle_x) ** 2 for a in x)


def section_lines(results: Mapping[str, Any]) -> list[str]:
    """The results as Markdown: seconds by number of blocks, the exponents, and the large model."""
    rows = results["rows"]
    chained = [row for row in rows if row["blocks"]]
    blocks = sorted({row["blocks"] for row in chained})
    lines = ["| analysis and shrinking | " + " | ".join(f"{count:,} blocks" for count in blocks) + " | exponent |"]
    lines.append("| --- |" + " ---: |" * (len(blocks) + 1))
    for name in dict.fromkeys(row["model"] for row in chained):
        its = sorted((row for row in chained if row["model"] == name), key=lambda row: row["blocks"])
        found = {row["blocks"]: sum(row["seconds"][part] for part in PARTS) for row in its}
        cells = [f"{found[count]:.2f} s" if count in found else "" for count in blocks]
        slope = exponent(list(found), list(found.values())) if len(found) > 1 else math.nan
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {slope:.2f} |")
    lines += ["", *(_large_line(row) for row in rows if not row["blocks"]), _machine_line(rows)]
    return lines


def _large_line(row: Row) -> str:
    seconds = ", ".join(f"{part} {row['seconds'][part]:.2f} s" for part in PARTS)
    params, after = row["params"]
    return (
        f"- {row['model']} on the meta device: {row['groups']} groups; {params / 1e9:.2f} -> {after / 1e9:.2f} billion "
        f"parameters planned and cut; {seconds}; peak memory of the whole process {row['peak_bytes'] / 1e9:.2f} GB."
    )


def _machine_line(rows: Sequence[Row]) -> str:
    machines = dict.fromkeys(
        f"{m['cpu']}, {m['threads']} of {m['cores']} cores, torch {m['torch']}, Python {m['python']}"
        for m in (row["machine"] for row in rows)
    )
    return f"- Measured on {'; '.join(machines)}."


def _row(name: str, blocks: int) -> Row:
    command = [sys.executable, str(Path(__file__).resolve()), "--child", name, "--blocks", str(blocks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}, {blocks} blocks: {done.stderr.strip()[-2000:]}")
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def _measured(name: str, blocks: int) -> Row:
    """The row of one case, measured in this process."""
    torch.set_num_threads(1)
    _costs(*chains.build(next(iter(chains.CHAINS)), 2))  # what is loaded at the first use is not timed
    model, inputs = _llama() if name == LLAMA else chains.build(name, blocks)
    seconds, facts = _costs(model, inputs)
    begin = time.process_time()
    for _ in range(REPEATS - 1):
        if time.process_time() - begin + sum(seconds.values()) > ENOUGH_SECONDS:
            break
        again, _ = _costs(model, inputs)
        seconds = {part: min(value, again[part]) for part, value in seconds.items()}
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    rounded = {part: round(value, 4) for part, value in seconds.items()}
    return {"model": name, "blocks": blocks, "seconds": rounded, **facts, "peak_bytes": peak, "machine": describe()}


def _costs(model: nn.Module, inputs: Any) -> tuple[dict[str, float], Row]:
    """CPU seconds of each part, and what came out of it. Scores are drawn: there may be no weights to judge."""
    import secateur as sc

    seconds: dict[str, float] = {}
    graph = _timed(seconds, "trace", lambda: sc.trace(model, inputs))
    draw = torch.Generator().manual_seed(0)
    scores = {group.name: torch.rand(group.channels, generator=draw) for group in graph.prunable}
    plan = _timed(seconds, "select", lambda: sc.select(graph, scores, sc.Target(sparsity=SPARSITY)))
    small = _timed(seconds, "shrink", lambda: sc.shrink(model, plan))
    after = sum(parameter.numel() for parameter in small.parameters())
    if after != plan.params[1]:
        raise SystemExit(f"the plan promised {plan.params[1]:,} parameters, the shrunk model has {after:,}")
    return seconds, {"groups": len(graph.prunable), "replaced": len(plan.replacements), "params": list(plan.params)}


def _timed(seconds: dict[str, float], part: str, call: Callable[[], Made]) -> Made:
    start = time.process_time()
    made = call()
    seconds[part] = time.process_time() - start
    return made


def _llama() -> tuple[nn.Module, dict[str, Tensor]]:
    """A language model of 6.7 billion weights, none of which is in memory."""
    import zoo

    zoo.load_torchvision()
    import transformers

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_CONFIG)).eval()
        return model, {"input_ids": torch.zeros(1, LLAMA_TOKENS, dtype=torch.long)}


def _read(path: Path) -> list[Row]:
    rows: list[Row] = json.loads(path.read_text())["rows"] if path.is_file() else []
    return rows


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "scaling.json", help="the results")
    parser.add_argument("--blocks", type=int, nargs="+", default=[10, 30, 100, 300, 1000])
    parser.add_argument("--fresh", action="store_true", help="measure again what is there already")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
