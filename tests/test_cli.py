"""The command line: answers, exit codes, and one line per error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import secateur.cli as command_line
from secateur.cli import app
from secateur.nets import digits_net

SHAPE = ["--input", "2,1,8,8"]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def failed(result, kind, *words):
    """The command ended with exit code 2 and one line `kind: ...` on standard error."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith("Note:")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith(f"{kind}: ")
    for word in words:
        assert word in lines[0]


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "dense.safetensors"
    save_file(digits_net().state_dict(), path)
    return path


# --- starting up


def test_torch_is_not_imported_for_help():
    code = (
        "import sys, secateur.cli; from typer.testing import CliRunner;"
        "assert CliRunner().invoke(secateur.cli.app, ['--help']).exit_code == 0;"
        "assert CliRunner().invoke(secateur.cli.app, ['prune', '--help']).exit_code == 0;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'plotly', 'sklearn')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_lists_the_commands():
    result = run("--help")
    assert result.exit_code == 0
    for name in ("demo", "inspect", "prune", "measure", "export", "criteria", "study"):
        assert name in result.output


def test_version():
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("secateur ")


# --- what the commands do


def test_inspect_names_groups_and_costs():
    result = run("inspect", "digits_net", *SHAPE)
    assert result.exit_code == 0, result.output
    assert "groups can be pruned" in result.stdout
    assert "MACs" in result.stdout
    assert "stem" in result.stdout


def test_prune_verifies_and_saves_what_load_understands(tmp_path, weights):
    from secateur.artifacts import load

    out = tmp_path / "small.safetensors"
    options = ["--sparsity", "0.5", "--scope", "layer", "--checkpoint", weights, "--out", out]
    result = run("prune", "digits_net", *SHAPE, *options)
    assert result.exit_code == 0, result.output
    assert "verified" in result.stdout
    assert "fresh" not in result.stderr
    small = load(out, digits_net())
    assert small.stem.out_channels == 8
    assert small(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_pruning_fresh_weights_says_so():
    result = run("prune", "digits_net", *SHAPE, "--max-macs", "0.5")
    assert result.exit_code == 0, result.output
    assert "not trained" in result.stderr


def test_measure_compares_an_artefact_with_the_dense_model(tmp_path, weights):
    out = tmp_path / "small.safetensors"
    assert run("prune", "digits_net", *SHAPE, "--sparsity", "0.5", "--checkpoint", weights, "--out", out).exit_code == 0
    result = run("measure", "digits_net", *SHAPE, "--artifact", out, "--seconds", "0")
    assert result.exit_code == 0, result.output
    assert "eager" in result.stdout
    assert "the baseline" in result.stdout


def test_export_writes_the_pruned_model_and_says_what_is_dynamic(tmp_path, weights):
    from secateur.artifacts import load

    small, out = tmp_path / "small.safetensors", tmp_path / "small.pt2"
    options = ["--sparsity", "0.5", "--checkpoint", weights, "--out", small]
    assert run("prune", "digits_net", *SHAPE, *options).exit_code == 0
    result = run("export", "digits_net", *SHAPE, "--artifact", small, "--out", out)
    assert result.exit_code == 0, result.output
    assert "dynamic: batch 1 or more" in result.stdout
    assert "batch 2 and batch 3" in result.stdout
    assert "fresh" not in result.stderr
    images = torch.randn(5, 1, 8, 8)
    program = torch.export.load(out)  # written by this test
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), load(small, digits_net()).eval()(images))


def test_exporting_fresh_weights_says_so(tmp_path):
    result = run("export", "digits_net", *SHAPE, "--out", tmp_path / "net.pt2")
    assert result.exit_code == 0, result.output
    assert "not trained" in result.stderr


def test_criteria_are_listed_with_what_they_need():
    result = run("criteria")
    assert result.exit_code == 0, result.output
    for name in ("l1", "l2", "bn_scale", "random", "taylor_fo"):
        assert name in result.stdout
    assert "gradient" in result.stdout
    assert "1608.08710" in result.stdout


