"""Counting and timing models: laws, hand-worked numbers, and what wrong arguments get. No test asserts a time."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.errors import ExampleInputsError, InputError, ModelError, UnknownNameError
from secateur.inputs import Inputs, as_inputs
from secateur.measuring import RUNTIMES, Counts, Measurement, count, measure
from secateur.measuring import latency as latency_module
from secateur.measuring import runtimes as runtimes_module
from secateur.onnxgraphs import SLOW_FUSIONS, onnx_model
from secateur.programs import program_of

ONNX = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
QUICK = {"seconds": 0.0, "repeats": 3, "warmup": 0}


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
        nn.Flatten(),
        nn.Linear(64, 5),
    )


def image(batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_hand_worked_counts() -> None:
    # conv 3x3: 16 positions x 8 x 27; conv 1x1: 16 x 4 x 8; linear: 5 x 64.
    params = 8 * 27 + 2 * 8 + (4 * 8 + 4) + (5 * 64 + 5)
    buffers = 8 * 8 + 8  # two running statistics of 8 floats, one int64 counter
    expected = Counts(params, 16 * 8 * 27 + 16 * 4 * 8 + 5 * 64, 4 * params + buffers)
    assert count(small_net(), image()) == expected
    assert str(expected) == "593 params, 4.29 k MACs, 0.00 MB"


def test_macs_are_proportional_to_the_batch() -> None:
    assert count(small_net(), image(6)).macs == 6 * count(small_net(), image()).macs


def test_grouped_convolution_counts_its_own_inputs_only() -> None:
    assert count(nn.Conv2d(8, 8, 3, groups=8, bias=False), torch.zeros(1, 8, 3, 3)).macs == 8 * 9


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


class Branching(Attention):
    """Looks at a value, which a pass without arithmetic cannot."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.sum()) < 1e9 else x


@pytest.mark.parametrize("model", [Attention(), Branching()], ids=["meta", "real"])
def test_attention_counts_both_products(model: nn.Module) -> None:
    # (2 heads, 5 tokens, 4 wide): 5 x 5 scores of 4 products, then 5 x 4 outputs of 5 products.
    assert count(model, torch.randn(1, 2, 5, 4)).macs == 2 * (5 * 5 * 4 + 5 * 4 * 5)


def test_fused_transformer_layer_counts_as_its_parts() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    tokens = 3
    expected = tokens * (4 * 8 * 8 + 2 * 8 * 16) + 2 * (2 * tokens * tokens * 4)
    assert count(layer, torch.randn(1, tokens, 8)).macs == expected


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.out = nn.Linear(4, 10, bias=False)
        self.out.weight = self.embed.weight
        self.cached = torch.ones(4)  # a plain attribute, no buffer

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.embed(ids) * self.cached)


def test_tied_weights_count_once_and_run_twice() -> None:
    counts = count(Tied(), torch.tensor([[1, 2, 3]]))
    assert counts == Counts(params=40, macs=3 * 4 * 10, size_bytes=160)


def test_every_form_of_inputs_counts_the_same() -> None:
    model = small_net()
    expected = count(model, image())
    assert count(model, (image(),)) == expected
    assert count(model, Inputs((image(),))) == expected
    assert count(model, {"input": image()}) == expected


