"""The driver and its workers, by really doing it: killed, interrupted, out of space, and every trial exactly once."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("sqlalchemy")
pytest.importorskip("pydantic")

import study_work
from secateur.errors import DataError, InputError
from secateur.study import Store, trials_of
from secateur.study.dense import Workplace
from secateur.study.driver import ATTEMPTS, run_study, running
from secateur.study.executors import Job, LocalExecutor, outcome
from study_kills import numbers, sessions_processes
from study_work import Here, calls, database, small

FIVE = trials_of(small(seeds=[0, 1, 2, 3, 4]))


@pytest.fixture
def place(tmp_path):
    return Workplace(tmp_path / "work")


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "results.db"))


def waited(condition, seconds=120.0):
    """Wait until a condition holds; what it gave."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
    return found


def gone(session: int) -> float:
    """Wait for the last process of a session; the seconds it took."""
    start = time.monotonic()
    waited(lambda: not sessions_processes(session), 10.0)
    return time.monotonic() - start


# -- zero-work trials on real workers --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_200_trials_run_exactly_once_each_under_4_workers(kind, tmp_path):
    study = small(seeds=list(range(20)), sparsities=[0.05 * place for place in range(1, 11)])
    trials, place, told = trials_of(study), Workplace(tmp_path / "work"), []
    with database(kind, tmp_path) as url:
        store = Store(url)
        outcome = run_study(
            study.name,
            trials,
            store,
            LocalExecutor(4),
            place,
            work=study_work.nothing,
            prepare=None,
            told=lambda done, line: told.append(done),
        )
        rows, curves = store.rows(study.name), store.curves(study.name)
        store.close()
    keys = [trial.key for trial in trials]
    assert len(keys) == 200
    assert sorted(calls(place.folder)) == sorted(keys)
    assert sorted(row.key for row in rows) == sorted(keys)
    assert sorted(curves) == sorted(keys)
    assert {row.key: row.record for row in rows} == {trial.key: study_work.found(trial) for trial in trials}
    assert (outcome.new, outcome.known, outcome.failures) == (200, 0, ())
    assert told == list(range(1, 201))


@pytest.fixture(scope="module")
def eventful(tmp_path_factory):
    """Five trials on two workers, of which some are killed and one raises."""
    folder = tmp_path_factory.mktemp("eventful")
    store, place, told = Store(str(folder / "results.db")), Workplace(folder / "work"), []
    outcome = run_study(
        "small",
        FIVE,
        store,
        LocalExecutor(2),
        place,
        work=study_work.eventful,
        prepare=None,
        told=lambda done, line: told.append(line),
    )
    return outcome, {row.key: row for row in store.rows("small")}, calls(place.folder), told


def test_a_trial_whose_worker_is_killed_is_done_again(eventful):
    _, rows, attempts, told = eventful
    assert attempts.count(FIVE[1].key) == 2
    assert rows[FIVE[1].key].record == study_work.found(FIVE[1])
    assert sum(FIVE[1].key in line and "SIGKILL" in line and "again" in line for line in told) == 1


def test_a_trial_that_kills_every_worker_becomes_a_failure(eventful):
    outcome, rows, attempts, _ = eventful
    assert attempts.count(FIVE[2].key) == ATTEMPTS == 3
    assert rows[FIVE[2].key].record is None
    assert "its worker died (signal SIGKILL), 3 times" in rows[FIVE[2].key].error
    assert FIVE[2].key in {failure.key for failure in outcome.failures}


def test_a_trial_that_raises_becomes_a_failure_with_its_place(eventful):
    outcome, rows, attempts, told = eventful
    assert attempts.count(FIVE[3].key) == 1
    error = rows[FIVE[3].key].error
    assert error.startswith("RuntimeError: of no use\n")
    assert "study_work.py" in error
    assert any(line == f"{FIVE[3].key} failed: RuntimeError: of no use" for line in told)
    assert len(outcome.failures) == 2


