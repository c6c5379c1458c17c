"""The small net of the demo."""

from __future__ import annotations

from torch import Tensor, nn


class DigitsNet(nn.Module):
    """Three convolutions with BatchNorm, two of them in a residual block, for 8x8 grey images."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        wide = 2 * width
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(width)
        self.down = nn.Conv2d(width, wide, 3, stride=2, padding=1, bias=False)
        self.down_bn = nn.BatchNorm2d(wide)
        self.conv1 = nn.Conv2d(wide, wide, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(4 * wide, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 8, 8) -> logits (N, num_classes)."""
        x = self.relu(self.stem_bn(self.stem(x)))
        x = self.relu(self.down_bn(self.down(x)))
        out = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(x + self.bn2(self.conv2(out)))
        logits: Tensor = self.fc(self.pool(x).flatten(1))
        return logits


def digits_net(num_classes: int = 10, width: int = 16) -> DigitsNet:
    """A CNN for the 8x8 digits with BatchNorm and one residual block; 24,698 parameters, 97 % in seconds."""
    return DigitsNet(num_classes, width)
