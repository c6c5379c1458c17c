"""The README and the examples do what they show."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.criteria.table import CRITERIA
from secateur.masking import WEIGHT_METHODS
from zoo import load_torchvision

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    """The code blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_the_first_example_prints_what_the_readme_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code, *_), (shown, *_) = blocks("python"), blocks("text")
    assert len([line for line in code.splitlines() if line.strip()]) == 10
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue() == shown
    assert (tmp_path / "small.safetensors").is_file()


def names_of_the_examples() -> dict[str, Any]:
    """What the examples take for granted: a model, an example input, and training data."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 4),
    )
    data = [(torch.randn(32, 3, 8, 8), torch.randint(4, (32,))) for _ in range(18)]
    return {"sc": sc, "model": model, "example": data[0][0][:1], "data": data}


def test_the_steps_run_as_shown() -> None:
    code = blocks("python")[1].replace('("eager", "onnxruntime")', '("eager",), seconds=0.0')
    names = names_of_the_examples()
    exec(compile(code, "README.md", "exec"), names)
    plan, small = names["plan"], names["small"]
    assert isinstance(plan, sc.Plan) and isinstance(small, nn.Module)
    assert plan.macs[1] <= 0.5 * plan.macs[0]
    assert {row.after % 16 for row in plan.widths if row.after < row.before} == {0}


def test_repair_and_methods_run_as_shown(capsys: pytest.CaptureFixture[str]) -> None:
    names = names_of_the_examples()
    for code in blocks("python")[2:4]:
        exec(compile(code, "README.md", "exec"), names)
    assert "layers fitted by least squares" in capsys.readouterr().out
    assert names["masks"].sparsity == 0.5 and names["step"].number == 2


def test_the_guide_to_methods_runs_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = names_of_the_examples()
    guide = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    found = blocks("python", guide)
    assert len(found) == 6
    for code in found:
        exec(compile(code, "methods.md", "exec"), names)
    for name in (*CRITERIA, *WEIGHT_METHODS):
        assert f"`{name}`" in guide


@pytest.mark.skipif(not find_spec("transformers"), reason="needs secateur[hf]")
def test_a_language_model_is_pruned_block_by_block_as_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    load_torchvision()
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128, "vocab_size": 50}
    names: dict[str, Any] = {"sc": sc, "language_model": GPT2LMHeadModel(GPT2Config(**shape))}
    names |= {"batches_of_tokens": [torch.randint(50, (4, 24))], "held_out_tokens": torch.randint(50, (300,))}
    exec(compile(blocks("python")[4], "README.md", "exec"), names)
    assert capsys.readouterr().out.startswith("perplexity ")
    assert names["result"].masks.sparsity == 0.5 and len(list((tmp_path / "blocks").iterdir())) == 2


@pytest.mark.skipif(not find_spec("transformers") or not find_spec("onnxruntime"), reason="needs secateur[hf,onnx]")
def test_a_transformer_is_pruned_saved_and_exported_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    load_torchvision()  # transformers imports it, and a build of torch for CPUs alone lacks its operators
    names: dict[str, Any] = {"sc": sc, "torch": torch}
    exec(compile(blocks("python")[5], "README.md", "exec"), names)
    plan, attention = names["pruned"].plan, names["small"].bert.encoder.layer[0].attention.self
    assert attention.query.weight.shape == (32, 32)  # half of the heads, half of the residual stream
    assert plan.params[1] == sum(parameter.numel() for parameter in names["small"].parameters())
    assert (tmp_path / "small.onnx").is_file()


@pytest.mark.skipif(not find_spec("transformers"), reason="needs secateur[hf]")
def test_the_guide_to_transformers_runs_as_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    load_torchvision()
    from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    decoder = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 50}
    tokens = [torch.randint(50, (16, 12)) for _ in range(8)]
    names: dict[str, Any] = {
        "sc": sc,
        "classifier": BertForSequenceClassification(BertConfig(vocab_size=50, **shape)).eval(),
        "batches": [{"input_ids": ids, "labels": torch.randint(2, (16,))} for ids in tokens],
        "example": {"input_ids": tokens[0][:1]},
        "tokenizer": None,
        "language_model": GPT2LMHeadModel(GPT2Config(**decoder)).eval(),
        "windows": tokens,
        "unseen": torch.randint(50, (300,)),
    }
    guide = (ROOT / "docs" / "transformers.md").read_text(encoding="utf-8")
    found = blocks("python", guide)
    assert len(found) == 6
    for code in found:
        exec(compile(code, "transformers.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "layers fitted by least squares" in printed and printed.count("perplexity ") == 2
    left = sum(parameter.numel() for parameter in names["small"].bert.encoder.parameters())
    assert left <= 0.4 * sum(parameter.numel() for parameter in names["classifier"].bert.encoder.parameters())
    assert names["result"].masks.sparsity == 0.5 and (tmp_path / "sparse" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    files = [link.partition("#")[0] for link in links if not link.startswith("http")]
    missing = [file for file in files if not (page.parent / file).exists()]
    assert not missing
    assert len(links) >= (5 if page.name == "README.md" else 1)


def run_example(name: str) -> None:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()


def test_a_criterion_of_ones_own_prunes_and_repair_brings_accuracy_back(capsys: pytest.CaptureFixture[str]) -> None:
    run_example("own_criterion")
    lines = capsys.readouterr().out.splitlines()
    for line, name in zip(lines[1:4], ("l2", "loud_and_strong", "ensemble(l2, loud_and_strong)"), strict=True):
        cut, repaired = map(float, re.findall(r"([\d.]+)%", line))
        assert line.startswith(name) and repaired > cut + 10
    assert "90.00%" in lines[-1] and float(re.findall(r"([\d.]+)%", lines[-1])[0]) > 80


def test_the_own_loop_example_shrinks_saves_and_loads(capsys: pytest.CaptureFixture[str]) -> None:
    run_example("own_loop")
    lines = capsys.readouterr().out.splitlines()
    macs = [int(line.split()[1].replace(",", "")) for line in lines if line.startswith("dense")]
    steps = [int(line.split()[2].replace(",", "")) for line in lines if line.startswith("step")]
    assert len(steps) == 5 and sorted(steps, reverse=True) == steps
    assert steps[-1] <= 0.25 * macs[0]
    assert "bit for bit" in lines[-1]


def test_the_guide_to_studies_shows_a_study_that_is_one(tmp_path: Path) -> None:
    from secateur.study import read_study, trials_of

    guide = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
    file = tmp_path / "filters.toml"
    file.write_text(blocks("toml", guide)[0], encoding="utf-8")
    trials = trials_of(read_study(file))
    assert {trial.method.criterion for trial in trials} >= {
        "taylor_fo",
        "magnitude",
        "random",
        "l2",
        "unpruned",
        "smaller",
    }
    printed = io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(printed):
        exec(compile(blocks("python", guide)[0], "studies.md", "exec"), {})
    assert printed.getvalue() == "44 trials\n"


@pytest.mark.parametrize("file", sorted((ROOT / "studies").glob("*.toml")), ids=lambda file: file.stem)
def test_every_study_of_the_repository_can_be_read_at_every_scale(file: Path) -> None:
    from secateur.study.reading import references_of
    from secateur.study.spec import read_profiles
    from secateur.study.trials import trials_of

    for study in read_profiles(file).values():
        assert len(trials_of(study)) > 5
        found = references_of(study, file.parent)
        published = (file.parent / study.reference.file).read_text(encoding="utf-8") if study.reference else ""
        nets = [net.stands_for or net.title for net in study.models]
        assert bool(found) == (any(net in published for net in nets) and study.data[0].name != "imagefolder")
        names = {method.title for method in study.methods}
        assert {line.method for line in found} <= names | {""}
