"""Tiny networks, one per pattern beyond plain layers (recurrent, parametrised, indexed, einsum, windows), by hand.

As in `nets_for_tests`: `free` is {group: channels}, `locked` {group: part of the reason}, `widths` the output width of
every layer after pruning with sparsity=0.5 and scope="layer": every group loses half of its channels, rounded down.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.nn.utils.spectral_norm import spectral_norm as old_spectral_norm
from torch.nn.utils.weight_norm import weight_norm as hooked_weight_norm

from nets_for_tests import HEAD, Case, Net, Trap, conv, head, pooled

SEQUENCE = (5, 4)  # steps, features


@torch.no_grad()  # a weight that remembers its parameters could not be copied
def old_weight_norm(module: nn.Module, name: str = "weight", dim: int = 0) -> nn.Module:
    """Weight normalisation by a hook."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return hooked_weight_norm(module, name, dim)


def weights(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape))


# -- recurrent layers ------------------------------------------------------------------------------------------------


def _recurrent(s: Any, x: Tensor) -> Tensor:
    return s.head(s.r(F.relu(s.a(x)))[0].mean(1))


def _recurrent_net(layer: Callable[..., nn.Module], width: int, **options: Any) -> Callable[[], nn.Module]:
    return lambda: Net(_recurrent, a=nn.Linear(4, 8), r=layer(8, 6, batch_first=True, **options), head=head(width))


def _states_made(s: Any, x: Tensor) -> Tensor:
    first = x[:, 0]
    return s.head(s.r(x, (s.h(first)[None], s.c(first)[None]))[0].mean(1))


def _states_given(s: Any, x: Tensor, h: Tensor) -> Tensor:
    return s.head(s.r(F.relu(s.a(x)), h)[0].mean(1))


def _cells(s: Any, x: Tensor) -> Tensor:
    state = None
    for step in range(x.shape[1]):
        state = s.r(x[:, step], state)
    return s.head(state[0] if isinstance(state, tuple) else state)


def _packed(s: Any, x: Tensor) -> Tensor:
    lengths = torch.arange(x.shape[0]) % 3 + 2
    packed = pack_padded_sequence(s.a(x), lengths, batch_first=True, enforce_sorted=False)
    return s.head(pad_packed_sequence(s.r(packed)[0], batch_first=True)[0].sum(1))


def _state_at_the_end(s: Any, x: Tensor) -> Tensor:
    return s.head(s.r(x)[1].transpose(0, 1).flatten(1))


def _last_step(s: Any, x: Tensor) -> Tensor:
    return s.head(s.r(x)[0][torch.arange(x.shape[0]), -1])


