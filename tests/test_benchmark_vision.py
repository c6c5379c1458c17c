"""The benchmark of vision transformers, tiny: it runs, goes on where it stopped, and its tables say what it found."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from trials import Trials

if not (find_spec("timm") and find_spec("transformers") and find_spec("onnxruntime")):
    pytest.skip("needs secateur[vision,hf,onnx]", allow_module_level=True)
import vision_transformers as benchmark
import write_results


def run(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """The rows after a tiny run."""
    benchmark.main(["--tiny", "--runs", str(folder), "--out", str(folder / "vision_transformers.json"), *arguments])
    return Trials(folder / "rows.jsonl").rows()


def test_both_nets_lose_heads_units_and_widths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "RUNTIMES", ("eager",))
    rows = run(tmp_path, "--what", "all", "--levels", "0.5")
    dense, pruned = ([row for row in rows if row["part"] == part] for part in ("dense", "pruned"))
    assert [row["net"] for row in dense] == [row["net"] for row in pruned] == ["timm", "transformers"]
    for before, after in zip(dense, pruned, strict=True):
        assert after["macs"] < 0.35 * before["macs"] and after["params"] < 0.4 * before["params"]
        assert after["verified_difference"] < 1e-6 and "tuned_test" in after
        assert [one["batch"] for one in after["latency"]] == [1, 16]
    assert dense[0]["params"] == pytest.approx(dense[1]["params"], rel=0.02)
    assert run(tmp_path, "--what", "all", "--levels", "0.5") == rows  # nothing is done twice

    run(tmp_path, "--collect")
    page = write_results.render(tmp_path)
    assert "### ViT of timm" in page and "### ViT of transformers" in page
    assert page.count("| all, 50% |") == 4 and "eager, batch 16" in page
    assert len(json.loads((tmp_path / "vision_transformers.json").read_text())["pruned"]) == 2


@pytest.mark.parametrize("net", sorted(benchmark.NETS))
def test_every_part_goes_alone(net: str, tmp_path: Path) -> None:
    scale = benchmark.TINY
    bench = benchmark.Bench(tmp_path, net, 0, benchmark.drawn_images(0), scale)
    sizes = {what: bench.pruned(what, 0.5).plan.params for what in benchmark.WHAT}
    assert len({after for _, after in sizes.values()}) == len(sizes)
    assert all(after < before for before, after in sizes.values())
    assert min(sizes, key=lambda what: sizes[what][1]) == "all"


@pytest.mark.slow
def test_the_whole_tiny_benchmark_runs(tmp_path: Path) -> None:
    rows = run(tmp_path)
    assert len(rows) == 2 + 2 * len(benchmark.WHAT) * len(benchmark.LEVELS)
    assert {one["runtime"] for row in rows for one in row["latency"]} == {"eager", "onnxruntime"}
