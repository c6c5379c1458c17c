"""Layer calls: every convolution and linear map of a forward pass, as it happens, its weight known by name.

What data says about a layer (activations, Hessians of its inputs, gradients of each sample) hangs on the calls of its
weight, however the model's code makes them: a module used twice makes two calls, a parameter in a functional call makes
calls, too. Nothing is attached to the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from secateur.attention import replaceable
from secateur.plans import Replacement, named_tensors, replaced


@dataclass(frozen=True)
class Window:
    """How a convolution moves over its input: one entry per spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # zeros before and after
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One call of a layer. The channel dimension is dim 1 of a convolution's tensors and the last of a linear map's."""

    name: str  # of the weight
    weight: Tensor  # (out, in / groups, ...); (in, out / groups, ...) where transposed
    input: Tensor
    output: Tensor
    window: Window | None = None  # None: a linear map
    transposed: bool = False  # a linear map whose weight is (in, out)
    bias: Tensor | None = None

    @property
    def groups(self) -> int:
        """In how many groups of channels the layer falls apart."""
        return 1 if self.window is None else self.window.groups

    @property
    def has_patches(self) -> bool:
        """Whether the layer is a matrix times patches of its input: all but transposed convolutions."""
        return self.window is None or not self.window.transposed

    def inputs(self) -> Tensor:
        """(samples, in channels, positions), in float32 at least."""
        return self._by_channel(self.input)

    def outputs(self) -> Tensor:
        """(samples, out channels, positions), in float32 at least."""
        return self._by_channel(self.output)

    def positions(self, per_sample: int | None, generator: torch.Generator) -> Tensor:
        """(samples, p): output positions drawn at random per sample; all of them where there are no more."""
        values = self._by_channel(self.output)
        samples, count = values.shape[0], values.shape[2]
        if per_sample is None or count <= per_sample:
            return torch.arange(count, device=values.device).expand(samples, count)
        drawn = torch.randint(count, (samples, per_sample), generator=generator)
        return drawn.to(values.device)

    def targets(self, positions: Tensor) -> Tensor:
        """(samples * p, out channels): the outputs at these positions."""
        values = self._by_channel(self.output)
        picked = values.gather(2, positions[:, None, :].expand(-1, values.shape[1], -1))
        return picked.transpose(1, 2).flatten(0, 1)

    def patches(self, positions: Tensor | None = None) -> Tensor:
        """(groups, samples * p, in / groups * taps): what each output at these positions is computed from.

        The last dimension is in the order of the weight: channel first, then tap. None: all positions, in order.
        """
        if self.window is None:
            values = self._by_channel(self.input)
            if positions is None:
                return values.transpose(1, 2).flatten(0, 1)[None]
            picked = values.gather(2, positions[:, None, :].expand(-1, values.shape[1], -1))
            return picked.transpose(1, 2).flatten(0, 1)[None]
        windows = self._windows(_wide(_batched(self.input, self.weight.dim())))
        dims = windows.dim() // 2 - 1
        sizes = windows.shape[2 : 2 + dims]
        moved = windows.movedim(1, 1 + dims)  # (N, o1, o2, ..., C, k1, k2, ...)
        if positions is not None:
            samples = torch.arange(positions.shape[0], device=positions.device)[:, None].expand_as(positions)
            moved = moved[(samples, *torch.unravel_index(positions, sizes))]  # (N, p, C, k1, k2, ...)
        rows = moved.reshape(-1, self.groups, windows.shape[1] // self.groups * self.weight[0, 0].numel())
        return rows.transpose(0, 1)

    def tap_squares(self) -> Tensor:
        """(in channels, taps): the sum over samples and positions of the squared input that meets each weight."""
        if self.window is None or self.window.transposed:
            squares = self.inputs().square().sum((0, 2))[:, None]
            return squares.expand(-1, math.prod(self.weight.shape[2:]) if self.window else 1)
        total = _wide(_batched(self.input, self.weight.dim())).square().sum(0, keepdim=True)
        windows = self._windows(total)[0]
        dims = windows.dim() // 2
        return windows.sum(tuple(range(1, 1 + dims))).flatten(1)

    def _by_channel(self, tensor: Tensor) -> Tensor:
        if self.window is not None:
            return _wide(_batched(tensor, self.weight.dim())).flatten(2)
        rows = _wide(tensor if tensor.dim() > 1 else tensor[None])
        return rows.reshape(rows.shape[0], -1, rows.shape[-1]).transpose(1, 2)

    def _windows(self, values: Tensor) -> Tensor:
        """(N, C, o1, o2, ..., k1, k2, ...): a view that copies nothing but the padding."""
        assert self.window is not None
        pads = [side for pair in reversed(self.window.padding) for side in pair]
        windows = F.pad(values, pads) if any(pads) else values
        kernel = self.weight.shape[2:]
        for dim, (size, stride, dilation) in enumerate(
            zip(kernel, self.window.stride, self.window.dilation, strict=True)
        ):
            windows = windows.unfold(2 + dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
        return windows


class LayerCalls(TorchFunctionMode):
    """While it is entered, `seen` is called after each call of a layer of `model`.

    Weights are known by identity: one that the code computes anew (a weight norm's) is not seen.
    """

    def __init__(self, model: nn.Module, seen: Callable[[LayerCall], None]) -> None:
        super().__init__()
        self._names = {id(tensor): name for name, tensor in named_tensors(model).items()}
        self._seen = seen
        self._last: LayerCall | None = None
        self.norms: dict[str, str] = {}  # weight -> running mean of the BatchNorm that read the layer's output

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the call, and report it where it is a layer's."""
        output = func(*args, **(kwargs or {}))
        form = _FORMS.get(func)
        if form is not None:
            call = form(func, self._names, output, args, kwargs or {})
            if call is not None:
                self._last = call
                self._seen(call)
        elif func is F.batch_norm and self._last is not None and args[0] is self._last.output:
            mean = kwargs.get("running_mean") if kwargs and "running_mean" in kwargs else args[1]
            if id(mean) in self._names:
                self.norms[self._last.name] = self._names[id(mean)]
        return output


def observable(model: nn.Module) -> nn.Module:
    """`model` itself, its attention modules exchanged for ones whose layers can be seen."""
    attentions = [Replacement(name, None) for name, module in model.named_modules() if replaceable(module)]
    return replaced(model, attentions)


def _convolution(
    func: Any, names: Mapping[int, str], output: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> LayerCall | None:
    transposed = func in _TRANSPOSED
    last = ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
    given = {**dict(zip(("input", "weight", "bias", "stride", "padding", *last), args, strict=False)), **kwargs}
    weight = given["weight"]
    if id(weight) not in names:
        return None
    dims = weight.dim() - 2
    stride, dilation = _spread(given.get("stride", 1), dims), _spread(given.get("dilation", 1), dims)
    padding = given.get("padding", 0)
    if padding == "same":
        totals = [step * (size - 1) for step, size in zip(dilation, weight.shape[2:], strict=True)]
        sides = tuple((total // 2, total - total // 2) for total in totals)
    else:
        sides = tuple((side, side) for side in _spread(0 if padding == "valid" else padding, dims))
    window = Window(stride, sides, dilation, given.get("groups", 1), transposed)
    return LayerCall(names[id(weight)], weight, given["input"], output, window, bias=given.get("bias"))


def _linear(
    func: Any, names: Mapping[int, str], output: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> LayerCall | None:
    given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
    weight = given["weight"]
    if id(weight) not in names or weight.dim() != 2:
        return None
    return LayerCall(names[id(weight)], weight, given["input"], output, bias=given.get("bias"))


def _product(
    func: Any, names: Mapping[int, str], output: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> LayerCall | None:
    """`input @ weight` and `addmm(bias, input, weight)`: the weight is (in, out)."""
    bias, values, weight = args if len(args) == 3 else (None, *args) if len(args) == 2 else (None, None, None)
    if kwargs or not isinstance(values, Tensor) or not isinstance(weight, Tensor):
        return None
    if id(weight) not in names or weight.dim() != 2:
        return None
    return LayerCall(names[id(weight)], weight, values, output, transposed=True, bias=bias)


_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_FORMS: dict[Any, Callable[..., LayerCall | None]] = {
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d, *_TRANSPOSED), _convolution),
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__, torch.addmm), _product),
}


def _spread(value: Any, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _batched(tensor: Tensor, dims: int) -> Tensor:
    return tensor if tensor.dim() == dims else tensor[None]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
