"""Hand-written networks: a few whole ones, and tiny ones that each show a single pattern. See `zoo.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Built = tuple[nn.Module, Any]
CLASSES = 5


class Net(nn.Module):
    """`forward` is a function (self, *inputs); the parts are modules, parameters, buffers or numbers."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.function = function

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.function(self, *inputs, **named)


def conv(inputs: int, outputs: int, size: int = 3, **options: Any) -> nn.Conv2d:
    """A convolution that keeps the picture's size."""
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


def image() -> Tensor:
    """Two pictures, (2, 3, 8, 8)."""
    return torch.randn(2, 3, 8, 8)


def sequence() -> Tensor:
    """Two sequences of 6 vectors, (2, 6, 12)."""
    return torch.randn(2, 6, 12)


def tokens() -> Tensor:
    """Two sequences of 6 tokens out of 20."""
    return torch.randint(0, 20, (2, 6))


def _classified(s: Any, features: Tensor) -> Tensor:
    return s.head(F.relu(features).mean((2, 3)))


def _head(width: int) -> nn.Linear:
    return nn.Linear(width, CLASSES)


# -- whole networks --------------------------------------------------------------------------------------------------


class LanguageModel(nn.Module):
    """An LSTM whose embedding and output layer are one matrix."""

    def __init__(self, vocabulary: int = 50, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.out = nn.Linear(width, vocabulary, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.lstm(self.embed(tokens))[0])


class Encoder(nn.Module):
    """`nn.TransformerEncoder` over projected vectors."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=64, batch_first=True)
        self.enter = nn.Linear(12, width)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.head = _head(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.enter(x)).mean(1))


class UNet(nn.Module):
    """Down with GroupNorm and PReLU, up with a transposed convolution and with PixelShuffle, skips by concatenation."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.one = nn.Sequential(conv(3, width), nn.GroupNorm(4, width), nn.PReLU(width))
        self.two = nn.Sequential(conv(width, 2 * width, stride=2), nn.GroupNorm(4, 2 * width), nn.PReLU(2 * width))
        self.three = nn.Sequential(conv(2 * width, 4 * width, stride=2), nn.GroupNorm(4, 4 * width), nn.PReLU())
        self.up = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.merge = nn.Sequential(conv(4 * width, 4 * width), nn.PReLU())
        self.shuffle = nn.PixelShuffle(2)
        self.last = conv(2 * width, 2)

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        two = self.two(one)
        merged = self.merge(torch.cat([self.up(self.three(two)), two], 1))
        return self.last(torch.cat([self.shuffle(merged), one], 1))


class GatedMLP(nn.Module):
    """Two residual blocks with a gated hidden layer under RMSNorm."""

    def __init__(self, width: int = 24, hidden: int = 48) -> None:
        super().__init__()
        self.enter = nn.Linear(12, width)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.gates = nn.ModuleList(nn.Linear(width, hidden) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(width, hidden) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(hidden, width) for _ in range(2))
        self.head = _head(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for norm, gate, up, down in zip(self.norms, self.gates, self.ups, self.downs, strict=True):
            h = norm(x)
            x = x + down(F.silu(gate(h)) * up(h))
        return self.head(x.mean(1))


class UsedTwice(nn.Module):
    """One convolution applied twice, each time with its own BatchNorm."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.body = conv(3, width), conv(width, width)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.tail = conv(width, 12)
        self.head = _head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.body(F.relu(self.stem(x)))))
        x = F.relu(self.bn2(self.body(x)))
        return _classified(self, self.tail(x))


class TwoInputs(nn.Module):
    """A picture and a vector in, a dictionary out."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.see, self.look = conv(3, width), conv(width, width)
        self.read = nn.Linear(6, width)
        self.mix = nn.Linear(2 * width, 24)
        self.head, self.side = _head(24), nn.Linear(24, 1)

    def forward(self, picture: Tensor, facts: Tensor) -> dict[str, Tensor]:
        seen = F.relu(self.look(F.relu(self.see(picture)))).mean((2, 3))
        mixed = F.relu(self.mix(torch.cat([seen, F.relu(self.read(facts))], 1)))
        return {"logits": self.head(mixed), "value": self.side(mixed)}


OWN: dict[str, Callable[[], Built]] = {
    "lstm_language_model": lambda: (LanguageModel(), torch.randint(0, 50, (2, 7))),
    "transformer_encoder": lambda: (Encoder(), sequence()),
    "unet": lambda: (UNet(), torch.randn(2, 3, 16, 16)),
    "gated_mlp": lambda: (GatedMLP(), sequence()),
    "used_twice": lambda: (UsedTwice(), image()),
    "two_inputs": lambda: (TwoInputs(), {"picture": image(), "facts": torch.randn(2, 6)}),
}


# -- one pattern each: convolutions ----------------------------------------------------------------------------------


def _chain(s: Any, x: Tensor) -> Tensor:
    return _classified(s, s.c(F.relu(s.b(F.relu(s.a(x))))))


def _channel_shuffle(s: Any, x: Tensor) -> Tensor:
    h = F.relu(s.a(x))
    n, c, height, width = h.shape
    h = h.view(n, s.ways, c // s.ways, height, width).transpose(1, 2).reshape(n, c, height, width)
    return _classified(s, s.b(h))


def _slices(s: Any, x: Tensor) -> Tensor:
    h = F.relu(s.a(x))
    half = h.shape[1] // 2
    return _classified(s, s.b(h[:, :half]) + s.c(h[:, half:]))


def _split(s: Any, x: Tensor) -> Tensor:
    first, second = F.relu(s.a(x)).split(s.sizes, dim=1)
    return _classified(s, s.b(first) + s.c(second))


def _upscaled(s: Any, x: Tensor) -> Tensor:
    return s.c(s.up(F.relu(s.a(x))))


def _residual_concat(s: Any, x: Tensor) -> Tensor:
    h = F.relu(s.a(x))
    h = h + torch.cat([s.b(h), s.c(h)], 1)
    return _classified(s, s.d(F.relu(h)))


def _dense_block(s: Any, x: Tensor) -> Tensor:
    features = [s.a(x)]
    for layer in (s.b, s.c):
        features.append(layer(F.relu(torch.cat(features, 1))))
    return _classified(s, torch.cat(features, 1))


def _squeeze_excite(s: Any, x: Tensor) -> Tensor:
    h = F.relu(s.a(x))
    gate = torch.sigmoid(s.expand(F.relu(s.squeeze(h.mean((2, 3), keepdim=True)))))
    return _classified(s, s.b(h * gate))


def _normed(s: Any, x: Tensor) -> Tensor:
    return _classified(s, s.b(s.act(s.norm(s.a(x)))))


def _flattened(s: Any, x: Tensor) -> Tensor:
    return s.head(F.relu(s.fc(F.max_pool2d(F.relu(s.a(x)), 4).flatten(1))))


def _layer_scale(s: Any, x: Tensor) -> Tensor:
    h = F.relu(s.a(x))
    return _classified(s, s.b((h - s.mean.view(1, -1, 1, 1)) * s.gamma.view(1, -1, 1, 1)))


def _direct_parameters(s: Any, x: Tensor) -> Tensor:
    return F.relu(x @ s.first + s.bias) @ s.second


def _tied_convs() -> nn.Module:
    net = Net(_chain, a=conv(3, 16), b=conv(16, 16, bias=False), c=conv(16, 16, bias=False), head=_head(16))
    net.c.weight = net.b.weight
    return net


def _frozen() -> nn.Module:
    return Net(_chain, a=conv(3, 16), b=conv(16, 12), c=conv(12, 8), head=_head(8)).requires_grad_(False)


def _weight_norm() -> nn.Module:
    parametrised = nn.utils.parametrizations.weight_norm
    return Net(_chain, a=parametrised(conv(3, 16)), b=parametrised(conv(16, 12)), c=conv(12, 8), head=_head(8))


# -- one pattern each: sequences -------------------------------------------------------------------------------------


def _recurrent(s: Any, x: Tensor) -> Tensor:
    return s.head(s.rnn(F.relu(s.enter(x)))[0].mean(1))


def _heads(s: Any, x: Tensor) -> Tensor:
    """(N, L, width) -> (N, heads, L, width per head)."""
    return x.unflatten(-1, (-1, s.head_width)).transpose(1, 2)


def _attended(s: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(-2, -1) / math.sqrt(s.head_width)).softmax(-1)
    return s.head(s.leave((weights @ v).transpose(1, 2).flatten(2)).mean(1))


def _fused_qkv(s: Any, x: Tensor) -> Tensor:
    q, k, v = s.qkv(s.enter(x)).chunk(3, dim=-1)
    return _attended(s, _heads(s, q), _heads(s, k), _heads(s, v))


def _stacked_qkv(s: Any, x: Tensor) -> Tensor:
    n, length, _ = x.shape
    q, k, v = s.qkv(s.enter(x)).reshape(n, length, 3, s.heads, s.head_width).permute(2, 0, 3, 1, 4)
    return _attended(s, q, k, v)


def _rotated(x: Tensor) -> Tensor:
    """Rotary position embedding over the last two dims of (N, heads, L, width per head)."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] / 100.0 ** (torch.arange(half) / half)
    angles = torch.cat([angles, angles], -1).to(x.dtype)
    return x * angles.cos() + torch.cat([-x[..., half:], x[..., :half]], -1) * angles.sin()


def _rope(s: Any, x: Tensor) -> Tensor:
    x = s.enter(x)
    return _attended(s, _rotated(_heads(s, s.q(x))), _rotated(_heads(s, s.k(x))), _heads(s, s.v(x)))


def _grouped_query(s: Any, x: Tensor) -> Tensor:
    x = s.enter(x)
    q, k, v = (_heads(s, part(x)) for part in (s.q, s.k, s.v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return s.head(s.leave(out.transpose(1, 2).flatten(2)).mean(1))


def _einsum(s: Any, x: Tensor) -> Tensor:
    h = F.relu(torch.einsum("nlc,chd->nlhd", x, s.first))
    return s.head(torch.einsum("nlhd,hde->nle", h, s.second).mean(1))


def _gated(s: Any, x: Tensor) -> Tensor:
    return s.head(s.down(F.glu(s.up(x), dim=-1)).mean(1))


def _gated_by_chunks(s: Any, x: Tensor) -> Tensor:
    gate, value = s.up(x).chunk(2, dim=-1)
    return s.head(s.down(F.silu(gate) * value).mean(1))


def _multihead(s: Any, x: Tensor) -> Tensor:
    x = s.enter(x)
    return s.head(s.leave(s.attention(x, x, x, need_weights=False)[0]).mean(1))


def _tied_embedding(s: Any, tokens: Tensor) -> Tensor:
    h = s.embed(tokens)
    return F.linear(h + s.down(F.relu(s.up(h))), s.embed.weight)


def _windows(s: Any, x: Tensor) -> Tensor:
    n, length, _ = x.shape
    h = F.relu(s.enter(x))
    h = h.view(n, length // s.window, s.window, -1).roll(1, dims=2)
    return s.head(F.relu(s.mix(h)).mean((1, 2)))


def _attention(function: Callable[..., Any], **parts: Any) -> nn.Module:
    """Four heads of 8 over a width of 32."""
    shared = {"enter": nn.Linear(12, 32), "leave": nn.Linear(32, 24), "head": _head(24), "head_width": 8, "heads": 4}
    return Net(function, **shared, **parts)


def _weights(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / math.sqrt(shape[0]))


IMAGES: dict[str, Callable[[], nn.Module]] = {
    "channel_shuffle": lambda: Net(_channel_shuffle, a=conv(3, 16), b=conv(16, 12), ways=2, head=_head(12)),
    "slices": lambda: Net(_slices, a=conv(3, 16), b=conv(8, 12), c=conv(8, 12), head=_head(12)),
    "split_sizes": lambda: Net(_split, a=conv(3, 16), b=conv(4, 12), c=conv(12, 12), sizes=(4, 12), head=_head(12)),
    "weight_norm": _weight_norm,
    "pixel_shuffle": lambda: Net(_upscaled, a=conv(3, 32), up=nn.PixelShuffle(2), c=conv(8, 2)),
    "grouped_transposed_conv": lambda: Net(
        _upscaled, a=conv(3, 16), up=nn.ConvTranspose2d(16, 16, 2, stride=2, groups=4), c=conv(16, 2)
    ),
    "grouped_conv": lambda: Net(_chain, a=conv(3, 16), b=conv(16, 24, groups=4), c=conv(24, 12), head=_head(12)),
    "depthwise_multiplier": lambda: Net(
        _chain, a=conv(3, 16), b=conv(16, 32, groups=16), c=conv(32, 12), head=_head(12)
    ),
    "tied_weights": _tied_convs,
    "frozen_weights": _frozen,
    "residual_concat": lambda: Net(
        _residual_concat, a=conv(3, 16), b=conv(16, 8), c=conv(16, 8), d=conv(16, 12), head=_head(12)
    ),
    "dense_block": lambda: Net(_dense_block, a=conv(3, 12), b=conv(12, 8), c=conv(20, 8), head=_head(28)),
    "squeeze_excite": lambda: Net(
        _squeeze_excite, a=conv(3, 16), squeeze=conv(16, 4, 1), expand=conv(4, 16, 1), b=conv(16, 12), head=_head(12)
    ),
    "group_norm": lambda: Net(
        _normed, a=conv(3, 16), norm=nn.GroupNorm(4, 16), act=nn.ReLU(), b=conv(16, 12), head=_head(12)
    ),
    "prelu": lambda: Net(
        _normed, a=conv(3, 16), norm=nn.BatchNorm2d(16), act=nn.PReLU(16), b=conv(16, 12), head=_head(12)
    ),
    "flatten": lambda: Net(_flattened, a=conv(3, 16), fc=nn.Linear(64, 24), head=_head(24)),
    "channel_parameters": lambda: Net(
        _layer_scale, a=conv(3, 16), mean=torch.randn(16), gamma=_weights(16), b=conv(16, 12), head=_head(12)
    ),
}
SEQUENCES: dict[str, Callable[[], nn.Module]] = {
    "fused_qkv": lambda: _attention(_fused_qkv, qkv=nn.Linear(32, 96)),
    "stacked_qkv": lambda: _attention(_stacked_qkv, qkv=nn.Linear(32, 96)),
    "rope": lambda: _attention(_rope, q=nn.Linear(32, 32), k=nn.Linear(32, 32), v=nn.Linear(32, 32)),
    "grouped_query": lambda: _attention(_grouped_query, q=nn.Linear(32, 32), k=nn.Linear(32, 16), v=nn.Linear(32, 16)),
    "multihead_attention": lambda: _attention(_multihead, attention=nn.MultiheadAttention(32, 4, batch_first=True)),
    "glu": lambda: Net(_gated, up=nn.Linear(12, 48), down=nn.Linear(24, 16), head=_head(16)),
    "gated_by_chunks": lambda: Net(_gated_by_chunks, up=nn.Linear(12, 48), down=nn.Linear(24, 16), head=_head(16)),
    "einsum": lambda: Net(_einsum, first=_weights(12, 4, 8), second=_weights(4, 8, 16), head=_head(16)),
    "direct_parameters": lambda: Net(
        _direct_parameters, first=_weights(12, 24), bias=_weights(24), second=_weights(24, CLASSES)
    ),
    "lstm": lambda: Net(_recurrent, enter=nn.Linear(12, 16), rnn=nn.LSTM(16, 16, batch_first=True), head=_head(16)),
    "gru": lambda: Net(_recurrent, enter=nn.Linear(12, 16), rnn=nn.GRU(16, 16, batch_first=True), head=_head(16)),
    "stacked_bidirectional_lstm": lambda: Net(
        _recurrent,
        enter=nn.Linear(12, 16),
        rnn=nn.LSTM(16, 12, num_layers=2, bidirectional=True, batch_first=True),
        head=_head(24),
    ),
    "windows": lambda: Net(_windows, enter=nn.Linear(12, 16), mix=nn.Linear(16, 24), window=3, head=_head(24)),
}
PATTERNS: dict[str, Callable[[], Built]] = {
    **{name: lambda make=make: (make(), image()) for name, make in IMAGES.items()},
    **{name: lambda make=make: (make(), sequence()) for name, make in SEQUENCES.items()},
    "tied_embedding": lambda: (
        Net(_tied_embedding, embed=nn.Embedding(20, 16), up=nn.Linear(16, 32), down=nn.Linear(32, 16)),
        tokens(),
    ),
}
