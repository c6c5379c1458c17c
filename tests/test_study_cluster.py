"""Trials on a Ray cluster: nodes come and go, and every trial is in the store exactly once."""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("sqlalchemy")
pytest.importorskip("pydantic")
pytest.importorskip("ray")

import ray

import study_work
from secateur.errors import InputError
from secateur.study import Store, trials_of
from secateur.study.cluster import RayExecutor
from secateur.study.dense import Workplace
from secateur.study.driver import run_study
from secateur.study.executors import Job
from study_work import calls, small

TESTS = str(Path(study_work.__file__).parent)
MEMORY = 80 * 1024 * 1024  # of Ray's store of objects, which hold next to nothing here
TRIALS = trials_of(small(seeds=list(range(8))))


@pytest.fixture
def quiet(monkeypatch):
    """What Ray's processes are started with: they find the work functions, and report nothing to anybody."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")
    yield
    ray.shutdown()


def run(executor, folder, trials=TRIALS, work=study_work.sleepy, told=lambda done, line: None):
    store, place = Store(str(folder / "results.db")), Workplace(folder / "work")
    outcome = run_study("small", trials, store, executor, place, work=work, prepare=None, told=told)
    return outcome, store.rows("small"), calls(place.folder)


@pytest.mark.slow
def test_two_nodes_of_which_one_is_lost_finish_every_trial_once(quiet, tmp_path):
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": MEMORY, "include_dashboard": False}
    )
    try:
        nodes = [cluster.add_node(num_cpus=2, object_store_memory=MEMORY) for _ in range(2)]
        cluster.wait_for_nodes()
        executor = RayExecutor(cluster.address)
        assert executor.slots == 4
        lost = nodes[1].node_id

        def lose() -> None:
            """As soon as a trial sleeps on it."""
            while not any(line.endswith(f"@{lost}") for line in calls(tmp_path / "work")):
                time.sleep(0.01)
            cluster.remove_node(nodes[1], allow_graceful=False)

        with ThreadPoolExecutor(1) as aside:
            losing = aside.submit(lose)
            outcome, rows, lines = run(executor, tmp_path)
            losing.result(timeout=60)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert sorted(row.key for row in rows) == sorted(trial.key for trial in TRIALS)
    assert {row.key: row.record for row in rows} == {trial.key: study_work.found(trial) for trial in TRIALS}
    assert (outcome.new, outcome.failures) == (len(TRIALS), ())
    begun = [line.partition("@") for line in lines]
    assert {key for key, _, _ in begun} == {trial.key for trial in TRIALS}
    again = {key for key, _, node in begun if node == lost} & {key for key, _, node in begun if node != lost}
    assert again  # what slept on the lost node was begun again on the other one
    assert len(begun) == len(TRIALS) + len(again)


def test_a_cluster_of_its_own_ends_with_the_run(quiet, tmp_path):
    executor = RayExecutor()
    assert executor.slots >= 1
    assert executor.ended(0.0) == []
    outcome, rows, attempts = run(executor, tmp_path, TRIALS[:4], study_work.nothing)
    assert not ray.is_initialized()
    assert sorted(attempts) == sorted(trial.key for trial in TRIALS[:4])
    assert {row.key: row.record for row in rows} == {trial.key: study_work.found(trial) for trial in TRIALS[:4]}
    assert (outcome.new, outcome.failures) == (4, ())


@pytest.mark.slow
def test_what_kills_its_worker_is_tried_again_and_then_a_failure(quiet, tmp_path):
    outcome, rows, attempts = run(RayExecutor(max_retries=0), tmp_path, TRIALS[:4], study_work.eventful)
    found = {row.key: row for row in rows}
    assert found[TRIALS[0].key].record == study_work.found(TRIALS[0])
    assert found[TRIALS[1].key].record == study_work.found(TRIALS[1])  # killed once
    assert [attempts.count(trial.key) for trial in TRIALS[:4]] == [1, 2, 3, 1]
    assert found[TRIALS[2].key].error.endswith("3 times")  # kills every worker
    assert "RuntimeError: of no use" in found[TRIALS[3].key].error
    assert {failure.key for failure in outcome.failures} == {TRIALS[2].key, TRIALS[3].key}


def test_a_cluster_that_is_not_there_is_named():
    for address in ("nowhere.invalid:6379", "127.0.0.1:9", "auto"):
        with pytest.raises(InputError, match=f"no Ray cluster at '{address}'"):
            RayExecutor(address)


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'secateur\[cluster\]'"):
        RayExecutor()


@pytest.mark.slow
def test_what_is_under_way_ends_when_the_driver_stops(quiet, tmp_path):
    executor = RayExecutor()
    executor.start(Job("long", time.sleep, (600,)))
    assert executor.ended(0.5) == []
    start = time.monotonic()
    executor.stop()
    assert time.monotonic() - start < 30