def test_a_model_of_the_users_own_is_found_in_the_current_folder(tmp_path, monkeypatch):
    source = (
        "from torch import nn\ndef tiny():\n    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))\n"
    )
    (tmp_path / "users_model.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    result = run("inspect", "users_model:tiny", "--input", "3,4")
    assert result.exit_code == 0, result.output
    assert "1 of" in result.stdout


def test_the_same_seed_builds_the_same_weights():
    from secateur.naming import named_model

    one, other, third = (named_model("digits_net", seed) for seed in (0, 0, 1))
    assert torch.equal(one.stem.weight, other.stem.weight)
    assert not torch.equal(one.stem.weight, third.stem.weight)


# --- what goes wrong


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (["inspect", "resnet21"], "UnknownNameError", ["'resnet20'"]),
        (["inspect", "no_such_package.models:build"], "InputError", ["no_such_package", "package.module:callable"]),
        (["inspect", "secateur.nets:resnet21"], "UnknownNameError", ["'resnet20'"]),
        (["inspect", "secateur.nets"], "InputError", ["package.module:callable"]),
        (["inspect", "builtins:dict"], "InputError", ["dict", "not a torch.nn.Module"]),
        (["inspect", "digits_net", "--input", "1,x"], "InputError", ["1,3,32,32", "'1,x'"]),
        (["inspect", "digits_net", "--input", "1,0,8,8"], "InputError", ["above 0"]),
        (["inspect", "digits_net", "--input", "1,3,8,8"], "ExampleInputsError", ["[1, 3, 8, 8]"]),
        (["prune", "digits_net", *SHAPE, "--sparsity", "30"], "TargetError", ["30", "0.3"]),
        (["prune", "digits_net", *SHAPE, "--sparsity", "-0.1"], "TargetError", ["-0.1"]),
        (["prune", "digits_net", *SHAPE, "--sparsity", "1.0"], "TargetError", ["1.0"]),
        (["prune", "digits_net", *SHAPE], "TargetError", ["sparsity"]),
        (["prune", "digits_net", *SHAPE, "--max-macs", "half"], "InputError", ["--max-macs", "'half'"]),
        (["prune", "digits_net", *SHAPE, "--max-macs", "10"], "TargetError", []),
        (
            ["prune", "digits_net", *SHAPE, "--sparsity", "0.5", "--criterion", "taylr_fo"],
            "UnknownNameError",
            ["taylor_fo"],
        ),
        (["prune", "digits_net", *SHAPE, "--sparsity", "0.5", "--out", "x.pt"], "InputError", [".safetensors", "x.pt"]),
        (
            ["prune", "digits_net", *SHAPE, "--sparsity", "0.5", "--checkpoint", "none.safetensors"],
            "ArtifactError",
            ["none"],
        ),
        (["measure", "digits_net", *SHAPE, "--runtime", "eagre"], "UnknownNameError", ["'eager'"]),
        (["measure", "digits_net", *SHAPE, "--artifact", "none.safetensors"], "ArtifactError", ["none.safetensors"]),
        (["export", "digits_net", *SHAPE, "--out", "net.pt"], "InputError", [".pt2", ".onnx", "'net.pt'"]),
        (["export", "digits_net", *SHAPE, "--out", "net.pt2", "--tolerance", "-1"], "InputError", ["-1"]),
        (
            ["export", "digits_net", *SHAPE, "--out", "net.pt2", "--artifact", "a", "--checkpoint", "b"],
            "InputError",
            ["--artifact", "--checkpoint"],
        ),
    ],
)
def test_a_wrong_argument_gets_one_line(arguments, kind, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed(run(*arguments), kind, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("collection", ["timm", "torchvision"])
def test_a_missing_collection_says_what_to_install(collection, monkeypatch):
    monkeypatch.setitem(sys.modules, collection, None)
    monkeypatch.setitem(sys.modules, f"{collection}.models", None)
    failed(run("inspect", f"{collection}:resnet18"), "InputError", f"pip install {collection}")


@pytest.mark.parametrize("collection", ["timm", "torchvision"])
def test_collections_build_by_name_and_suggest_the_nearest(collection, monkeypatch):
    class Models:
        @staticmethod
        def list_models():
            return ["tinynet", "tinynet_large", "other"]

        @staticmethod
        def create_model(name):
            return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

        @staticmethod
        def get_model(name, weights):
            return Models.create_model(name)

    for name in ("timm", "torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, name, Models)
    assert run("inspect", f"{collection}:tinynet", "--input", "2,4").exit_code == 0
    failed(run("inspect", f"{collection}:tinynt"), "UnknownNameError", "Did you mean 'tinynet'?")


def test_a_checkpoint_of_another_architecture_names_the_first_tensor(tmp_path):
    path = tmp_path / "wide.safetensors"
    save_file(digits_net(width=24).state_dict(), path)
    result = run("prune", "digits_net", *SHAPE, "--sparsity", "0.5", "--checkpoint", path)
    failed(result, "PlanMismatchError", "'stem.weight'", "[24, 1, 3, 3]", "[16, 1, 3, 3]")


def test_a_pickle_is_refused_and_never_opened(tmp_path):
    path = tmp_path / "weights.safetensors"
    torch.save(digits_net().state_dict(), path)
    for option, command in (("--checkpoint", ["prune", "--sparsity", "0.5"]), ("--artifact", ["measure"])):
        result = run(command[0], "digits_net", *SHAPE, *command[1:], option, path)
        failed(result, "ArtifactError", "pickle")


def test_a_full_disk_gets_one_line_and_the_old_file_survives(tmp_path, weights, monkeypatch):
    out = tmp_path / "small.safetensors"
    out.write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = run("prune", "digits_net", *SHAPE, "--sparsity", "0.5", "--checkpoint", weights, "--out", out)
    assert result.exit_code == 2
    assert "No space left on device" in result.stderr
    assert out.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense.safetensors", "small.safetensors"]


def test_a_folder_that_cannot_be_made_gets_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = run("demo", "--out", tmp_path / "file" / "demo")
    failed(result, "NotADirectoryError", "Not a directory")


def test_debug_adds_the_traceback():
    for arguments in (["--debug", "inspect", "resnet21"], ["inspect", "resnet21", "--debug"]):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "Traceback" in result.stderr
        assert result.stderr.splitlines()[-1].startswith("UnknownNameError: ")


def test_an_error_in_the_users_module_keeps_its_own_traceback(tmp_path, monkeypatch):
    (tmp_path / "broken_model.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    result = run("inspect", "broken_model:build")
    assert isinstance(result.exception, ModuleNotFoundError)
    assert result.exception.name == "a_package_that_is_not_there"


def test_exit_codes_reach_the_shell():
    script = "from secateur.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "inspect", "resnet21"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


# --- the demo, as far as the command line is concerned


def test_ctrl_c_in_the_demo_says_how_to_go_on(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    import secateur.demo

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(secateur.demo, "run_demo", interrupted)
    result = run("demo", "--out", tmp_path)
    assert result.exit_code == 130
    assert "run the same command again" in result.stderr
    assert str(tmp_path) in result.stderr


@pytest.mark.slow
def test_the_demo_prints_its_table_and_where_the_report_is(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    import secateur.demo
    from test_demo import short

    monkeypatch.setattr(secateur.demo, "demo_study", short)
    result = run("demo", "--out", tmp_path / "new", "--seeds", "1")
    assert result.exit_code == 0, result.output
    assert "[3/3]" in result.stderr  # plain lines where there is no terminal
    assert "fine-tuned" in result.stdout
    assert Path(result.stdout.splitlines()[-1].removeprefix("Report: ")) == tmp_path / "new" / "report.html"
    again = run("demo", "--out", tmp_path / "new", "--seeds", "1")
    assert again.exit_code == 0
    assert "were done before" in again.stderr


def test_a_terminal_gets_a_progress_bar(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with command_line.progress(2) as told:
        told(1, "one trial")
