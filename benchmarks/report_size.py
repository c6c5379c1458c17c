"""How long the report of many trials takes to write and to open.

    python benchmarks/report_size.py [--trials 5000] [--repeats 5]

Made-up records, in two shapes: a study (10 pairs of model and data set, each with a section of its own) and a search
(a single section with as many settings as trials). The page opens from its file in headless Chromium; its own clock
(`performance.now()`, from the start of navigation) tells when there is something to read, when it has loaded, when
all that is in sight is drawn ("opened"), when the first chart is, in sight or not, and when all are. It is sent to
this script, which also takes the time from the start of the browser's process. Results: one JSON file.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import parse_qs, urlparse

from machine import describe
from secateur.files import write_bytes
from secateur.report import Pair, Record, write_report
from secateur.report.records import LayerWeights, LayerWidth

HERE = Path(__file__).parent
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1280,900"),
)
LAYERS = 20
MODELS = ("resnet20", "resnet32", "resnet56", "vgg11", "vgg16")
METHODS = ("l1", "l2", "taylor", "fpgm", "bn_scale", "wanda", "lamp", "random")
# The policy forbids every request; the copy that is timed may tell this script what its clock says.
POLICY = '<meta http-equiv="Content-Security-Policy"'
TELL = """<script>
  const told = setInterval(() => {
    const { openedMs, chartMs, drawnMs } = document.documentElement.dataset;
    if (!drawnMs) return;
    clearInterval(told);
    const painted = performance.getEntriesByName("first-contentful-paint")[0];
    const loaded = performance.getEntriesByType("navigation")[0].loadEventEnd;
    const said = { painted: painted?.startTime, loaded, opened: openedMs, chart: chartMs, drawn: drawnMs };
    new Image().src = "http://127.0.0.1:PORT/?" + new URLSearchParams(said);
  }, 20);
</script></body>"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "report_size.json")
    options = parser.parse_args()
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        parser.error("no chromium on PATH")
    shapes: dict[str, Callable[[int], list[Record]]] = {"study": study, "search": search}
    results: dict[str, Any] = {"trials": options.trials, "repeats": options.repeats, "machine": describe()}
    with tempfile.TemporaryDirectory() as folder:
        for shape, made in shapes.items():
            for number in (5, options.trials):
                results[f"{shape} {number}"] = timed(made(number), Path(folder), browser, options.repeats)
                print(shape, number, json.dumps(results[f"{shape} {number}"]))
    write_bytes(options.out, (json.dumps(results, indent=1) + "\n").encode())


def section_lines(results: Mapping[str, Any], file: str) -> list[str]:
    """Its part of the results page."""
    rows = [(name, row) for name, row in results.items() if isinstance(row, Mapping) and "opened_ms" in row]
    head = (
        "shape and trials",
        "page, MB",
        "written, s",
        "first paint",
        "loaded",
        "all in sight drawn",
        "first chart",
        "all charts",
    )
    machine = results["machine"]
    return [
        "## The report of many trials",
        "",
        f"Command: `python benchmarks/report_size.py`. File: `benchmarks/results/{file}`. Made-up records; the page is "
        "opened from its file in headless Chromium, and times in milliseconds are by its own clock, medians over "
        f"{results['repeats']} openings. A study is ten pairs of model and data set, with a section each; a search is "
        "one section with a setting for every trial. Machine: "
        f"{machine['cores']} cores, load average {machine['load_average_1min']} while measuring.",
        "",
        "| " + " | ".join(head) + " |",
        "|---" + "|---:" * (len(head) - 1) + "|",
        *(
            f"| {name} | {row['size_mb']} | {row['written_s']} | {row['first_paint_ms']:.0f} | {row['loaded_ms']:.0f} "
            f"| {row['opened_ms']:.0f} | {row['first_chart_ms']:.0f} | {row['all_drawn_ms']:.0f} |"
            for name, row in rows
        ),
        "",
        "What is out of sight is drawn afterwards, chart by chart, while the page can already be read and scrolled.",
        "",
    ]