def test_the_others_are_not_disturbed(eventful):
    outcome, rows, attempts, _ = eventful
    assert (outcome.new, outcome.known, len(rows)) == (5, 0, 5)
    for trial in (FIVE[0], FIVE[4]):
        assert attempts.count(trial.key) == 1
        assert rows[trial.key].record == study_work.found(trial)


# -- the pool of processes -------------------------------------------------------------------------------------------


def surroundings():
    """What a worker sees."""
    import torch

    return os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads()


def test_each_worker_has_its_gpu_and_one_thread_and_a_dead_one_is_replaced():
    executor = LocalExecutor(2, gpus=("3", "1"))
    try:
        assert executor.slots == 2
        assert executor.ended(0.0) == []
        for name in "ab":
            executor.start(Job(name, surroundings, ()))
        answers = []
        waited(lambda: len(answers.extend(executor.ended(0.1)) or answers) == 2)
        assert {ended.value for ended in answers} == {("3", "1", 1), ("1", "1", 1)}
        executor.start(Job("dies", os._exit, (7,)))
        (gone,) = waited(lambda: executor.ended(0.1))
        assert (gone.name, gone.died) == ("dies", "its worker died (exit code 7)")
        executor.start(Job("again", surroundings, ()))
        (answer,) = waited(lambda: executor.ended(0.1))
        assert answer.value == ("3", "1", 1)
        executor.start(Job("killed", time.sleep, (600,)))
    finally:
        start = time.monotonic()
        executor.stop()
    assert time.monotonic() - start < 5


LONG = """
import sys, time
from pathlib import Path
from secateur.study.executors import Job, LocalExecutor
import study_work

executor = LocalExecutor(1)
executor.start(Job("long", study_work.forever, (Path(sys.argv[1]),)))
time.sleep(600)
"""


def test_a_worker_ends_in_the_middle_of_a_job_when_its_driver_is_killed(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(study_work.__file__).parent)}
    driver = subprocess.Popen(
        [sys.executable, "-c", LONG, str(tmp_path)], env=environment, start_new_session=True, stderr=subprocess.PIPE
    )
    waited(lambda: calls(tmp_path) or driver.poll() is not None)
    (worker,) = map(int, calls(tmp_path))
    assert {driver.pid, worker} <= set(sessions_processes(driver.pid))
    driver.kill()
    driver.wait()
    assert gone(driver.pid) < 10


def test_workers_and_gpus_are_as_many():
    with pytest.raises(InputError, match="at least 1; got 0"):
        LocalExecutor(0)
    with pytest.raises(InputError, match="2 workers take 2 GPUs"):
        LocalExecutor(2, gpus=("0",))


def raises(error, cause=None):
    raise error from cause


def test_an_outcome_tells_trouble_of_the_machine_from_errors():
    assert outcome("a", max, (1, 2)).value == 2
    full = OSError(28, "No space left on device")
    assert "No space left" in outcome("a", raises, (full,)).trouble
    assert outcome("a", raises, (RuntimeError("not written"), full)).trouble == "RuntimeError: not written"
    foreseen = outcome("a", raises, (DataError("too few images"),))
    assert (foreseen.error, foreseen.trouble) == ("DataError: too few images", "")
    other = outcome("a", raises, (ValueError("odd"),))
    assert other.error.startswith("ValueError: odd\n") and "Traceback" not in other.error.splitlines()[0]


# -- what the driver decides -----------------------------------------------------------------------------------------


def test_finished_trials_are_not_done_again(store, place):
    first = run_study("small", FIVE[:2], store, Here(), place, work=study_work.nothing, prepare=None)
    executor = Here()
    second = run_study("small", FIVE, store, executor, place, work=study_work.nothing, prepare=None)
    assert (first.new, first.known) == (2, 0)
    assert (second.new, second.known) == (3, 2)
    assert calls(place.folder) == [trial.key for trial in FIVE]
    assert executor.started == [trial.key for trial in FIVE[2:]]
    assert executor.stopped == 1


