"""Every architecture of the zoo exported to .pt2 and ONNX, unpruned and with half of its channels removed.

    python benchmarks/exports.py [--only PREFIX ...] [--fresh]

`secateur.export` checks each file against eager mode at the example's sizes and at others before it writes it. Every
architecture has a process of its own; every row is kept as soon as it is there, and the same command goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import zoo
from machine import describe
from secateur.files import write_bytes
from tables import number_table

HERE = Path(__file__).resolve().parent
SPARSITY = 0.5
KINDS = ("pt2", "onnx")
FORMS = ("unpruned", "pruned")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="PREFIX", help="architectures whose name starts so: timm:, own:")
    parser.add_argument("--fresh", action="store_true", help="export again what already has a row")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "exports.json", help="the results")
    parser.add_argument("--limit-seconds", type=float, default=600.0, help="for each architecture")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(measure(options.child)))
        return
    for name in zoo.BUILDERS:
        wanted = not options.only or name.startswith(tuple(options.only))
        if wanted and (options.fresh or name not in {row["model"] for row in _rows(options.out)}):
            row = _in_a_process(name, options.limit_seconds)
            others = [other for other in _rows(options.out) if other["model"] != name]
            order = {known: place for place, known in enumerate(zoo.BUILDERS)}
            rows = sorted([*others, row], key=lambda row: order.get(row["model"], len(order)))
            results = {"protocol": {"sparsity": SPARSITY}, "machine": describe() | {"threads": 1}, "rows": rows}
            write_bytes(options.out, (json.dumps(results, indent=1) + "\n").encode())
            print(" | ".join(_cells(row)), flush=True)


def measure(name: str) -> dict[str, Any]:
    """What exporting the architecture, unpruned and pruned, gave."""
    import torch

    import secateur as sc

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model, inputs = zoo.build(name)
    try:
        pruned = sc.prune(model, inputs, sparsity=SPARSITY).model
    except sc.SecateurError:
        pruned = sc.prune(model, inputs, sparsity=SPARSITY, prune_residual=True).model
    row: dict[str, Any] = {"model": name}
    for form, net in zip(FORMS, (model, pruned), strict=True):
        for kind in KINDS:
            row[f"{form}_{kind}"] = _exported(net, inputs, kind)
    return row


def _exported(net: Any, inputs: Any, kind: str) -> dict[str, Any]:
    import secateur as sc

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = sc.export(net, inputs, Path(folder) / f"model.{kind}")
        except sc.SecateurError as error:
            return {"ok": False, "reason": " ".join(str(error).split())[:300]}
    return {
        "ok": True,
        "difference": report.max_difference,
        "tolerance": report.tolerance,
        "dynamic": [axis.name for axis in report.dynamic],
        "seconds": round(time.perf_counter() - start, 2),
    }


def _in_a_process(name: str, limit_seconds: float) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).resolve()), "--child", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, env=environment, timeout=limit_seconds, capture_output=True, text=True, check=True
        )
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        reason = f"not finished after {limit_seconds:.0f} s"
    except (subprocess.CalledProcessError, ValueError, IndexError) as error:
        reason = f"crashed: {str(getattr(error, 'stderr', error)).strip().splitlines()[-1:]}"
    return {"model": name, **{f"{form}_{kind}": {"ok": False, "reason": reason} for form in FORMS for kind in KINDS}}


def _rows(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(path.read_text())["rows"]) if path.is_file() else []


# -- the section of docs/results.md ----------------------------------------------------------------------------------


def section_lines(results: Mapping[str, Any]) -> list[str]:
    """Counts first, then what does not export, then every architecture."""
    rows: Sequence[Mapping[str, Any]] = results["rows"]
    counts = [
        [
            kind,
            *(str(sum(row[f"{form}_{kind}"]["ok"] for row in rows)) for form in FORMS),
            str(sum(row[f"unpruned_{kind}"]["ok"] and not row[f"pruned_{kind}"]["ok"] for row in rows)),
            *(str(sum(axis in row[f"pruned_{kind}"].get("dynamic", ()) for row in rows)) for axis in AXES),
        ]
        for kind in KINDS
    ]
    failed = [
        [row["model"], form, kind, row[f"{form}_{kind}"]["reason"].replace("|", "/")]
        for row in rows
        for form in FORMS
        for kind in KINDS
        if not row[f"{form}_{kind}"]["ok"]
    ]
    head = [f"of {len(rows)} architectures", *FORMS, "only unpruned", *(f"pruned, {axis} open" for axis in AXES)]
    lines = [*number_table(head, counts), ""]
    if failed:
        lines += ["What does not export:", "", *number_table(["model", "form", "file", "reason"], failed), ""]
    lines += ["Largest difference to eager mode, relative to the largest output, of the pruned models:", ""]
    return [*lines, *number_table(["model", "pt2", "onnx", "open"], map(_cells, rows)), ""]


AXES = ("batch", "sequence")


def _cells(row: Mapping[str, Any]) -> list[str]:
    found = [row[f"pruned_{kind}"] for kind in KINDS]
    differences = [f"{part['difference']:.1e}" if part["ok"] else "no" for part in found]
    return [row["model"], *differences, ", ".join(found[-1].get("dynamic", ()))]


if __name__ == "__main__":
    sys.exit(main())
