"""The store: the same on SQLite and PostgreSQL, one row per trial, and one clear error for what it cannot use."""

import csv
import io
import json
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import pytest

pytest.importorskip("sqlalchemy")
pytest.importorskip("pydantic")
import sqlalchemy as sa

from secateur.errors import ArtifactError, InputError
from secateur.report import Failure
from secateur.study import Store, trials_of
from secateur.study import store as storing
from secateur.study.reading import FORMATS, Results, as_bytes, progress_of
from secateur.study.results import Point
from study_work import database, finished, found, small

TRIALS = trials_of(small(seeds=list(range(6))))


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    with database(request.param, tmp_path) as found:
        yield found


@pytest.fixture
def store(url):
    opened = Store(url)
    yield opened
    opened.close()


def executed(url, statement):
    """What a statement gives, past the store."""
    engine = sa.create_engine(storing._as_url(url))
    with engine.begin() as link:
        result = link.execute(sa.text(statement))
        answer = result.all() if result.returns_rows else None
    engine.dispose()
    return answer


# -- rows ------------------------------------------------------------------------------------------------------------


def test_what_is_stored_comes_back_equal(store, url):
    result = finished(TRIALS[0])
    assert store.add("a", result)
    again = Store(url, create=False)
    (row,) = again.rows("a")
    assert row.record == result.record
    assert (row.key, row.error, row.seconds) == (TRIALS[0].key, None, result.record.seconds)
    assert again.curves("a") == {TRIALS[0].key: list(result.curve)}
    again.close()


def test_floats_keep_every_bit(store):
    values = {"accuracy_finetuned": 0.1 + 0.2, "speedup": 1 / 3, "verified_difference": 5e-324, "seconds": 1e300}
    point = Point("dense", 1, 1 / 3, 0.1 + 0.2, 5e-10)
    store.add("a", replace(finished(TRIALS[0]), record=replace(found(TRIALS[0]), **values), curve=(point,)))
    (row,) = store.rows("a")
    assert {name: getattr(row.record, name) for name in values} == values
    assert store.curves("a") == {TRIALS[0].key: [point]}


def test_a_trial_is_there_once_and_the_first_one_stays(store):
    first = finished(TRIALS[0])
    later = replace(first, record=replace(first.record, accuracy_finetuned=0.1), curve=first.curve[:1])
    assert store.add("a", first)
    assert not store.add("a", later)
    assert not store.add_failure("a", Failure(TRIALS[0].key, "too late"))
    assert [row.record for row in store.rows("a")] == [first.record]
    assert store.curves("a") == {TRIALS[0].key: list(first.curve)}


def test_studies_do_not_mix(store):
    store.add("a", finished(TRIALS[0]))
    store.add("b", finished(TRIALS[0]))
    store.add("b", finished(TRIALS[1]))
    assert store.studies() == {"a": 1, "b": 2}
    assert store.done("a") == {TRIALS[0].key}
    assert store.done("b") == {trial.key for trial in TRIALS[:2]}
    assert store.done("c") == set()
    assert store.rows("c") == []
    assert set(store.curves("b")) == store.done("b")


def test_rows_come_in_the_order_in_which_they_finished(store):
    order = [TRIALS[3], TRIALS[0], TRIALS[2]]
    for trial in order:
        store.add("a", finished(trial))
    assert [row.key for row in store.rows("a")] == [trial.key for trial in order]
    times = [row.finished for row in store.rows("a")]
    assert times == sorted(times)
    assert [row.key for row in store.rows("a", {TRIALS[2].key, TRIALS[3].key})] == [TRIALS[3].key, TRIALS[2].key]
    assert set(store.curves("a", {TRIALS[2].key})) == {TRIALS[2].key}


def test_a_failure_is_a_row_with_its_error(store):
    store.add_failure("a", Failure(TRIALS[0].key, "RuntimeError: no\nsecond line"), seconds=2.5)
    store.add("a", finished(TRIALS[1]))
    row = store.rows("a")[0]
    assert (row.record, row.error, row.seconds) == (None, "RuntimeError: no\nsecond line", 2.5)
    assert store.done("a") == {TRIALS[0].key, TRIALS[1].key}
    assert store.forget_failures("b") == 0
    assert store.forget_failures("a") == 1
    assert store.done("a") == {TRIALS[1].key}
    assert store.add("a", finished(TRIALS[0]))


@pytest.mark.parametrize("text", ["quote ' and \"", "null \0 byte", "half a pair \udc80", "é → ∞", "x" * 100_000])
def test_an_error_of_any_text_can_be_stored(store, text):
    store.add_failure("a", Failure(TRIALS[0].key, text))
    (row,) = store.rows("a")
    assert row.error[:4] == text[:4]
    if text.isprintable():
        assert row.error == text


