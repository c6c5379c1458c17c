"""Networks without shortcuts: VGG, AlexNet, and the small net of four convolutions."""

from __future__ import annotations

from torch import Tensor, nn

from secateur.errors import InputError

POOL = 0  # in the tables of widths: a 2x2 max-pooling

VGG11 = (64, POOL, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL)
VGG13 = (64, 64, POOL, 128, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL)
VGG16 = (64, 64, POOL, 128, 128, POOL, *(256,) * 3, POOL, *(512,) * 3, POOL, *(512,) * 3, POOL)
VGG19 = (64, 64, POOL, 128, 128, POOL, *(256,) * 4, POOL, *(512,) * 4, POOL, *(512,) * 4, POOL)


class Plain(nn.Module):
    """Features (a chain of convolutions) and a classifier on the flattened result."""

    def __init__(self, features: nn.Sequential, classifier: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> logits (N, num_classes)."""
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


def vgg11(num_classes: int = 10, width: int = 64) -> Plain:
    """VGG-11 with BatchNorm for 32x32 images: Simonyan and Zisserman 2015, table 1 A; one linear layer as the head."""
    return _vgg(VGG11, num_classes, width)


def vgg13(num_classes: int = 10, width: int = 64) -> Plain:
    """VGG-13 (table 1 B) with BatchNorm and one linear layer as the head, for 32x32 images."""
    return _vgg(VGG13, num_classes, width)


def vgg16(num_classes: int = 10, width: int = 64) -> Plain:
    """VGG-16 (table 1 D) with BatchNorm and one linear layer as the head, for 32x32 images."""
    return _vgg(VGG16, num_classes, width)


def vgg19(num_classes: int = 10, width: int = 64) -> Plain:
    """VGG-19 (table 1 E) with BatchNorm and one linear layer as the head, for 32x32 images."""
    return _vgg(VGG19, num_classes, width)


def alexnet(num_classes: int = 10, image_size: int = 32, hidden: int = 4096) -> Plain:
    """AlexNet in the one-column form of Krizhevsky 2014 ("One weird trick"), for images of 224 or of 32 pixels.

    At 224 it has the 61,100,840 parameters of the published form at 1,000 classes. At 32 the first convolution is
    3x3 with stride 2, the poolings are 2x2, and the 256 x 2 x 2 features feed the same two layers of 4,096 (`hidden`).
    """
    if hidden < 1:
        raise InputError(f"hidden is the width of the two hidden linear layers, at least 1; got {hidden}.")
    if image_size not in (32, 224):
        raise InputError(f"alexnet takes images of 32 or 224 pixels, got image_size={image_size}.")
    large = image_size == 224
    stem = nn.Conv2d(3, 64, 11, stride=4, padding=2) if large else nn.Conv2d(3, 64, 3, stride=2, padding=1)
    second = nn.Conv2d(64, 192, 5, padding=2) if large else nn.Conv2d(64, 192, 3, padding=1)
    window = 3 if large else 2
    features = nn.Sequential(
        *(stem, nn.ReLU(), nn.MaxPool2d(window, 2)),
        *(second, nn.ReLU(), nn.MaxPool2d(window, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(window, 2)),
    )
    side = 6 if large else 2
    classifier = nn.Sequential(
        *(nn.Dropout(), nn.Linear(256 * side * side, hidden), nn.ReLU()),
        *(nn.Dropout(), nn.Linear(hidden, hidden), nn.ReLU()),
        nn.Linear(hidden, num_classes),
    )
    return Plain(features, classifier)


def conv4(num_classes: int = 10, filters: int = 3) -> Plain:
    """Four 3x3 convolutions of three filters each, no BatchNorm, one linear layer: too small to prune by filters.

    After Batra, Das and Xu, "Exploring Large Convolutional Network Pruning", which names no more than the four layers
    of three filters and their three input channels; the poolings (after the second and fourth) and the linear layer
    are this project's choice, for 32x32 images.
    """
    layers: list[nn.Module] = []
    for position in range(4):
        layers += [nn.Conv2d(3 if position == 0 else filters, filters, 3, padding=1), nn.ReLU()]
        if position % 2:
            layers.append(nn.MaxPool2d(2))
    return Plain(nn.Sequential(*layers), nn.Linear(filters * 8 * 8, num_classes))


def _vgg(widths: tuple[int, ...], num_classes: int, first: int) -> Plain:
    """`first`: channels of the first layer; the published networks have 64, and the others follow in proportion."""
    if first < 1:
        raise InputError(f"width is the number of channels of the first layer, at least 1; got {first}.")
    layers: list[nn.Module] = []
    channels = 3
    for published in widths:
        width = published * first // 64
        if published == POOL:
            layers.append(nn.MaxPool2d(2))
        else:
            # The bias does nothing in front of BatchNorm; the published networks have it.
            convolution = nn.Conv2d(channels, width, 3, padding=1)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(convolution.get_parameter("bias"))
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
    return Plain(nn.Sequential(*layers), nn.Linear(channels, num_classes))
