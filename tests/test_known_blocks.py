"""Building blocks of well-known architectures, with the groups worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from nets_for_tests import Net, assert_shrunk_equals_zeroed, conv, distance, head, pooled, randomised, zeroed_by_hand


def unit(inputs: int, outputs: int, size: int = 3, groups: int = 1, stride: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU."""
    layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def ending(width: int) -> Net:
    return Net(lambda s, x: s.fc(pooled(x)), fc=head(width))


def inverted_residual(inputs: int, outputs: int, expansion: int) -> Net:
    """MobileNetV2: expand, depthwise, project; added where the widths agree."""
    hidden = inputs * expansion
    body = nn.Sequential(
        unit(inputs, hidden, 1), unit(hidden, hidden, groups=hidden), conv(hidden, outputs, 1), nn.BatchNorm2d(outputs)
    )
    return Net(lambda s, x: x + s.body(x) if inputs == outputs else s.body(x), body=body)


def mobilenet() -> nn.Module:
    blocks = [inverted_residual(8, 6, 2), inverted_residual(6, 6, 3), inverted_residual(6, 8, 2)]
    return nn.Sequential(unit(3, 8), *blocks, ending(8))


def unet() -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        a = s.down1(x)
        b = s.down2(F.max_pool2d(a, 2))
        y = s.up2(s.middle(F.max_pool2d(b, 2)))
        y = s.up1(s.join2(torch.cat([y, b], 1)))
        return s.out(s.join1(torch.cat([y, a], 1)))

    return Net(
        forward,
        down1=unit(3, 6),
        down2=unit(6, 8),
        middle=unit(8, 10),
        up2=nn.ConvTranspose2d(10, 8, 2, 2),
        join2=unit(16, 8),
        up1=nn.ConvTranspose2d(8, 6, 2, 2),
        join1=unit(12, 6),
        out=conv(6, 2, 1),
    )


def res2net() -> nn.Module:
    """Four quarters; each but the first goes through a convolution with what came before."""

    def forward(s: Any, x: Tensor) -> Tensor:
        first, second, third, fourth = s.enter(x).chunk(4, 1)
        parts = [first, s.a(second)]
        parts.append(s.b(third + parts[-1]))
        parts.append(s.c(fourth + parts[-1]))
        return x + s.leave(torch.cat(parts, 1))

    block = Net(forward, enter=conv(8, 8, 1), a=unit(2, 2), b=unit(2, 2), c=unit(2, 2), leave=conv(8, 8, 1))
    return nn.Sequential(unit(3, 8), block, ending(8))


def ghost() -> nn.Module:
    """Half of the channels made by a cheap depthwise convolution, and one too many cut off."""

    def forward(s: Any, x: Tensor) -> Tensor:
        primary = s.primary(x)
        return torch.cat([primary, s.cheap(primary)], 1)[:, : s.width]

    block = Net(forward, primary=unit(6, 4, 1), cheap=unit(4, 4, groups=4), width=7)
    return nn.Sequential(unit(3, 6), block, ending(7))


def repvgg() -> nn.Module:
    def block() -> Net:
        return Net(
            lambda s, x: F.relu(s.a(x) + s.b(x) + s.norm(x)), a=conv(8, 8), b=conv(8, 8, 1), norm=nn.BatchNorm2d(8)
        )

    return nn.Sequential(unit(3, 8), block(), block(), ending(8))


def sknet() -> nn.Module:
    """Two branches, mixed by a softmax across the branches."""

    def forward(s: Any, x: Tensor) -> Tensor:
        branches = torch.stack([s.a(x), s.b(x)], 1)
        squeezed = F.relu(s.squeeze(pooled(branches.sum(1))))
        weights = torch.stack([s.one(squeezed), s.two(squeezed)], 1).softmax(1)
        return (branches * weights[..., None, None]).sum(1)

    block = Net(
        forward, a=unit(6, 8), b=unit(6, 8, 5), squeeze=nn.Linear(8, 4), one=nn.Linear(4, 8), two=nn.Linear(4, 8)
    )
    return nn.Sequential(unit(3, 6), block, ending(8))