def test_an_interrupted_driver_goes_on_with_what_is_missing(store, place):
    def stop_after_two(done, line):
        if done == 2:
            raise KeyboardInterrupt

    executor = Here(slots=2)
    with pytest.raises(KeyboardInterrupt):
        run_study("small", FIVE, store, executor, place, work=study_work.nothing, prepare=None, told=stop_after_two)
    assert executor.stopped == 1
    assert len(store.rows("small")) == 2
    again = run_study("small", FIVE, store, Here(), place, work=study_work.nothing, prepare=None)
    assert (again.new, again.known) == (3, 2)
    assert len(store.rows("small")) == 5


def test_a_failed_trial_stays_failed_until_it_is_forgotten(store, place):
    place.folder.mkdir()
    (place.folder / "broken").touch()
    first = run_study("small", FIVE, store, Here(), place, work=study_work.raising, prepare=None)
    assert [failure.key for failure in first.failures] == [FIVE[1].key]
    assert first.new == 5
    (place.folder / "broken").unlink()
    second = run_study("small", FIVE, store, Here(), place, work=study_work.raising, prepare=None)
    assert (second.new, second.known, second.failures) == (0, 5, ())
    assert store.forget_failures("small") == 1
    third = run_study("small", FIVE, store, Here(), place, work=study_work.raising, prepare=None)
    assert (third.new, third.known, third.failures) == (1, 4, ())
    assert calls(place.folder).count(FIVE[1].key) == 2
    assert {row.key: row.record for row in store.rows("small")} == {t.key: study_work.found(t) for t in FIVE}


def test_a_full_disk_stops_everything_and_loses_nothing(store, place):
    place.folder.mkdir()
    (place.folder / "full").touch()
    with pytest.raises(OSError, match=r"No space left on device.*the same command goes on") as caught:
        run_study("small", FIVE, store, Here(), place, work=study_work.filling, prepare=None)
    assert len(str(caught.value).splitlines()) == 1
    assert FIVE[1].key in str(caught.value)
    assert [row.key for row in store.rows("small")] == [FIVE[0].key]
    assert not any(row.error for row in store.rows("small"))
    (place.folder / "full").unlink()
    again = run_study("small", FIVE, store, Here(), place, work=study_work.filling, prepare=None)
    assert (again.new, again.known, again.failures) == (4, 1, ())
    assert calls(place.folder).count(FIVE[0].key) == 1


def test_a_full_disk_while_training_stops_everything_and_loses_nothing(store, place, monkeypatch):
    (trial,) = trials_of(small())

    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            run_study("small", (trial,), store, Here(), place)
    assert len(str(caught.value).splitlines()) == 1
    assert store.rows("small") == []
    assert run_study("small", (trial,), store, Here(), place).failures == ()
    assert store.rows("small")[0].record is not None


def test_one_folder_takes_one_driver_of_a_study_at_a_time(store, place):
    met = []

    def second(done, line):
        with pytest.raises(InputError, match=r"another process runs the study 'small' in .*wait for it") as caught:
            run_study("small", FIVE, store, Here(), place, work=study_work.nothing, prepare=None)
        met.append(caught.value)
        run_study("other", FIVE[:1], store, Here(), place, work=study_work.nothing, prepare=None)

    run_study("small", FIVE[:1], store, Here(), place, work=study_work.nothing, prepare=None, told=second)
    assert len(met) == 1
    assert store.studies() == {"small": 1, "other": 1}


def test_what_runs_can_be_seen_from_outside(store, place):
    seen = []
    run_study(
        "small",
        FIVE,
        store,
        Here(slots=3),
        place,
        work=study_work.nothing,
        prepare=None,
        told=lambda done, line: seen.append(running(place, "small")),
    )
    assert seen[0] == sorted(trial.key for trial in FIVE[:3])
    assert running(place, "small") == []
    (place.folder / "small.running.json").write_text(json.dumps({"running": ["a ghost"]}))
    assert running(place, "small") == []  # nobody holds the lock


