"""One architecture, pruned by Secateur and by Torch-Pruning 1.6.1 in turn, each called as its README says.

Runs in a process of its own (`coupling.py` starts it), and writes one JSON line per finished part to a file, so that
what was measured before a crash is not lost.
"""

from __future__ import annotations

import copy
import gc
import json
import resource
import signal
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import oracle
import zoo

SPARSITY = 0.5
CRITERION = "l2"
REPEATS = 3
LONG_SECONDS = 8.0  # a library that took longer than this for one model is not asked again
OURS, OPEN, PEER = "secateur", "secateur_open", "torch_pruning"
Found = dict[str, Any]


class OutOfTime(BaseException):
    """The library took longer than it may; no `except Exception` of its own can swallow this."""


def compare(name: str, out: Path, *, form: str, libraries: list[str], limit_seconds: float, limit_bytes: int) -> None:
    """Prune the architecture by each of `libraries`, and append the findings to `out`."""
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model, inputs = zoo.build(name)
    prunes = {
        OURS: lambda *given: _as_advised(*given, form=form),
        OPEN: lambda *given: _secateur(*given, form=form, prune_residual=True),
        PEER: _torch_pruning,
    }
    for library in libraries:
        _warm_up(prunes[library])
    start = time.perf_counter()
    size = _size(copy.deepcopy(model), inputs)
    _write(out, {"model": {**size, "forward_seconds": _rounded(time.perf_counter() - start)}})
    for library in libraries:
        _write(out, {"started": library})
        repeats = REPEATS if form == "live" else 1  # times are those of the live form
        _write(out, {library: _findings(prunes[library], model, inputs, limit_seconds, repeats)})


def _warm_up(prune: Callable[..., Any]) -> None:
    """Import what the library imports lazily; a failure shows up when it matters."""
    small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)).eval()
    with suppress(Exception):
        prune(small, torch.randn(1, 3, 6, 6))


def _findings(prune: Callable[..., Any], model: nn.Module, inputs: Any, limit_seconds: float, repeats: int) -> Found:
    """What one library made of the model: its verdict, costs and times."""
    times: dict[str, list[float]] = {}
    try:
        with _limited(limit_seconds):
            begin = time.perf_counter()
            while True:
                gc.collect()
                pruned, seconds, facts = prune(copy.deepcopy(model), inputs)
                for part, value in seconds.items():
                    times.setdefault(part, []).append(value)
                if len(times["prune"]) >= repeats or time.perf_counter() - begin > LONG_SECONDS:
                    break
    except OutOfTime:
        return {"status": "timeout", "ran": False, "reason": f"not finished after {limit_seconds:.0f} s"}
    except MemoryError:
        return {"status": "out of memory", "ran": False, "reason": "the memory limit was reached"}
    except Exception as error:
        return {"status": "error", "ran": False, "reason": oracle.short(error)}
    found: Found = {f"{part}_seconds": _rounded(statistics.median(values)) for part, values in times.items()}
    found |= {"repeats": len(times["prune"]), **facts}
    try:
        found |= _size(pruned, inputs)
    except Exception as error:
        params = _params(pruned)
        return {**found, "params": params, "status": "error", "ran": False, "reason": f"forward: {oracle.short(error)}"}
    verdict = oracle.judge(model, pruned, inputs)
    return {**found, "ran": True, **{key: value for key, value in vars(verdict).items() if value not in (None, "")}}


# -- the two libraries -----------------------------------------------------------------------------------------------


def _as_advised(model: nn.Module, inputs: Any, form: str) -> tuple[nn.Module, dict[str, float], Found]:
    """The default call; where all is locked under norms, the call that its error message asks for."""
    from secateur.errors import NothingToPruneError

    try:
        return _secateur(model, inputs, form=form, prune_residual=False)
    except NothingToPruneError as error:
        if "prune_residual=True" not in str(error):
            raise
        pruned, seconds, facts = _secateur(model, inputs, form=form, prune_residual=True)
        return pruned, seconds, {**facts, "as_advised": True}


def _secateur(
    model: nn.Module, inputs: Any, *, form: str, prune_residual: bool
) -> tuple[nn.Module, dict[str, float], Found]:
    import secateur as sc

    seconds = {}
    if form == "live":
        start = time.perf_counter()
        graph = sc.trace(model, inputs, prune_residual=prune_residual)
        scores = sc.score(graph, sc.observe(model, graph), CRITERION)
        traced = time.perf_counter()
        sc.shrink(model, sc.select(graph, scores, sc.Target(sparsity=SPARSITY)))
        seconds = {"trace": traced - start, "analysis": time.perf_counter() - start}
    start = time.perf_counter()
    pruned = sc.prune(model, inputs, sparsity=SPARSITY, criterion=CRITERION, prune_residual=prune_residual, form=form)
    seconds["prune"] = time.perf_counter() - start
    summary = pruned.summary
    facts = {
        "verified_difference": summary.verified_difference,
        "channels": list(summary.channels),
        "locked": dict(Counter(summary.locked.values()).most_common()),
        "unknown": dict(summary.unknown),
        "replaced": [part.module for part in pruned.plan.replacements],
    }
    return pruned.model, seconds, facts


def _torch_pruning(model: nn.Module, inputs: Any) -> tuple[nn.Module, dict[str, float], Found]:
    import torch_pruning as tp

    ignored = _classifiers(model, inputs)
    start = time.perf_counter()
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=SPARSITY,
        ignored_layers=ignored,
        output_transform=lambda output: list(oracle.tensors(output)),  # as its examples do for Hugging Face models
    )
    pruner.step()
    seconds = time.perf_counter() - start
    # There is no separate proof: analysis and shrinking are the whole call.
    return model, {"analysis": seconds, "prune": seconds}, {"ignored_layers": len(ignored)}


def _classifiers(model: nn.Module, inputs: Any) -> list[nn.Module]:
    """The layers that its README ignores: those as wide as the output, of which it says DO NOT prune."""
    with torch.no_grad():
        output = next(oracle.tensors(oracle.call(copy.deepcopy(model), inputs)))
    if output.dim() == 4:
        return [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.out_channels == output.shape[1]]
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == output.shape[-1]]


# -- costs -----------------------------------------------------------------------------------------------------------


def _size(model: nn.Module, inputs: Any) -> Found:
    """Parameters, and multiply-accumulates of one forward pass; the same counter for both libraries."""
    model.requires_grad_(False)  # the counter hooks into gradients, and stumbles over parameters that are inputs
    counter = FlopCounterMode(display=False)
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # fused layers hide their products
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            oracle.call(model.eval(), inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return {"params": _params(model), "macs": int(counter.get_total_flops()) // 2}


def _params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.4g}")


def _write(out: Path, part: Found) -> None:
    with out.open("a") as file:
        file.write(json.dumps(part) + "\n")
