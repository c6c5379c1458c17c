"""Export: what was written computes what the model computes, at other sizes too, or there is one clear error."""

from __future__ import annotations

import copy
import io
import json
import os
import sys
import zipfile
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur.exporting as exporting_module
from secateur.errors import ExportError, InputError, ModelError
from secateur.exporting import MAGNIFYING_TOLERANCE, TOLERANCE, export
from secateur.inputs import Inputs, as_inputs
from secateur.programs import Axis, exported_program, innermost, most_open, open_axes, prepared, resized
from secateur.pruning import prune

FORMATS = pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
Pair = namedtuple("Pair", "first second")


@dataclass
class Answer:
    logits: Tensor
    hidden: tuple[Any, ...]
    note: str = "not a tensor"


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class FixedBatch(Convolutions):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).view(2, 6, 36).mean(2))


class Encoder(nn.Module):
    """Tokens and a padding mask in, a dataclass out; at most 16 tokens, which it never says."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.positions = nn.Parameter(torch.randn(16, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor, scale: float = 1.0, *, mask: Tensor | None = None) -> Answer:
        x = self.embed(ids) + self.positions[: ids.shape[1]]
        x = self.layer(x, src_key_padding_mask=None if mask is None else mask == 0) * scale
        return Answer(self.head(x), (x, Pair(x[:, 0], None)))


class TwoInputs(nn.Module):
    """Keyword inputs, one of them nested; a dict out, whose keys are those of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor, rest: dict[str, Tensor]) -> dict[str, Any]:
        y = self.right(rest["y"])
        return {"x": self.left(x) * y, "y": y, "loss": None}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 6, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(ids))[0])


class Biased(nn.Module):
    """Attention by two kernels, whose outputs are laid out differently in memory; a tuple out."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, 2, 16, 16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        heads = x.unflatten(2, (2, 4)).transpose(1, 2)
        length = x.shape[1]
        y = F.scaled_dot_product_attention(heads, heads, heads, self.bias[:, :, :length, :length])
        z = F.scaled_dot_product_attention(heads, heads, heads)
        return y.transpose(1, 2).reshape(*x.shape[:2], -1), z.transpose(1, 2).view(*x.shape[:2], -1).mean(1)


class Branching(Convolutions):
    """Control flow that depends on values: no graph can hold it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.sum()) > 0 else -x)


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 8)


def tokens(batch: int = 2, length: int = 5) -> Tensor:
    return torch.randint(0, 20, (batch, length))