def cbam() -> nn.Module:
    """A gate per channel, and one per position made from statistics over the channels."""

    def forward(s: Any, x: Tensor) -> Tensor:
        x = x * torch.sigmoid(s.up(F.relu(s.down(pooled(x)))) + s.up(F.relu(s.down(x.amax((2, 3))))))[:, :, None, None]
        seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(s.where(seen))

    gate = Net(forward, down=nn.Linear(6, 4), up=nn.Linear(4, 6), where=conv(2, 1))
    return nn.Sequential(unit(3, 8), unit(8, 6), gate, unit(6, 4), ending(4))


def c2f() -> nn.Module:
    """YOLO's block: split in two, one half goes through a bottleneck, all three are concatenated."""

    def forward(s: Any, x: Tensor) -> Tensor:
        parts = list(s.enter(x).split((s.width, s.width), 1))
        parts.append(parts[-1] + s.body(parts[-1]))
        return s.leave(torch.cat(parts, 1))

    block = Net(forward, enter=unit(8, 8, 1), body=unit(4, 4), leave=unit(12, 8, 1), width=4)
    return nn.Sequential(unit(3, 8), block, ending(8))


def hrnet() -> nn.Module:
    """Two resolutions that exchange what they found."""

    def forward(s: Any, x: Tensor) -> Tensor:
        fine = s.fine(x)
        coarse = s.coarse(fine)
        up = F.interpolate(s.up(coarse), size=fine.shape[2:], mode="nearest")
        down = F.relu(coarse + s.down(fine))
        return s.end(torch.cat([F.relu(fine + up), F.interpolate(down, scale_factor=2.0, mode="bilinear")], 1))

    return Net(
        forward,
        fine=unit(3, 6),
        coarse=unit(6, 8, stride=2),
        up=conv(8, 6, 1),
        down=conv(6, 8, stride=2),
        end=ending(14),
    )


def wavenet() -> nn.Module:
    """Gated dilated convolutions with a residual and a skip stream."""

    def forward(s: Any, x: Tensor) -> Tensor:
        x, skips = s.enter(x.flatten(2)), 0
        for wide, back, skip in zip(s.wide, s.back, s.skip, strict=True):
            a, b = wide(F.pad(x, (wide.dilation[0], 0))).chunk(2, 1)
            h = torch.tanh(a) * torch.sigmoid(b)
            skips, x = skips + skip(h), x + back(h)
        return s.leave(F.relu(skips)).mean(2)

    return Net(
        forward,
        enter=nn.Conv1d(3, 8, 1),
        wide=nn.ModuleList([nn.Conv1d(8, 12, 2, dilation=1), nn.Conv1d(8, 12, 2, dilation=2)]),
        back=nn.ModuleList([nn.Conv1d(6, 8, 1), nn.Conv1d(6, 8, 1)]),
        skip=nn.ModuleList([nn.Conv1d(6, 4, 1), nn.Conv1d(6, 4, 1)]),
        leave=nn.Conv1d(4, 3, 1),
    )


def autoencoder() -> nn.Module:
    """The decoder is the encoder transposed."""

    def forward(s: Any, x: Tensor) -> Tensor:
        code = torch.tanh(s.two(torch.tanh(s.one(x.flatten(1)))))
        return F.linear(torch.tanh(F.linear(code, s.two.weight.t(), s.inner)), s.one.weight.t(), s.outer)

    return Net(
        forward,
        one=nn.Linear(192, 10),
        two=nn.Linear(10, 4),
        inner=nn.Parameter(torch.ones(10)),
        outer=nn.Parameter(torch.ones(192)),
    )


def film() -> nn.Module:
    """Scale and shift of every channel, predicted from the input."""

    def forward(s: Any, x: Tensor) -> Tensor:
        scale, shift = s.predict(pooled(x)).chunk(2, dim=-1)
        h = s.norm(s.a(x)) * (1 + scale[..., None, None]) + shift[..., None, None]
        return s.end(F.relu(s.b(F.relu(h))))

    return Net(
        forward,
        a=conv(3, 8),
        norm=nn.BatchNorm2d(8, affine=False),
        predict=nn.Linear(3, 16),
        b=conv(8, 5),
        end=ending(5),
    )


