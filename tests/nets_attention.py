"""Attention in the ways people write it, with groups and widths worked out by hand.

Unless a net says otherwise: 5 tokens of 7 features, a stream of 6 channels, 4 heads of 3 (12 channels inside); a single
head is 8 wide. Where several axes of a projection could shrink, the outer one does: whole heads go, their size stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nets_for_tests import HEAD, OUTPUT, Case, Net, head

WIDTH, HEADS, SIZE, SINGLE, LENGTH = 6, 4, 3, 8, 5
INNER = HEADS * SIZE
NORMED = "normalised over this width"
ADDED = "combined with a tensor of fixed size"
FIXED = "reads a tensor of fixed size"
ITSELF = "its module has no graph form: it is the model itself"


@dataclass(frozen=True)
class AttentionCase(Case):
    """Also: which modules are replaced, and in which form the model is pruned."""

    replaced: tuple[str, ...] = ()
    form: str = "live"
    shape: tuple[int, ...] = (LENGTH, 7)


Forward = Callable[..., Any]


def weights(*shape: int) -> nn.Parameter:
    """A parameter that forward uses directly."""
    return nn.Parameter(torch.empty(*shape))


def buffer(net: nn.Module, name: str, values: Tensor) -> nn.Module:
    """`net` itself with a buffer more."""
    net.register_buffer(name, values)
    return net


def _stream(s: Any, x: Tensor) -> Tensor:
    h = s.stem(x)
    return s.head((h + s.att(h)).mean(1))


def around(attention: nn.Module) -> nn.Module:
    """A residual stream with one attention."""
    return Net(_stream, stem=nn.Linear(7, WIDTH), att=attention, head=head(WIDTH))


def packed(forward: Forward, inner: int = INNER, heads: int = HEADS, **parts: Any) -> nn.Module:
    """An attention with one layer for queries, keys and values."""
    return Net(forward, qkv=nn.Linear(WIDTH, 3 * inner), proj=nn.Linear(inner, WIDTH), heads=heads, **parts)


def apart(forward: Forward, inner: int = INNER, seen: int | None = None, heads: int = HEADS, **parts: Any) -> nn.Module:
    """An attention with a layer each; `seen`: how wide keys and values are."""
    seen = inner if seen is None else seen
    layers = {"q": nn.Linear(WIDTH, inner), "k": nn.Linear(WIDTH, seen), "v": nn.Linear(WIDTH, seen)}
    return Net(forward, **layers, proj=nn.Linear(inner, WIDTH), heads=heads, **parts)


def rms_norm(width: int) -> nn.Module:
    """As language models write it."""
    return Net(
        lambda s, x: s.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)), weight=weights(width)
    )


def joined(heads: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H * D)."""
    return heads.transpose(1, 2).flatten(2)


