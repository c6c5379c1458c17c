"""What ten criteria on one model cost: each in a pass of its own, all of them in one, and a plain training pass.

    python benchmarks/observing.py [--images 500] [--repeats 5]

ResNet-20 on random images of CIFAR's size, one thread; the forms take turns, and medians of ratios to the plain pass
(forward, loss and backward, no statistics) of the same turn are reported. Results: one JSON file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from machine import describe
from secateur.criteria.table import needs_of
from secateur.files import write_bytes
from secateur.nets import build

HERE = Path(__file__).parent
TEN = (
    *("l1", "fpgm", "bn_scale", "group_norm"),
    *("activation_mean", "apoz", "activation_variance", "output_norm", "taylor", "taylor_fo"),
)
COSTLY = ("obd", "thinet", "hessian")  # gradients of each sample, second moments, second derivatives


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "observing.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build("resnet20").eval()
    graph = sc.trace(model, torch.zeros(1, 3, 32, 32))
    count = options.images // 125
    data = [(torch.randn(125, 3, 32, 32), torch.randint(10, (125,))) for _ in range(count)]

    def scored(*names: str) -> Callable[[], None]:
        def run() -> None:
            facts = sc.observe(model, graph, data, {need for name in names for need in needs_of(name)})
            for name in names:
                sc.score(graph, facts, name)

        return run

    def apart() -> None:
        for name in TEN:
            scored(name)()

    forms = {"together": scored(*TEN), "apart": apart, **{name: scored(name) for name in (*TEN, *COSTLY)}}
    ratios: dict[str, list[float]] = {name: [] for name in forms}
    seconds = []
    for _ in range(options.repeats + 1):  # the first turn warms up
        plain = _timed(lambda: _plain(model, data))
        seconds.append(plain)
        for name, form in forms.items():
            ratios[name].append(_timed(form) / plain)
    results = {
        "criteria": TEN,
        "images": count * 125,
        "repeats": options.repeats,
        "plain_seconds": round(median(seconds[1:]), 3),
        "ratios": {name: round(median(values[1:]), 2) for name, values in ratios.items()},
        "machine": describe(),
    }
    write_bytes(options.out, (json.dumps(results, indent=1) + "\n").encode())
    print(json.dumps(results["ratios"], indent=1))


def section_lines(results: Mapping[str, Any], file: str) -> list[str]:
    """Its part of the results page."""
    ratios = results["ratios"]
    single = {name: ratio for name, ratio in ratios.items() if name not in ("together", "apart")}
    return [
        "## Ten criteria, one pass",
        "",
        f"Command: `python benchmarks/observing.py`. File: `benchmarks/results/{file}`. ResNet-20, {results['images']} "
        f"images, one thread. In units of a plain pass (forward, loss, backward: {results['plain_seconds']} s), "
        f"medians over {results['repeats']} turns:",
        "",
        f"- {', '.join(f'`{name}`' for name in results['criteria'])}, **together: {ratios['together']}**",
        f"- the same ten, each in a pass of its own: {ratios['apart']}",
        f"- one by one: {', '.join(f'`{name}` {ratio}' for name, ratio in single.items())}",
        "",
    ]


def _plain(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
    for x, y in data:
        F.cross_entropy(model(x), y).backward()
        model.zero_grad(set_to_none=True)


def _timed(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