def _with_given_state(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    return (
        torch.randn(size, *SEQUENCE, generator=generator, dtype=torch.float64),
        torch.randn(1, size, 6, generator=generator, dtype=torch.float64),
    )


RECURRENT = (
    Case(
        "lstm", _recurrent_net(nn.LSTM, 6), {"a": 8, "r": 6}, HEAD, {"a": 4, "r": 12, "head": 3}, SEQUENCE
    ),  # four gates of three units
    Case(
        "lstm without biases",
        _recurrent_net(nn.LSTM, 6, bias=False),
        {"a": 8, "r": 6},
        HEAD,
        {"a": 4, "r": 12, "head": 3},
        SEQUENCE,
    ),
    Case("gru", _recurrent_net(nn.GRU, 6), {"a": 8, "r": 6}, HEAD, {"a": 4, "r": 9, "head": 3}, SEQUENCE),
    Case(
        "simple recurrent layer",
        _recurrent_net(nn.RNN, 6, nonlinearity="relu"),
        {"a": 8, "r": 6},
        HEAD,
        {"a": 4, "r": 3, "head": 3},
        SEQUENCE,
    ),
    Case(
        "stacked lstm",  # one number of units for both layers, not the same units
        _recurrent_net(nn.LSTM, 6, num_layers=2),
        {"a": 8, "r": 6, "r#2": 6},
        HEAD,
        {"a": 4, "r": 12, "head": 3},
        SEQUENCE,
        balances=(("r", "r#2"),),
    ),
    Case(
        "stacked gru in both directions",
        _recurrent_net(nn.GRU, 12, num_layers=2, bidirectional=True),
        {"a": 8, "r": 6, "r#2": 6, "r#3": 6, "r#4": 6},
        HEAD,
        {"a": 4, "r": 9, "head": 3},
        SEQUENCE,
        balances=(("r", "r#2", "r#3", "r#4"),),
    ),
    Case(
        "lstm with a projection",  # the last matrix makes the 3 projected outputs, of which 2 stay
        _recurrent_net(nn.LSTM, 3, proj_size=3),
        {"a": 8, "r": 6, "r#2": 3},
        HEAD,
        {"a": 4, "r": 2, "head": 3},
        SEQUENCE,
    ),
    Case(
        "lstm over time first",
        lambda: Net(lambda s, x: s.head(s.r(x.transpose(0, 1))[0].mean(0)), r=nn.LSTM(4, 6), head=head(6)),
        {"r": 6},
        HEAD,
        {"r": 12, "head": 3},
        SEQUENCE,
    ),
    Case(
        "initial states made by layers",
        lambda: Net(
            _states_made, h=nn.Linear(4, 6), c=nn.Linear(4, 6), r=nn.LSTM(4, 6, batch_first=True), head=head(6)
        ),
        {"h": 6},
        HEAD,
        {"h": 3, "c": 3, "r": 12, "head": 3},
        SEQUENCE,
    ),
    Case(
        "an initial state given by the caller",
        lambda: Net(_states_given, a=nn.Linear(4, 8), r=nn.GRU(8, 6, batch_first=True), head=head(6)),
        {"a": 8},
        {"r": "fixed size", **HEAD},
        {"a": 4, "r": 18, "head": 3},
        inputs=_with_given_state,
    ),
    Case(
        "final state of both directions",  # read as one tensor, it ties the directions
        lambda: Net(_state_at_the_end, r=nn.GRU(4, 6, batch_first=True, bidirectional=True), head=head(12)),
        {"r": 6},
        HEAD,
        {"r": 9, "head": 3},
        SEQUENCE,
    ),
    Case(
        "last step by index",
        lambda: Net(_last_step, r=nn.LSTM(4, 6, batch_first=True), head=head(6)),
        {"r": 6},
        HEAD,
        {"r": 12, "head": 3},
        SEQUENCE,
    ),
    Case(
        "packed sequences",
        lambda: Net(_packed, a=nn.Linear(4, 8), r=nn.LSTM(8, 6, batch_first=True), head=head(6)),
        {"a": 8, "r": 6},
        HEAD,
        {"a": 4, "r": 12, "head": 3},
        SEQUENCE,
    ),
    *(
        Case(
            f"{name} cell in a loop",
            lambda cell=cell: Net(_cells, r=cell(4, 6), head=head(6)),  # type: ignore[misc]  # bound per case
            {"r": 6},
            HEAD,
            {"r": 3 * gates, "head": 3},
            SEQUENCE,
        )
        for name, cell, gates in (("lstm", nn.LSTMCell, 4), ("gru", nn.GRUCell, 3), ("simple", nn.RNNCell, 1))
    ),
)


# -- weights that are computed ---------------------------------------------------------------------------------------


def _two(s: Any, x: Tensor) -> Tensor:
    return s.head(pooled(F.relu(s.b(F.relu(s.a(x))))))


def _dense(s: Any, x: Tensor) -> Tensor:
    return s.head(F.relu(s.b(F.relu(s.a(x)))))


def _standardised(epsilon: float) -> Callable[[Any, Tensor], Tensor]:
    def forward(s: Any, x: Tensor) -> Tensor:
        weight = s.a.weight
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.std((1, 2, 3), keepdim=True) + epsilon)
        return s.head(pooled(F.relu(F.conv2d(F.relu(s.z(x)), weight, s.a.bias, padding=1))))

    return forward


class Standardised(nn.Conv2d):
    """A convolution whose weights are standardised by a batch norm."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, padding=1)


class LowRank(nn.Module):
    """A linear layer plus a product of two thin matrices."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.down, self.up = weights(rank, inputs), weights(outputs, rank)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.linear.weight + self.up @ self.down, self.linear.bias)


class Masked(nn.Module):
    """A parametrization that multiplies with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(8, 3, 3, 3))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class Symmetric(nn.Module):
    """A parametrization that mirrors the upper triangle."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).transpose(-1, -2)


def _parametrised(module: nn.Module, parametrization: nn.Module) -> nn.Module:
    parametrize.register_parametrization(module, "weight", parametrization)
    return module


