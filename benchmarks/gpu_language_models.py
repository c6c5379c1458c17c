"""On a GPU: a Llama of a billion weights pruned block by block, and what 2:4 zeros gain in torch's sparse kernels.

    PYTHONPATH=src python benchmarks/gpu_language_models.py [--out FILE]
    python benchmarks/gpu_language_models.py --tiny --device cpu

Weights are random, and nothing is fetched: only times and memory are of interest. Every row is written as soon as it is
there, to FILE, else to gpu_language_models.json in the folder that the variable OUT names, else to the results. A case
that has used its seconds stops after the block it is at, and says how many it has pruned.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from language_nets import library
from machine import describe
from secateur.files import write_bytes

HERE = Path(__file__).parent
METHODS = ("magnitude", "wanda", "sparsegpt")
PATTERNS: dict[str, dict[str, Any]] = {"2:4": {"pattern": "2:4"}, "unstructured": {"sparsity": 0.5}}
BACKENDS = {"cusparselt": False, "cutlass": True}  # name -> what switches torch to it
CYCLED_BYTES = 1 << 28  # copies of a weight that calls take in turn: more than a cache holds
Row = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    width: int = 2048
    inner: int = 8192
    heads: int = 32
    kv_heads: int = 8
    layers: int = 16
    vocabulary: int = 32000
    windows: int = 32  # of calibration
    batch_size: int = 8
    length: int = 512
    case_seconds: float = 40.0  # after which a case stops
    repeats: int = 15  # pairs of timings
    calls: int = 20  # in each
    tokens: tuple[int, ...] = (64, 512, 4096, 16384)
    shapes: tuple[tuple[int, int], ...] = ((2048, 8192), (8192, 2048), (4096, 4096), (4096, 11008), (8192, 28672))


TINY = Scale(
    width=32, inner=48, heads=4, kv_heads=2, layers=2, vocabulary=50, windows=4, batch_size=2, length=16, repeats=2,
    calls=1, tokens=(16,), shapes=((64, 64),),
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    scale = replace(TINY if options.tiny else Scale(), case_seconds=options.case_seconds)
    results: Row = {"scale": asdict(scale), "device": options.device, "machine": describe(), "oneshot": []}
    for pattern, asked in PATTERNS.items():
        for method in METHODS:
            row = pruned_in_time(scale, method, asked, options.device)
            results["oneshot"].append({"method": method, "pattern": pattern, **row})
            _write(options.out, results)
            print(method, pattern, row, flush=True)
    if not options.device.startswith("cuda"):
        reason = f"semi-structured kernels need a CUDA device; this run was on {options.device}"
        _write(options.out, {**results, "skipped": reason})
        return
    results |= {"backends": {name: unusable(name) or "works" for name in BACKENDS}, "kernels": [], "models": []}
    for name in (name for name, found in results["backends"].items() if found == "works"):
        for part, rows in (("kernels", kernels(scale, name)), ("models", models(scale, name))):
            for row in rows:
                results[part].append({"backend": name, **row})
                _write(options.out, results)
                print(name, row, flush=True)
    _write(options.out, results)


# -- pruning ---------------------------------------------------------------------------------------------------------


class _EnoughError(Exception):
    """The case has used its seconds."""


def pruned_in_time(scale: Scale, method: str, asked: Row, device: str) -> Row:
    """How long each block takes, and the most memory of the device in use, the model included."""
    model = _llama(scale, device)
    data = None if method == "magnitude" else _calibration(scale)
    seconds: list[float] = []
    peaks: list[int] = []
    start = time.perf_counter()

    def note(number: int, total: int, block: Any) -> None:
        seconds.append(round(block.seconds, 3))
        peaks.append(block.peak_bytes or 0)
        if time.perf_counter() - start > scale.case_seconds and number < total:
            raise _EnoughError

    with suppress(_EnoughError):
        sc.prune_layerwise_(model, data, method, **asked, progress=note)
    whole = time.perf_counter() - start
    first = whole - sum(seconds)  # the dense pass
    return {
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "blocks": len(seconds),
        "of": scale.layers,
        "block_seconds": seconds,
        "model_seconds": round(first + scale.layers * median(seconds), 1),
        "peak_bytes": max(peaks),
    }


def _llama(scale: Scale, device: str) -> Any:
    t = library()
    torch.manual_seed(0)
    config = t.LlamaConfig(
        hidden_size=scale.width, intermediate_size=scale.inner, num_attention_heads=scale.heads,
        num_key_value_heads=scale.kv_heads, num_hidden_layers=scale.layers, vocab_size=scale.vocabulary,
        max_position_embeddings=max(scale.length, *scale.tokens), use_cache=False,
    )  # fmt: skip
    with torch.device(device):
        model = t.LlamaForCausalLM(config)
    return model.to(device).eval()


def _calibration(scale: Scale) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(scale.vocabulary, (scale.windows, scale.length), generator=generator)
    return list(torch.split(tokens, scale.batch_size))


# -- semi-structured kernels -----------------------------------------------------------------------------------------


def compressed(weight: Tensor, backend: str) -> Tensor:
    """A weight with 2:4 zeros along its inputs, in the form that torch multiplies by sparse tensor cores."""
    from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

    SparseSemiStructuredTensor._FORCE_CUTLASS = BACKENDS[backend]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # its interface is a prototype
        return to_sparse_semi_structured(weight.detach().contiguous())


def unusable(backend: str) -> str:
    """Why a backend cannot multiply on this machine; empty where it can, and is right."""
    weight, x = _two_of_four(256, 256), torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    try:
        with torch.inference_mode():
            difference = _difference(F.linear(x, compressed(weight, backend)), F.linear(x, weight))
    except Exception as error:  # whatever it is, it is the answer
        return f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
    return "" if difference < 0.02 else f"wrong by {difference:.1e} of the largest output"


def kernels(scale: Scale, backend: str) -> Sequence[Row]:
    """Linear layers in bfloat16, dense against sparse, in turn; ratios above 1 are gains."""
    return [_kernel(scale, backend, tokens, *shape) for shape in scale.shapes for tokens in scale.tokens]


def _kernel(scale: Scale, backend: str, tokens: int, inputs: int, outputs: int) -> Row:
    copies = max(CYCLED_BYTES // (2 * inputs * outputs), 1)
    weights = [_two_of_four(outputs, inputs) for _ in range(copies)]
    sparse = [compressed(weight, backend) for weight in weights]
    x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        found = _paired(scale, _cycling(x, weights), _cycling(x, sparse))
        difference = _difference(F.linear(x, sparse[0]), F.linear(x, weights[0]))
    return {"tokens": tokens, "inputs": inputs, "outputs": outputs, **found, "difference": difference}


def _cycling(x: Tensor, weights: Sequence[Tensor]) -> Callable[[int], Tensor]:
    return lambda call: F.linear(x, weights[call % len(weights)])


def models(scale: Scale, backend: str) -> Sequence[Row]:
    """The whole model in bfloat16, its blocks' weights 2:4: dense against sparse."""
    plain = _llama(scale, "cuda").to(torch.bfloat16)
    for layer in _linears(plain):
        layer.weight.data = _without_half(layer.weight.data)
    quick = copy.deepcopy(plain)
    for layer in _linears(quick):
        layer.weight = nn.Parameter(compressed(layer.weight, backend), requires_grad=False)
    rows = []
    for tokens in scale.tokens:
        length = min(tokens, scale.length)
        ids = torch.randint(scale.vocabulary, (tokens // length, length), device="cuda")
        with torch.inference_mode():
            found = _paired(
                replace(scale, calls=3), lambda call, ids=ids: plain.model(ids), lambda call, ids=ids: quick.model(ids)
            )
            states = [model.model(ids).last_hidden_state for model in (quick, plain)]
        rows.append({"tokens": tokens, "length": length, **found, "difference": _difference(*states)})
    return rows


def _linears(model: Any) -> list[nn.Linear]:
    return [layer for layer in model.model.layers.modules() if isinstance(layer, nn.Linear)]


def _paired(scale: Scale, dense: Callable[[int], object], sparse: Callable[[int], object]) -> Row:
    """Milliseconds per call of both, and the median of their ratios; which goes first takes turns."""
    for work in (dense, sparse):
        _milliseconds(work, scale.calls)
    pairs = []
    for number in range(scale.repeats):
        order = (dense, sparse) if number % 2 else (sparse, dense)
        times = {work: _milliseconds(work, scale.calls) for work in order}
        pairs.append((times[dense], times[sparse]))
    ratios = sorted(first / second for first, second in pairs)
    return {
        "dense_ms": round(median(pair[0] for pair in pairs), 4),
        "sparse_ms": round(median(pair[1] for pair in pairs), 4),
        "ratio": round(median(ratios), 3),
        "ratio_range": [round(ratios[0], 3), round(ratios[-1], 3)],
    }


def _milliseconds(work: Callable[[int], object], calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for call in range(calls):
        work(call)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def _two_of_four(outputs: int, inputs: int) -> Tensor:
    return _without_half(torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) * inputs**-0.5)


def _without_half(weight: Tensor) -> Tensor:
    """The weight, (out, in), the two smallest of every four consecutive inputs zero."""
    units = weight.reshape(len(weight), -1, 4)
    gone = units.abs().argsort(dim=-1)[..., :2]
    return units.scatter(-1, gone, 0.0).reshape(weight.shape)


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _write(path: Path, results: Row) -> None:
    write_bytes(path, (json.dumps(results, indent=1) + "\n").encode())


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = Path(os.environ.get("OUT") or HERE / "results")
    parser.add_argument("--out", type=Path, default=folder / "gpu_language_models.json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model that only shows that it works")
    parser.add_argument("--case-seconds", type=float, default=Scale.case_seconds)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
