"""Every architecture of the zoo, pruned by Secateur and by Torch-Pruning side by side, and judged by a third party.

    python benchmarks/coupling.py [--only PREFIX ...] [--secateur-only] [--form graph] [--fresh]

Half of the channels go, by their l2 norm, layer by layer. Every architecture has a process of its own with a limit on
time and memory; imports and a first small call are not timed. The judge is `oracle.py`. Every row is kept as soon as
it is there: the same command goes on where it stopped. Results: a JSON file, and its tables in Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import contenders
import zoo
from coupling_tables import full_tables, headline_lines, line_of
from machine import describe
from secateur.files import write_bytes

HERE = Path(__file__).resolve().parent
SLACK_SECONDS = 240  # for imports, building, and the judge, beyond the limit of each library
LIBRARIES = ("secateur", "torch-pruning", "torch", "torchvision", "timm", "transformers")


def main() -> None:
    options = _options()
    if options.child is not None:
        contenders.compare(
            options.child,
            options.out,
            form=options.form,
            libraries=_libraries(options),
            limit_seconds=options.limit_seconds,
            limit_bytes=int(options.limit_gb * 2**30),
        )
        return
    chosen = [name for name in zoo.BUILDERS if not options.only or name.startswith(tuple(options.only))]
    if not chosen:
        raise SystemExit(f"no architecture starts with {options.only}; `python benchmarks/zoo.py` lists them")
    done = {row["model"] for row in _read(options.out)["rows"] if row["form"] == options.form}
    for name in chosen:
        if options.fresh or name not in done:
            row = _row(name, options)
            _add(options, row)
            print(line_of(row), flush=True)
    print("\n".join(headline_lines(_read(options.out))))


def _row(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own found out about one architecture."""
    libraries = _libraries(options)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.jsonl"
        command = [sys.executable, str(Path(__file__).resolve()), "--child", name, "--out", str(out)]
        command += ["--form", options.form, "--limit-seconds", str(options.limit_seconds)]
        command += ["--limit-gb", str(options.limit_gb), *(["--secateur-only"] if options.secateur_only else [])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        limit = len(libraries) * options.limit_seconds + SLACK_SECONDS
        try:
            done = subprocess.run(
                command, env=environment, timeout=limit, capture_output=True, text=True, errors="replace", check=False
            )
            failure = _failure(done)
        except subprocess.TimeoutExpired:
            failure = {"status": "timeout", "reason": f"the process was ended after {limit:.0f} s"}
        lines = out.read_text().splitlines() if out.is_file() else []
    found: dict[str, Any] = {key: value for line in lines for key, value in json.loads(line).items()}
    missing = {library: {**failure, "ran": False} for library in libraries if library not in found}
    found.pop("started", None)
    return {"model": name, "form": options.form, "dense": found.pop("model", {}), **found, **missing}


def _failure(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    last = (done.stderr.strip().splitlines() or [""])[-1]
    return {"status": "crashed", "reason": f"the process ended with {done.returncode}: {last[:200]}"}


def _libraries(options: argparse.Namespace) -> list[str]:
    """Torch-Pruning has no other form: it is asked once."""
    if options.form != "live":
        return [contenders.OURS]
    ours = [contenders.OURS, contenders.OPEN]
    return ours if options.secateur_only else [*ours, contenders.PEER]


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return {"protocol": {}, "machine": {}, "rows": [], **found}


def _add(options: argparse.Namespace, row: Mapping[str, Any]) -> None:
    """Put a row into the file as it is now; what was not measured this time stays as it was."""
    results = _read(options.out)
    key = row["model"], row["form"]
    old = next((other for other in results["rows"] if (other["model"], other["form"]) == key), {})
    others = [other for other in results["rows"] if other is not old]
    order = {name: place for place, name in enumerate(zoo.BUILDERS)}
    rows = [*others, {**old, **row}]
    results["rows"] = sorted(rows, key=lambda row: (order.get(row["model"], len(order)), row["form"]))
    results["protocol"] = {
        "sparsity": contenders.SPARSITY,
        "criterion": contenders.CRITERION,
        "repeats": contenders.REPEATS,
        "limit_seconds": options.limit_seconds,
        "limit_gb": options.limit_gb,
        "versions": {name: metadata.version(name) for name in LIBRARIES},
    }
    results["machine"] = describe() | {"threads": 1}
    write_bytes(options.out, (json.dumps(results, indent=1) + "\n").encode())
    write_bytes(options.out.with_suffix(".md"), full_tables(results).encode())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", metavar="PREFIX", help="architectures whose name starts so: timm:, own:unet"
    )
    parser.add_argument("--secateur-only", action="store_true", help="leave the peer's part of each row as it is")
    parser.add_argument("--form", choices=("live", "graph"), default="live", help="of Secateur's pruned model")
    parser.add_argument("--fresh", action="store_true", help="measure again what already has a row")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "coupling.json", help="the results")
    parser.add_argument("--limit-seconds", type=float, default=120.0, help="for each library on each architecture")
    parser.add_argument("--limit-gb", type=float, default=14.0, help="address space of each process")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
