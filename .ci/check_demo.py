"""Fail unless the demo left 40 finished trials and a report that shows them: `check_demo.py FOLDER`."""

import json
import math
import sys
from pathlib import Path

CRITERIA = {"l1", "l2", "bn_scale", "random"}
SPARSITIES = {0.1, 0.2, 0.3, 0.4, 0.6}
SEEDS = {0, 1}


def numbers(value: object) -> list[float]:
    """Every number in a record, however deep."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for part in value for number in numbers(part)]
    return [float(value)] if isinstance(value, (int, float)) else []


def main() -> None:
    folder = Path(sys.argv[1])
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    trials = {(record["criterion"], record["sparsity"], record["seed"]) for record in records}
    expected = {(criterion, sparsity, seed) for criterion in CRITERIA for sparsity in SPARSITIES for seed in SEEDS}
    assert len(records) == 40 and trials == expected, f"{len(records)} records; missing {sorted(expected - trials)}"
    assert all(math.isfinite(number) for number in numbers(records)), "a record holds a number that is not finite"
    for record in records:
        assert record["verified_difference"] <= 1e-9, f"{record['key']}: not verified"
        assert record["params"][1] < record["params"][0] and record["macs"][1] < record["macs"][0], record["key"]
        assert record["accuracy_finetuned"] > 0.5, f"{record['key']}: fine-tuning did not work"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html>"), "the report is no HTML page"
    missing = [criterion for criterion in CRITERIA if criterion not in page]
    assert not missing, f"the report does not mention {missing}"
    print(f"demo: {len(records)} trials, report of {len(page) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