def awake(model: nn.Module) -> nn.Module:
    """The model in training mode with BatchNorm statistics that are not the identity."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.train()


def run_file(path: Path, inputs: Any) -> list[Tensor]:
    """The outputs of an exported file, by the runtime that it is for."""
    inputs = as_inputs(inputs)
    if path.suffix == ".pt2":
        with torch.no_grad():
            output = inputs.call(torch.export.load(path).module())  # a file that this test wrote
        return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    fed = {name: tensor.numpy() for name, tensor in zip(names, inputs.tensors(), strict=True)}
    return [torch.from_numpy(array) for array in session.run(None, fed)]


def assert_same(actual: list[Tensor], *expected: Tensor) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert other.abs().max() > 0, "a dead output proves nothing"
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def dims(report: Any) -> dict[str, tuple[tuple[str, int], ...]]:
    return {axis.name: axis.places for axis in report.dynamic}


# --- what comes out


@FORMATS
def test_convolutions_at_other_batch_sizes(tmp_path: Path, suffix: str) -> None:
    model, path = awake(Convolutions()), tmp_path / f"net{suffix}"
    report = export(model, images(), path)
    assert dims(report) == {"batch": (("x", 0),)} and report.fixed == {}
    assert report.dynamic[0].least == 1 and report.dynamic[0].most is None
    assert report.checked == ({"batch": 2}, {"batch": 3})
    assert report.tolerance == TOLERANCE and report.max_difference <= TOLERANCE
    assert (report.kind, report.inputs, list(report.differences)) == (suffix[1:], ("x",), ["output"])
    assert report.path == path and report.size_bytes == path.stat().st_size
    assert (report.opset is None) == (suffix == ".pt2")
    model.eval()
    for batch in (1, 7):
        x = images(batch)
        assert_same(run_file(path, x), model(x))


def test_one_example_leaves_the_batch_open(tmp_path: Path) -> None:
    model, path = awake(Convolutions()), tmp_path / "net.pt2"
    report = export(model, images(1), path)
    assert dims(report) == {"batch": (("x", 0),)}
    assert report.checked == ({"batch": 1}, {"batch": 2})
    x = images(5)
    assert_same(run_file(path, x), model.eval()(x))


@pytest.mark.parametrize("suffix", [".onnx", pytest.param(".pt2", marks=pytest.mark.slow)])
def test_attention_over_any_length_with_keywords_and_a_dataclass(tmp_path: Path, suffix: str) -> None:
    model, path = Encoder().train(), tmp_path / f"net{suffix}"
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    report = export(model, Inputs((tokens(), 2.0), {"mask": mask}), path)
    assert dims(report) == {"batch": (("ids", 0), ("mask", 0)), "sequence": (("ids", 1), ("mask", 1))}
    assert [axis.most for axis in report.dynamic] == [None, 16]
    assert report.tolerance == MAGNIFYING_TOLERANCE
    assert list(report.differences) == ["logits", "hidden_0", "hidden_1_first"]
    ids, mask = tokens(3, 11), torch.ones(3, 11, dtype=torch.int64)
    mask[1, 4:] = 0
    answer = model.eval()(ids, 2.0, mask=mask)
    assert_same(
        run_file(path, Inputs((ids, 2.0), {"mask": mask})), answer.logits, answer.hidden[0], answer.hidden[1][0]
    )


@FORMATS
def test_two_nested_keyword_inputs_and_a_dict(tmp_path: Path, suffix: str) -> None:
    model, path = TwoInputs(), tmp_path / f"net{suffix}"
    report = export(model, {"rest": {"y": torch.randn(2, 4)}, "x": torch.randn(2, 5)}, path)
    assert report.inputs == ("rest_y", "x")  # as they were given
    assert dims(report) == {"batch": (("rest_y", 0), ("x", 0))}
    assert set(report.differences).isdisjoint(report.inputs)  # ONNX wants all names to differ
    inputs = {"rest": {"y": torch.randn(6, 4)}, "x": torch.randn(6, 5)}
    output = model(**inputs)
    assert_same(run_file(path, inputs), output["x"], output["y"])


@FORMATS
def test_a_recurrent_net_says_that_its_length_is_fixed(tmp_path: Path, suffix: str) -> None:
    model, path = Recurrent(), tmp_path / f"net{suffix}"
    report = export(model, tokens(length=3), path)
    assert dims(report) == {"batch": (("ids", 0),)}
    assert "constant (3)" in report.fixed["sequence"]
    assert "fixed: sequence: " in str(report)
    ids = tokens(4, 3)
    assert_same(run_file(path, ids), model(ids))


def test_a_model_of_one_batch_size_says_so(tmp_path: Path) -> None:
    report = export(FixedBatch(), images(), tmp_path / "net.pt2")
    assert report.dynamic == () and report.checked == ({},)
    assert "does not run at 3 instead of 2" in report.fixed["batch"]
    assert "at the example's sizes" in str(report)


@FORMATS
def test_arguments_that_are_no_tensors_are_built_in(tmp_path: Path, suffix: str) -> None:
    class Optioned(Convolutions):
        def forward(self, kind: str, x: Tensor, scale: float, other: None) -> Tensor:
            assert (kind, other) == ("scaled", None)
            return super().forward(x) * scale

    model, path, x = Optioned().eval(), tmp_path / f"net{suffix}", images(3)
    report = export(model, ("scaled", images(), 3.0, None), path)
    assert report.inputs == ("x",)
    assert_same(run_file(path, ("scaled", x, 3.0, None)), model("scaled", x, 3.0, None))


def test_an_attention_mask_grows_with_the_sequence(tmp_path: Path) -> None:
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.attention(x, x, x, attn_mask=mask)[0]

    causal = torch.triu(torch.full((6, 6), -torch.inf), 1)
    report = export(Causal(), (torch.randn(2, 6, 8), causal), tmp_path / "net.pt2")
    assert dims(report) == {"batch": (("x", 0),), "sequence": (("x", 1), ("mask", 0), ("mask", 1))}


@FORMATS
def test_a_pruned_model(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"net{suffix}"
    pruned = prune(awake(Convolutions()), images(), sparsity=0.5).model
    report = export(pruned, images(), path)
    assert dims(report) == {"batch": (("x", 0),)}
    x = images(5)
    assert_same(run_file(path, x), pruned.eval()(x))


def test_onnx_names_what_it_takes_and_gives(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    report = export(Biased(), torch.randn(2, 5, 8), tmp_path / "net.onnx")
    model = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(model)

    def named(values: Any) -> dict[str, list[Any]]:
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    assert named(model.graph.input) == {"x": ["batch", "sequence", 8]}
    assert named(model.graph.output) == {"output_0": ["batch", "sequence", 8], "output_1": ["batch", 8]}
    assert report.opset == model.opset_import[0].version
    assert "bias" in {tensor.name for tensor in model.graph.initializer}
    assert b"test_exporting.py" not in (tmp_path / "net.onnx").read_bytes()  # nothing of the machine it was made on


def test_pt2_holds_no_pickle_no_example_and_no_source(tmp_path: Path) -> None:
    export(Convolutions(), images(), tmp_path / "net.pt2")
    with zipfile.ZipFile(tmp_path / "net.pt2") as file:
        contents = {entry.filename.partition("/")[2]: file.read(entry) for entry in file.infolist()}
    assert [content for name, content in contents.items() if "sample_inputs" in name] == [b""]
    config = json.loads(next(content for name, content in contents.items() if name.endswith("weights_config.json")))
    assert config["config"].keys() == Convolutions().state_dict().keys()
    assert {entry["use_pickle"] for entry in config["config"].values()} == {False}
    assert not any(b"test_exporting.py" in content for content in contents.values())


def test_what_only_a_pickle_could_hold_is_refused() -> None:
    def archive(use_pickle: bool) -> io.BytesIO:
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as file:
            config = {"config": {"odd": {"path_name": "weight_0", "use_pickle": use_pickle}}}
            file.writestr("net/data/weights/model_weights_config.json", json.dumps(config))
        return content

    exporting_module._check_no_pickle(archive(False))
    with pytest.raises(ExportError, match=r"'odd' is no ordinary tensor.*pickle"):
        exporting_module._check_no_pickle(archive(True))


# --- the caller's model, and the program alone


def test_the_model_is_not_changed(tmp_path: Path) -> None:
    model = awake(Convolutions())
    model.body[1].eval()
    calls: list[int] = []
    model.register_forward_hook(lambda module, args, output: calls.append(1))
    modes = [module.training for module in model.modules()]
    before, fast = copy.deepcopy(model.state_dict()), torch.backends.mha.get_fastpath_enabled()
    export(model, images(), tmp_path / "net.pt2")
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert len(model._forward_hooks) == 1
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_a_hook_that_changes_the_output_is_exported(tmp_path: Path) -> None:
    model = Convolutions().eval()
    model.head.register_forward_hook(lambda module, args, output: output * 3)
    export(model, images(), tmp_path / "net.pt2")
    x = images()
    assert_same(run_file(tmp_path / "net.pt2", x), model(x))


def test_the_program_is_called_and_named_like_the_model() -> None:
    model = Encoder()
    program = exported_program(model, {"ids": tokens(1, 1)})
    assert list(program.state_dict) == list(model.state_dict())
    ids = tokens(3, 9)
    with torch.no_grad():
        output, expected = program.module()(ids=ids), model.eval()(ids)
    assert list(output) == ["logits", "hidden"]
    assert_same([output["logits"], output["hidden"][0]], expected.logits, expected.hidden[0])


def test_resized_inputs_are_no_copies() -> None:
    inputs = Inputs((tokens(2, 5), torch.randn(2, 3)))
    model = prepared(_Sum(), inputs)
    (batch, sequence), fixed = open_axes(model, inputs)
    assert fixed == {} and (batch.size, sequence.size) == (2, 5)
    larger = resized(inputs, {batch: 4, sequence: 7}).tensors()
    assert [tensor.shape for tensor in larger] == [(4, 7), (4, 3)]
    assert all(torch.equal(new[:2, : old.shape[1]], old) for new, old in zip(larger, inputs.tensors(), strict=True))
    assert not any(torch.equal(new[2:], new[:2]) for new in larger)
    smaller = resized(inputs, {batch: 1, sequence: 2}).tensors()
    assert [tensor.shape for tensor in smaller] == [(1, 2), (1, 3)]


def test_the_most_open_attempt_wins_and_the_rest_has_its_reason() -> None:
    batch, sequence, other = (Axis(name, 2, 3, ()) for name in ("batch", "sequence", "sequence_2"))
    tried = []

    def attempt(axes: tuple[Axis, ...]) -> str:
        tried.append(axes)
        if sequence in axes:
            raise ExportError(f"no, not {'+'.join(axis.name for axis in axes)}")
        return "made"

    assert most_open((batch, sequence, other), attempt) == (
        "made",
        (batch, other),
        {"sequence": "no, not batch+sequence+sequence_2"},
    )
    assert tried == [(batch, sequence, other), (batch, sequence), (batch, other)]

    def refuse(axes: tuple[Axis, ...]) -> str:
        raise ExportError(f"not {len(axes)}")

    with pytest.raises(ExportError, match="not 0"):
        most_open((batch, sequence), refuse)


class _Sum(nn.Module):
    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        return ids.sum(1, keepdim=True) + x


# --- what goes wrong


@pytest.mark.parametrize("name", ["net.pt", "net", "net.ONNX", "net.safetensors"])
def test_another_suffix_names_both(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"\.pt2.*\.onnx.*" + name):
        export(Convolutions(), images(), tmp_path / name)
    assert not list(tmp_path.iterdir())


@FORMATS
def test_control_flow_by_value_is_one_clear_error(
    tmp_path: Path, suffix: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ExportError, match=r"cannot trace.*data-dependent.*torch\.where") as caught:
        export(Branching(), images(), tmp_path / f"net{suffix}")
    assert "\n" not in str(caught.value)
    assert type(caught.value.__cause__).__name__ == "GuardOnDataDependentSymNode"
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_an_op_without_an_onnx_form_is_one_clear_error(tmp_path: Path) -> None:
    class Odd(Convolutions):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(super().forward(x))

    with pytest.raises(ExportError, match=r"cannot translate.*bessel_j0"):
        export(Odd(), images(), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


@FORMATS
def test_a_missing_package_says_what_to_install(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    path = tmp_path / f"net{suffix}"
    if suffix == ".pt2":
        assert export(Convolutions(), images(), path).path == path  # needs none of them
        return
    with pytest.raises(InputError, match=r"exporting to \.onnx needs onnxscript: pip install 'secateur\[onnx\]'"):
        export(Convolutions(), images(), path)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExportError, match=r"cannot write .*(Not a directory|File exists)"):
        export(Convolutions(), images(), tmp_path / "file" / "net.pt2")
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        export(Convolutions(), images(), tmp_path / "folder.pt2")
    (tmp_path / "net.pt2").write_bytes(b"old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ExportError, match=r"No space left on device.*unchanged"):
        export(Convolutions(), images(), tmp_path / "net.pt2")
    assert (tmp_path / "net.pt2").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.pt2", "net.pt2"]


@FORMATS
def test_a_wrong_file_is_never_written(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle sees a program whose weights are not the model's."""
    tampered = exporting_module.program_of

    def wrong(net: nn.Module, inputs: Inputs, axes: Any) -> Any:
        other = copy.deepcopy(net)
        with torch.no_grad():
            other.head.weight[0, 0] += 1e-3
        return tampered(other, inputs, axes)

    monkeypatch.setattr(exporting_module, "program_of", wrong)
    with pytest.raises(ExportError, match=r"differs from the model by .*'output' \(allowed: 1e-05\).*tolerance="):
        export(awake(Convolutions()), images(), tmp_path / f"net{suffix}")
    assert not list(tmp_path.iterdir())
    if suffix == ".pt2":
        assert export(awake(Convolutions()), images(), tmp_path / "net.pt2", tolerance=0.5).tolerance == 0.5


