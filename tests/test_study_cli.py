"""`secateur study ...`: what it prints, its exit codes, and one line per error."""

import csv
import io
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("sqlalchemy")
pytest.importorskip("pydantic")

import secateur.cli.study as commands
import study_work
from secateur.report import Failure
from secateur.study import Store, read_study, trials_of
from secateur.study.driver import run_study
from secateur.study.spec import field_lines
from study_work import Here, database, finished
from test_cli import failed, run

TOML = """\
name = "tiny"
title = "A tiny study"
models = ["digits_net"]
data = ["digits"]
sparsities = [0.5]
seeds = [0, 1]
calibration = 200
methods = [{ criterion = "l1" }, { criterion = "fpgm", label = "geometric median" }]
training = { epochs = 1, batch_size = 256, lr = 0.05 }
tuning = { epochs = 1, batch_size = 256, lr = 0.02 }
controls = { random = false, smaller = false }
latency = { batches = [1], seconds = 1e-6 }
"""
TRIALS = 2 * (2 + 1)  # two methods and the unpruned control; l1 is by magnitude already
PROFILES = """
[profiles.cpu]
seeds = [0]

[profiles.gpu]
seeds = [0, 1, 2]
"""


class Shop:
    """A folder with a study file, a store and a place to work."""

    def __init__(self, folder, content=TOML):
        self.folder, self.file, self.url = folder, folder / "study.toml", f"sqlite:///{folder / 'results.db'}"
        self.file.write_text(content)

    @property
    def study(self):
        return read_study(self.file, None)

    @property
    def trials(self):
        return trials_of(self.study)

    @property
    def store(self):
        return Store(self.url)

    def __call__(self, command, *more):
        places = ["--store", self.url, *(["--work", self.folder / "work"] if command in ("run", "status") else [])]
        return run("study", command, self.file, *places, *more)

    def filled(self, trials):
        store = self.store
        for trial in trials:
            store.add(self.study.name, finished(trial))
        return store


@pytest.fixture
def shop(tmp_path):
    return Shop(tmp_path)


