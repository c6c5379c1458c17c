"""Fail unless the demo left all its trials and a report that shows them: `check_demo.py FOLDER`."""

import json
import math
import subprocess
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
    command = [str(Path(sys.executable).parent / "secateur"), "study", "rows", "studies/digits.toml"]
    asked = subprocess.run(
        [*command, "--store", str(folder / "results.db"), "--format", "json"], capture_output=True, check=True
    )
    records = json.loads(asked.stdout)
    failed = [record["key"] for record in records if record["error"]]
    assert not failed, f"failed: {failed}"
    pruned = [record for record in records if record["prunes"] == "channels"]
    trials = {(record["criterion"], record["sparsity"], record["seed"]) for record in pruned}
    expected = {(criterion, sparsity, seed) for criterion in CRITERIA for sparsity in SPARSITIES for seed in SEEDS}
    assert trials == expected and len(pruned) == 40, f"{len(pruned)} records; missing {sorted(expected - trials)}"
    controls = sorted(record["criterion"] for record in records if record["prunes"] == "nothing")
    assert controls == ["smaller", "smaller", "unpruned", "unpruned"], controls
    assert all(math.isfinite(number) for number in numbers(records)), "a record holds a number that is not finite"
    for record in pruned:
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