def tried(dense, place):
    """A dense model that is not to be had for seed 1."""
    study_work.note(place.folder, f"dense{dense.seed}")
    if dense.seed == 1:
        raise DataError("no images")


def test_a_dense_model_is_prepared_once_before_the_first_trial_that_needs_it(store, place):
    study = small(seeds=[0, 2], sparsities=[0.3, 0.5], methods=[{"criterion": "l1"}, {"criterion": "l2"}])
    trials = trials_of(study)
    run_study("small", trials, store, Here(), place, work=study_work.nothing, prepare=tried)
    keys = [trial.key for trial in trials]
    assert calls(place.folder) == ["dense0", *keys[:4], "dense2", *keys[4:]]


def test_trials_fail_with_their_dense_model_and_others_do_not(store, place):
    trials = trials_of(small(seeds=[0, 1, 2], sparsities=[0.3, 0.5]))
    outcome = run_study("small", trials, store, Here(), place, work=study_work.nothing, prepare=tried)
    assert {failure.key for failure in outcome.failures} == {trial.key for trial in trials if trial.seed == 1}
    assert {failure.error for failure in outcome.failures} == {"its dense model failed: DataError: no images"}
    assert sorted(calls(place.folder)) == sorted(
        ["dense0", "dense1", "dense2", *(trial.key for trial in trials if trial.seed != 1)]
    )
    assert outcome.new == 6


def test_a_store_that_is_gone_stops_everything(store, place, tmp_path):
    executor = Here()

    def lose(done, line):
        with sqlite3.connect(tmp_path / "results.db") as link:
            link.execute("DROP TABLE IF EXISTS secateur_trials")

    with pytest.raises(OSError, match=r"results\.db cannot be used: no such table"):
        run_study("small", FIVE, store, executor, place, work=study_work.nothing, prepare=None, told=lose)
    assert executor.stopped == 1
    assert len(calls(place.folder)) == 2


# -- real trainings through the command line: interrupted, a worker killed, the driver killed ----------------------

TOML = """\
name = "ordeal"
models = ["digits_net"]
data = ["digits"]
sparsities = [0.5]
seeds = [0]
calibration = 200
methods = [{ criterion = "l1" }]
training = { epochs = 8, batch_size = 32, lr = 0.05 }
tuning = { epochs = 8, batch_size = 32, lr = 0.02 }
controls = { random = false, magnitude = false, smaller = false }
latency = { batches = [1], seconds = 1e-6 }
"""
NEEDED = 8 + 8 + 8  # epochs of the dense model, of the pruned one and of the control


