"""Blocks of images: (B, C, H, W) to (B, C', H, W)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drawn_blocks import Block, OwnLayerNorm, Pick, ResponseNorm, Table, kind
from nets_for_tests import conv, pooled

IMAGES: Table = {}
WIDTHS = (4, 6, 8, 3, 5)


class Norm(nn.Sequential):
    """A norm and an activation."""

    def __init__(self, width: int, pick: Pick) -> None:
        norm = pick(
            nn.Identity,
            lambda: nn.BatchNorm2d(width),
            lambda: nn.GroupNorm(math.gcd(width, 4), width),
            lambda: nn.GroupNorm(width, width),
            lambda: nn.InstanceNorm2d(width, affine=True),
            lambda: nn.PReLU(width),
        )()
        super().__init__(norm, pick(nn.ReLU, nn.GELU, lambda: nn.ReLU(inplace=True))())


@kind(IMAGES, "convolution")
class Plain(Block):
    """Convolution, norm, activation; perhaps transposed, in groups, depthwise."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        how = pick("dense", "depthwise", "grouped", "transposed", "grouped transposed", "depthwise transposed")
        outputs, groups = pick(*WIDTHS), 1
        if "depthwise" in how:
            groups, outputs = width, width * pick(1, 2)
        elif "grouped" in how:
            groups = math.gcd(width, pick(2, 3, 4))
            outputs = max(groups, outputs // groups * groups)
        layer = nn.ConvTranspose2d if "transposed" in how else nn.Conv2d
        self.conv = layer(width, outputs, 3, padding=1, groups=groups, bias=pick(True, False))
        self.norm = Norm(outputs, pick)
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


@kind(IMAGES, "residual")
class Residual(Block):
    """x + f(x), with or without a projection."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        self.outputs = pick(width, *WIDTHS)
        self.one = Plain(width, pick)
        self.two = conv(self.one.outputs, self.outputs)
        self.skip = nn.Identity() if width == self.outputs else conv(width, self.outputs, 1)
        self.in_place = pick(False, True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(self.one(x))
        if self.in_place:
            y += self.skip(x)
            return y.relu_()
        return F.relu(y + self.skip(x))


@kind(IMAGES, "branches")
class Branches(Block):
    """Two branches, concatenated, perhaps with the input too; or stacked and weighed."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        self.how = pick("cat", "dense", "cat by name", "stack")
        first, second = pick(*WIDTHS), pick(*WIDTHS)
        second = first if self.how == "stack" else second
        self.first, self.second = conv(width, first, 1), conv(width, second)
        self.outputs = {"dense": first + second + width, "stack": first}.get(self.how, first + second)

    def forward(self, x: Tensor) -> Tensor:
        parts = [F.relu(self.first(x)), torch.sigmoid(self.second(x))]
        if self.how == "stack":
            return torch.stack(parts, dim=1).sum(1)
        if self.how == "dense":
            parts.append(x)
        return torch.cat(tensors=parts, dim=-3) if self.how == "cat by name" else torch.cat(parts, 1)


@kind(IMAGES, "parts")
class Parts(Block):
    """The channels in two parts, equal or not, which go different ways."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        self.first = pick(4, 3, 6)
        self.second = pick(self.first, 5)
        self.make = conv(width, self.first + self.second)
        even = self.first == self.second
        ways = ("chunk", "half", "unbind", "view") if even else ()
        self.cut = pick("split", "sizes", "slices", "negative", "narrow", *ways)
        self.glue = pick("cat", "add", *(("gate", "swap", "sum") if even else ()))
        self.one = conv(self.first, 4)
        self.two = conv(self.second, 4)
        self.outputs = {"cat": 4 + self.second, "swap": 2 * self.first, "gate": self.first, "sum": self.first}.get(
            self.glue, 4
        )

    def parts(self, h: Tensor) -> tuple[Tensor, ...]:
        if self.cut == "chunk":
            return h.chunk(2, 1)
        if self.cut == "half":
            c = h.shape[1] // 2
            return h[:, :c], h[:, c:]
        if self.cut == "unbind":
            return h.unflatten(1, (2, -1)).unbind(1)
        if self.cut == "view":
            b, c, height, width = h.size()
            h = h.view(b, 2, c // 2, height, width)
            return h[:, 0], h[:, 1]
        if self.cut == "narrow":
            return h.narrow(1, 0, self.first), h.narrow(1, self.first, self.second)
        if self.cut == "negative":
            return h[:, : -self.second], h[:, -self.second :]
        if self.cut == "slices":
            return h[:, : self.first], h[:, self.first :]
        sizes = [self.first, self.second]
        return torch.split(h, sizes, dim=1) if self.cut == "sizes" else h.split(sizes, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.parts(self.make(x))
        if self.glue == "gate":
            return a * torch.sigmoid(b)
        if self.glue == "sum":
            return F.relu(a + b)
        if self.glue == "swap":
            return torch.cat([F.relu(b), a], 1)
        return torch.cat([self.one(a), F.relu(b)], 1) if self.glue == "cat" else F.relu(self.one(a) + self.two(b))


@kind(IMAGES, "squeeze-excite")
class Excite(Block):
    """A gate per channel, per place, or both."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        self.where = pick("channels", "channels", "places")
        self.shape = pick("view", "view of sizes", "index", "expand", "unsqueeze")
        layer = nn.Linear
        middle = pick(4, 2, 5)
        self.down, self.up, self.outputs = layer(width, middle), layer(middle, width), width
        self.places = conv(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "places":
            return x * torch.sigmoid(self.places(x)).expand_as(x)
        gate = torch.sigmoid(self.up(F.relu(self.down(pooled(x)))))
        if self.shape == "view":
            return x * gate.view(x.shape[0], -1, 1, 1)
        if self.shape == "view of sizes":
            b, c, _, _ = x.size()
            return x * gate.view(b, c, 1, 1)
        if self.shape == "expand":
            return x * gate[:, :, None, None].expand(x.shape)
        return x * (gate[..., None, None] if self.shape == "index" else gate.unsqueeze(-1).unsqueeze(-1))


@kind(IMAGES, "shuffle")
class Shuffle(Block):
    """Channel shuffle, by hand or by the library."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        self.groups, self.outputs = math.gcd(width, pick(2, 3)), width
        self.how = pick("view", "reshape of halves", "library", "unflatten")

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "library":
            return F.channel_shuffle(x, self.groups)
        if self.how == "unflatten":
            return x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)
        n, c, height, width = x.shape
        if self.how == "view":
            x = x.view(n, self.groups, c // self.groups, height, width)
        else:
            x = x.reshape(n, self.groups, -1, height, width)
        return x.transpose(1, 2).reshape(n, c, height, width)


@kind(IMAGES, "odd")
class Odd(Block):
    """What locks or ties channels: a mean over them, a softmax, a fixed pick, pairs, a sum."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        self.how, self.outputs = (
            pick("sum", "mean", "softmax", "pick", "norm", "pairs", "roll", "flip", "cosine"),
            width,
        )
        self.mix = conv(1, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "mean":
            return x + self.mix(x.mean(1, keepdim=True))
        if self.how == "sum":
            return F.relu(self.mix(x.sum(1, keepdim=True)))
        if self.how == "softmax":
            return x * x.softmax(1)
        if self.how == "pick":
            return x + self.mix(x[:, 1:2])
        if self.how == "norm":
            return x / (1 + x.norm(dim=1, keepdim=True))
        if self.how == "cosine":
            return F.normalize(x, dim=1)
        if self.how == "roll":
            return x + torch.roll(x, 1, dims=1)
        return x * x.flip(1) if self.how == "flip" else torch.stack([x, -x], 2).amax(2)


@kind(IMAGES, "attention over places")
class PlaceAttention(Block):
    """Attention over the places of an image, with the shapes that such code takes."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        self.heads, self.size = pick(2, 1, 4), pick(2, 4)
        self.inner = self.heads * self.size
        self.qkv = pick(conv(width, 3 * self.inner, 1), conv(width, 3 * self.inner, 1, bias=False))
        self.proj, self.outputs = conv(self.inner, width, 1), width
        self.shape = pick("reshape", "view of sizes", "split", "flatten")
        self.core = pick("sdpa", "manual", "linear", "scaled")

    def forward(self, x: Tensor) -> Tensor:
        b, _, height, width = x.shape
        qkv = self.qkv(x)
        if self.shape == "split":
            parts = [p.reshape(b, self.heads, -1, height * width) for p in qkv.split(self.inner, dim=1)]
        elif self.shape == "flatten":
            parts = [p.unflatten(1, (self.heads, -1)).flatten(3) for p in qkv.chunk(3, 1)]
        elif self.shape == "reshape":
            parts = list(qkv.reshape(b, 3, self.heads, self.size, height * width).unbind(1))
        else:
            c = qkv.shape[1] // 3
            parts = list(qkv.view(b, 3, self.heads, c // self.heads, height * width).unbind(1))
        q, k, v = (p.transpose(-2, -1) for p in parts)  # (B, heads, places, size)
        found = self.attend(q, k, v).transpose(-2, -1)
        return x + self.proj(found.reshape(b, -1, height, width))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.core == "sdpa":
            return F.scaled_dot_product_attention(q, k, v)
        if self.core == "scaled":
            return F.scaled_dot_product_attention(q, k, v, scale=0.5)
        if self.core == "linear":
            return F.relu(q) @ (F.relu(k).transpose(-2, -1) @ v) / 16
        return (q @ k.transpose(-2, -1) * self.size**-0.5).softmax(-1) @ v


@kind(IMAGES, "convnext")
class ConvNext(Block):
    """Depthwise convolution, channels last, norm, two linear layers, a scale; perhaps a norm that is written out."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        self.mix = conv(width, width, 3, groups=width)
        self.norm = pick(nn.Identity, lambda: nn.LayerNorm(width), lambda: OwnLayerNorm(width))()
        middle = pick(8, 5)
        self.up, self.down = nn.Linear(width, middle), nn.Linear(middle, width)
        self.gamma, self.outputs = nn.Parameter(torch.ones(width)), width
        self.last = pick("vector", "image")

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.mix(x).permute(0, 2, 3, 1))
        y = self.down(F.gelu(self.up(y)))
        if self.last == "vector":
            return x + (self.gamma * y).permute(0, 3, 1, 2)
        return x + self.gamma[:, None, None] * y.permute(0, 3, 1, 2)


@kind(IMAGES, "down and up")
class DownUp(Block):
    """A small U: down by strides or pooling, up by interpolation or transposed convolution, joined with the input."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        middle, back = pick(6, 4), pick(4, 5)
        self.down = pick("stride", "pool", "unshuffle", "merge")
        self.up = pick("nearest", "transposed", "shuffle", "repeat")
        first = 4 * width if self.down in ("unshuffle", "merge") else width
        self.one = nn.Conv2d(first, middle, 3, padding=1, stride=2 if self.down == "stride" else 1)
        if self.up == "transposed":
            self.two: nn.Module = nn.ConvTranspose2d(middle, back, 2, stride=2)
        else:
            self.two = conv(middle, back * 4 if self.up == "shuffle" else back)
        self.join = pick("cat", "add")
        self.last = conv(back, width)
        self.outputs = width + back if self.join == "cat" else width

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self.down == "pool":
            y = F.max_pool2d(x, 2)
        elif self.down == "unshuffle":
            y = F.pixel_unshuffle(x, 2)
        elif self.down == "merge":
            y = torch.cat([x[:, :, 0::2, 0::2], x[:, :, 1::2, 0::2], x[:, :, 0::2, 1::2], x[:, :, 1::2, 1::2]], 1)
        y = self.two(F.relu(self.one(y)))
        if self.up == "nearest":
            y = F.interpolate(y, scale_factor=2, mode="nearest")
        elif self.up == "shuffle":
            y = F.pixel_shuffle(y, 2)
        elif self.up == "repeat":
            y = y.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return torch.cat([x, y], 1) if self.join == "cat" else x + self.last(y)


@kind(IMAGES, "selective kernel")
class Selective(Block):
    """Two branches, weighed by a softmax over the branches (and over nothing else)."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        self.outputs = pick(4, 6)
        self.one, self.two = conv(width, self.outputs), conv(width, self.outputs, 1)
        self.squeeze, self.excite = nn.Linear(self.outputs, 4), nn.Linear(4, 2 * self.outputs)
        self.how = pick("view", "unflatten", "chunk", "sizes")

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.stack([self.one(x), self.two(x)], 1)  # (B, 2, C, H, W)
        weights = self.excite(F.relu(self.squeeze(parts.sum(1).mean((2, 3)))))
        if self.how == "view":
            weights = weights.view(x.shape[0], 2, -1)
        elif self.how == "unflatten":
            weights = weights.unflatten(1, (2, self.outputs))
        elif self.how == "sizes":
            weights = weights.view(parts.shape[0], 2, parts.shape[2])
        else:
            weights = torch.stack(weights.chunk(2, -1), 1)
        return (parts * weights.softmax(1)[..., None, None]).sum(1)


@kind(IMAGES, "csp")
class Partial(Block):
    """Part of the channels goes through a chain; every link of it is kept and concatenated (C2f, ELAN)."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        half = pick(3, 4)
        self.first = conv(width, 2 * half, 1)
        self.links = nn.ModuleList(conv(half, half) for _ in range(pick(1, 2)))
        self.outputs = pick(6, 4)
        self.last = conv(half * (2 + len(self.links)), self.outputs, 1)
        self.add = pick(False, True)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for link in self.links:
            y = F.silu(link(parts[-1]))
            parts.append(parts[-1] + y if self.add else y)
        return self.last(torch.cat(parts, 1))


@kind(IMAGES, "ghost")
class Ghost(Block):
    """Half of the channels are made from the other half, one from one."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        half = pick(4, 3)
        self.primary, self.cheap = conv(width, half, 1), conv(half, half, 3, groups=half)
        self.outputs = pick(2 * half, 2 * half - 1)

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.primary(x))
        return torch.cat([first, F.relu(self.cheap(first))], 1)[:, : self.outputs]