def test_long_names_fit(store):
    study = small(
        name="n" * 100,
        methods=[{"criterion": ["l1", "l2", "fpgm", "bn_scale", "taylor", "taylor_fo", "apoz", "activation_mean"] * 9}],
    )
    (trial,) = trials_of(study)
    assert len(trial.key) < 200  # it is a file name, too, with something before and after it
    assert store.add(study.name, finished(trial))
    assert store.done(study.name) == {trial.key}


# -- several at once ---------------------------------------------------------------------------------------------------


def test_one_of_many_writers_stores_a_trial(store, url):
    others = [Store(url, create=False) for _ in range(4)]

    def add_all(mine):
        return sum(mine.add("a", finished(trial)) for trial in TRIALS)

    with ThreadPoolExecutor(4) as pool:
        added = sum(pool.map(add_all, others))
    assert added == len(TRIALS)
    assert len(store.rows("a")) == len(TRIALS)
    assert all(len(points) == 2 for points in store.curves("a").values())
    for other in others:
        other.close()


def test_several_that_make_a_store_at_once_all_get_it(url, tmp_path):
    for turn in range(10):
        place = f"sqlite:///{tmp_path}/{turn}.db" if url.startswith("sqlite") else url
        together = Barrier(4)

        def opened(_, place=place, together=together):
            together.wait()
            Store(place).close()
            return True

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(opened, range(4)))
        assert executed(place, "SELECT value FROM secateur_meta") == [(str(storing.SCHEMA),)]
        for table in ("meta", "trials", "curves"):
            executed(place, f"DROP TABLE secateur_{table}")


# -- schema ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["2", "0", "two"])
def test_a_store_of_another_schema_is_refused_and_left_alone(store, url, version):
    store.add("a", finished(TRIALS[0]))
    executed(url, f"UPDATE secateur_meta SET value = '{version}'")
    with pytest.raises(ArtifactError, match=f"schema {version}.*reads schema {storing.SCHEMA}"):
        Store(url)
    assert executed(url, "SELECT count(*) FROM secateur_trials") == [(1,)]


def test_a_store_that_is_not_there_is_not_made_for_reading(url):
    with pytest.raises(ArtifactError, match=r"there is no store.*--store"):
        Store(url, create=False)
    Store(url).close()
    Store(url, create=False).close()


# -- what cannot be used -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mysql://user@host/db", "mysql.*SQLite or PostgreSQL"),
        ("oracle+cx://user@host/db", "oracle.*SQLite or PostgreSQL"),
        ("sqlite+nonsense:///x.db", "nonsense"),
        ("postgresql+nonsense://host/db", "nonsense"),
        ("://", "no URL"),
        ("postgresql://host:port/db", "no URL|port"),
        ("", "no URL|empty|name"),
    ],
)
def test_a_wrong_url_is_named(url, words):
    with pytest.raises(InputError, match=words):
        Store(url)


def test_a_password_is_not_shown():
    with pytest.raises(OSError, match="cannot be used") as caught:
        Store("postgresql://me:secret@127.0.0.1:9/none?connect_timeout=2")
    assert "secret" not in str(caught.value)
    assert "127.0.0.1" in str(caught.value)


def test_a_missing_server_gets_one_error():
    with pytest.raises(OSError, match=r"refused|timeout"):
        Store("postgresql://127.0.0.1:9/none?connect_timeout=2")


def test_a_file_that_is_no_database(tmp_path):
    path = tmp_path / "notes.db"
    path.write_text("these are notes, and quite a lot of them\n" * 100)
    with pytest.raises(ArtifactError, match=r"notes\.db is no SQLite database"):
        Store(str(path))
    assert path.read_text().startswith("these are notes")


def test_a_database_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as link:
        link.execute("CREATE TABLE photographs (name TEXT)")
    with pytest.raises(ArtifactError, match=r"something else.*photographs"):
        Store(f"sqlite:///{path}")
    with sqlite3.connect(path) as link:
        assert link.execute("SELECT name FROM sqlite_master").fetchall() == [("photographs",)]


def test_another_programs_tables_may_share_a_server(url):
    if url.startswith("sqlite"):
        pytest.skip("a file belongs to one program")
    executed(url, "CREATE TABLE photographs (name TEXT)")
    store = Store(url)
    assert store.add("a", finished(TRIALS[0]))
    store.close()


def test_a_folder_is_no_store(tmp_path):
    with pytest.raises(OSError, match="unable to open database file"):
        Store(str(tmp_path))


def test_a_path_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        Store(str(tmp_path / "file" / "results.db"))
    with pytest.raises(OSError):
        Store("/proc/nowhere/results.db")