def softmaxed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Attention by hand, without a scale."""
    return (q @ k.transpose(-2, -1) + bias).softmax(-1) @ v


# -- packed projections ----------------------------------------------------------------------------------------------


def _by_unbind(s: Any, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    q, k, v = s.qkv(x).view(b, n, 3, s.heads, s.size).permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(q, k, v, scale=0.5)
    return s.proj(out.transpose(1, 2).reshape(b, n, s.heads * s.size))


def _by_chunk(s: Any, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    q, k, v = (part.view(b, n, s.heads, -1).transpose(1, 2) for part in s.qkv(x).chunk(3, dim=-1))
    return s.proj(joined(F.scaled_dot_product_attention(q, k, v)))


def _by_split(s: Any, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    q, k, v = (part.view(b, n, s.heads, -1).transpose(1, 2) for part in s.qkv(x).split(s.all_heads, dim=-1))
    return s.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, s.all_heads))


def _three_sizes(s: Any, x: Tensor) -> Tensor:
    """One head, whose keys are narrower than its values."""
    q, k, v = s.qkv(x).split([s.inner, s.inner, s.outer], dim=-1)
    return s.proj(softmaxed(q, k, v))


PACKED = (
    AttentionCase(
        "packed: view, permute, unbind",
        lambda: around(packed(_by_unbind, size=SIZE)),
        {"stem": 6, "att.qkv": 4},
        HEAD,
        {"stem": 3, "att.qkv": 18, "att.proj": 3, "head": 3},
    ),
    AttentionCase(
        "packed: chunk",
        lambda: around(packed(_by_chunk)),
        {"stem": 6, "att.qkv": 4},
        HEAD,
        {"stem": 3, "att.qkv": 18, "att.proj": 3, "head": 3},
    ),
    AttentionCase(
        "packed: split by an attribute",
        lambda: around(packed(_by_split, all_heads=INNER)),
        {"stem": 6, "att.qkv": 4},
        HEAD,
        {"stem": 3, "att.qkv": 18, "att.proj": 3, "head": 3},
    ),
    AttentionCase(
        "packed: split into parts of their own sizes",
        lambda: around(
            Net(_three_sizes, qkv=nn.Linear(WIDTH, 4 + 4 + 8), proj=nn.Linear(8, WIDTH), inner=4, outer=8),
        ),
        {"stem": 6, "att.qkv": 4, "att.qkv#2": 8},  # 4 pairs of query and key channels, 8 of values
        HEAD,
        {"stem": 3, "att.qkv": 8, "att.proj": 3, "head": 3},
    ),
)


# -- one layer each, and the scale -----------------------------------------------------------------------------------


def _qkv(s: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, H, N, D)."""
    b, n, _ = x.shape
    q, k, v = (layer(x).view(b, n, s.heads, -1).transpose(1, 2) for layer in (s.q, s.k, s.v))
    return q, k, v


def _heads_by_default(s: Any, x: Tensor) -> Tensor:
    return s.proj(joined(F.scaled_dot_product_attention(*_qkv(s, x))))


def _heads_of_root(s: Any, x: Tensor) -> Tensor:
    q, k, v = _qkv(s, x)
    return s.proj(joined(softmaxed(q / math.sqrt(q.size(-1)), k, v)))


def _heads_by_attribute(s: Any, x: Tensor) -> Tensor:
    q, k, v = _qkv(s, x)
    return s.proj(joined(softmaxed(q * s.scale, k, v)))


def _one_by_scale(s: Any, x: Tensor) -> Tensor:
    return s.proj(F.scaled_dot_product_attention(s.q(x), s.k(x), s.v(x), scale=0.3))


def _one_by_default(s: Any, x: Tensor) -> Tensor:
    return s.proj(F.scaled_dot_product_attention(s.q(x), s.k(x), s.v(x)))


def _one_by_attribute(s: Any, x: Tensor) -> Tensor:
    return s.proj(softmaxed(s.q(x), s.k(x) / s.scale, s.v(x)))


def _one_by_root(s: Any, x: Tensor) -> Tensor:
    q = s.q(x)
    return s.proj(softmaxed(q / math.sqrt(q.size(-1)), s.k(x), s.v(x)))


def _one_by_power(s: Any, x: Tensor) -> Tensor:
    q = s.q(x)
    return s.proj(softmaxed(q * q.shape[-1] ** -0.5, s.k(x), s.v(x)))


def _in_the_model(forward: Forward) -> nn.Module:
    """One head whose code is that of the model itself."""
    net = apart(forward, SINGLE)
    net.proj, net.q, net.k, net.v = head(SINGLE), nn.Linear(7, SINGLE), nn.Linear(7, SINGLE), nn.Linear(7, SINGLE)
    net.__dict__["function"] = lambda s, x: forward(s, x).mean(1)
    return net


WHOLE_HEADS = {"stem": 3, "att.q": 6, "att.k": 6, "att.v": 6, "att.proj": 3, "head": 3}
ONE_HEAD = {"stem": 3, "att.q": 4, "att.k": 4, "att.v": 4, "att.proj": 3, "head": 3}