@kind(IMAGES, "windows")
class Windows(Block):
    """Attention inside windows of two by two places, channels last, with a bias per pair of places."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        self.heads, self.outputs, self.window = math.gcd(width, pick(2, 4)), width, 2
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.zeros(9, self.heads))
        self.register_buffer("index", torch.arange(16).view(4, 4) % 9, persistent=pick(True, False))
        self.shift, self.sizes = pick(0, 1), pick("shape", "minus one")

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        y = x.permute(0, 2, 3, 1)
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), dims=(1, 2))
        last = c if self.sizes == "shape" else -1
        w = self.window
        y = y.reshape(b, height // w, w, width // w, w, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, c)
        n, places, _ = y.shape
        q, k, v = self.qkv(y).reshape(n, places, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1) * 0.5
        scores = scores + self.table[self.index.view(-1)].view(places, places, -1).permute(2, 0, 1)
        y = self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, places, last))
        y = y.view(b, height // w, width // w, w, w, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, height, width, last)
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), dims=(1, 2))
        return x + y.permute(0, 3, 1, 2)


@kind(IMAGES, "einsum over channels")
class Einsum(Block):
    """A matrix over the channels as einsum, tensordot, matmul or conv1d; plain parameters of the block."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        self.outputs = pick(6, 4, 5)
        self.matrix = nn.Parameter(torch.zeros(width, self.outputs))
        self.bias = nn.Parameter(torch.zeros(self.outputs, 1, 1))
        self.how = pick("einsum", "tensordot", "matmul", "linear", "bmm")

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "einsum":
            return F.relu(torch.einsum("bchw,cd->bdhw", x, self.matrix) + self.bias)
        if self.how == "tensordot":
            return F.relu(torch.tensordot(x, self.matrix, dims=([1], [0])).permute(0, 3, 1, 2) + self.bias)
        if self.how == "matmul":
            b, _, height, width = x.shape
            return F.relu((self.matrix.T @ x.flatten(2)).view(b, -1, height, width) + self.bias)
        if self.how == "bmm":
            rows = x.flatten(2).transpose(1, 2)
            y = torch.bmm(rows, self.matrix.expand(x.shape[0], -1, -1)).transpose(1, 2)
            return F.relu(y.unflatten(2, x.shape[2:]) + self.bias)
        return F.relu(F.linear(x.movedim(1, -1), self.matrix.t()).movedim(-1, 1) + self.bias)


