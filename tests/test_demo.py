"""The demo: every trial is proved right and kept, an interrupted run goes on, other settings are not mixed in."""

import json

import pytest
import torch

pytest.importorskip("sklearn")

from secateur import demo
from secateur.demo import Trial, baseline, fingerprint, grid, run_demo
from secateur.errors import InputError
from secateur.report import read_records, write_records
from secateur.training import Recipe

TRIALS = [Trial("l1", 0.4, 0), Trial("random", 0.4, 0), Trial("l1", 0.4, 1)]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """A few seconds' worth of the demo, with everything in it."""
    torch.set_num_threads(1)
    monkeypatch.setattr(demo, "TRAINING", Recipe(epochs=2, lr=0.05))
    monkeypatch.setattr(demo, "RECOVERY", Recipe(epochs=1, lr=0.02))
    monkeypatch.setattr(demo, "TIMED_SECONDS", 0.0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "TRAINING", Recipe(epochs=2, lr=0.05))
        patch.setattr(demo, "RECOVERY", Recipe(epochs=1, lr=0.02))
        patch.setattr(demo, "TIMED_SECONDS", 0.0)
        out = tmp_path_factory.mktemp("demo")
        told = []
        yield out, run_demo(out, TRIALS, lambda done, line: told.append((done, line))), told


def settled(record):
    """A record without what depends on the clock."""
    clock = ("seconds", "latency_ms", "latency_noise", "speedup")
    return {name: value for name, value in json.loads(record.to_json()).items() if name not in clock}


def test_the_grid_has_every_setting_once_per_seed():
    trials = grid(2)
    assert len(trials) == len({trial.key for trial in trials}) == 2 * 4 * 5
    with pytest.raises(InputError):
        grid(0)


def test_every_trial_is_recorded_and_reported(finished):
    out, outcome, told = finished
    assert outcome.new == 3
    assert [record.key for record in outcome.records] == [trial.key for trial in TRIALS]
    assert list(outcome.records) == read_records(out / "records.jsonl")
    assert "l1" in outcome.report.read_text(encoding="utf-8")
    assert [done for done, _ in told] == [0, 1, 2, 2, 3]


def test_pruning_is_physical_proved_and_costs_something(finished):
    _, outcome, _ = finished
    for record in outcome.records:
        assert record.macs.after < 0.6 * record.macs.before
        assert all(row.after == row.before - int(0.4 * row.before) for row in record.widths if row.after != row.before)
        assert any(row.after < row.before for row in record.widths)
        assert record.verified_difference < 1e-6
        assert record.accuracy_dense > 0.5  # two epochs: far above one in ten
        assert record.accuracy_pruned < record.accuracy_dense
        assert record.accuracy_repaired is not None and record.accuracy_repaired > record.accuracy_pruned


def test_criteria_choose_different_channels(finished):
    _, outcome, _ = finished
    first, second, _ = outcome.records
    assert first.macs == second.macs
    assert first.accuracy_pruned != second.accuracy_pruned


def test_a_second_run_only_writes_the_report_again(finished, monkeypatch):
    out, outcome, _ = finished
    monkeypatch.setattr(demo, "fit", lambda *_, **__: pytest.fail("something was trained again"))
    outcome.report.unlink()
    again = run_demo(out, TRIALS)
    assert again.new == 0
    assert again.records == outcome.records
    assert again.report.exists()


def test_an_interrupted_run_goes_on_and_ends_with_the_same_numbers(finished, tmp_path, monkeypatch):
    _, outcome, _ = finished

    def interrupt(done, line):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path, TRIALS[:2], interrupt)
    assert len(read_records(tmp_path / "records.jsonl")) == 1
    assert not (tmp_path / "report.html").exists()
    recipes = []
    fit = demo.fit
    monkeypatch.setattr(demo, "fit", lambda *args, **options: recipes.append(args[2]) or fit(*args, **options))
    resumed = run_demo(tmp_path, TRIALS[:2])
    assert resumed.new == 1
    assert recipes == [demo.RECOVERY]  # the dense model came from its checkpoint
    assert [settled(r) for r in resumed.records] == [settled(r) for r in outcome.records[:2]]


@pytest.mark.parametrize("content", [b"", b"\x80\x02}q\x00.", b"\x10\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_damaged_checkpoint_is_made_again(finished, tmp_path, content):
    out, outcome, _ = finished
    path = tmp_path / "dense-seed0.safetensors"
    path.write_bytes(content)
    assert baseline(0, tmp_path, fingerprint()).test == outcome.records[0].accuracy_dense
    assert path.read_bytes() == (out / "dense-seed0.safetensors").read_bytes()


def test_records_of_other_settings_are_not_mixed_in(finished, tmp_path, monkeypatch):
    _, outcome, _ = finished
    write_records(tmp_path / "records.jsonl", outcome.records)
    monkeypatch.setattr(demo, "RECOVERY", Recipe(epochs=2, lr=0.02))
    with pytest.raises(InputError, match=r"another settings.*--out"):
        run_demo(tmp_path, TRIALS)
    assert read_records(tmp_path / "records.jsonl") == list(outcome.records)
