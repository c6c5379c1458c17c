"""Blocks of sequences: (B, T, C) to (B, T, C')."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drawn_blocks import PLACES, Block, Pick, Table, activation, kind, token_norm

SEQUENCES: Table = {}


@kind(SEQUENCES, "perceptron")
class Perceptron(Block):
    """Two linear layers, with or without the input added, a norm before or after."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        middle, self.residual = pick(8, 6, 5), pick(True, False)
        self.outputs = width if self.residual else pick(width, 4, 6)
        self.up, self.down = nn.Linear(width, middle), nn.Linear(middle, self.outputs, bias=pick(True, False))
        self.before, self.after = token_norm(width, pick), token_norm(self.outputs, pick)
        self.act = activation(pick)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.act(self.up(self.before(x))))
        return self.after(x + y if self.residual else y)


@kind(SEQUENCES, "gated")
class Gated(Block):
    """SwiGLU and its relatives: packed, apart, by F.glu, with a bilinear gate."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        self.middle, self.outputs = pick(6, 8, 5), width
        self.how = pick("apart", "chunk", "split", "glu", "slices", "interleaved", "highway")
        self.norm = token_norm(width, pick)
        self.gate, self.up = nn.Linear(width, self.middle, bias=False), nn.Linear(width, self.middle, bias=False)
        self.both = nn.Linear(width, 2 * self.middle)
        self.down, self.residual = nn.Linear(self.middle, width), pick(True, False)
        self.transform = nn.Linear(width, width)
        self.carry = nn.Linear(width, width)

    def hidden(self, x: Tensor) -> Tensor:
        if self.how == "apart":
            return F.silu(self.gate(x)) * self.up(x)
        both = self.both(x)
        if self.how == "glu":
            return F.glu(both, -1)
        if self.how == "chunk":
            a, b = both.chunk(2, dim=-1)
        elif self.how == "split":
            a, b = both.split(self.middle, dim=-1)
        elif self.how == "interleaved":
            a, b = both[..., ::2], both[..., 1::2]
        else:
            a, b = both[..., : self.middle], both[..., self.middle :]
        return F.gelu(a) * b

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.how == "highway":
            gate = torch.sigmoid(self.carry(y))
            return gate * F.relu(self.transform(y)) + (1 - gate) * x
        y = self.down(self.hidden(y))
        return x + y if self.residual else y


def rotated(x: Tensor, table: Tensor) -> Tensor:
    """Rotary places: halves of a head turned against each other. x (B, heads, T, size), table (2, T', size)."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * table[0, : x.shape[-2]] + turned * table[1, : x.shape[-2]]


@kind(SEQUENCES, "attention")
class Attention(Block):
    """Self-attention in the ways that people write it."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        self.heads, self.size = pick(2, 4, 3, 1), pick(2, 4)
        if width % self.heads == 0 and pick(True, False):
            self.size = width // self.heads
        self.inner, self.outputs = self.heads * self.size, width
        self.whole = self.inner == width
        self.packed = pick("apart", "five dims", "chunk", "split", "slices", "per head")
        self.groups = self.heads if self.packed != "apart" else pick(self.heads, 1, math.gcd(self.heads, 2))
        self.inward = pick("attributes", "minus", "width", "sizes")
        self.outward = pick("flatten", "minus", "sizes", "attributes")
        self.core = pick("sdpa", "scaled", "manual", "einsum", "baddbmm", "kernel")
        self.library = self.core in ("sdpa", "scaled") and self.groups not in (1, self.heads)
        self.places = pick("none", "rotary", "relative", "causal", "alibi")
        if self.places == "rotary" and self.size % 2:
            self.places = "none"
        bias = pick(True, False)
        if self.packed == "apart":
            self.q, self.k, self.v = (
                nn.Linear(width, n * self.size, bias=bias) for n in (self.heads, self.groups, self.groups)
            )
        else:
            self.qkv = nn.Linear(width, 3 * self.inner, bias=bias)
        self.proj = nn.Linear(self.inner, width)
        self.norm, self.residual = token_norm(width, pick), pick(True, False)
        self.inside = pick(nn.Identity, nn.Identity, lambda: nn.RMSNorm(self.size), lambda: nn.LayerNorm(self.size))()
        self.register_buffer("table", torch.zeros(2, PLACES, self.size), persistent=pick(True, False))
        if self.places == "relative":
            self.bias = nn.Parameter(torch.zeros(self.heads, PLACES, PLACES))
        elif self.places == "alibi":
            self.register_buffer("slopes", torch.zeros(self.heads, 1, 1))

    def split_heads(self, x: Tensor, heads: int) -> Tensor:
        """(B, T, heads * size) -> (B, heads, T, size)."""
        b, t, _ = x.shape
        if self.inward == "attributes":
            return x.view(b, t, heads, self.size).transpose(1, 2)
        if self.inward == "minus":
            return x.reshape(b, t, -1, self.size).permute(0, 2, 1, 3)
        if self.inward == "width":
            return x.reshape(b, t, heads, x.shape[-1] // heads).transpose(1, 2)
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    def parts(self, x: Tensor) -> list[Tensor]:
        if self.packed == "apart":
            return [
                self.split_heads(layer(x), n)
                for layer, n in ((self.q, self.heads), (self.k, self.groups), (self.v, self.groups))
            ]
        b, t, c = x.shape
        qkv = self.qkv(x)
        if self.packed == "five dims":
            size = c // self.heads if self.whole and self.inward == "width" else self.size
            return list(qkv.reshape(b, t, 3, self.heads, size).permute(2, 0, 3, 1, 4).unbind(0))
        if self.packed == "per head":
            return list(qkv.view(b, t, self.heads, 3 * self.size).transpose(1, 2).chunk(3, -1))
        if self.packed == "chunk":
            parts = qkv.chunk(3, dim=-1)
        elif self.packed == "split":
            parts = qkv.split(self.inner, dim=2)
        else:
            n = self.inner
            parts = qkv[..., :n], qkv[..., n : 2 * n], qkv[..., 2 * n :]
        return [self.split_heads(part, self.heads) for part in parts]

    def mask(self, t: int, like: Tensor) -> Tensor | None:
        if self.places == "relative":
            return self.bias[:, :t, :t]
        if self.places == "alibi":
            steps = torch.arange(t, dtype=like.dtype)
            return self.slopes * (steps[None, :] - steps[:, None])
        if self.places == "causal":
            return torch.zeros(t, t, dtype=like.dtype).masked_fill(torch.ones(t, t).tril() == 0, float("-inf"))
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.library:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(q.shape[2], q), enable_gqa=True)
        if self.groups != self.heads:
            b, g, t, d = k.shape
            times = self.heads // self.groups
            if self.packed == "apart" and self.inward == "minus":
                k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
            else:
                k, v = (p[:, :, None].expand(b, g, times, t, d).reshape(b, g * times, t, d) for p in (k, v))
        mask = self.mask(q.shape[2], q)
        if self.core == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        if self.core == "scaled":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.4)
        if self.core == "kernel":
            return F.elu(q) @ (F.elu(k).mT @ v) / q.shape[2]
        if self.core == "einsum":
            scores = torch.einsum("bhtd,bhsd->bhts", q, k) / math.sqrt(self.size)
        elif self.core == "baddbmm":
            b, h, t, d = q.shape
            scores = torch.bmm(q.reshape(b * h, t, d), k.reshape(b * h, t, d).transpose(1, 2)).view(b, h, t, t)
        else:
            scores = (q * self.size**-0.5) @ k.transpose(-2, -1)
        weights = (scores if mask is None else scores + mask).softmax(dim=-1)
        return torch.einsum("bhts,bhsd->bhtd", weights, v) if self.core == "einsum" else weights @ v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(self.norm(x))
        q, k = self.inside(q), self.inside(k)
        if self.places == "rotary":
            q, k = rotated(q, self.table), rotated(k, self.table)
        y = self.attend(q, k, v).transpose(1, 2)
        b, t, c = x.shape
        if self.outward == "flatten":
            y = y.flatten(2)
        elif self.outward == "minus":
            y = y.reshape(b, t, -1)
        else:
            y = y.reshape(b, t, c if self.whole and self.outward == "sizes" else self.inner)
        y = self.proj(y)
        return x + y if self.residual else y


@kind(SEQUENCES, "reads the stream")
class ReadsStream(Block):
    """Sizes that are read off the residual stream: what only a graph form can follow."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        self.heads, self.outputs, self.width = math.gcd(width, pick(2, 4)), width, width
        self.how = pick("attention", "rows", "merge", "zeros", "windows", "pairs", "literal")
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc = nn.Linear(2 * width if self.how in ("merge", "pairs") else width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        if self.how == "attention":
            q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, scale=0.7)
            return x + self.proj(y.transpose(1, 2).reshape(b, n, c))
        if self.how == "rows":
            return x + F.relu(self.fc(x.reshape(b * n, c))).reshape(b, n, c)
        if self.how == "merge":  # patches in pairs, and back
            y = self.fc(x.reshape(b, n // 2, 2 * c))
            return y.repeat_interleave(2, dim=1)
        if self.how == "pairs":
            y = self.fc(torch.cat([x[:, 0::2], x[:, 1::2]], -1))
            return x + y[:, :, None].expand(b, n // 2, 2, c).reshape(b, n, c)
        if self.how == "zeros":
            before = torch.zeros(b, 1, c, dtype=x.dtype)
            return x + self.fc(torch.cat([before, x[:, :-1]], dim=1))
        if self.how == "windows":
            y = self.fc(x.reshape(b, n // 2, 2, c).permute(0, 2, 1, 3).reshape(-1, n // 2, c))
            return y.view(b, 2, n // 2, c).transpose(1, 2).reshape(b, n, c)
        return x + self.fc(x).reshape(b, n, self.width)


@kind(SEQUENCES, "multihead attention")
class Multihead(Block):
    """nn.MultiheadAttention: onto itself, onto other keys, with masks, with weights that are asked for."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        self.outputs, heads = width, math.gcd(width, pick(2, 4, 1))
        self.batch_first, self.keys = pick(True, False), pick("same", "made", "other width")
        other = {"made": width, "other width": 5}.get(self.keys, width)
        self.make = nn.Linear(width, other)
        self.attention = nn.MultiheadAttention(
            width,
            heads,
            bias=pick(True, False),
            batch_first=self.batch_first,
            add_bias_kv=pick(False, True),
            add_zero_attn=pick(False, True),
            kdim=other if self.keys == "other width" else None,
            vdim=other if self.keys == "other width" else None,
        )
        self.weights, self.causal = pick(False, True), pick(False, True)
        self.norm, self.residual = token_norm(width, pick), pick(True, False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        keys = y if self.keys == "same" else F.relu(self.make(y))
        if not self.batch_first:
            y, keys = y.transpose(0, 1), keys.transpose(0, 1)
        n = x.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool).triu(1) if self.causal else None
        y, weights = self.attention(y, keys, keys, attn_mask=mask, need_weights=self.weights)
        if not self.batch_first:
            y = y.transpose(0, 1)
        if self.weights:
            y = y + weights.mean((1, 2))[:, None, None]
        return x + y if self.residual else y


@kind(SEQUENCES, "transformer layer")
class Layer(Block):
    """The library's own encoder and decoder layers."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        self.outputs, heads, self.first = width, math.gcd(width, pick(2, 4)), pick(True, False)
        options = {"norm_first": pick(False, True), "activation": pick("relu", "gelu"), "batch_first": self.first}
        middle = pick(8, 6)
        self.how = pick("layer", "decoder", "encoder")
        if self.how == "decoder":
            self.layer: nn.Module = nn.TransformerDecoderLayer(width, heads, middle, **options)
        else:
            self.layer = nn.TransformerEncoderLayer(width, heads, middle, **options)
            if self.how == "encoder":
                self.layer = nn.TransformerEncoder(self.layer, 2, enable_nested_tensor=False)
        self.causal = pick(False, True)

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.first else x.transpose(0, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype) if self.causal else None
        y = self.layer(y, torch.tanh(y), tgt_mask=mask) if self.how == "decoder" else self.layer(y, mask)
        return y if self.first else y.transpose(0, 1)


@kind(SEQUENCES, "recurrent")
class Recurrent(Block):
    """LSTM, GRU and RNN; every state or the last one; or cells in a loop."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        kinds = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN, "cell": nn.GRUCell, "lstm cell": nn.LSTMCell}
        self.how, size = pick(*kinds), pick(6, 4)
        self.first, self.gives = pick(True, False), pick("all", "last state", "last output")
        if "cell" in self.how:
            self.cell, both = kinds[self.how](width, size), 1
        else:
            both = pick(1, 2)
            self.net = kinds[self.how](
                width,
                size,
                num_layers=pick(1, 2),
                bidirectional=both == 2,
                batch_first=self.first,
                bias=pick(True, False),
            )
        self.outputs = size * (1 if self.gives == "last state" else both)

    def forward(self, x: Tensor) -> Tensor:
        if "cell" in self.how:
            return self.loop(x)
        y, state = self.net(x if self.first else x.transpose(0, 1))
        if self.gives == "last state":
            last = state[0][-1] if isinstance(state, tuple) else state[-1]
            return last[:, None].expand(-1, x.shape[1], -1)
        y = y if self.first else y.transpose(0, 1)
        return y if self.gives == "all" else y[:, -1:].expand_as(y)

    def loop(self, x: Tensor) -> Tensor:
        state, found = None, []
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
            found.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(found, dim=1)


@kind(SEQUENCES, "convolution along time")
class Temporal(Block):
    """Convolutions along time: dense, grouped, depthwise, causal, gated (Mamba, Conformer, WaveNet)."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        self.how = pick("dense", "grouped", "depthwise", "conformer", "causal")
        self.outputs = pick(6, 4) if self.how == "dense" else width
        groups = {"grouped": math.gcd(width, 2), "depthwise": width, "causal": width}.get(self.how, 1)
        self.norm = pick(nn.Identity, lambda: nn.BatchNorm1d(self.outputs), lambda: nn.GroupNorm(1, self.outputs))()
        middle = 2 * pick(4, 3)
        self.up = nn.Conv1d(width, middle, 1)
        self.deep = nn.Conv1d(middle // 2, middle // 2, 3, padding=1, groups=middle // 2)
        self.down = nn.Conv1d(middle // 2, width, 1)
        self.conv = nn.Conv1d(width, self.outputs, 3, padding=2 if self.how == "causal" else 1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(1, 2)
        if self.how == "conformer":
            y = y + self.down(F.silu(self.deep(F.glu(self.up(y), dim=1))))
        elif self.how == "causal":
            y = self.conv(y)[..., : x.shape[1]]
        else:
            y = self.conv(y)
        return F.gelu(self.norm(y)).permute(0, 2, 1)


@kind(SEQUENCES, "mixer")
class Mixer(Block):
    """Tokens mixed without attention: shifted, decaying, pooled, or by a matrix over time."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        self.how, self.outputs, middle = pick("shift", "decay", "pooled", "gated over time"), width, pick(5, 6)
        self.up, self.down = nn.Linear(width, 2 * middle), nn.Linear(middle, width)
        self.time = nn.Parameter(torch.zeros(PLACES, PLACES))
        self.fc, self.decay = nn.Linear(width, width), nn.Parameter(torch.zeros(width))
        self.norm = token_norm(width, pick)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.how == "shift":
            late = F.pad(y, (0, 0, 1, 0))[:, :-1]
            return x + self.fc(y * self.decay + late * (1 - self.decay))
        if self.how == "decay":
            state, found = torch.zeros_like(y[:, 0]), []
            for step in y.unbind(1):
                state = torch.sigmoid(self.decay) * state + step
                found.append(state)
            return x + self.fc(torch.stack(found, 1))
        if self.how == "gated over time":  # gMLP
            a, b = F.gelu(self.up(y)).chunk(2, dim=-1)
            return x + self.down(a * (self.time[: x.shape[1], : x.shape[1]] @ b))
        return x + self.fc(y.amax(1, keepdim=True))


@kind(SEQUENCES, "per head")
class PerHead(Block):
    """Channels seen as heads: a norm, a scale, or a matrix for every head."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        self.heads, self.size, self.outputs = pick(2, 3), pick(4, 2), width
        self.how = pick("scale", "einsum", "norm", "softmax", "group norm", "outer", "mean")
        self.up, self.down = nn.Linear(width, self.heads * self.size), nn.Linear(self.heads * self.size, width)
        self.scale = nn.Parameter(torch.ones(self.heads, 1))
        self.matrix = nn.Parameter(torch.zeros(self.heads, self.size, self.size))
        self.norm = nn.LayerNorm(self.size)
        self.groups = nn.GroupNorm(self.heads, self.heads * self.size)
        self.join = pick("flatten", "view", "minus")

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        y = torch.tanh(self.up(x)).view(b, t, self.heads, self.size)
        if self.how == "scale":
            y = y * self.scale
        elif self.how == "einsum":
            y = torch.einsum("bthd,hde->bthe", y, self.matrix)
        elif self.how == "norm":
            y = self.norm(y)
        elif self.how == "softmax":
            y = y.softmax(2) * y
        elif self.how == "outer":
            y = y * (y[..., :1] * self.scale)
        elif self.how == "mean":
            y = y - y.mean(2, keepdim=True)
        else:
            y = self.groups(y.reshape(b * t, -1)).view(b, t, self.heads, -1)
        if self.join == "flatten":
            y = y.flatten(-2)
        else:
            y = y.reshape(b, t, self.heads * self.size if self.join == "view" else -1)
        return x + self.down(y)


@kind(SEQUENCES, "linear in other words")
class Spelled(Block):
    """A linear layer as einsum, matmul, addmm, baddbmm, a list of parameters, a bilinear form, an embedding bag."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        self.outputs = pick(6, 4, 5)
        self.how = pick("einsum", "matmul", "functional", "addmm", "list", "dict", "bilinear", "broadcast")
        self.matrix, self.bias = nn.Parameter(torch.zeros(width, self.outputs)), nn.Parameter(torch.zeros(self.outputs))
        self.listed = nn.ParameterList([nn.Parameter(torch.zeros(self.outputs, width)) for _ in range(2)])
        self.named = nn.ParameterDict({"weight": nn.Parameter(torch.zeros(self.outputs, width))})
        self.bilinear = nn.Bilinear(width, width, self.outputs)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "einsum":
            y = torch.einsum("btc,cd->btd", x, self.matrix)
        elif self.how == "matmul":
            y = x @ self.matrix
        elif self.how == "functional":
            return F.relu(F.linear(x, self.matrix.t(), self.bias))
        elif self.how == "addmm":
            b, t, c = x.shape
            return F.relu(torch.addmm(self.bias, x.reshape(-1, c), self.matrix)).view(b, t, -1)
        elif self.how == "list":
            y = F.relu(F.linear(x, self.listed[0])) + F.linear(x, self.listed[1])
        elif self.how == "dict":
            y = F.linear(x, self.named["weight"])
        elif self.how == "bilinear":
            return torch.tanh(self.bilinear(x.contiguous(), torch.tanh(x)))
        else:
            y = (x.unsqueeze(-1) * self.matrix).sum(-2)
        return F.relu(y + self.bias)


@kind(SEQUENCES, "experts")
class Experts(Block):
    """A few experts, weighed by a softmax over them, by the best one, or stacked into one weight."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        self.outputs, middle, count = width, pick(5, 6), 2
        self.how = pick("list", "einsum", "best")
        self.gate = nn.Linear(width, count)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, middle), nn.ReLU(), nn.Linear(middle, width)) for _ in range(count)
        )
        self.up, self.down = (
            nn.Parameter(torch.zeros(count, width, middle)),
            nn.Parameter(torch.zeros(count, middle, width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)  # (B, T, experts)
        if self.how == "einsum":
            hidden = F.gelu(torch.einsum("btc,ecm->btem", x, self.up))
            found = torch.einsum("btem,emc->btec", hidden, self.down)
        else:
            found = torch.stack([expert(x) for expert in self.experts], dim=-2)
        if self.how == "best":
            best, which = weights.max(-1, keepdim=True)
            index = which.unsqueeze(-1).expand(-1, -1, 1, found.shape[-1])
            return x + best * found.gather(2, index).squeeze(2)
        return x + (weights.unsqueeze(-1) * found).sum(-2)


@kind(SEQUENCES, "shared")
class Shared(Block):
    """One layer used again and again, in loops, on parts, transposed; or two layers with one weight."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        self.how, self.outputs, middle = pick("loop", "tied", "transposed", "siamese", "both ways"), width, pick(6, 4)
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, middle, bias=False), nn.Linear(middle, width)
        if self.how == "tied":
            self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "loop":
            for _ in range(3):
                x = torch.tanh(self.one(x)) + x
            return x
        if self.how == "tied":
            return self.two(F.relu(self.one(x)))
        if self.how == "transposed":
            return F.relu(self.up(x)) @ self.up.weight
        if self.how == "siamese":
            return self.down(F.relu(self.up(x)) * torch.tanh(self.up(x.flip(1))))
        return self.down(self.up(x)) + self.down(F.relu(self.up(-x)))


@kind(SEQUENCES, "context")
class Context(Block):
    """A summary of the sequence scales and shifts it (FiLM, adaLN), stands in front of it, or asks it (queries)."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        self.how, self.outputs = pick("film", "class token", "queries", "places", "three parts"), width
        self.middle = pick(5, 6)
        self.down, self.up = nn.Linear(width, self.middle), nn.Linear(self.middle, 3 * width)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.zeros(1, PLACES, width))
        self.asking = nn.Parameter(torch.zeros(3, self.middle))
        self.keys, self.values = nn.Linear(width, self.middle), nn.Linear(width, width)
        self.norm = token_norm(width, pick)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        y = self.norm(x)
        if self.how in ("film", "three parts"):
            ways = self.up(F.relu(self.down(y.mean(1))))
            if self.how == "film":
                scale, shift, gate = ways.unsqueeze(1).chunk(3, dim=-1)
            else:
                scale, shift, gate = ways.view(b, 3, 1, -1).unbind(1)
            return x + gate * (y * (1 + scale) + shift)
        if self.how == "class token":
            y = torch.cat([self.token.expand(b, -1, -1), y], dim=1)
            return x + torch.tanh(y.cumsum(1))[:, 1:]
        if self.how == "places":
            return y + self.places[:, :t]
        weights = (self.asking @ self.keys(y).mT).softmax(-1)  # (B, 3, T)
        return x + (weights @ self.values(y)).sum(1, keepdim=True)


@kind(SEQUENCES, "moved data")
class Moved(Block):
    """Channels cut, turned, padded, picked and put back."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        self.outputs, self.middle = width, pick(6, 8)
        self.how = pick("flip", "roll", "pad", "tile", "index", "unbind", "write", "where", "sort", "scatter", "swap")
        self.up = nn.Linear(width, self.middle)
        self.down = nn.Linear(2 * self.middle if self.how == "tile" else self.middle, width)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.up(x))
        half = self.middle // 2
        if self.how == "flip":
            y = y + y.flip(-1)
        elif self.how == "roll":
            y = y.roll(2, -1)
        elif self.how == "pad":
            y = F.pad(y, (1, 1))[..., 1:-1]
        elif self.how == "tile":
            y = torch.cat([y, y.neg()], -1) if self.middle == 6 else y.tile(1, 1, 2)
        elif self.how == "index":
            y = y[..., torch.tensor([*range(1, self.middle), 0])]
        elif self.how == "unbind":
            y = torch.stack([part * 2 for part in y.unbind(-1)], -1)
        elif self.how == "write":
            y = y.clone()
            y[..., :half] = y[..., :half] * 3
        elif self.how == "where":
            y = torch.where(y > 0.1, y, 0.5 * y)
        elif self.how == "sort":
            y = y.sort(dim=-1).values
        elif self.how == "scatter":
            y = torch.zeros_like(y).index_add(-1, torch.arange(self.middle), y)
        else:
            y = torch.cat([y[..., half:], y[..., :half]], -1)
        return x + self.down(y)
