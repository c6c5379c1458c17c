"""The benchmarks of language models, tiny: every part runs, once, and its tables say what it found."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu_language_models
import language_blocks
import language_models
import language_nets
import language_tables
import write_results
from pretrained_for_tests import library
from trials import Trials

WORDS = ("the", "king", "is", "gone", "to", "his", "own", "house", "and", "he", "will", "not", "speak", "with", "her")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two short texts."""
    library()
    folder = tmp_path_factory.mktemp("language")
    draw = random.Random(0)
    text = "\n".join(" ".join(draw.choices(WORDS, k=8)) + "." for _ in range(100))
    (folder / "text" / "wikitext-2").mkdir(parents=True)
    (folder / "text" / "tinyshakespeare.txt").write_text(text)
    (folder / "text" / "wikitext-2" / "valid.txt").write_text(text[:1000].upper())
    return folder


def run(place: Path, *arguments: str) -> None:
    """One part of the benchmark, in the tests' folder."""
    language_models.main([*arguments, "--tiny", "--data-dir", str(place), "--runs", str(place / "runs")])


def rows(place: Path, part: str) -> list[dict[str, Any]]:
    """The finished trials of a part."""
    return [row for row in Trials(place / "runs" / "rows.jsonl").rows() if row["part"] == part]


def test_every_part_runs_once_and_its_page_can_be_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(place, "oneshot", "--seeds", "0", "--nets", "llama")
    run(place, "structured", "--seeds", "0", "--nets", "gpt2")
    monkeypatch.setattr(
        language_blocks, "apart", lambda *given, threads: language_blocks.measured(*given, threads=threads)
    )
    run(place, "block", "--width", "32", "--inner", "48", "--heads", "4", "--windows", "2", "--length", "8")

    shots, widths, blocks = (rows(place, part) for part in ("oneshot", "structured", "block"))
    assert len(rows(place, "dense")) == 2 and len(shots) == 9 and (len(widths), len(blocks)) == (8, 6)
    assert all(set(row["perplexity"]) == {"shakespeare", "wikitext2"} for row in shots + widths)
    assert all(abs(row["sparsity"] - 0.5) < 0.01 for row in shots + blocks)
    assert all(row["params"][1] < row["params"][0] and row["verified_difference"] < 1e-9 for row in widths)
    found = {row["perplexity"]["shakespeare"] for row in widths if row["sparsity"] == 0.5}
    assert len(found) == 4  # each repair did something

    files = {file: file.stat().st_mtime_ns for file in (place / "runs").glob("*.safetensors")}
    run(place, "oneshot", "--seeds", "0", "--nets", "llama")
    assert len(rows(place, "oneshot")) == 9 and all(file.stat().st_mtime_ns == time for file, time in files.items())

    out = place / "results"
    run(place, "collect", "--out", str(out / "language_models.json"))
    page = write_results.render(out)
    assert "### Llama-shaped: half of the weights" in page and "### GPT-2-shaped: heads and hidden units" in page
    assert "| 32 x 48 | sparsegpt | 2:4 |" in page

    collected = out / "language_models.json"
    before = json.loads(collected.read_text())
    Trials(place / "elsewhere" / "rows.jsonl").add({"part": "block"}, {"block_seconds": 1.0})  # and nothing else there
    language_models.main(["collect", "--out", str(collected), "--runs", str(place / "elsewhere")])
    assert json.loads(collected.read_text()) == {**before, "block": [{"block_seconds": 1.0}]}


def test_windows_are_of_the_training_text_and_differ_by_epoch(place: Path) -> None:
    scale = language_nets.TINY
    texts = language_nets.read_texts(place, scale, place / "runs")
    batches = language_nets.Windows(texts.train, scale, seed=0)
    first = [x for x, y in batches]
    assert all(torch.equal(x[:, 1:], y[:, :-1]) and x.shape == (4, 16) for x, y in batches)
    batches.set_epoch(1)
    assert len(first) == len(batches) and not torch.equal(first[0], next(iter(batches))[0])
    known = texts.train.unfold(0, scale.length, 1)
    drawn = torch.cat(language_nets.calibration(texts, scale, seed=0))
    assert all((known == window).all(1).any() for window in drawn)


