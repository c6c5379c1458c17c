"""Norms over live channels: what a model computes whose normalised widths shrink.

LayerNorm and RMSNorm take statistics over a width. Zeros would count in them, so "the original with those channels
zeroed" says nothing about a narrower norm. With `prune_residual=True` the reference is the original in which every norm
over a shrinking width sees the live channels alone, and leaves zeros in the place of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.plans import Cut

# Calls in Python code that normalise, and calls that take a statistic inside a module that normalises.
NORMS = ("layer_norm", "rms_norm", "group_norm")
STATISTICS = ("mean", "var", "var_mean", "std")


def norm_name(module: str, ordinal: int) -> str:
    """The name of the `ordinal`-th norm or statistic that the forward of a module calls."""
    return f"{module}:{ordinal}"


def with_live_norms(model: nn.Module, norms: Iterable[Cut]) -> nn.Module:
    """`model` itself, in which norms count only the positions that `norms` keep; a cut is named by `norm_name`."""
    kept = {cut.tensor: cut for cut in norms}
    if not kept:
        return model
    mode = _LiveNorms(kept)
    for name, module in model.named_modules():
        module.register_forward_pre_hook(_Enter(mode, name), prepend=True)
        module.register_forward_hook(_Leave(mode), always_call=True)
    return model


class _Enter:
    def __init__(self, mode: _LiveNorms, name: str) -> None:
        self._mode, self._name = mode, name

    def __call__(self, module: nn.Module, args: Any) -> None:
        self._mode.frames.append([self._name, 0])
        if len(self._mode.frames) == 1:
            self._mode.__enter__()  # type: ignore[no-untyped-call]  # the base is untyped


class _Leave:
    def __init__(self, mode: _LiveNorms) -> None:
        self._mode = mode

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self._mode.frames.pop()
        if not self._mode.frames:
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # the base is untyped


class _LiveNorms(TorchFunctionMode):
    """Counts the norms of every module call, and narrows those that are named."""

    def __init__(self, kept: Mapping[str, Cut]) -> None:
        super().__init__()
        self.frames: list[list[Any]] = []  # [module, norms so far] per module call under way
        self._kept = kept

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        if name not in (*NORMS, *STATISTICS):
            return function(*args, **kwargs)
        frame = self.frames[-1]
        cut = self._kept.get(norm_name(*frame))
        frame[1] += 1
        if cut is None:
            return function(*args, **kwargs)
        return (_narrow_norm if name in NORMS else _narrow_statistic)(function, cut, args, kwargs)


def _narrow_statistic(function: Callable[..., Any], cut: Cut, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    data, *rest = args
    return function(data.index_select(cut.dim, _positions(data, cut)), *rest, **kwargs)


def _narrow_norm(function: Callable[..., Any], cut: Cut, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The norm of the live entries, with zeros for the others. (A group norm here has a single group.)"""
    data, live = args[0], _positions(args[0], cut)
    narrow = [data.index_select(cut.dim, live), *(_taken(entry, live) for entry in args[1:])]
    kwargs = {name: _taken(entry, live) for name, entry in kwargs.items()}
    result = function(*narrow, **kwargs)
    return torch.zeros_like(data).index_copy(cut.dim, live, result)


def _positions(data: Tensor, cut: Cut) -> Tensor:
    return torch.tensor(cut.kept, device=data.device)


def _taken(entry: Any, live: Tensor) -> Any:
    """Scales and shifts of the live channels; a normalised shape as long as they are."""
    if isinstance(entry, (list, tuple)):
        return [len(live)]
    return entry.index_select(0, live) if isinstance(entry, Tensor) else entry