class Counting(nn.Module):
    """Changes its buffer at every pass, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.linear(x) if float(x.sum()) < 1e9 else x  # needs the real pass


@pytest.mark.parametrize("model", [small_net(), Counting()], ids=["meta", "real"])
def test_counting_leaves_the_model_alone(model: nn.Module) -> None:
    model.train()
    before = copy.deepcopy(model.state_dict())
    count(model, image() if isinstance(model, nn.Sequential) else torch.randn(1, 4))
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


def test_a_broken_forward_gives_its_own_error() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        count(nn.Linear(4, 4), torch.zeros(1, 3))


def test_wrong_models_and_inputs_are_refused() -> None:
    with pytest.raises(ModelError, match=r"expected a torch\.nn\.Module"):
        count("resnet18", image())  # type: ignore[arg-type]
    with pytest.raises(ExampleInputsError, match="hold no tensor"):
        measure(small_net(), ())


@pytest.mark.parametrize("name", [name for name in RUNTIMES if name != "compiled"])
@ONNX
def test_every_runtime_computes_the_same(name: str) -> None:
    model = small_net().eval()
    with torch.no_grad():
        output, expected = runtimes_module.prepare(name, model, Inputs((image(),)), 1)(), model(image())
    output = torch.from_numpy(output[0]) if isinstance(output, list) else output
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_runtime_measures() -> None:
    assert measure(small_net(), image(), ("compiled",), baseline=small_net(), **QUICK)["compiled"].runs == 3


def test_compiled_is_fixed_in_shape_and_isolated(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def fake(model: nn.Module, **options: object) -> nn.Module:
        seen.update(options)
        return model

    monkeypatch.setattr(torch, "compile", fake)
    assert measure(small_net(), image(), ("compiled",), **QUICK)["compiled"].runs == 3
    assert seen == {"dynamic": False, "isolate_recompiles": True}


def test_candidates_take_turns_and_speedups_are_medians_of_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    times = {"slow": 8.0, "fast": 2.0}

    def fake_prepare(name: str, model: nn.Module, inputs: Inputs, threads: int) -> str:
        return "fast" if model.get_buffer("name_of") else "slow"

    def fake_sample(run: str, calls: int, device: torch.device) -> float:
        order.append(run)
        drift = 1 + len(order) // 2  # the machine gets slower all the time; each pair meets the same slowness
        return times[run] * drift

    monkeypatch.setattr(latency_module, "prepare", fake_prepare)
    monkeypatch.setattr(latency_module, "_warm_up", lambda run, warmup, device: 1)
    monkeypatch.setattr(latency_module, "_sample", fake_sample)
    fast, slow = small_net(), small_net()
    fast.register_buffer("name_of", torch.tensor(1))
    slow.register_buffer("name_of", torch.tensor(0))
    result = measure(fast, image(), baseline=slow, seconds=0.0, repeats=4)
    assert order == ["fast", "slow", "slow", "fast"] * 2
    latency = result["eager"]
    assert latency.baseline_ms is not None and latency.baseline_ms > latency.median_ms
    assert latency.speedup == latency.speedup_over_best
    assert latency.speedup == pytest.approx(4.0, rel=0.6)
    assert "x the baseline" in str(result)


def test_speedup_over_best_uses_the_fastest_dense_runtime() -> None:
    key = latency_module._MODEL, latency_module._BASELINE
    times = {("a", key[0]): 1.0, ("a", key[1]): 8.0, ("b", key[0]): 4.0, ("b", key[1]): 2.0}
    samples = {candidate: [time, time] for candidate, time in times.items()}
    calls = dict.fromkeys(samples, 1)
    a, b = (latency_module._latency(name, samples, calls) for name in "ab")
    assert (a.speedup, a.speedup_over_best) == (8.0, 2.0)
    assert (b.speedup, b.speedup_over_best) == (0.5, 0.5)  # the pruned model may be slower, and then it says so


def test_measuring_restores_threads_and_modes() -> None:
    model, dense = small_net().train(), small_net().eval()
    model[1].eval()
    before = torch.get_num_threads(), copy.deepcopy(model.state_dict())
    try:
        torch.set_num_threads(2)
        result = measure(model, image(), ("eager", "eager_channels_last"), baseline=dense, threads=1, **QUICK)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before[0])
    assert result.threads == 1 and result.device == "cpu"
    for latency in result.latencies:
        assert latency.runs == 3
        assert 0 < latency.lower_ms <= latency.median_ms <= latency.upper_ms
        assert latency.speedup_over_best is not None and latency.speedup_over_best > 0
    assert model.training and not model[1].training and model[2].training and not dense.training
    assert all(torch.equal(before[1][name], tensor) for name, tensor in model.state_dict().items())
    assert model[0].weight.is_contiguous()  # channels_last worked on a copy
    with pytest.raises(KeyError, match="was not measured"):
        result["compiled"]


def test_threads_are_restored_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        measure(nn.Linear(4, 4), torch.zeros(1, 3), threads=before + 1)
    assert torch.get_num_threads() == before


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, b: Tensor, a: dict[str, Tensor], scale: float = 1.0) -> Tensor:
        return self.linear(a["deep"]) * scale + b


@ONNX
def test_onnx_keeps_nested_and_keyword_inputs_in_order() -> None:
    model = TwoInputs().eval()
    inputs = Inputs(kwargs={"a": {"deep": torch.randn(1, 3)}, "b": torch.randn(1, 2), "scale": 3.0})
    with torch.no_grad():
        (output,) = runtimes_module.prepare("onnxruntime", model, inputs, 1)()
        torch.testing.assert_close(torch.from_numpy(output), inputs.call(model), rtol=1e-4, atol=1e-5)


def test_a_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"needs onnxruntime: pip install 'secateur\[onnx\]'"):
        measure(small_net(), image(), ("onnxruntime",), **QUICK)


def test_a_runtime_that_cannot_take_the_model_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: nn.Module, inputs: Inputs, threads: int) -> runtimes_module.Run:
        raise ValueError("no kernel\nand a long story")

    monkeypatch.setitem(RUNTIMES, "refusing", refuse)
    with pytest.raises(InputError, match=r"'refusing' cannot run this model \(ValueError: no kernel\)"):
        measure(small_net(), image(), ("refusing",), **QUICK)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'eager'"):
        measure(small_net(), image(), ("eagre",))
    with pytest.raises(InputError, match="sequence of names"):
        measure(small_net(), image(), "eager")
    with pytest.raises(InputError, match="is empty"):
        measure(small_net(), image(), ())
    for wrong in ({"threads": 0}, {"repeats": 0}, {"warmup": -1}, {"seconds": float("nan")}):
        with pytest.raises(InputError, match="expected threads and repeats of at least 1"):
            measure(small_net(), image(), **wrong)


def test_results_are_values() -> None:
    result = measure(small_net(), image(), repeats=1, seconds=0.0)
    assert isinstance(result, Measurement)
    assert result["eager"].lower_ms == result["eager"].upper_ms  # one sample has no spread
    assert str(result).startswith("cpu, 1 thread\neager: ")


def test_a_parameter_handed_to_a_submodule_can_be_counted() -> None:
    class Token(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = torch.nn.Parameter(torch.randn(1, 1, 6))
            self.inner = torch.nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(self.token.expand(x.shape[0], -1, -1)) + x

    model = Token()
    assert count(model, torch.randn(2, 1, 3)).macs == 2 * 6 * 3
    assert model.token.requires_grad


@ONNX
def test_the_fusion_that_is_slow_is_one_that_would_happen(tmp_path: Path) -> None:
    """A name that onnxruntime does not know would be ignored in silence."""
    ort, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x + self.inner(x))

    inputs = as_inputs(torch.randn(2, 5, 8))
    content = onnx_model(program_of(Residual().eval(), inputs)).content

    def operations(**options: Any) -> set[str]:
        settings, file = ort.SessionOptions(), tmp_path / "optimised.onnx"
        settings.optimized_model_filepath, settings.log_severity_level = str(file), 3
        ort.InferenceSession(content, settings, providers=["CPUExecutionProvider"], **options)
        return {node.op_type for node in onnx.load(file).graph.node}

    assert "SkipLayerNormalization" in operations()
    assert "SkipLayerNormalization" not in operations(disabled_optimizers=SLOW_FUSIONS)