def convnext() -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        h = s.norm(s.spatial(x).permute(0, 2, 3, 1))
        return x + (s.gain * s.narrow(F.gelu(s.wide(h)))).permute(0, 3, 1, 2)

    block = Net(
        forward,
        spatial=conv(8, 8, groups=8),
        norm=nn.LayerNorm(8),
        wide=nn.Linear(8, 16),
        narrow=nn.Linear(16, 8),
        gain=nn.Parameter(torch.ones(8)),
    )
    return nn.Sequential(conv(3, 8), block, ending(8))


def coordinates() -> nn.Module:
    """Two fixed planes of coordinates are concatenated to the features."""

    def forward(s: Any, x: Tensor) -> Tensor:
        h = F.relu(s.a(x))
        n, _, height, width = h.shape
        rows, columns = torch.linspace(-1, 1, height, dtype=h.dtype), torch.linspace(-1, 1, width, dtype=h.dtype)
        planes = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).expand(n, -1, -1, -1)
        return s.end(F.relu(s.b(torch.cat([h, planes], 1))))

    return Net(forward, a=conv(3, 8), b=conv(10, 5), end=ending(5))


# The free groups; whatever else the net has is locked.
BLOCKS: dict[Callable[[], nn.Module], Mapping[str, int]] = {
    mobilenet: {"0.0": 8, "1.body.0.0": 16, "1.body.2": 6, "2.body.0.0": 18, "3.body.0.0": 12, "3.body.2": 8},
    unet: {"down1.0": 6, "down2.0": 8, "middle.0": 10, "up2": 8, "join2.0": 8, "up1": 6, "join1.0": 6},
    res2net: {"0.0": 8, "1.enter": 2, "1.enter#2": 2, "1.enter#3": 2, "1.enter#4": 2, "1.c.0": 2},
    ghost: {"0.0": 6, "1.primary.0": 3, "1.primary.0#2": 1},
    repvgg: {"0.0": 8},
    sknet: {"0.0": 6, "1.a.0": 8, "1.squeeze": 4},
    cbam: {"0.0": 8, "2.down": 4, "3.0": 4},
    c2f: {"0.0": 8, "1.enter.0": 4, "1.enter.0#2": 4, "1.leave.0": 8},
    hrnet: {"fine.0": 6, "coarse.0": 8},
    wavenet: {"enter": 8, "wide.0": 6, "skip.0": 4, "wide.1": 6},
    autoencoder: {"one": 10, "two": 4},
    film: {"a": 8, "b": 5},
    convnext: {"1.wide": 16},
    coordinates: {"a": 8, "b": 5},
}


@pytest.mark.parametrize("build", BLOCKS, ids=lambda build: build.__name__)
def test_known_blocks_are_free_where_they_should_be_and_right_wherever_they_are_cut(
    build: Callable[[], nn.Module],
) -> None:
    model = randomised(build().double()).eval()
    batches = [torch.randn(size, 3, 8, 8, dtype=torch.float64) for size in (2, 3)]
    graph = sc.trace(model, batches[0])
    assert {group.name: group.channels for group in graph.prunable} == dict(BLOCKS[build])
    scores = sc.score(graph, sc.observe(model, graph), "random")
    for sparsity, scope in ((0.5, "layer"), (0.3, "global"), (0.95, "global")):
        plan = sc.select(graph, scores, sc.Target(sparsity=sparsity), scope=scope)
        small = sc.shrink(model, plan)
        assert_shrunk_equals_zeroed(model, plan, small, batches)
        counts = sc.count(small, batches[0])
        assert (counts.macs, counts.params) == (plan.macs[1], plan.params[1])


def test_a_stack_of_channel_shuffles_is_right_even_where_it_is_locked() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        kept, worked = x.chunk(2, 1)
        y = torch.cat([kept, s.body(worked)], 1)
        n, c, height, width = y.shape
        return y.view(n, 2, c // 2, height, width).transpose(1, 2).reshape(n, -1, height, width)

    def block() -> Net:
        return Net(forward, body=nn.Sequential(unit(4, 4, 1), unit(4, 4, groups=4), unit(4, 4, 1)))

    model = randomised(nn.Sequential(unit(3, 8), block(), block(), unit(8, 6, 1), ending(6)).double()).eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    pruned = sc.prune(model, x, sparsity=0.5)
    assert {"1.body.0.0", "2.body.0.0", "3.0"} <= {row.layer for row in pruned.plan.widths if row.after < row.before}
    assert distance(zeroed_by_hand(model, pruned.plan), pruned.model, x) < 1e-9
