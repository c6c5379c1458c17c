"""The examples for models of other libraries run as they stand, and do what they print."""

from __future__ import annotations

import importlib.util
import json
import re
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

import secateur as sc
from zoo import load_torchvision

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

needs_timm = pytest.mark.skipif(
    not (find_spec("timm") and find_spec("onnxruntime")), reason="needs secateur[vision,onnx]"
)
needs_transformers = pytest.mark.skipif(not find_spec("transformers"), reason="needs secateur[hf]")


def example(name: str) -> ModuleType:
    """A script of examples/, as a module."""
    load_torchvision()  # timm and transformers import it, and a build of torch for CPUs alone lacks its operators
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def macs(text: str) -> list[float]:
    """Every count of MACs that a text names, in order."""
    units = {"G": 1e9, "M": 1e6, "k": 1e3}
    return [float(number) * units[unit] for number, unit in re.findall(r"([\d.]+) ([GMk]) MACs", text)]


@needs_timm
@pytest.mark.parametrize(
    "name",
    ["test_vit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("test_convnext", "vit_tiny_patch16_224"))],
)
def test_the_timm_example_prunes_saves_loads_and_exports(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = example("timm_model")
    module.main(["--model", name, "--max-macs", "0.6", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    closed, opened = printed.index("prune_residual=False"), printed.index("prune_residual=True")
    assert closed < opened and printed.count("verified: ") == 2
    assert "bit for bit" in printed and "dynamic: batch 1 or more" in printed

    dense = module.timm.create_model(name).eval()
    example_input = torch.randn(1, *dense.pretrained_cfg["input_size"])
    small = sc.load(tmp_path / "small.safetensors", dense)
    before, after = (sc.count(model, example_input) for model in (dense, small))
    assert 0.5 * before.macs < after.macs <= 0.6 * before.macs
    assert macs(printed)[0] == pytest.approx(before.macs, rel=0.01)
    assert (tmp_path / "small.onnx").stat().st_size < 4.1 * after.params + 1e6


@needs_transformers
def test_the_hugging_face_example_prunes_heads_and_saves_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = example("hugging_face")
    module.main(["--out", str(tmp_path / "small")])
    printed = capsys.readouterr().out
    before, *_, after = macs(printed)
    assert after <= 0.5 * before * 1.01  # both are rounded
    dense, cut, tuned = (float(share) for share in re.findall(r"([\d.]+)%(?= ->|$)", printed, re.MULTILINE)[-3:])
    assert dense > 90 and tuned > 90 and cut <= 100

    small = sc.load(tmp_path / "small")
    heads = small.bert.encoder.layer[0].attention.self
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert heads.query.out_features < config["hidden_size"]
    assert heads.query.out_features % heads.attention_head_size == 0
    tokens = module.AutoTokenizer.from_pretrained(tmp_path / "small")("the plot was not dull", return_tensors="pt")
    assert small(**tokens).logits.argmax(-1).item() == 1


@needs_transformers
def test_the_hugging_face_example_takes_a_model_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = example("hugging_face")
    model, tokenizer = module.tiny_bert()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "own")
    module.main(["--model", str(tmp_path / "own"), "--epochs", "0", "--out", str(tmp_path / "small")])
    assert "bit for bit" in capsys.readouterr().out
    assert (tmp_path / "small" / "model.safetensors").is_file()


@needs_transformers
def test_the_causal_example_opens_both_models_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = example("causal_lm")
    module.main(["--epochs", "5", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "50.0% of the blocks' weights are zero" in printed and "layers fitted by least squares" in printed
    dense, sparse, small = map(float, re.findall(r"perplexity ([\d.]+)", printed))
    assert dense < 2.5 and sparse < 1.1 * dense and small < 1.1 * dense
    assert printed.count("the music was not slow so we stayed .") == 3
    before, *_, after = macs(printed)
    assert after <= 0.7 * before * 1.01

    sparse_again = module.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert 0.49 < module.zero_share(sparse_again, ["model.layers.0.mlp.up_proj.weight"]) < 0.51
    small_again = sc.load(tmp_path / "small")
    assert small_again.model.layers[0].mlp.up_proj.out_features < small_again.config.intermediate_size
    tokenizer = module.AutoTokenizer.from_pretrained(tmp_path / "small")
    assert module.goes_on(small_again, tokenizer, "the plot was funny").endswith("so we stayed .")


@needs_transformers
def test_the_causal_example_takes_a_model_and_a_text_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = example("causal_lm")
    model, tokenizer = module.tiny_llama()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "own")
    (tmp_path / "text").write_text(module.reviews(400, seed=3))
    module.main(["--model", str(tmp_path / "own"), "--text", str(tmp_path / "text"), "--out", str(tmp_path / "pruned")])
    assert "bit for bit" in capsys.readouterr().out
    assert (tmp_path / "pruned" / "small" / "model.safetensors").is_file()


@pytest.mark.skipif(not (find_spec("transformers") and find_spec("accelerate")), reason="needs secateur[trainer]")
def test_weights_go_along_a_schedule_in_the_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    example("in_the_trainer").main()
    zero, accuracy = map(float, re.findall(r"([\d.]+)%", capsys.readouterr().out))
    assert zero == pytest.approx(80, abs=0.5) and accuracy > 90


@pytest.mark.skipif(not (find_spec("lightning") and find_spec("sklearn")), reason="needs secateur[lightning,data]")
def test_masks_hold_in_lightning(capsys: pytest.CaptureFixture[str]) -> None:
    example("in_lightning").main()
    dense, masked, tuned, zero = map(float, re.findall(r"([\d.]+)%", capsys.readouterr().out))
    assert zero == pytest.approx(80, abs=0.5) and dense > 90 and tuned > max(masked, 90)