class Ordeal:
    """A study in a folder, its driver, and the epochs that its workers have begun."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file, self.log = folder / "study.toml", folder / "epochs"
        self.file.write_text(TOML)
        self.arguments = [self.file, "--store", folder / "results.db", "--work", folder / "work", "--workers", "1"]

    def begin(self) -> subprocess.Popen[str]:
        command = [sys.executable, study_work.__file__, "study", "run", *map(str, self.arguments)]
        environment = {**os.environ, "SECATEUR_TEST_EPOCHS": str(self.log), "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            env=environment,
            text=True,
            start_new_session=True,
        )

    def epochs(self) -> list[list[int]]:
        """(process, epoch) of every epoch begun."""
        return [list(map(int, line.split())) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def until(self, process: subprocess.Popen[str], epoch: int, more: int) -> int:
        """Wait until an epoch of that number has begun after so many others; the worker that trains it."""

        def there():
            assert process.poll() is None, process.communicate()[1]
            return next((worker for worker, number in self.epochs()[more:] if number >= epoch), None)

        return waited(there)


@pytest.fixture(scope="module")
def ordeal(tmp_path_factory):
    """Interrupted while the dense model trains, a worker killed and then the driver while the pruned one does."""
    ordeal, facts = Ordeal(tmp_path_factory.mktemp("ordeal")), {}
    process = ordeal.begin()
    ordeal.until(process, 3, 0)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: workers get it too
    facts["interrupted"] = (*process.communicate(timeout=60), process.returncode)
    gone(process.pid)

    before = len(ordeal.epochs())
    process = ordeal.begin()
    # What is left of the dense training begins after epoch 3; epoch 3 of another training is the pruned model's.
    waited(lambda: any((ordeal.folder / "work" / "dense").glob("*.safetensors")) or process.poll() is not None)
    facts["dense epochs"] = len(ordeal.epochs())
    worker = ordeal.until(process, 3, max(before, 8))
    os.kill(worker, signal.SIGKILL)
    facts["epochs at the worker's death"] = len(ordeal.epochs())
    other = waited(lambda: next((w for w, _ in ordeal.epochs()[before:] if w != worker), None))
    assert other != worker
    process.kill()
    facts["killed"] = (*process.communicate(timeout=60), process.returncode)
    facts["seconds until nothing ran"] = gone(process.pid)

    process = ordeal.begin()
    facts["finished"] = (*process.communicate(timeout=200), process.returncode)
    return ordeal, facts


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The same study in one go, in this process."""
    from secateur.study import read_study

    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "study.toml").write_text(TOML)
    study = read_study(folder / "study.toml")
    store = Store(str(folder / "results.db"))
    run_study(study.name, trials_of(study), store, Here(), Workplace(folder))
    return study, store


def test_ctrl_c_ends_with_one_line_and_code_130(ordeal):
    out, err, code = ordeal[1]["interrupted"]
    lines = [line for line in err.splitlines() if not line.startswith("[")]
    assert code == 130
    assert lines == ["Interrupted. Finished trials are in the store; run the same command again to go on."]
    assert out == ""


def test_no_worker_survives_a_killed_driver(ordeal):
    *_, code = ordeal[1]["killed"]
    assert code == -signal.SIGKILL
    assert ordeal[1]["seconds until nothing ran"] < 10


def test_a_killed_worker_is_told_of(ordeal):
    _, err, _ = ordeal[1]["killed"]
    assert "its worker died (signal SIGKILL); again" in err


def test_the_same_command_finishes_the_study(ordeal, undisturbed):
    out, err, code = ordeal[1]["finished"]
    assert code == 0, err
    study, _ = undisturbed
    killed = Store(str(ordeal[0].folder / "results.db"), create=False)
    keys = [trial.key for trial in trials_of(study)]
    assert sorted(row.key for row in killed.rows("ordeal")) == sorted(keys)
    assert f"{len(keys)} trials: " in out


def test_the_numbers_are_those_of_an_undisturbed_run(ordeal, undisturbed):
    study, store = undisturbed
    killed = Store(str(ordeal[0].folder / "results.db"), create=False)
    alone = {row.key: numbers(row) for row in store.rows(study.name)}
    assert {row.key: numbers(row) for row in killed.rows(study.name)} == alone
    assert killed.curves(study.name) == store.curves(study.name)
    assert all(values["accuracy_finetuned"] > 0.5 for values in alone.values())  # something was learnt


def test_epochs_that_were_done_are_not_trained_again(ordeal):
    begun = len(ordeal[0].epochs())
    assert NEEDED <= begun <= NEEDED + 3  # one was under way each of the three times


def test_nothing_is_left_but_dense_models(ordeal):
    work = ordeal[0].folder / "work"
    assert list((work / "trials").iterdir()) == []
    assert not (work / "ordeal.running.json").exists()
    assert [path.suffix for path in (work / "dense").iterdir() if path.suffix != ".lock"] == [".safetensors"]
