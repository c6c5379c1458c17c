"""A study whose driver is killed five times, beside the same study left alone: are the stores the same?

    python benchmarks/study_kills.py [--trials 300] [--kills 5] [--workers 2] [--work runs/kills]

Trials on the handwritten digits: one epoch of dense training, one of fine-tuning, five criteria, ten sparsities, six
seeds. The driver gets SIGKILL at random moments (seeded) somewhere in the grid and is started again with the same
command. Afterwards both stores must hold every trial exactly once, with the same numbers apart from times. Interrupted
itself, the script goes on where it was. Results: one JSON file; exit code 1 where the stores differ.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from machine import describe
from secateur.errors import ArtifactError
from secateur.files import write_bytes
from secateur.study import Store, read_study, trials_of
from secateur.study.store import Row

HERE = Path(__file__).parent
NAME = "kills"
TIMES = ("seconds", "latency_ms", "speedup", "latency_noise", "timings")
STUDY = """\
name = "{name}"
title = "Killed and not killed"
models = ["digits_net"]
data = ["digits"]
sparsities = {sparsities}
seeds = {seeds}
calibration = 250
methods = [{methods}]
controls = {{ random = false, magnitude = false, unpruned = false, smaller = false }}
training = {{ epochs = 1, batch_size = 64, lr = 0.05 }}
tuning = {{ epochs = 1, batch_size = 64, lr = 0.02 }}
latency = {{ batches = [1], seconds = 1e-6 }}
"""
CRITERIA = ("l1", "l2", "fpgm", "bn_scale", "taylor")
SPARSITIES = [round(0.05 + 0.07 * place, 2) for place in range(10)]


def numbers(row: Row) -> dict[str, Any]:
    """What a trial found, without what the clock says: equal for equal settings, whatever else was committed since."""
    if row.record is None:
        return {"key": row.key, "error": row.error}
    found = {name: value for name, value in json.loads(row.record.to_json()).items() if name not in TIMES}
    found["fingerprint"].pop("commit", None)
    return found


def sessions_processes(session: int) -> list[int]:
    """The processes of a session that still run, zombies aside."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, owner = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has ended meanwhile
            continue
        if int(owner) == session and state != "Z":
            found.append(int(entry.name))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=300, help="a multiple of 50")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which the driver is killed")
    parser.add_argument("--work", type=Path, default=Path("runs") / "kills")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "study_kills.json")
    options = parser.parse_args()
    per_seed = len(CRITERIA) * len(SPARSITIES)
    if options.trials % per_seed:
        parser.error(f"--trials is a multiple of {per_seed}")
    file = options.work / "study.toml"
    seeds = list(range(options.trials // per_seed))
    methods = ", ".join(f'{{ criterion = "{name}" }}' for name in CRITERIA)
    content = STUDY.format(name=NAME, sparsities=SPARSITIES, seeds=seeds, methods=methods)
    write_bytes(file, content.encode())
    alone = _alone(file, options.workers)
    killed, kills = _killed(file, options.workers, options.trials, options.kills, options.seed)
    results = {
        "trials": len(trials_of(read_study(file))),
        "workers": options.workers,
        "kills": kills,
        "seconds_alone": alone,
        "seconds_killed": killed,
        **_compared(file.parent),
        "machine": describe(),
    }
    write_bytes(options.out, (json.dumps(results, indent=1) + "\n").encode())
    print(json.dumps(results, indent=1))
    if results["different"] or {results["rows_alone"], results["rows_killed"]} != {options.trials}:
        sys.exit(1)


def _alone(file: Path, workers: int) -> float:
    """Run the study and leave it alone; the seconds that this call took."""
    start = time.perf_counter()
    if _started(file, "alone", workers).wait():
        raise SystemExit(f"the undisturbed run failed: see {file.parent / 'alone.log'}")
    return _kept(file.parent / "alone.json", round(time.perf_counter() - start, 1))


def _killed(file: Path, workers: int, trials: int, number: int, seed: int) -> tuple[float, list[dict[str, Any]]]:
    """Run the study, kill its driver so many times, and let it finish; seconds, and what each kill met."""
    start, notes = time.perf_counter(), file.parent / "kills.json"
    kills: list[dict[str, Any]] = json.loads(notes.read_text()) if notes.exists() else []
    drawn = random.Random(seed)
    moments = [(at, drawn.random()) for at in sorted(drawn.sample(range(trials - trials // 10), number))]
    for at, delay in moments[len(kills) :]:
        process = _started(file, "killed", workers)
        while len(_done(file.parent / "killed.db")) < at and process.poll() is None:
            time.sleep(0.05)
        time.sleep(delay)
        if process.poll() is not None:
            raise SystemExit(f"the study ended before it was killed: see {file.parent / 'killed.log'}")
        process.send_signal(signal.SIGKILL)
        process.wait()
        moment = time.perf_counter()
        while sessions_processes(process.pid):  # its workers end by themselves
            time.sleep(0.05)
        done = len(_done(file.parent / "killed.db"))
        kills.append({"finished_trials": done, "seconds_until_workers_ended": round(time.perf_counter() - moment, 2)})
        write_bytes(notes, json.dumps(kills).encode())
    if _started(file, "killed", workers).wait():
        raise SystemExit(f"the last run failed: see {file.parent / 'killed.log'}")
    return _kept(file.parent / "killed.json", round(time.perf_counter() - start, 1)), kills


def _started(file: Path, name: str, workers: int) -> subprocess.Popen[bytes]:
    """`secateur study run` in a session of its own."""
    folder = file.parent
    arguments = [str(file), "--store", str(folder / f"{name}.db"), "--work", str(folder / name)]
    command = [sys.executable, "-c", "from secateur.cli import main; main()", "study", "run", *arguments]
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            [*command, "--workers", str(workers)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def _done(path: Path) -> set[str]:
    try:
        store = Store(str(path), create=False)
    except ArtifactError:
        return set()
    try:
        return store.done(NAME)
    finally:
        store.close()


def _kept(path: Path, seconds: float) -> float:
    """The seconds of the first call that finished: another one finds everything done."""
    if not path.exists():
        write_bytes(path, json.dumps(seconds).encode())
    return float(json.loads(path.read_text()))


def _compared(folder: Path) -> dict[str, Any]:
    """Row by row, by key."""
    stores = {name: Store(str(folder / f"{name}.db"), create=False) for name in ("alone", "killed")}
    alone, killed = ({row.key: numbers(row) for row in store.rows(NAME)} for store in stores.values())
    points = [store.curves(NAME) for store in stores.values()]
    different = sorted(key for key in {*alone, *killed} if alone.get(key) != killed.get(key))
    return {
        "rows_alone": len(alone),
        "rows_killed": len(killed),
        "failures": sum("error" in values for values in (*alone.values(), *killed.values())),
        "different": different,
        "curves_equal": points[0] == points[1],
    }


def section_lines(results: Mapping[str, Any], file: str) -> list[str]:
    """Its part of the results page."""
    kills = results["kills"]
    ended = max(kill["seconds_until_workers_ended"] for kill in kills)
    same = "the same numbers in all of them" if not results["different"] else f"{len(results['different'])} differ"
    return [
        "## A study that is killed",
        "",
        f"Command: `python benchmarks/study_kills.py`. File: `benchmarks/results/{file}`. {results['trials']} trials "
        f"on the digits, {results['workers']} workers; `kill -9` of the driver after "
        f"{', '.join(str(kill['finished_trials']) for kill in kills)} finished trials, and the same command again.",
        "",
        f"- rows: {results['rows_alone']} undisturbed, {results['rows_killed']} killed; {same}, times aside; "
        f"curves {'equal' if results['curves_equal'] else 'DIFFERENT'}; {results['failures']} failures",
        f"- the workers of a killed driver ended after at most {ended:g} s",
        f"- {results['seconds_alone']:g} s undisturbed, {results['seconds_killed']:g} s with "
        f"{len(kills)} kills (each start imports torch anew)",
        "",
    ]


if __name__ == "__main__":
    sys.exit(main())
