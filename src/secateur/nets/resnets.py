"""Residual networks for 32x32 images (He et al. 2016, "Deep Residual Learning for Image Recognition")."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, figure 5 left)."""

    expansion = 1  # output channels per unit of width

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.shortcut = _shortcut(inputs, width * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, width, H / stride, W / stride)."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        total: Tensor = self.relu(out + self.shortcut(x))
        return total


class Bottleneck(nn.Module):
    """1x1, 3x3 (which carries the stride) and 1x1 convolutions and a shortcut (He et al. 2016, figure 5 right)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = _conv(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, 4 * width, H / stride, W / stride)."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        total: Tensor = self.relu(out + self.shortcut(x))
        return total


class ResNet(nn.Module):
    """A 3x3 stem, stages of residual blocks that halve the image and widen it, a mean over positions, a classifier."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        widths: Sequence[int],
        num_classes: int,
    ) -> None:
        super().__init__()
        channels = widths[0]
        self.conv1 = _conv(3, channels, 3)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        stages = []
        for number, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            blocks = []
            for position in range(depth):
                stride = 2 if number > 0 and position == 0 else 1
                blocks.append(block(channels, width, stride))
                channels = width * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> logits (N, num_classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.pool(self.stages(x))
        logits: Tensor = self.fc(x.flatten(1))
        return logits


def resnet20(num_classes: int = 10, width: int = 16) -> ResNet:
    """ResNet-20 for CIFAR (He et al. 2016, section 4.2): 3 stages of 3 blocks, 16-32-64 channels.

    Shortcuts that change the shape are 1x1 convolutions with BatchNorm (option B of the paper, which itself used the
    parameter-free option A on CIFAR): 272,474 parameters at 10 classes instead of 269,722.
    """
    return ResNet(BasicBlock, (3, 3, 3), (width, 2 * width, 4 * width), num_classes)


def resnet56(num_classes: int = 10, width: int = 16) -> ResNet:
    """ResNet-56 for CIFAR: 3 stages of 9 blocks; 855,770 parameters at 10 classes (option A: 853,018)."""
    return ResNet(BasicBlock, (9, 9, 9), (width, 2 * width, 4 * width), num_classes)


def resnet18(num_classes: int = 10, width: int = 64) -> ResNet:
    """ResNet-18 with a 3x3 stem and no max-pooling, for 32x32 images."""
    return ResNet(BasicBlock, (2, 2, 2, 2), _doubling(width), num_classes)


def resnet34(num_classes: int = 10, width: int = 64) -> ResNet:
    """ResNet-34 with a 3x3 stem and no max-pooling, for 32x32 images."""
    return ResNet(BasicBlock, (3, 4, 6, 3), _doubling(width), num_classes)


def resnet50(num_classes: int = 10, width: int = 64) -> ResNet:
    """ResNet-50 (bottlenecks) with a 3x3 stem and no max-pooling, for 32x32 images."""
    return ResNet(Bottleneck, (3, 4, 6, 3), _doubling(width), num_classes)


def resnet101(num_classes: int = 10, width: int = 64) -> ResNet:
    """ResNet-101 (bottlenecks) with a 3x3 stem and no max-pooling, for 32x32 images."""
    return ResNet(Bottleneck, (3, 4, 23, 3), _doubling(width), num_classes)


def _doubling(width: int) -> tuple[int, ...]:
    return width, 2 * width, 4 * width, 8 * width


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)  # BatchNorm follows: no bias


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