def _two_convs(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Net(_two, a=wrap(conv(3, 8)), b=wrap(conv(8, 6)), head=head(6))


def _up(inputs: int, outputs: int) -> nn.Module:
    return nn.ConvTranspose2d(inputs, outputs, 2)


_CONVS = {"a": 8, "b": 6}, HEAD, {"a": 4, "b": 3, "head": 3}

PARAMETRISED = (
    Case("weight norm", _two_convs(parametrizations.weight_norm), *_CONVS),
    Case("weight norm by hooks", _two_convs(old_weight_norm), *_CONVS),
    Case("weight norm with one gain", _two_convs(lambda m: parametrizations.weight_norm(m, dim=None)), *_CONVS),
    Case(
        "weight norm per output of a transposed convolution",
        lambda: Net(_two, a=old_weight_norm(_up(3, 8), dim=1), b=old_weight_norm(_up(8, 6), dim=1), head=head(6)),
        *_CONVS,
    ),
    Case(
        "weight norm per input of a transposed convolution",
        lambda: Net(_two, a=conv(3, 8), b=parametrizations.weight_norm(_up(8, 6)), head=head(6)),
        *_CONVS,
    ),
    Case(
        "weight norm of linear layers",
        lambda: Net(
            _dense, a=old_weight_norm(nn.Linear(5, 8)), b=parametrizations.weight_norm(nn.Linear(8, 6)), head=head(6)
        ),
        *_CONVS,
        (5,),
    ),
    Case(
        "weight norm of an lstm",
        lambda: Net(
            _recurrent,
            a=nn.Linear(4, 8),
            r=old_weight_norm(nn.LSTM(8, 6, batch_first=True), "weight_hh_l0"),
            head=head(6),
        ),
        {"a": 8, "r": 6},
        HEAD,
        {"a": 4, "r": 12, "head": 3},
        SEQUENCE,
    ),
    Case("spectral norm", _two_convs(parametrizations.spectral_norm), *_CONVS),
    Case("spectral norm by hooks", _two_convs(old_spectral_norm), *_CONVS),
    Case(
        "weights standardised, with an epsilon",
        lambda: Net(_standardised(1e-3), z=conv(3, 6), a=conv(6, 8), head=head(8)),
        {"a": 8},
        {"z": "fixed size", **HEAD},  # the mean of a filter counts its inputs
        {"z": 6, "a": 4, "head": 3},
    ),
    Case(
        "weights standardised, without",
        lambda: Net(_standardised(0.0), z=conv(3, 6), y=conv(6, 6), a=conv(6, 8), head=head(8)),
        {},
        {"z": "fixed size", "a": "not finite where channels are zero", **HEAD},
        {"z": 6, "a": 8, "head": 3},
    ),
    Case(
        "weights standardised by a batch norm",
        lambda: Net(_two, a=conv(3, 8), b=Standardised(8, 6, 3), head=head(6)),
        {"b": 6},
        {"a": "fixed size", **HEAD},
        {"a": 8, "b": 3, "head": 3},
    ),
    Case(
        "a layer plus a low-rank product",
        lambda: Net(_dense, a=LowRank(5, 8, 4), b=nn.Linear(8, 6), head=head(6)),
        {"a": 4, "a.linear": 8, "b": 6},
        HEAD,
        {"a": 2, "a.linear": 4, "b": 3, "head": 3},
        (5,),
    ),
    Case(
        "a product of two weights",
        lambda: Net(
            lambda s, x: s.head(F.relu(F.linear(x, s.u @ s.v))), u=weights(8, 4), v=weights(4, 5), head=head(8)
        ),
        {"v": 4, "u": 8},
        HEAD,
        {"v": 2, "u": 4, "head": 3},
        (5,),
    ),
    Case(
        "a masked weight",
        lambda: Net(_two, a=_parametrised(conv(3, 8), Masked()), b=conv(8, 6), head=head(6)),
        *_CONVS,
    ),
    Case(
        "a symmetric weight",
        lambda: Net(_dense, a=nn.Linear(5, 8), b=_parametrised(nn.Linear(8, 8), Symmetric()), head=head(8)),
        {},
        {"a": "fixed size", **HEAD},
        {"a": 8, "head": 3},
        (5,),
    ),
)


# -- elements by number ----------------------------------------------------------------------------------------------


def _between(change: Callable[[Any, Tensor], Tensor], width: int = 8, **parts: Callable[[], Any]) -> Callable[[], Net]:
    """Two convolutions, and what is done to the maps between them."""

    def build() -> Net:
        made = {name: part() for name, part in parts.items()}
        return Net(
            lambda s, x: s.head(pooled(F.relu(s.b(change(s, F.relu(s.a(x))))))),
            a=conv(3, 8),
            b=conv(width, 6),
            head=head(6),
            **made,
        )

    return build


def _relative_bias(s: Any, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    query, key, value = s.qkv(x).reshape(b, n, 3, s.heads, -1).permute(2, 0, 3, 1, 4)
    bias = s.table[s.places].permute(2, 0, 1)
    mixed = (query @ key.transpose(-1, -2) * 0.3 + bias).softmax(-1) @ value
    return s.head(mixed.transpose(1, 2).flatten(2).mean(1))


def _written(
    write: Callable[[Tensor, Tensor], Any], *, start: Callable[[Tensor], Tensor]
) -> Callable[[Any, Tensor], Tensor]:
    def change(s: Any, h: Tensor) -> Tensor:
        y = start(h)
        write(y, h)
        return y

    return change


def _places(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


ROWS = (slice(None), slice(None))

INDEXED = (
    *(
        Case(name, _between(change), *_CONVS)
        for name, change in {
            "positions by number": lambda s, h: h[:, :, _places(2, 1, 0)],
            "positions by two indices": lambda s, h: h[:, :, _places(2, 1), _places(1, 3)][..., None],
            "positions by a mask": lambda s, h: h[:, :, torch.ones(6, 6).tril() > 0][..., None],
            "positions selected": lambda s, h: h.index_select(3, _places(1, 2)),
            "positions gathered": lambda s, h: h.gather(2, h.argsort(2)),
            "positions gathered by an expanded index": lambda s, h: h.flatten(2).gather(
                2, _places(1, 3, 5).expand(h.shape[0], h.shape[1], 3)
            )[..., None],
            "positions taken along a dimension": lambda s, h: torch.take_along_dim(
                h, _places(1, 3).view(1, 1, 2, 1), 2
            ),
            "positions written by number": _written(
                lambda y, h: y.__setitem__((*ROWS, _places(1, 2)), h[:, :, :2]), start=torch.zeros_like
            ),
            "positions written by a constant": _written(
                lambda y, h: y.__setitem__((*ROWS, _places(1, 2)), 0.5), start=torch.clone
            ),
            "positions written as a slice": _written(
                lambda y, h: y.__setitem__((*ROWS, slice(1, 3)), h[:, :, :2]), start=torch.zeros_like
            ),
            "positions scattered": lambda s, h: torch.zeros_like(h).scatter(2, h.argsort(2), h),
            "positions scattered and added": lambda s, h: h.scatter_add(2, h.argsort(2), h),
            "positions added by number": lambda s, h: h.index_add(2, _places(0, 1, 2), h[:, :, :3]),
            "positions filled": lambda s, h: h.index_fill(2, _places(0, 1), 0.5),
        }.items()
    ),
    Case(
        "a table used as a parameter",
        lambda: Net(
            lambda s, x: s.head(F.relu(s.l(s.table[x].mean(1)))), table=weights(9, 8), l=nn.Linear(8, 6), head=head(6)
        ),
        {"table": 8, "l": 6},
        HEAD,
        {"l": 3, "head": 3},
        inputs=lambda size: torch.arange(size * 4).view(size, 4) ** 2 % 9,
    ),
    Case(
        "relative position bias",  # whole heads of 4: q, k and v hold 4 channels each
        lambda: Net(
            _relative_bias,
            qkv=nn.Linear(6, 24),
            table=weights(9, 2),
            places=torch.arange(16).view(4, 4) % 9,
            heads=2,
            head=head(8),
        ),
        {"qkv": 2},
        HEAD,
        {"qkv": 12, "head": 3},
        (4, 6),
    ),
    Case(
        "one-hot inputs",
        lambda: Net(
            lambda s, x: s.head(F.relu(s.l(F.one_hot(x, 5).double()).mean(1))), l=nn.Linear(5, 8), head=head(8)
        ),
        {"l": 8},
        HEAD,
        {"l": 4, "head": 3},
        inputs=lambda size: torch.arange(size * 4).view(size, 4) ** 2 % 5,
    ),
    Case(
        "channels by number",
        _between(lambda s, h: h[:, _places(7, 6, 5, 4, 3, 2, 1, 0)]),
        {"b": 6},
        {"a": "looked up by number", **HEAD},
        {"a": 8, "b": 3, "head": 3},
    ),
    Case(
        "channels selected by number",
        _between(lambda s, h: h.index_select(1, _places(0, 2, 4, 6)), 4),
        {"b": 6},
        {"a": "looked up by number", **HEAD},
        {"a": 8, "b": 3, "head": 3},
    ),
)


# -- windows, orders, new tensors ------------------------------------------------------------------------------------


class FrozenNorm(nn.Module):
    """A batch norm of buffers, written out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        scale = weight * (self.running_var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (bias - self.running_mean.reshape(1, -1, 1, 1) * scale)


def _lower() -> Tensor:
    return torch.ones(6, 6).tril() == 0


def _wide_zeros(s: Any, h: Tensor) -> Tensor:
    return torch.cat([h, torch.zeros(h.shape[0], h.shape[1], 1, 6, dtype=h.dtype)], 2)


SHAPED = (
    *(
        Case(name, _between(change, **parts), *_CONVS)
        for name, (change, parts) in {
            "unfolded and folded": (lambda s, h: F.fold(F.unfold(h, 2, stride=2), (6, 6), 2, stride=2), {}),
            "windows along positions": (lambda s, h: h.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)), {}),
            "flipped positions": (lambda s, h: h.flip(2, 3), {}),
            "flipped channels": (lambda s, h: h.flip(1), {}),
            "rolled positions": (lambda s, h: h.roll((1, 2), (2, 3)), {}),
            "interleaved positions": (lambda s, h: h.repeat_interleave(2, 2), {}),
            "a triangle of positions": (lambda s, h: h.tril(), {}),
            "masked positions": (lambda s, h: h.masked_fill(_lower(), -1.0), {}),
            "moved dimensions": (lambda s, h: h.movedim(1, 3).swapaxes(1, 2).movedim(3, 1), {}),
            "normalised over channels": (lambda s, h: F.normalize(h, dim=1), {}),
            "logsumexp over positions": (lambda s, h: h.logsumexp(2, keepdim=True), {}),
            "softmax over positions": (lambda s, h: h.flatten(2).softmax(2).view_as(h), {}),
            "zeros of a size of the maps": (_wide_zeros, {}),
            "ones of a size in an attribute": (
                lambda s, h: h * torch.ones(s.channels, 1, 1, dtype=h.dtype),
                {"channels": lambda: 8},
            ),
            "a new tensor like the maps": (lambda s, h: h + h.new_full((h.shape[0], h.shape[1], 6, 6), 2.0), {}),
            "a sum repeated over the width": (
                lambda s, h: h * h.sum(1, keepdim=True).repeat(1, h.shape[1], 1, 1),
                {},
            ),
            "a sum expanded over the width": (
                lambda s, h: h * h.sum(1, keepdim=True).expand(-1, h.shape[1], -1, -1),
                {},
            ),
            "circular padding": (lambda s, h: F.pad(h, (1, 2, 2, 1), mode="circular"), {}),
            "instance norm with statistics": (
                lambda s, h: s.norm(h),
                {"norm": lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True)},
            ),
            "a frozen batch norm": (lambda s, h: s.norm(h), {"norm": lambda: FrozenNorm(8)}),
        }.items()
    ),
    Case(
        "convolution with circular padding",
        lambda: Net(_two, a=conv(3, 8), b=conv(8, 6, padding_mode="circular"), head=head(6)),
        *_CONVS,
    ),
    Case(
        "channel shuffle as one op",
        _between(lambda s, h: s.shuffle(h), shuffle=lambda: nn.ChannelShuffle(2)),
        {"a": 4, "b": 6},
        HEAD,
        {"a": 4, "b": 3, "head": 3},
    ),
    Case(
        "channels plus flipped channels",  # channel i goes with channel 7 - i
        _between(lambda s, h: h + h.flip(1)),
        {"a": 4, "b": 6},
        HEAD,
        {"a": 4, "b": 3, "head": 3},
    ),
    Case("interleaved channels", _between(lambda s, h: h.repeat_interleave(2, 1), 16), *_CONVS),
    Case("tiled channels", _between(lambda s, h: h.tile(1, 2, 1, 1), 16), *_CONVS),
    *(
        Case(name, _between(change), {"b": 6}, {"a": reason, **HEAD}, {"a": 8, "b": 3, "head": 3}, unknown=unknown)
        for name, change, reason, unknown in (
            ("local response norm", lambda s, h: F.local_response_norm(h, 3), "positions are pooled", ()),
            ("logsumexp over channels", lambda s, h: h * h.logsumexp(1, keepdim=True), "reduced by logsumexp", ()),
            ("rolled channels", lambda s, h: h.roll(1, 1), "roll runs along it", ()),
            ("windows along channels", lambda s, h: h.unfold(1, 1, 1).squeeze(-1), "windows of fixed length", ()),
            ("ones of a literal size", lambda s, h: h + h.new_ones(8, 1, 1), "fixed size", ()),
            (
                "strides by hand",
                lambda s, h: h.as_strided(h.shape, h.stride()),
                "no rule for this op",
                ("aten.as_strided",),
            ),
        )
    ),
)


# -- products --------------------------------------------------------------------------------------------------------


def _einsum_attention(s: Any, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    query, key, value = (layer(x).view(b, n, s.heads, -1) for layer in (s.q, s.k, s.v))
    mixing = (torch.einsum("bihd,bjhd->bhij", query, key) * 0.3).softmax(-1)
    return s.head(torch.einsum("bhij,bjhd->bihd", mixing, value).flatten(2).mean(1))


def _two_views(function: Callable[[Any, Tensor, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    return lambda s, x: s.head(function(s, s.a(x), s.b(x)))


VECTOR, TOKENS = (5,), (4, 6)

PRODUCTS = (
    Case(
        "einsum as a layer",
        lambda: Net(
            lambda s, x: s.head(F.relu(torch.einsum("ij,jk->ik", F.relu(s.a(x)), s.w))),
            a=nn.Linear(5, 8),
            w=weights(8, 6),
            head=head(6),
        ),
        {"a": 8, "w": 6},
        HEAD,
        {"a": 4, "w": 3, "head": 3},
        VECTOR,
    ),
    Case(
        "einsum as a pointwise convolution",
        lambda: Net(
            lambda s, x: s.head(pooled(F.relu(torch.einsum("bchw,oc->bohw", F.relu(s.a(x)), s.w)))),
            a=conv(3, 8),
            w=weights(6, 8),
            head=head(6),
        ),
        {"a": 8, "w": 6},
        HEAD,
        {"a": 4, "w": 3, "head": 3},
    ),
    Case(
        "einsum as attention",  # two heads of four
        lambda: Net(_einsum_attention, q=nn.Linear(6, 8), k=nn.Linear(6, 8), v=nn.Linear(6, 8), heads=2, head=head(8)),
        {"q": 2},
        HEAD,
        {"q": 4, "k": 4, "v": 4, "head": 3},
        TOKENS,
    ),
    Case(
        "einsum of two views",
        lambda: Net(
            _two_views(lambda s, a, b: torch.einsum("bld,bld->bl", a, b)),
            a=nn.Linear(6, 8),
            b=nn.Linear(6, 8),
            head=head(4),
        ),
        {"a": 8},
        HEAD,
        {"a": 4, "b": 4, "head": 3},
        TOKENS,
    ),
    Case(
        "matrix by vector",
        lambda: Net(lambda s, x: s.head(F.relu(s.a(x)) @ s.w), a=nn.Linear(6, 8), w=weights(8), head=head(4)),
        {"a": 8},
        HEAD,
        {"a": 4, "head": 3},
        TOKENS,
    ),
    Case(
        "weight on the left",
        lambda: Net(lambda s, x: s.head(F.relu(s.p @ x).sum(1)), p=weights(8, 4), head=head(6)),
        {"p": 8},
        HEAD,
        {"p": 4, "head": 3},
        TOKENS,
    ),
    Case(
        "outer product as a weight",
        lambda: Net(
            lambda s, x: s.head(F.relu(s.a(x)) @ torch.outer(s.u, s.w)),
            a=nn.Linear(5, 8),
            u=weights(8),
            w=weights(6),
            head=head(6),
        ),
        {"a": 8, "w": 6},
        HEAD,
        {"a": 4, "w": 3, "head": 3},
        VECTOR,
    ),
    Case(
        "bilinear layer",
        lambda: Net(
            _two_views(lambda s, a, b: F.relu(s.w(a, b))),
            a=nn.Linear(5, 8),
            b=nn.Linear(5, 6),
            w=nn.Bilinear(8, 6, 4),
            head=head(4),
        ),
        {"a": 8, "b": 6, "w": 4},
        HEAD,
        {"a": 4, "b": 3, "w": 2, "head": 3},
        VECTOR,
    ),
    Case(
        "batched product with a bias",
        lambda: Net(
            lambda s, x: s.head(torch.baddbmm(s.bias, s.a(x), s.w.expand(x.shape[0], -1, -1)).mean(1)),
            a=nn.Linear(6, 8),
            w=weights(1, 8, 6),
            bias=weights(1, 1, 6),
            head=head(6),
        ),
        {"a": 8, "w": 6},
        HEAD,
        {"a": 4, "w": 3, "head": 3},
        TOKENS,
    ),
    Case(
        "distances to centres",  # a centre is a channel of the head, too
        lambda: Net(lambda s, x: s.head(torch.cdist(s.a(x), s.c)), a=nn.Linear(5, 8), c=weights(4, 8), head=head(4)),
        {"a": 8, "c": 4},
        HEAD,
        {"a": 4, "head": 3},
        VECTOR,
    ),
    Case(
        "cosine similarity to centres",
        lambda: Net(
            lambda s, x: s.head(F.cosine_similarity(s.a(x)[:, None], s.c[None], dim=-1)),
            a=nn.Linear(5, 8),
            c=weights(4, 8),
            head=head(4),
        ),
        {"a": 8, "c": 4},
        HEAD,
        {"a": 4, "head": 3},
        VECTOR,
    ),
    Case(
        "distances with an epsilon",  # dead channels differ by the epsilon
        lambda: Net(
            lambda s, x: s.head(F.pairwise_distance(s.a(x)[:, None], s.c[None])),
            a=nn.Linear(5, 8),
            c=weights(4, 8),
            head=head(4),
        ),
        {"c": 4},
        {"a": "reduced by norm over channels", **HEAD},
        {"a": 8, "head": 3},
        VECTOR,
    ),
)

PATTERNS = (*RECURRENT, *PARAMETRISED, *INDEXED, *SHAPED, *PRODUCTS)


# -- traps: whatever a plan removes here, shrunk must equal zeroed -----------------------------------------------------


def _sum(s: Any, h: Tensor) -> Tensor:
    """A consumer without weights of its own, which sees what dead channels really hold."""
    return s.head(pooled(F.relu(s.last(h.sum(1, keepdim=True)))))


def _trap(change: Callable[[Any, Tensor], Tensor], **parts: Callable[[], Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        made = {name: part() for name, part in parts.items()}
        return Net(lambda s, x: _sum(s, change(s, s.a(x))), a=conv(3, 8), last=conv(1, 6), head=head(6), **made)

    return build


def _direction_read_twice(s: Any, h: Tensor) -> Tensor:
    return s.n(h) + s.n.weight_v.sum((1, 2, 3))[:, None, None]


def _in_place(change: Callable[[Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    def run(s: Any, h: Tensor) -> Tensor:
        y = h.clone()
        change(y)
        return y

    return run


def _buffer_of_ones(s: Any, h: Tensor) -> Tensor:
    y = torch.ones(h.shape, dtype=h.dtype)
    y[:, :, 1:3] = h[:, :, :2]
    return y


def _normed() -> nn.Module:
    return old_weight_norm(conv(8, 8))


def _gains_computed(s: Any, h: Tensor) -> Tensor:
    gain = F.softplus(s.weight_g)  # of zero it is no zero
    return F.conv2d(h, torch._weight_norm(s.weight_v, gain, 0), padding=1)


PATTERN_TRAPS = (
    Trap(
        "gains that are computed",
        _trap(_gains_computed, weight_v=lambda: weights(8, 8, 3, 3), weight_g=lambda: weights(8, 1, 1, 1)),
    ),
    Trap("a direction that is read elsewhere", _trap(_direction_read_twice, n=_normed)),
    Trap("index made of channels", _trap(lambda s, h: h[:, :, h.mean((0, 1, 3)).argsort()])),
    Trap("arg max of channels as an index", _trap(lambda s, h: h[:, :, h.argmax(1)[0, 0]])),
    Trap("channels gathered", _trap(lambda s, h: h.gather(1, h.argsort(1)))),
    Trap("channels scattered", _trap(lambda s, h: h.scatter(1, h.argsort(1), h))),
    Trap("channels written by number", _trap(_in_place(lambda y: y.__setitem__((slice(None), _places(0, 5)), 1.0)))),
    Trap("channels written as a slice", _trap(_in_place(lambda y: y.__setitem__((slice(None), slice(2, 5)), 1.0)))),
    Trap("positions written with ones", _trap(_in_place(lambda y: y.__setitem__((*ROWS, slice(2, 5)), 1.0)))),
    Trap("positions zeroed", _trap(_in_place(lambda y: y[:, :, 1].zero_()))),
    Trap("channels filled by number", _trap(lambda s, h: h.index_fill(1, _places(1), 2.0))),
    Trap("positions filled by number", _trap(lambda s, h: h.index_fill(2, _places(1), 2.0))),
    Trap("scatter of a constant", _trap(lambda s, h: h.scatter(2, h.argsort(2)[:, :, :2], 2.0))),
    Trap("scatter into ones", _trap(lambda s, h: torch.ones_like(h).scatter_add(2, h.argsort(2), h))),
    Trap("a narrow scatter", _trap(lambda s, h: h.scatter(2, torch.zeros(2, 3, 2, 6, dtype=torch.int64), h))),
    Trap("a narrow gather", _trap(lambda s, h: h.gather(2, torch.zeros(2, 3, 2, 6, dtype=torch.int64)))),
    Trap("buffer of ones", _trap(_buffer_of_ones)),
    Trap("masked scatter", _trap(lambda s, h: h.masked_scatter(h > 0, h.flip(1)))),
    Trap("mask of everything", _trap(lambda s, h: h * h[h > 0].mean())),
    Trap("number of positives", _trap(lambda s, h: h * (h > 0).sum())),
    Trap("a number read out", _trap(lambda s, h: h * float(h.amax()))),
    Trap("diagonal of channels", _trap(lambda s, h: h[:, :6].diagonal(0, 1, 2).unsqueeze(1))),
    Trap("diagonal of positions", _trap(lambda s, h: h.diagonal(0, 2, 3)[:, :, None])),
    Trap("triangle over channels", _trap(lambda s, h: h.movedim(1, 3).tril().movedim(3, 1))),
    Trap("flip that is summed", _trap(lambda s, h: h.flip(1) * h)),
    Trap("channels rolled and added", _trap(lambda s, h: h + h.roll(2, 1))),
    Trap("interleaved by a tensor", _trap(lambda s, h: h.repeat_interleave(_places(1, 2, 1, 2, 1, 2, 1, 2), 1))),
    Trap("shuffled in two ways", _trap(lambda s, h: F.channel_shuffle(h, 2) + F.channel_shuffle(h, 4))),
    Trap("circular padding of the batch's maps", _trap(lambda s, h: F.pad(h + 1, (1, 1, 0, 0), mode="circular"))),
    Trap("a gate of ones", _trap(lambda s, h: torch.ones(h.shape[1], 1, 1, dtype=h.dtype) + h)),
    Trap("a fill with the width", _trap(lambda s, h: h + torch.full((h.shape[1], 1, 1), h.shape[1], dtype=h.dtype))),
    Trap("zeros of a literal size", _trap(lambda s, h: h + torch.zeros(8, 1, 1, dtype=h.dtype))),
    Trap("copies counted", _trap(lambda s, h: h.mean(1, keepdim=True).repeat(1, h.shape[1], 1, 1))),
    Trap("copies expanded", _trap(lambda s, h: h[:, :1].expand(-1, h.shape[1], -1, -1))),
    Trap("product of itself", _trap(lambda s, h: torch.einsum("bchw,bdhw->bc", h, h)[..., None, None])),
    Trap("trace", _trap(lambda s, h: h * torch.einsum("bii->b", h.flatten(2) @ h.flatten(2).transpose(1, 2)).mean())),
    Trap("distances between channels", _trap(lambda s, h: torch.cdist(h.flatten(2), h.flatten(2))[..., None])),
    Trap("distances between positions", _trap(lambda s, h: h * torch.cdist(*[h.flatten(2).mT] * 2).mean())),
    Trap("distances of shifted maps", _trap(lambda s, h: h * torch.cdist(*[(h + 1).flatten(2).mT] * 2).mean())),
    Trap(
        "instance statistics without gains",
        _trap(lambda s, h: s.n(h), n=lambda: nn.InstanceNorm2d(8, track_running_stats=True)),
    ),
)