@kind(IMAGES, "twice")
class Twice(Block):
    """One module used twice, or two that share a weight."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        self.how, self.outputs = pick("same module", "shared weight", "functional"), width
        self.one = nn.Sequential(conv(width, width), pick(nn.Identity, lambda: nn.BatchNorm2d(width))(), nn.ReLU())
        self.two = conv(width, width)
        if self.how == "shared weight":
            self.two.weight = self.one[0].weight

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "same module":
            return self.one(self.one(x))
        if self.how == "shared weight":
            return self.two(self.one(x))
        return F.conv2d(self.one(x), self.two.weight, None, padding=1)


@kind(IMAGES, "reads sizes")
class ReadsSizes(Block):
    """Computes with sizes that it reads off its input."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        self.how = pick("rows", "columns", "both", "pool", "zeros", "assert", "repeat")
        self.fc, self.outputs, self.width = nn.Linear(width, width), width, width

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        if self.how == "rows":
            return F.relu(
                self.fc(x.permute(0, 2, 3, 1).reshape(b * height * width, c)).reshape(b, height, width, c)
            ).permute(0, 3, 1, 2)
        if self.how == "columns":
            return self.fc(x.reshape(b, c, height * width).mT).mT.reshape(b, c, height, width)
        if self.how == "both":
            return x + self.fc(x.view(b, self.width, -1).transpose(1, 2)).transpose(1, 2).view(x.shape)
        if self.how == "zeros":
            y = torch.zeros(b, c, height, width, dtype=x.dtype)
            y[:, :, 1:] = x[:, :, :-1]
            return y + self.fc(pooled(x)).view(b, c, 1, 1)
        if self.how == "assert":
            assert c == self.width, "wrong width"
            return x * self.fc(pooled(x))[:, :, None, None]
        if self.how == "repeat":
            return x + self.fc(pooled(x)).repeat_interleave(height * width, 1).view(b, -1, height, width)
        return x + self.fc(F.adaptive_avg_pool2d(x, 1).view(b, c)).reshape(b, c, 1, 1)


