"""The source documents' studies at full scale on one GPU, for as long as a time limit allows.

    python benchmarks/gpu_studies.py --study s1 --models resnet18 vgg16 --out OUT --minutes 9 --data-dir DATA

Finished trials are in OUT/studies.db and checkpoints in OUT/work: with the same OUT the same command goes on. Writes
OUT/STUDY-rows.json and the report. `--epochs` shortens the training of dense models, and the file says so.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from machine import describe
from secateur.files import write_bytes
from secateur.study.dense import Workplace
from secateur.study.driver import run_study
from secateur.study.executors import LocalExecutor
from secateur.study.reading import Results, as_bytes, write_reports
from secateur.study.spec import Study, read_study
from secateur.study.store import Store
from secateur.study.trials import trials_of

STUDIES = Path(__file__).parent.parent / "studies"


def main() -> None:
    options = _options()
    file = STUDIES / f"{options.study}.toml"
    study = shortened(read_study(file, options.profile), options)
    options.out.mkdir(parents=True, exist_ok=True)
    store = Store(f"sqlite:///{options.out / 'studies.db'}")
    place = Workplace(options.out / "work", options.data_dir, None, options.device)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(round(60 * options.minutes))
    with suppress(KeyboardInterrupt):  # the time is up
        run_study(study.name, trials_of(study), store, _executor(options), place, told=_told)
    signal.alarm(0)
    results = Results.of(study, store)
    rows = json.loads(as_bytes(results.rows, "json"))
    facts: dict[str, Any] = {"study": json.loads(study.model_dump_json()), "machine": describe(), "rows": rows}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    write_bytes(options.out / f"{options.study}-rows.json", (json.dumps(facts, indent=1) + "\n").encode())
    if rows:
        write_reports(results, store, STUDIES, options.out / options.study, figures=False)
    print(f"{len(rows)} of {len(trials_of(study))} trials")


def shortened(study: Study, options: argparse.Namespace) -> Study:
    """Some of its models, data sets and seeds, trained for fewer epochs."""
    changes: dict[str, Any] = {}
    if options.models:
        changes["models"] = tuple(net for net in study.models if net.name in options.models)
    if options.data:
        changes["data"] = tuple(data for data in study.data if data.name in options.data)
    if options.seeds:
        changes["seeds"] = tuple(options.seeds)
    if options.epochs:
        changes["training"] = study.training.model_copy(update={"epochs": options.epochs})
    if options.tuning_epochs:
        changes["tuning"] = study.tuning.model_copy(update={"epochs": options.tuning_epochs})
    return study.model_copy(update=changes)


def _executor(options: argparse.Namespace) -> LocalExecutor:
    """Several workers share the one GPU, as small networks leave most of it idle."""
    gpus = ["0"] * options.workers if options.device == "cuda" else []
    return LocalExecutor(options.workers, gpus)


def _told(done: int, line: str) -> None:
    print(done, line, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="s1")
    parser.add_argument("--profile", type=lambda name: name or None, default="gpu", help="'' for a file without any")
    parser.add_argument("--models", nargs="+", help="by name; default: all of the study")
    parser.add_argument("--data", nargs="+", help="by name; default: all of the study")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--epochs", type=int, help="of dense models, instead of the file's")
    parser.add_argument("--tuning-epochs", type=int)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/gpu_studies")))
    return parser.parse_args()


if __name__ == "__main__":
    main()