def study(number: int) -> list[Record]:
    """Models x data x methods x sparsities x seeds."""
    levels = [k / 10 for k in range(1, 10)]
    cells = [
        (model, data, method, level, seed)
        for seed in range(1 + number // 720)
        for model in MODELS
        for data in ("cifar10", "cifar100")
        for method in METHODS
        for level in levels
    ]
    chance = random.Random(0)
    return [record(*cell, chance) for cell in cells[:number]]


def search(number: int) -> list[Record]:
    """One model, one seed, and a sparsity of its own for every trial."""
    chance = random.Random(0)
    return [
        record("resnet56", "cifar10", METHODS[k % len(METHODS)], 0.05 + 0.9 * k / number, 0, chance)
        for k in range(number)
    ]


def record(model: str, data: str, method: str, level: float, seed: int, chance: random.Random) -> Record:
    """A record with plausible numbers."""
    masked = method in ("wanda", "lamp")
    kept = 1.0 if masked else (1 - level) ** 1.7
    dense = 0.93 + chance.gauss(0, 0.002)
    tuned = dense - 0.06 * level**2 - (0.01 if method == "random" else 0.0) + chance.gauss(0, 0.003)
    widths = [16 * 2 ** (k // 7) for k in range(LAYERS)]
    names = [f"layer{k // 6 + 1}.{k % 6}.conv" for k in range(LAYERS)]
    left = [(1 - level if masked else kept) * (0.9 + 0.2 * chance.random()) for _ in names]
    return Record(
        key=f"{model}-{data}-{method}-{level:g}-s{seed}-{chance.getrandbits(48):012x}",
        model=model,
        data=data,
        criterion=method,
        scope="layer",
        sparsity=level,
        seed=seed,
        accuracy_dense=dense,
        accuracy_pruned=max(0.1, dense - 1.2 * level**2),
        accuracy_finetuned=tuned,
        params=Pair(855_770, max(1, int(855_770 * kept))),
        macs=Pair(125_485_706, max(1, int(125_485_706 * kept))),
        latency_ms=Pair(9.0, 9.0 * (0.4 + 0.6 * kept)),
        speedup=1 / (0.4 + 0.6 * kept),
        verified_difference=None if masked else 1e-15 * chance.random(),
        widths=()
        if masked
        else tuple(LayerWidth(n, w, max(1, int(w * (1 - level)))) for n, w in zip(names, widths, strict=True)),
        seconds=60 + 60 * chance.random(),
        validation_dense=dense,
        validation_finetuned=tuned,
        train_finetuned=min(1.0, tuned + 0.04),
        method=f"{method}, weights" if masked else method,
        prunes="weights" if masked else "channels",
        target="weights" if masked else "channels",
        epochs=30,
        weights_left=1 - level if masked else kept,
        layers=tuple(
            LayerWeights(n, 9 * w * w, int(9 * w * w * min(1.0, part)))
            for n, w, part in zip(names, widths, left, strict=True)
        ),
    )


def timed(records: Sequence[Record], folder: Path, browser: str, repeats: int) -> dict[str, Any]:
    """Seconds to write the page, its size, and medians of the milliseconds until it is open and drawn."""
    start = time.perf_counter()
    page = write_report(records, folder / "report.html", "Benchmark")
    wrote = time.perf_counter() - start
    seen = [opened(page, folder / f"profile{k}", browser) for k in range(repeats + 1)][1:]  # the first warms the disk
    return {
        "records": len(records),
        "written_s": round(wrote, 2),
        "size_mb": round(page.stat().st_size / 1e6, 2),
        "first_paint_ms": round(median(row["painted"] for row in seen)),
        "loaded_ms": round(median(row["loaded"] for row in seen)),
        "opened_ms": median(row["opened"] for row in seen),
        "first_chart_ms": median(row["chart"] for row in seen),
        "first_chart_ms_worst": max(row["chart"] for row in seen),
        "all_drawn_ms": median(row["drawn"] for row in seen),
        "browser_start_to_all_drawn_ms": median(row["wall"] for row in seen),
        "opened_ms_worst": max(row["opened"] for row in seen),
    }


def opened(page: Path, profile: Path, browser: str) -> dict[str, float]:
    """Milliseconds by the page's own clock, and from the start of the browser's process."""
    told: dict[str, float] = {}
    done = threading.Event()

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told.update({name: float(values[0]) for name, values in parse_qs(urlparse(self.path).query).items()})
            told["wall"] = round(1000 * (time.perf_counter() - start))
            self.send_response(204)
            self.end_headers()
            done.set()

        def log_message(self, *_: object) -> None:
            """Silence."""

    server = HTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    text = page.read_text(encoding="utf-8").replace(POLICY, '<meta name="policy"', 1)
    copy = page.with_name("timed.html")
    end = text.rindex("</body>")
    copy.write_text(text[:end] + TELL.replace("PORT", str(server.server_port)) + text[end + 7 :], encoding="utf-8")
    start = time.perf_counter()
    command = [browser, *FLAGS, "--remote-debugging-port=0", f"--user-data-dir={profile}", copy.as_uri()]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        if not done.wait(120):
            raise TimeoutError(f"{page} did not finish drawing within two minutes.")
    finally:
        process.terminate()
        process.wait()
        server.shutdown()
        server.server_close()
    return told


if __name__ == "__main__":
    sys.exit(main())