@pytest.fixture
def here(monkeypatch):
    """Trials run in this process."""
    monkeypatch.setattr(commands, "_executor", lambda *_: Here())


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A study that was run, once, and what that said."""
    shop = Shop(tmp_path_factory.mktemp("ran"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(commands, "_executor", lambda *_: Here())
        return shop, shop("run")


# -- starting up -----------------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy():
    code = (
        "import sys, secateur.cli; from typer.testing import CliRunner;"
        "call = lambda *words: CliRunner().invoke(secateur.cli.app, ['study', *words, '--help']);"
        "names = ('run', 'status', 'rows', 'report', 'compare', 'schema');"
        "assert all(name in call().output for name in names);"
        "assert all(call(name).exit_code == 0 for name in names);"
        "heavy = ('torch', 'numpy', 'sqlalchemy', 'plotly', 'ray', 'sklearn', 'pyarrow', 'filelock', 'secateur.study');"
        "print([name for name in heavy if name in sys.modules])"  # typer itself brings pydantic
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


# -- run -------------------------------------------------------------------------------------------------------------


def test_run_tells_every_trial_and_how_to_get_the_report(ran):
    shop, result = ran
    assert result.exit_code == 0, result.output
    lines = result.stderr.splitlines()
    assert sum("dense model" in line and "is trained" in line for line in lines) == 2
    numbered = [line.split("]")[0] for line in lines if "fine-tuned" in line]
    assert numbered == [f"[{number}/{TRIALS}" for number in range(1, TRIALS + 1)]
    assert result.stdout.splitlines() == [
        f"{TRIALS} trials: {TRIALS} new, 0 were there.",
        f"Report: secateur study report {shop.file} --store {shop.url}",
    ]


def test_run_again_does_nothing(ran, here):
    shop, _ = ran
    again = shop("run")
    assert (again.exit_code, again.stderr) == (0, "")
    assert f"0 new, {TRIALS} were there" in again.stdout


def test_a_failed_trial_is_exit_code_1_and_can_be_tried_again(shop, monkeypatch):
    def broken(*arguments, **options):
        return run_study(*arguments, **options, work=study_work.raising, prepare=None)

    (shop.folder / "work").mkdir()
    (shop.folder / "work" / "broken").touch()
    monkeypatch.setattr(commands, "_executor", lambda *_: Here())
    monkeypatch.setattr("secateur.study.driver.run_study", broken)
    first = shop("run")
    assert first.exit_code == 1
    assert "3 of the new ones failed" in first.stdout
    assert "failed: ValueError: the loss is nan" in first.stderr
    second = shop("run")
    assert (second.exit_code, "0 new, 6 were there" in second.stdout) == (0, True)
    (shop.folder / "work" / "broken").unlink()
    third = shop("run", "--retry-failed")
    assert (third.exit_code, "3 new, 3 were there" in third.stdout) == (0, True)
    assert all(row.error is None for row in shop.store.rows("tiny"))


def test_ctrl_c_is_exit_code_130_and_one_line(shop, monkeypatch, here):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("secateur.study.driver.run_study", interrupted)
    result = shop("run")
    assert result.exit_code == 130
    assert result.stderr.splitlines() == [
        "Interrupted. Finished trials are in the store; run the same command again to go on."
    ]


def test_a_profile_is_a_scale(tmp_path, here):
    shop = Shop(tmp_path, TOML + PROFILES)
    for profile, seeds in (("cpu", 1), ("gpu", 3)):
        result = shop("run", "--profile", profile, "--dry-run", "--workers", "1")
        assert result.stdout.splitlines()[-1] == f"{3 * seeds} trials"
    failed(shop("run", "--profile", "gpus"), "UnknownNameError", "Did you mean 'gpu'?")


def test_a_dry_run_lists_everything_and_leaves_nothing_behind(shop):
    result = shop("run", "--dry-run", "--workers", "2")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[-1] == f"{TRIALS} trials"
    assert sum(line.strip().startswith("dense digits_net on digits, seed") for line in lines) == 2
    for trial in shop.trials:
        assert str(trial) in result.stdout
    assert "A tiny study" in result.stdout
    assert "minutes to go on one worker" in result.stdout
    assert "0 of the trials are done." in result.stdout
    assert sorted(path.name for path in shop.folder.iterdir()) == ["study.toml"]


def test_a_dry_run_of_a_finished_study_costs_nothing(ran):
    shop, _ = ran
    result = shop("run", "--dry-run", "--workers", "1")
    assert result.stdout.count(" done") >= TRIALS
    assert f"{TRIALS} of the trials are done." in result.stdout
    assert "0 minutes to go on one worker" in result.stdout
    assert "dense digits_net" not in result.stdout


# -- status, rows, report, compare -----------------------------------------------------------------------------------


def test_status_of_a_study_under_way(shop):
    store = shop.filled(shop.trials[:3])
    store.add_failure("tiny", Failure(shop.trials[3].key, "ValueError: the loss is nan\nand more"))
    result = shop("status")
    assert result.exit_code == 0, result.output
    assert f"A tiny study: 4 of {TRIALS} trials are done." in result.stdout
    assert "1 failed:" in result.stdout
    assert f"{shop.trials[3].key}: ValueError: the loss is nan" in result.stdout
    assert "and more" not in result.stdout
    assert "trials per hour" in result.stdout
    assert "not running in" in result.stdout


def test_status_of_a_finished_study(ran):
    result = ran[0]("status", "--watch")  # which ends where everything is done
    assert f"{TRIALS} of {TRIALS} trials are done." in result.stdout
    assert "failed" not in result.stdout and "expected end" not in result.stdout


def test_status_names_what_runs(shop, monkeypatch):
    from secateur.study.dense import Workplace

    seen = []
    place = Workplace(shop.folder / "work")
    told = lambda done, line: seen.append(shop("status").stdout)  # noqa: E731 - one line is enough
    run_study("tiny", shop.trials[:2], shop.store, Here(2), place, work=study_work.nothing, prepare=None, told=told)
    assert f"running: {shop.trials[1].key}" in seen[0]


@pytest.mark.parametrize("form", ["csv", "json", "parquet"])
def test_rows_are_written_to_standard_output(ran, form):
    shop, _ = ran
    places = ["study", "rows", str(shop.file), "--store", shop.url, "--format", form]
    command = [sys.executable, "-c", "from secateur.cli import main; main()", *places]
    if form == "parquet":  # bytes: through a real pipe
        parquet = pytest.importorskip("pyarrow.parquet")
        done = subprocess.run(command, capture_output=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        keys = parquet.read_table(io.BytesIO(done.stdout)).column("key").to_pylist()
    else:
        result = shop("rows", "--format", form)
        assert result.exit_code == 0, result.output
        rows = json.loads(result.stdout) if form == "json" else list(csv.DictReader(io.StringIO(result.stdout)))
        keys = [row["key"] for row in rows]
    assert keys == [trial.key for trial in shop.trials]


def test_the_report_is_written(ran, tmp_path):
    shop, _ = ran
    result = shop("report", "--out", tmp_path / "report")
    assert result.exit_code == 0, result.output
    written = [tmp_path / "report" / name for name in ("report.html", "report.md")]
    assert result.stdout.split() == [str(path.resolve()) for path in written]
    for path in written:
        content = path.read_text(encoding="utf-8")
        assert "A tiny study" in content and "geometric median" in content


def test_two_methods_of_a_study_are_compared(ran):
    shop, _ = ran
    result = run("study", "compare", "l1", "geometric median", "--study", shop.file, "--store", shop.url)
    assert result.exit_code == 0, result.output
    assert "geometric median against l1" in result.stdout
    arguments = ["l1", "median", "--study", shop.file, "--store", shop.url]
    failed(run("study", "compare", *arguments), "UnknownNameError", "Did you mean 'geometric median'?")


def test_a_study_compared_with_itself_differs_by_nothing(ran):
    shop, _ = ran
    result = run("study", "compare", shop.file, shop.file, "--store", shop.url, "--other-store", shop.url)
    assert result.exit_code == 0, result.output
    failed(run("study", "compare", "l1", "l2", "--store", shop.url), "InputError", "--study FILE")


def test_schema_explains_every_field():
    result = run("study", "schema")
    assert result.exit_code == 0
    for name, _, _, meaning in field_lines():
        assert name in result.stdout
        assert meaning.split()[0] in result.stdout
    assert "[profiles.NAME]" in result.stdout
    schema = json.loads(run("study", "schema", "--format", "json").stdout)
    assert schema["additionalProperties"] is False


# -- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (TOML.replace("sparsities", "sparsity"), ["sparsity: unknown key; did you mean 'sparsities'?", "study.toml"]),
        (TOML.replace('"l1"', '"taylr"'), ["Did you mean 'taylor'?"]),
        (TOML.replace("[0.5]", "[50]"), ["sparsities[0]"]),
        ("name = ", ["no TOML"]),
    ],
)
@pytest.mark.parametrize("command", ["run", "status", "rows", "report"])
def test_a_wrong_study_gets_one_line(tmp_path, command, content, words):
    shop = Shop(tmp_path, content)
    Store(shop.url).close()
    failed(shop(command), "InputError", *words)


@pytest.mark.parametrize("command", ["status", "rows", "report"])
def test_a_store_that_is_not_there_gets_one_line(shop, command):
    failed(shop(command), "ArtifactError", "there is no store", "results.db", "run the study first")
    assert not (shop.folder / "results.db").exists()


def test_a_report_of_nothing_gets_one_line(shop):
    shop.store.close()
    failed(shop("report"), "InputError", "no trial of 'tiny'", "run it first")
    assert shop("rows").stdout == "key,finished,error\n"


@pytest.mark.parametrize(
    ("url", "kind", "words"),
    [
        ("mysql://host/db", "InputError", ["a store is SQLite or PostgreSQL"]),
        ("postgresql://127.0.0.1:9/none?connect_timeout=2", "OSError", ["cannot be used"]),
        ("NOTES", "ArtifactError", ["no SQLite database"]),
        ("OTHER", "ArtifactError", ["something else"]),
        ("/proc/nowhere/results.db", "FileNotFoundError", ["/proc/nowhere"]),
    ],
)
def test_a_store_that_cannot_be_used_gets_one_line(shop, tmp_path, url, kind, words, here):
    import sqlite3

    if url == "NOTES":
        url = str(tmp_path / "notes.txt")
        (tmp_path / "notes.txt").write_text("no database at all, but quite a lot of text" * 100)
    if url == "OTHER":
        url = str(tmp_path / "other.db")
        with sqlite3.connect(url) as link:
            link.execute("CREATE TABLE photographs (name TEXT)")
    failed(run("study", "run", shop.file, "--store", url, "--work", tmp_path / "work"), kind, *words)
    assert not (tmp_path / "work").exists()


def test_a_full_disk_gets_one_line(shop, monkeypatch, here):
    def full(*arguments, **options):
        return run_study(*arguments, **options, work=study_work.filling, prepare=None)

    (shop.folder / "work").mkdir()
    (shop.folder / "work" / "full").touch()
    monkeypatch.setattr("secateur.study.driver.run_study", full)
    result = shop("run")
    assert result.exit_code == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("OSError: ") and "No space left on device" in last and "the same command goes on" in last
    assert len(shop.store.rows("tiny")) == 3


def test_wrong_options_get_one_line(shop):
    failed(shop("run", "--executor", "slurm"), "UnknownNameError", "Known: local, ray")
    failed(shop("rows", "--format", "xml"), "UnknownNameError", "csv, json, parquet")
    failed(run("study", "schema", "--format", "yaml"), "UnknownNameError", "Known: json, text")
    failed(run("study", "run", shop.folder / "none.toml"), "FileNotFoundError", "none.toml")
    assert shop("run", "--workers", "0").exit_code == 2


def test_a_gpu_that_is_not_there_gets_one_line(shop):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    failed(shop("run", "--device", "cuda"), "InputError", "this machine has none")


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_both_databases_give_the_same_rows(kind, tmp_path):
    with database(kind, tmp_path) as url:
        shop = Shop(tmp_path)
        shop.url = url
        shop.filled(shop.trials).close()
        result = shop("rows", "--format", "json")
        assert result.exit_code == 0, result.output
        rows = json.loads(result.stdout)
    expected = [json.loads(finished(trial).record.to_json()) for trial in shop.trials]
    labels = {"control": None, "method": None}
    assert [{**row, **labels} for row in rows] == [
        {"key": row["key"], "finished": row["finished"], "error": None, **values, **labels}
        for row, values in zip(rows, expected, strict=True)
    ]