SCALED = (
    *(
        AttentionCase(
            f"heads: scale {name}",
            lambda forward=forward: around(apart(forward, scale=SIZE**-0.5)),
            {"stem": 6, "att.q": 4},  # a head: its queries, keys and values, and the inputs of proj that it makes
            HEAD,
            WHOLE_HEADS,
        )
        for name, forward in {
            "by default": _heads_by_default,
            "in an attribute": _heads_by_attribute,
            "by the root of the size": _heads_of_root,
        }.items()
    ),
    *(
        AttentionCase(
            f"one head: scale {name}",
            lambda forward=forward: around(apart(forward, SINGLE, scale=math.sqrt(SINGLE))),
            {"stem": 6, "att.q": 8, "att.v": 8},  # channels that queries and keys share; channels of values
            HEAD,
            ONE_HEAD,
        )
        for name, forward in {"given": _one_by_scale, "in an attribute": _one_by_attribute}.items()
    ),
    *(
        AttentionCase(
            f"one head: scale {name}, which a graph form writes down",
            lambda forward=forward: around(apart(forward, SINGLE)),
            {"stem": 6, "att.q": 8, "att.v": 8},
            HEAD,
            ONE_HEAD,
            replaced=("att",),
        )
        for name, forward in {
            "by default": _one_by_default,
            "by the root of the size": _one_by_root,
            "by a power of the size": _one_by_power,
        }.items()
    ),
    AttentionCase(
        "one head in the model itself: scale by default",
        lambda: _in_the_model(_one_by_default),
        {"v": 8},
        {"q": f"scale is 1 / sqrt(size of a head): a size there cannot follow, and {ITSELF}", "proj": HEAD["head"]},
        {"q": 8, "k": 8, "v": 4, "proj": 3},
    ),
    AttentionCase(
        "one head in the model itself: scale by the root of the size",
        lambda: _in_the_model(_one_by_root),
        {"v": 8},
        {"q": f"a size there cannot follow, and {ITSELF}", "proj": HEAD["head"]},
        {"q": 8, "k": 8, "v": 4, "proj": 3},
    ),
    AttentionCase(
        "one head in the model itself, in graph form",
        lambda: _in_the_model(_one_by_default),
        {"q": 8, "v": 8},
        {"proj": HEAD["head"]},
        {"q": 4, "k": 4, "v": 4, "proj": 3},
        replaced=("",),
        form="graph",
    ),
)


# -- fewer heads for keys and values ---------------------------------------------------------------------------------