@kind(IMAGES, "norms")
class Norms(Block):
    """A convolution under one of the stranger norms."""

    def __init__(self, width: int, pick: Pick) -> None:
        super().__init__()
        self.outputs = pick(8, 6)
        self.conv = conv(width, self.outputs, bias=pick(True, False))
        self.how = pick("batch", "batch by hand", "frozen", "group", "layer", "response", "local", "functional")
        self.norm = nn.BatchNorm2d(self.outputs)
        self.groups, self.response = nn.GroupNorm(2, self.outputs), ResponseNorm(self.outputs)
        self.gamma = nn.Parameter(torch.ones(1, self.outputs, 1, 1))
        self.register_buffer("mean", torch.zeros(self.outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.how == "batch":
            return F.relu(self.norm(x))
        if self.how == "group":
            return F.relu(self.groups(x))
        if self.how == "layer":
            return F.relu(F.layer_norm(x, x.shape[2:]) * self.gamma)
        if self.how == "local":
            return F.relu(F.local_response_norm(x, 2))
        if self.how == "frozen":
            scale = self.norm.weight * (self.norm.running_var + self.norm.eps).rsqrt()
            return F.relu(
                x * scale[None, :, None, None] + (self.norm.bias - self.norm.running_mean * scale)[None, :, None, None]
            )
        if self.how == "functional":
            n = self.norm
            return F.relu(F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, False, 0.1, n.eps))
        if self.how == "response":
            return self.response(x)
        return F.relu((x - self.mean.view(1, -1, 1, 1)) * self.gamma)
