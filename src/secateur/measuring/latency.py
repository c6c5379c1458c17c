"""How long one forward pass takes, measured so that the answer means something on a busy machine.

All candidates (the model and its baseline, in every runtime) take turns within each round, so that whatever else the
machine does meets all of them alike. The speed-up is the median of the rounds' ratios, not the ratio of two medians.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
from torch import nn

from secateur.errors import InputError
from secateur.inputs import as_inputs, check_devices, check_model, evaluating
from secateur.measuring.runtimes import Run, prepare, runtime

_MODEL, _BASELINE = "model", "baseline"
_SAMPLE_SECONDS = 0.002  # a sample of at least this length hides the clock's grain and the caches' first miss
_Key = tuple[str, str]  # runtime, _MODEL or _BASELINE


@dataclass(frozen=True)
class Latency:
    """One model in one runtime. Times are milliseconds per forward pass of the whole batch."""

    runtime: str
    median_ms: float
    lower_ms: float  # first quartile
    upper_ms: float  # third quartile
    runs: int  # timed samples; each is the mean of `calls` passes
    calls: int
    baseline_ms: float | None = None  # median of the baseline in the same runtime; None without a baseline
    speedup: float | None = None  # against the baseline in the same runtime: median over rounds of its time / this time
    speedup_over_best: float | None = None  # against the baseline in whichever measured runtime runs it fastest

    def __str__(self) -> str:
        text = f"{self.runtime}: {self.median_ms:.3g} ms [{self.lower_ms:.3g}, {self.upper_ms:.3g}]"
        if self.speedup is None:
            return text
        return f"{text}, {self.speedup:.2f}x the baseline, {self.speedup_over_best:.2f}x its best runtime"


@dataclass(frozen=True)
class Measurement:
    """What `measure` returns: one Latency per runtime, in the order asked for."""

    latencies: tuple[Latency, ...]
    threads: int
    device: str

    def __getitem__(self, name: str) -> Latency:
        """The latency in the runtime `name`; KeyError where it was not measured."""
        for latency in self.latencies:
            if latency.runtime == name:
                return latency
        raise KeyError(f"{name!r} was not measured; there are {[latency.runtime for latency in self.latencies]}")

    def __str__(self) -> str:
        threads = f"{self.threads} thread" + ("s" if self.threads > 1 else "")
        return "\n".join([f"{self.device}, {threads}", *map(str, self.latencies)])


def measure(
    model: nn.Module,
    example_inputs: Any,
    runtimes: Sequence[str] = ("eager",),
    *,
    baseline: nn.Module | None = None,
    threads: int = 1,
    seconds: float = 1.0,
    repeats: int = 9,
    warmup: int = 3,
) -> Measurement:
    """Time one forward pass of `model`, and of `baseline` in turn with it, in each of `runtimes`.

    Both run in eval mode without gradients, on the device they are on, with `threads` CPU threads (one per process is
    the only setting that stays meaningful on a busy machine); modes and thread count are restored afterwards.
    `seconds` is the time to spend per model and runtime, `repeats` the least number of samples whatever they take,
    `warmup` the untimed passes before. Runtimes: the keys of `RUNTIMES`.
    Raises UnknownNameError for an unknown runtime, InputError for one that is not installed or cannot run the model.
    """
    names = _checked_names(runtimes)
    _check_numbers(threads, seconds, repeats, warmup)
    inputs = as_inputs(example_inputs)
    models = {_MODEL: model} | ({} if baseline is None else {_BASELINE: baseline})
    for each in models.values():
        check_model(each)
        check_devices(each, inputs)
    device = inputs.tensors()[0].device
    with ExitStack() as stack:
        for each in models.values():
            stack.enter_context(evaluating(each))
        stack.enter_context(with_threads(threads))
        stack.enter_context(torch.no_grad())
        runs = {(name, which): prepare(name, each, inputs, threads) for name in names for which, each in models.items()}
        calls = {key: _warm_up(run, warmup, device) for key, run in runs.items()}
        samples = _take_turns(runs, calls, seconds * len(runs), repeats, device)
    return Measurement(tuple(_latency(name, samples, calls) for name in names), threads, str(device))


def _take_turns(
    runs: Mapping[_Key, Run], calls: Mapping[_Key, int], seconds: float, repeats: int, device: torch.device
) -> dict[_Key, list[float]]:
    """Milliseconds per pass, one list per candidate, entry i of all of them from the same round."""
    samples: dict[_Key, list[float]] = {key: [] for key in runs}
    order = list(runs)
    start = perf_counter()
    while len(samples[order[0]]) < repeats or perf_counter() - start < seconds:
        for key in order:
            samples[key].append(_sample(runs[key], calls[key], device) * 1e3)
        order.reverse()  # A B, B A: whoever ran before a candidate is not always the same
    return samples


def _sample(run: Run, calls: int, device: torch.device) -> float:
    """Seconds per pass, the mean of `calls` passes in a row."""
    _synchronize(device)
    start = perf_counter()
    for _ in range(calls):
        run()
    _synchronize(device)
    return (perf_counter() - start) / calls


def _warm_up(run: Run, warmup: int, device: torch.device) -> int:
    """Run untimed, and return how many passes make one sample long enough."""
    for _ in range(warmup):
        run()
    return max(1, math.ceil(_SAMPLE_SECONDS / max(_sample(run, 1, device), 1e-7)))


def _latency(name: str, samples: Mapping[_Key, list[float]], calls: Mapping[_Key, int]) -> Latency:
    own = samples[name, _MODEL]
    lower, middle, upper = quantiles(own, n=4, method="inclusive") if len(own) > 1 else own * 3
    dense = {key: times for key, times in samples.items() if key[1] == _BASELINE}
    latency = Latency(name, middle, lower, upper, len(own), calls[name, _MODEL])
    if not dense:
        return latency
    same, best = dense[name, _BASELINE], min(dense.values(), key=median)
    return Latency(
        name, middle, lower, upper, len(own), calls[name, _MODEL], median(same), _ratio(same, own), _ratio(best, own)
    )


def _ratio(before: Sequence[float], after: Sequence[float]) -> float:
    return median(b / a for b, a in zip(before, after, strict=True))


def _checked_names(runtimes: Sequence[str]) -> list[str]:
    if isinstance(runtimes, str):
        raise InputError(f"runtimes is a sequence of names; got {runtimes!r}. For one, pass runtimes=({runtimes!r},).")
    names = list(dict.fromkeys(runtimes))
    if not names:
        raise InputError("runtimes is empty; pass at least one name, such as runtimes=('eager',).")
    for name in names:
        runtime(name)
    return names


def _check_numbers(threads: int, seconds: float, repeats: int, warmup: int) -> None:
    if threads < 1 or repeats < 1 or warmup < 0 or not 0 <= seconds < math.inf:
        raise InputError(
            f"expected threads and repeats of at least 1, warmup and seconds of at least 0; "
            f"got threads={threads}, repeats={repeats}, warmup={warmup}, seconds={seconds}."
        )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextmanager
def with_threads(number: int) -> Iterator[None]:
    """So many CPU threads in torch; as before afterwards."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(number)
        yield
    finally:
        torch.set_num_threads(before)