def test_a_program_that_is_wrong_at_another_batch_size_is_not_called_dynamic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_pt2 = exporting_module.FORMATS[".pt2"]

    def broken(*args: Any) -> Any:
        file = as_pt2(*args)

        def first_two(inputs: Inputs) -> list[Tensor]:
            return [torch.cat([y[:2], y[:1].expand(max(len(y) - 2, 0), -1)]) for y in file.run(inputs)]

        return exporting_module._File(file.content, first_two)

    monkeypatch.setitem(exporting_module.FORMATS, ".pt2", broken)
    report = export(awake(Convolutions()), images(), tmp_path / "net.pt2")
    assert report.dynamic == ()
    assert "at batch 3 the exported model differs" in report.fixed["batch"]


def test_wrong_arguments_and_models_are_refused(tmp_path: Path) -> None:
    for wrong in (-1.0, float("nan"), float("inf"), "small"):
        with pytest.raises(InputError, match="tolerance is a number"):
            export(Convolutions(), images(), tmp_path / "net.pt2", tolerance=wrong)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="meta device"):
        export(Convolutions().to("meta"), images().to("meta"), tmp_path / "net.pt2")
    with pytest.raises(ModelError, match=r"expected a torch\.nn\.Module"):
        exported_program("resnet18", images())  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="to have 3 channels"):  # the model's own error
        export(Convolutions(), torch.randn(2, 4, 8, 8), tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())


def test_a_model_without_output_is_refused(tmp_path: Path) -> None:
    class Silent(Convolutions):
        def forward(self, x: Tensor) -> dict[str, None]:
            return {"loss": None}

    with pytest.raises(ExportError, match="holds no tensor"):
        export(Silent(), images(), tmp_path / "net.pt2")


def test_the_innermost_reason_is_found() -> None:
    try:
        try:
            raise KeyError("root\nof it\n\nand a long story")
        except KeyError as error:
            raise ValueError("middle") from error
    except ValueError as error:
        error.__cause__.__cause__ = error  # even in a circle
        assert innermost(error) == "KeyError: 'root\\nof it\\n\\nand a long story'"
    assert innermost(RuntimeError("one\ntwo\n\nthree")) == "RuntimeError: one two"
    assert innermost(RuntimeError()) == "RuntimeError"