def _grouped(s: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, 4, N, 3), keys and values (B, 2, N, 3)."""
    b, n, _ = x.shape
    q = s.q(x).view(b, n, s.heads, -1).transpose(1, 2)
    k, v = (layer(x).view(b, n, s.shared, -1).transpose(1, 2) for layer in (s.k, s.v))
    return q, k, v


def _repeated(s: Any, x: Tensor) -> Tensor:
    q, k, v = _grouped(s, x)
    k, v = (part.repeat_interleave(s.each, dim=1) for part in (k, v))
    return s.proj(joined(F.scaled_dot_product_attention(q, k, v)))


def _expanded(s: Any, x: Tensor) -> Tensor:
    q, k, v = _grouped(s, x)
    b, shared, n, size = k.shape
    k, v = (p[:, :, None].expand(b, shared, s.each, n, size).reshape(b, shared * s.each, n, size) for p in (k, v))
    return s.proj(joined(softmaxed(q, k, v)))


def _by_dimension(s: Any, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    q = s.q(x).view(b, n, s.shared, s.each, -1)
    k, v = (layer(x).view(b, n, s.shared, -1) for layer in (s.k, s.v))
    weights = torch.einsum("bnged,bmgd->bgenm", q, k).softmax(-1)
    return s.proj(torch.einsum("bgenm,bmgd->bnged", weights, v).flatten(2))


def _enabled(s: Any, x: Tensor) -> Tensor:
    return s.proj(joined(F.scaled_dot_product_attention(*_grouped(s, x), enable_gqa=True)))


def _shared_by_all(s: Any, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    q = s.q(x).view(b, n, s.heads, -1).transpose(1, 2)
    return s.proj(joined(F.scaled_dot_product_attention(q, s.k(x)[:, None], s.v(x)[:, None], scale=0.5)))


SHARED = (
    *(
        AttentionCase(
            f"grouped queries: {name}",
            lambda forward=forward: around(apart(forward, seen=6, shared=2, each=2)),
            {"stem": 6, "att.q": 2},  # a key and value head with its two query heads
            HEAD,
            {"stem": 3, "att.q": 6, "att.k": 3, "att.v": 3, "att.proj": 3, "head": 3},
        )
        for name, forward in {
            "repeated": _repeated,
            "expanded": _expanded,
            "by the op": _enabled,
            "by a dimension": _by_dimension,
        }.items()
    ),
    *(
        AttentionCase(
            f"one key and value head: {name}",
            lambda forward=forward: around(apart(forward, seen=SIZE, shared=1)),
            {"stem": 6, "att.q": 4},  # query heads go, with their columns of proj; what they share stays
            {"att.k": FIXED, "att.v": "become one dimension with others that can go", **HEAD},
            {"stem": 3, "att.q": 6, "att.k": 3, "att.v": 3, "att.proj": 3, "head": 3},
        )
        for name, forward in {"broadcast": _shared_by_all, "by the op": _enabled}.items()
    ),
    AttentionCase(
        "one key and value head: repeated",  # the number of repeats is fixed: positions of a head go, in all of them
        lambda: around(apart(_repeated, seen=SIZE, shared=1, each=4)),
        {"stem": 6, "att.q": 3, "att.v": 3},
        HEAD,
        {"stem": 3, "att.q": 8, "att.k": 2, "att.v": 2, "att.proj": 3, "head": 3},
        replaced=("att",),
    ),
)


# -- positions -------------------------------------------------------------------------------------------------------


def _rotated_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)


def _rotated_pairs(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def _rope(turned: Callable[[Tensor], Tensor]) -> Forward:
    def forward(s: Any, x: Tensor) -> Tensor:
        n = x.shape[1]
        q, k = (p * s.cos[:n] + turned(p) * s.sin[:n] for p in (s.q(x), s.k(x)))
        return s.proj(softmaxed(q, k, s.v(x)))

    return forward


def _rope_of_heads(turned: Callable[[Tensor], Tensor]) -> Forward:
    def forward(s: Any, x: Tensor) -> Tensor:
        q, k, v = _qkv(s, x)
        q, k = (p * s.cos + turned(p) * s.sin for p in (q, k))
        return s.proj(joined(F.scaled_dot_product_attention(q, k, v)))

    return forward


def _with_table(net: nn.Module, width: int) -> nn.Module:
    """Cosines and sines (5, width)."""
    return buffer(buffer(net, "cos", torch.zeros(LENGTH, width)), "sin", torch.zeros(LENGTH, width))


def _bias_by_index(s: Any, x: Tensor) -> Tensor:
    n = s.index.shape[0]
    bias = s.table[s.index.view(-1)].view(n, n, -1).permute(2, 0, 1)
    return s.proj(joined(F.scaled_dot_product_attention(*_qkv(s, x), attn_mask=bias[None])))


def _distances() -> Tensor:
    """How far apart, as an index (5, 5) with entries from 0 to 8."""
    places = torch.arange(LENGTH)
    return places[:, None] - places[None] + LENGTH - 1


def _bias_by_embedding(s: Any, x: Tensor) -> Tensor:
    places = torch.arange(x.shape[1])
    buckets = (places[:, None] - places[None]).abs().clamp(max=3)
    return s.proj(joined(softmaxed(*_qkv(s, x), bias=s.bias(buckets).permute(2, 0, 1)[None])))


def _slopes(s: Any, x: Tensor) -> Tensor:
    places = torch.arange(x.shape[1])
    distance = (places[None] - places[:, None]).abs()
    return s.proj(joined(softmaxed(*_qkv(s, x), bias=-s.slopes[:, None, None] * distance)))


def _classified(s: Any, x: Tensor) -> Tensor:
    patches = s.patch(x).flatten(2).transpose(1, 2)  # (B, 4, 6)
    h = torch.cat([s.token.expand(patches.shape[0], -1, -1), patches], 1) + s.places
    return s.head((h + s.att(h))[:, 0])


PLACED = (
    AttentionCase(
        "rotary positions: halves",
        lambda: around(_with_table(apart(_rope(_rotated_half), SINGLE), SINGLE)),
        {"stem": 6, "att.q": 4, "att.v": 8},  # 4 pairs that turn
        HEAD,
        ONE_HEAD,
    ),
    AttentionCase(
        "rotary positions: neighbours",
        lambda: around(_with_table(apart(_rope(_rotated_pairs), SINGLE), SINGLE)),
        {"stem": 6, "att.q": 4, "att.v": 8},
        HEAD,
        ONE_HEAD,
    ),
    *(
        AttentionCase(
            f"rotary positions in heads: {name}",
            lambda turned=turned: around(_with_table(apart(_rope_of_heads(turned), inner=16), 4)),  # 4 heads of 4
            {"stem": 6, "att.q": 4},
            HEAD,
            {"stem": 3, "att.q": 8, "att.k": 8, "att.v": 8, "att.proj": 3, "head": 3},
        )
        for name, turned in {"halves": _rotated_half, "neighbours": _rotated_pairs}.items()
    ),
    AttentionCase(
        "a table of biases per head, by index",
        lambda: around(buffer(apart(_bias_by_index, table=weights(9, HEADS)), "index", _distances())),
        {"stem": 6, "att.q": 4},
        HEAD,
        WHOLE_HEADS,
    ),
    AttentionCase(
        "biases per head, embedded by bucket",
        lambda: around(apart(_bias_by_embedding, bias=nn.Embedding(4, HEADS))),
        {"stem": 6, "att.q": 4},
        HEAD,
        {**WHOLE_HEADS, "att.bias": 2},
    ),
    AttentionCase(
        "a slope per head in a buffer",
        lambda: around(buffer(apart(_slopes), "slopes", torch.zeros(HEADS))),
        {"stem": 6, "att.q": 4},
        HEAD,
        WHOLE_HEADS,
    ),
    AttentionCase(
        "class token and embedded positions",
        lambda: Net(
            _classified,
            patch=nn.Conv2d(3, WIDTH, 3, 3),
            token=weights(1, 1, WIDTH),
            places=weights(1, 5, WIDTH),
            att=apart(_heads_by_default),
            head=head(WIDTH),
        ),
        {"patch": 6, "att.q": 4},
        HEAD,
        {"patch": 3, "att.q": 6, "att.k": 6, "att.v": 6, "att.proj": 3, "head": 3},
        (3, 6, 6),
    ),
)


# -- other shapes of attention ---------------------------------------------------------------------------------------


def _windowed(s: Any, x: Tensor) -> Tensor:
    """Shifted windows of 2 x 2 in a map (B, 4, 4, C)."""
    b, height, width, c = x.shape
    w = s.window
    x = torch.roll(x, (-1, -1), dims=(1, 2))
    x = x.view(b, height // w, w, width // w, w, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, c)
    qkv = s.qkv(x).reshape(x.shape[0], w * w, 3, s.heads, -1).permute(2, 0, 3, 1, 4)
    logits = qkv[0] @ qkv[1].transpose(-2, -1)
    windows = s.mask.shape[0]
    logits = logits.view(-1, windows, s.heads, w * w, w * w) + s.mask[None, :, None]
    out = logits.view(-1, s.heads, w * w, w * w).softmax(-1) @ qkv[2]
    out = s.proj(joined(out)).view(b, height // w, width // w, w, w, c)
    out = out.permute(0, 1, 3, 2, 4, 5).reshape(b, height, width, c)
    return torch.roll(out, (1, 1), dims=(1, 2))


def _maps(s: Any, x: Tensor) -> Tensor:
    h = s.stem(x)
    return s.head((h + s.att(h)).mean((1, 2)))


def _crossed(s: Any, x: Tensor, context: Tensor) -> Tensor:
    b, n, _ = x.shape
    q = s.q(x).view(b, n, s.heads, -1).transpose(1, 2)
    k, v = (layer(context).view(b, context.shape[1], s.heads, -1).transpose(1, 2) for layer in (s.k, s.v))
    return s.proj(joined(F.scaled_dot_product_attention(q, k, v)))


def _with_context(s: Any, x: Tensor, context: Tensor) -> Tensor:
    h = s.stem(x)
    return s.head((h + s.att(h, F.relu(s.side(context)))).mean(1))


def _two_sequences(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    return tuple(torch.randn(size, n, 7, generator=generator, dtype=torch.float64) for n in (5, 3))


def _talking(s: Any, x: Tensor) -> Tensor:
    q, k, v = _qkv(s, x)
    logits = q @ k.transpose(-2, -1)
    mixed = s.mix(logits.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return s.proj(joined(mixed.softmax(-1) @ v))


def _linear(feature: Callable[[Tensor], Tensor]) -> Forward:
    def forward(s: Any, x: Tensor) -> Tensor:
        q, k, v = feature(s.q(x)), feature(s.k(x)), s.v(x)
        total = q @ k.sum(1)[..., None]  # (B, N, 1)
        return s.proj(q @ (k.transpose(1, 2) @ v) / (total + 1))

    return forward


def _linear_heads(s: Any, x: Tensor) -> Tensor:
    q, k, v = _qkv(s, x)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    out = torch.einsum("bhnd,bhde->bhne", q, torch.einsum("bhnd,bhne->bhde", k, v))
    return s.proj(joined(out / torch.einsum("bhnd,bhd->bhn", q, k.sum(2))[..., None]))


def _over_channels(s: Any, x: Tensor) -> Tensor:
    """The weights are among channels (D, D): the softmax runs over those of the keys."""
    q, k, v = (p.transpose(-2, -1) for p in _qkv(s, x))  # (B, H, D, N)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    out = softmaxed(q * s.temperature, k, v)
    return s.proj(out.permute(0, 3, 1, 2).flatten(2))


def _over_all_channels(s: Any, x: Tensor) -> Tensor:
    q, k, v = (layer(x).transpose(1, 2) for layer in (s.q, s.k, s.v))  # (B, 8, N)
    return s.proj(softmaxed(q, k, v).transpose(1, 2))


def _normed_heads(s: Any, x: Tensor) -> Tensor:
    q, k, v = _qkv(s, x)
    return s.proj(joined(F.scaled_dot_product_attention(s.q_norm(q), s.k_norm(k), v)))


def _normed_head(s: Any, x: Tensor) -> Tensor:
    return s.proj(softmaxed(s.q_norm(s.q(x)), s.k_norm(s.k(x)), s.v(x)))


OTHERS = (
    AttentionCase(
        "shifted windows with a mask",
        lambda: Net(
            _maps,
            stem=nn.Linear(7, WIDTH),
            att=buffer(packed(_windowed, window=2), "mask", torch.zeros(4, 4, 4)),
            head=head(WIDTH),
        ),
        {"stem": 6, "att.qkv": 4},
        HEAD,
        {"stem": 3, "att.qkv": 18, "att.proj": 3, "head": 3},
        (4, 4, 7),
    ),
    AttentionCase(
        "cross attention",
        lambda: Net(
            _with_context,
            stem=nn.Linear(7, WIDTH),
            side=nn.Linear(7, WIDTH),
            att=apart(_crossed),
            head=head(WIDTH),
        ),
        {"stem": 6, "side": 6, "att.q": 4},
        HEAD,
        {**WHOLE_HEADS, "side": 3},
        inputs=_two_sequences,
    ),
    AttentionCase(
        "talking heads",  # `mix` reads the heads of queries and keys, and makes those of values
        lambda: around(apart(_talking, mix=nn.Linear(HEADS, HEADS))),
        {"stem": 6, "att.q": 4, "att.v": 4},
        HEAD,
        {**WHOLE_HEADS, "att.mix": 2},
        balances=(("att.q", "att.v"),),  # both are viewed with the one number of heads
    ),
    AttentionCase(
        "linear attention: relu",
        lambda: around(apart(_linear(F.relu), SINGLE)),
        {"stem": 6, "att.q": 8, "att.v": 8},
        HEAD,
        ONE_HEAD,
    ),
    AttentionCase(
        "linear attention: elu + 1",  # of a dead channel that is 1, and counts in the sum
        lambda: around(apart(_linear(lambda x: F.elu(x) + 1), SINGLE)),
        {"stem": 6, "att.v": 8},
        {"att.q": "", **HEAD},
        {"stem": 3, "att.q": 8, "att.k": 8, "att.v": 4, "att.proj": 3, "head": 3},
    ),
    AttentionCase(
        "linear attention: elu + 1 in heads",
        lambda: around(apart(_linear_heads)),
        {"stem": 6, "att.q": 4},
        HEAD,
        WHOLE_HEADS,
    ),
    AttentionCase(
        "attention among the channels of a head",
        lambda: around(apart(_over_channels, temperature=weights(HEADS, 1, 1))),
        {"stem": 6, "att.q": 4},
        HEAD,
        WHOLE_HEADS,
    ),
    AttentionCase(
        "attention among all channels",  # rows of the weights are free, columns are in a softmax
        lambda: around(apart(_over_all_channels, SINGLE)),
        {"stem": 6, "att.q": 8},
        {"att.k": "softmax runs along it", "att.v": FIXED, **HEAD},
        {"stem": 3, "att.q": 4, "att.k": 8, "att.v": 8, "att.proj": 3, "head": 3},
    ),
    AttentionCase(
        "queries and keys normalised per head, by hand",
        lambda: around(apart(_normed_heads, q_norm=rms_norm(SIZE), k_norm=rms_norm(SIZE))),
        {"stem": 6, "att.q": 4},
        HEAD,
        WHOLE_HEADS,
    ),
    AttentionCase(
        "queries and keys normalised per head",
        lambda: around(apart(_normed_heads, q_norm=nn.LayerNorm(SIZE), k_norm=nn.LayerNorm(SIZE))),
        {"stem": 6, "att.q": 4},
        HEAD,
        WHOLE_HEADS,
    ),
    AttentionCase(
        "queries and keys of one head normalised",
        lambda: around(apart(_normed_head, SINGLE, q_norm=nn.LayerNorm(SINGLE), k_norm=nn.LayerNorm(SINGLE))),
        {"stem": 6, "att.v": 8},
        {"att.q": NORMED, "att.k": NORMED, **HEAD},
        {"stem": 3, "att.q": 8, "att.k": 8, "att.v": 4, "att.proj": 3, "head": 3},
    ),
)


# -- the framework's own ---------------------------------------------------------------------------------------------


def _own(s: Any, x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    h = s.stem(x)
    out, weights = s.att(h, h, h, **options)
    return s.head((h + out).mean(1)), weights


def _own_net(forward: Forward) -> nn.Module:
    attention = nn.MultiheadAttention(INNER, HEADS, batch_first=True)
    return Net(forward, stem=nn.Linear(7, INNER), att=attention, head=head(INNER))


def _decoded(s: Any, x: Tensor, context: Tensor) -> Tensor:
    return s.head(s.layer(s.stem(x), s.side(context)).mean(1))


FRAMEWORK = (
    AttentionCase(
        "nn.MultiheadAttention without weights",
        lambda: _own_net(lambda s, x: _own(s, x, need_weights=False)[0]),
        {"stem": 12, "att": 4},
        HEAD,
        {"stem": 6, "att": 18, "att.out_proj": 6, "head": 3},
        replaced=("att",),
    ),
    AttentionCase(
        "nn.MultiheadAttention with weights that nobody uses",
        lambda: _own_net(lambda s, x: _own(s, x)[0]),
        {"stem": 12, "att": 4},
        HEAD,
        {"stem": 6, "att": 18, "att.out_proj": 6, "head": 3},
        replaced=("att",),
    ),
    AttentionCase(
        "nn.MultiheadAttention whose weights per head are an output",
        lambda: _own_net(lambda s, x: _own(s, x, average_attn_weights=False)),
        {"stem": 12},
        {"att": OUTPUT, **HEAD},
        {"stem": 6, "att": 36, "att.out_proj": 6, "head": 3},
        replaced=("att",),
    ),
    AttentionCase(
        "nn.MultiheadAttention whose mean weights are an output",
        lambda: _own_net(_own),
        {"stem": 12},
        {"att": "mean", **HEAD},
        {"stem": 6, "att": 36, "att.out_proj": 6, "head": 3},
        replaced=("att",),
    ),
    AttentionCase(
        "encoder layer",
        lambda: Net(
            lambda s, x: s.head(s.layer(s.stem(x)).mean(1)),
            stem=nn.Linear(7, 8),
            layer=nn.TransformerEncoderLayer(8, 2, 10, batch_first=True),
            head=head(8),
        ),
        {"layer.self_attn": 2, "layer.linear1": 10},
        {"stem": NORMED, "layer.linear2": ADDED, **HEAD},
        {
            "stem": 8,
            "layer.self_attn": 12,
            "layer.self_attn.out_proj": 8,
            "layer.linear1": 5,
            "layer.linear2": 8,
            "head": 3,
        },
        replaced=("layer.self_attn",),
    ),
    AttentionCase(
        "decoder layer",
        lambda: Net(
            _decoded,
            stem=nn.Linear(7, 8),
            side=nn.Linear(7, 8),
            layer=nn.TransformerDecoderLayer(8, 2, 10, batch_first=True, norm_first=True),
            head=head(8),
        ),
        {"layer.self_attn": 2, "layer.multihead_attn": 2, "layer.linear1": 10},
        {  # one in_proj_weight reads the normalised stream and the context, so neither shrinks
            "stem": NORMED,
            "side": FIXED,
            **{f"layer.{name}": ADDED for name in ("self_attn.out_proj", "multihead_attn.out_proj", "linear2")},
            **HEAD,
        },
        {
            "stem": 8,
            "side": 8,
            "layer.self_attn": 12,
            "layer.self_attn.out_proj": 8,
            "layer.multihead_attn": 12,
            "layer.multihead_attn.out_proj": 8,
            "layer.linear1": 5,
            "layer.linear2": 8,
            "head": 3,
        },
        inputs=_two_sequences,
        replaced=("layer.self_attn", "layer.multihead_attn"),
    ),
)


# -- sizes read off the stream ---------------------------------------------------------------------------------------


def _read_off(s: Any, x: Tensor) -> Tensor:
    """All heads together are as wide as the stream was before, and that is where the code reads it."""
    b, n, c = x.shape
    q, k, v = s.qkv(x).reshape(b, n, 3, s.heads, c // s.heads).permute(2, 0, 3, 1, 4)
    return s.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


def _equally_wide(forward: Forward) -> nn.Module:
    return Net(forward, qkv=nn.Linear(INNER, 3 * INNER), proj=nn.Linear(INNER, INNER), heads=HEADS)


def _stream_of_twelve() -> nn.Module:
    return Net(_stream, stem=nn.Linear(7, INNER), att=_equally_wide(_read_off), head=head(INNER))


def _all_in_one(s: Any, x: Tensor) -> Tensor:
    h = s.stem(x)
    return s.head((h + _read_off(s, h)).mean(1))


def _root_of_twelve() -> nn.Module:
    layers = {"stem": nn.Linear(7, INNER), "qkv": nn.Linear(INNER, 3 * INNER), "proj": nn.Linear(INNER, INNER)}
    return Net(_all_in_one, **layers, head=head(INNER), heads=HEADS)


READ_OFF = (
    AttentionCase(
        "a width read off the stream, in a submodule",
        _stream_of_twelve,
        {"stem": 12, "att.qkv": 4},
        HEAD,
        {"stem": 6, "att.qkv": 18, "att.proj": 6, "head": 3},
        replaced=("att",),
    ),
    AttentionCase(
        "a width read off the stream, in the model itself",
        _root_of_twelve,
        {},
        {"stem": ITSELF, "qkv": ITSELF, **HEAD},
        {},
    ),
    AttentionCase(
        "a width read off the stream, in the model itself, in graph form",
        _root_of_twelve,
        {"stem": 12, "qkv": 4},
        HEAD,
        {"stem": 6, "qkv": 18, "proj": 6, "head": 3},
        replaced=("",),
        form="graph",
    ),
)

ATTENTION = (*PACKED, *SCALED, *SHARED, *PLACED, *OTHERS, *FRAMEWORK, *READ_OFF)