def test_a_read_only_store_can_be_read_and_says_that_it_cannot_be_written(tmp_path):
    path = tmp_path / "results.db"
    Store(str(path)).add("a", finished(TRIALS[0]))
    frozen = Store(f"sqlite:///file:{path}?mode=ro&uri=true", create=False)
    assert frozen.done("a") == {TRIALS[0].key}
    with pytest.raises(OSError, match="readonly"):
        frozen.add("a", finished(TRIALS[1]))


def test_a_locked_database_is_waited_for_and_then_named(tmp_path, monkeypatch):
    monkeypatch.setattr(storing, "BUSY_SECONDS", 0.2)
    path = tmp_path / "results.db"
    store = Store(str(path))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(OSError, match=r"results\.db.*locked"):
        store.add("a", finished(TRIALS[0]))
    other.execute("COMMIT")
    other.close()
    assert store.add("a", finished(TRIALS[0]))
    assert len(store.rows("a")) == 1


def test_a_lock_that_is_let_go_costs_only_time(tmp_path):
    path = tmp_path / "results.db"
    store = Store(str(path))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with ThreadPoolExecutor(1) as pool:
        adding = pool.submit(store.add, "a", finished(TRIALS[0]))
        with pytest.raises(TimeoutError):
            adding.result(timeout=0.3)
        other.execute("COMMIT")
        assert adding.result(timeout=30)
    other.close()


def test_a_row_that_is_no_record_is_named(store, url):
    store.add("a", finished(TRIALS[0]))
    executed(url, "UPDATE secateur_trials SET record = '{\"key\": 1}'")
    with pytest.raises(ArtifactError, match="not a record"):
        store.rows("a")


# -- reading it out ----------------------------------------------------------------------------------------------------


@pytest.fixture
def results(store):
    study = small(seeds=[0, 1, 2])
    first, second, third = trials_of(study)
    store.add(study.name, finished(third))
    store.add_failure(study.name, Failure(second.key, 'ValueError: a "quoted", error\nof two lines'))
    store.add(study.name, finished(first))
    return Results.of(study, store)


def test_results_come_in_the_order_of_the_grid(results):
    assert [row.key for row in results.rows] == [trial.key for trial in results.trials]
    assert [record.seed for record in results.records] == [0, 2]
    assert [failure.key for failure in results.failures] == [results.trials[1].key]


def test_labels_are_those_of_the_study_as_it_is_now(results, store):
    renamed = small(
        seeds=[0, 1, 2], models=[{"name": "digits_net", "label": "tiny"}], methods=[{"criterion": "l1", "label": "L1"}]
    )
    again = Results.of(renamed, store)
    assert [(record.model, record.method) for record in again.records] == [("tiny", "L1")] * 2
    assert {record.model for record in results.records} == {"digits_net"}


def test_rows_as_csv_json_and_parquet_say_the_same(results):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    assert set(FORMATS) == {"csv", "json", "parquet"}
    table = list(csv.DictReader(io.StringIO(as_bytes(results.rows, "csv").decode())))
    whole = json.loads(as_bytes(results.rows, "json"))
    columns = parquet.read_table(pyarrow.BufferReader(as_bytes(results.rows, "parquet"))).to_pylist()
    assert [row["key"] for row in table] == [row["key"] for row in whole] == [row["key"] for row in columns]
    assert [row["error"] or None for row in table] == [row["error"] for row in whole] == [r["error"] for r in columns]
    for line, full, column in zip(table, whole, columns, strict=True):
        if full["error"] is not None:
            assert line["accuracy_finetuned"] == "" and column["accuracy_finetuned"] is None
            continue
        assert float(line["accuracy_finetuned"]) == full["accuracy_finetuned"] == column["accuracy_finetuned"]
        assert (int(line["params_dense"]), int(line["params_pruned"])) == tuple(full["params"])
        assert json.loads(line["fingerprint"]) == full["fingerprint"] == json.loads(column["fingerprint"])


@pytest.mark.parametrize("form", ["csv", "json", "parquet"])
def test_no_rows_are_a_file_too(form):
    content = as_bytes([], form)
    assert (
        content.decode().strip() == {"csv": "key,finished,error", "json": "[]"}[form] if form != "parquet" else content
    )


def test_progress_follows_from_the_times(results, store):
    progress = progress_of(results)
    assert (progress.total, progress.done, progress.failed) == (3, 3, 1)
    assert progress.expected_end is None and progress.per_hour > 0
    more = progress_of(Results.of(small(seeds=list(range(9))), store))
    assert (more.total, more.done) == (9, 3)
    assert more.expected_end is not None and more.last == progress.last
    nothing_yet = progress_of(Results.of(small(seeds=[7]), store))
    assert (nothing_yet.per_hour, nothing_yet.expected_end, nothing_yet.last) == (None, None, None)
