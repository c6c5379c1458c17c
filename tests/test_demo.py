"""The demo: a study like any other, proved right, kept trial by trial, and reported."""

import json

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("sqlalchemy")

from secateur.demo import demo_study, run_demo
from secateur.errors import InputError
from secateur.study import Store, trials_of
from secateur.study.spec import Controls


def short(seeds=1):
    """A few seconds' worth of the demo, with everything in it."""
    study = demo_study(seeds)
    changes = {
        "training": study.training.model_copy(update={"epochs": 2, "warmup_epochs": 0.0}),
        "tuning": study.tuning.model_copy(update={"epochs": 1}),
        "latency": study.latency.model_copy(update={"batches": (1,), "seconds": 1e-3}),
        "methods": study.methods[:1],
        "sparsities": (0.4,),
        "controls": Controls(magnitude=False, smaller=False),
    }
    return study.model_copy(update=changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out, told = tmp_path_factory.mktemp("demo"), []
    return out, run_demo(out, short(), lambda done, line: told.append((done, line)), workers=1), told


def test_the_grid_has_every_setting_once_per_seed():
    trials = trials_of(demo_study(2))
    assert len(trials) == 2 * (4 * 5 + 1 + 1)  # four criteria at five sparsities, unpruned, one smaller
    assert {trial.method.criterion for trial in trials} == {"l1", "l2", "bn_scale", "random", "unpruned", "smaller"}
    with pytest.raises(InputError):
        demo_study(0)


def test_every_trial_is_recorded_and_reported(finished):
    out, outcome, told = finished
    assert (outcome.new, outcome.failed) == (3, 0)
    assert [record.key for record in outcome.records] == [trial.key for trial in trials_of(short())]
    assert "l1" in outcome.report.read_text(encoding="utf-8") and (out / "report.md").exists()
    assert [done for done, _ in told] == [0, 1, 2, 3]


def test_pruning_is_physical_proved_and_costs_something(finished):
    for record in finished[1].records:
        if record.prunes != "channels":
            continue
        assert record.macs.after < 0.6 * record.macs.before
        assert all(row.after == row.before - int(0.4 * row.before) for row in record.widths if row.after != row.before)
        assert any(row.after < row.before for row in record.widths)
        assert record.verified_difference < 1e-6
        assert record.accuracy_dense > 0.5  # two epochs: far above one in ten
        assert record.accuracy_pruned < record.accuracy_dense
        assert record.accuracy_repaired is not None and record.accuracy_repaired > record.accuracy_pruned


def test_a_second_run_only_writes_the_report_again(finished):
    out, outcome, _ = finished
    outcome.report.unlink()
    again = run_demo(out, short(), workers=1)
    assert again.new == 0
    assert again.records == outcome.records
    assert again.report.exists()


def test_other_settings_are_other_trials(finished):
    out, outcome, _ = finished
    study = short()
    longer = study.model_copy(update={"tuning": study.tuning.model_copy(update={"epochs": 2})})
    assert not {trial.key for trial in trials_of(longer)} & Store(str(out / "results.db")).done("digits")
    assert len(outcome.records) == 3


def test_records_are_plain_values(finished):
    for record in finished[1].records:
        assert json.loads(record.to_json())["fingerprint"]["data"]["test"] == 359