def shot(seed: int, method: str, value: float) -> dict[str, Any]:
    """A row of the benchmark's file."""
    cost = {"seconds": 1.0, "peak_bytes": 10**9, "threads": 1}
    key = {"net": "llama", "seed": seed, "method": method, "pattern": "2:4"}
    return {**key, **cost, "perplexity": {"shakespeare": value}}


def test_the_tables_count_in_how_many_seeds_the_order_holds() -> None:
    dense = [{"net": "llama", "seed": seed, "perplexity": {"shakespeare": 9.0 + seed}} for seed in (0, 1)]
    shots = [shot(0, "sparsegpt", 10.0), shot(0, "wanda", 12.0), shot(0, "magnitude", 14.0)]
    shots += [shot(1, "sparsegpt", 20.0), shot(1, "wanda", 22.0), shot(1, "magnitude", 21.0)]
    shots += [shot(2, "sparsegpt", 30.0)]  # not finished: not counted
    lines = language_tables._shots("Llama", dense, shots)
    assert "| dense | 9.50 |  |  |" in lines and "| sparsegpt | 20.00 | 1.0 | 1.00 GB |" in lines
    assert "- Shakespeare, held out: SparseGPT < Wanda < magnitude in 1 of 2 seeds (2:4)" in lines


def test_a_block_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_blocks, "available_bytes", lambda: language_blocks.ROOM + 1)
    with pytest.raises(SystemExit, match="are available"):
        language_blocks.apart(language_blocks.Shape(), "wanda", {"sparsity": 0.5})


def test_the_benchmark_of_gpus_runs_without_one_and_says_what_it_left_out(tmp_path: Path) -> None:
    library()
    out = tmp_path / "gpu_language_models.json"
    gpu_language_models.main(["--tiny", "--device", "cpu", "--out", str(out)])
    found = json.loads(out.read_text())
    assert len(found["oneshot"]) == 6 and all(row["blocks"] == row["of"] == 2 for row in found["oneshot"])
    assert "need a CUDA device" in found["skipped"] and "need a CUDA device" in write_results.render(tmp_path)


def test_a_case_that_has_used_its_seconds_stops_after_a_block() -> None:
    library()
    hurried = replace(gpu_language_models.TINY, case_seconds=0.0)
    row = gpu_language_models.pruned_in_time(hurried, "wanda", {"pattern": "2:4"}, "cpu")
    assert (row["blocks"], row["of"]) == (1, 2) and row["model_seconds"] >= 0


def test_kernels_are_tabulated() -> None:
    times = {"dense_ms": 2.0, "sparse_ms": 1.0, "ratio": 2.0, "ratio_range": [1.5, 2.5], "difference": 0.004}
    row = {"method": "wanda", "pattern": "2:4", "blocks": 1, "of": 2, "block_seconds": [0.5], "model_seconds": 2.0}
    results = {
        "scale": {"windows": 4, "length": 16},
        "machine": {"cuda": "a GPU", "torch": "2"},
        "oneshot": [{**row, "peak_bytes": 2 * 10**9, "params": 10**9}],
        "backends": {"cusparselt": "works", "cutlass": "RuntimeError: no"},
        "kernels": [{"backend": "cusparselt", "tokens": 64, "inputs": 8, "outputs": 16, **times}],
        "models": [],
    }
    lines = language_tables.gpu_section_lines(results, "gpu_language_models.json")
    assert "| wanda | 2:4 | 1 of 2 | 0.50 s | 2 s | 2.00 GB |" in lines and "- cutlass: RuntimeError: no" in lines
    assert "| cusparselt | 8 -> 16 | 64 | 2.000 ms | 1.000 ms | 2.00 (1.50 to 2.50) | 4e-03 |" in lines
