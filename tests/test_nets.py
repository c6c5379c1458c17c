"""The networks of the studies: published parameter counts, shapes, and that they learn."""

import pytest
import torch
from torch import nn

from secateur.data import Batches, digits
from secateur.errors import InputError, SecateurError, UnknownNameError
from secateur.nets import NETS, alexnet, build, digits_net
from secateur.training import Recipe, evaluate, fit

# Published by torchvision for ImageNet: 1,000 classes, 7x7 stem of 64, linear head on `features`.
TORCHVISION_RESNETS = {
    "resnet18": (11_689_512, 512),
    "resnet34": (21_797_672, 512),
    "resnet50": (25_557_032, 2048),
    "resnet101": (44_549_160, 2048),
}
# Published by torchvision for its VGG with BatchNorm; the head is 25,088 - 4,096 - 4,096 - 1,000.
TORCHVISION_VGGS = {"vgg11": 132_868_840, "vgg13": 133_053_736, "vgg16": 138_365_992, "vgg19": 143_678_248}
# Published for the CIFAR forms with option A shortcuts (akamaster/pytorch_resnet_cifar10 prints 0.27M and 0.85M).
CIFAR_RESNETS = {"resnet20": 269_722, "resnet56": 853_018}


def count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


@pytest.fixture(autouse=True)
def _on_meta(request: pytest.FixtureRequest):
    """Counting needs no memory: networks of tests named `counts` live on the meta device."""
    if "counts" in request.node.name:
        with torch.device("meta"):
            yield
    else:
        yield


@pytest.mark.parametrize("name", TORCHVISION_RESNETS)
@pytest.mark.parametrize("classes", [10, 100])
def test_counts_of_resnets_are_the_published_ones_less_stem_and_head(name: str, classes: int) -> None:
    published, features = TORCHVISION_RESNETS[name]
    stem = 3 * 64 * (7 * 7 - 3 * 3)
    expected = published - stem - linear(features, 1000) + linear(features, classes)
    assert count(build(name, num_classes=classes)) == expected


@pytest.mark.parametrize("name", TORCHVISION_VGGS)
def test_counts_of_vggs_are_the_published_ones_less_the_head(name: str) -> None:
    head = linear(25_088, 4096) + linear(4096, 4096) + linear(4096, 1000)
    assert count(build(name)) == TORCHVISION_VGGS[name] - head + linear(512, 10)


@pytest.mark.parametrize("name", CIFAR_RESNETS)
def test_counts_of_cifar_resnets_are_the_published_ones_and_two_projections(name: str) -> None:
    projections = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)  # 1x1 convolution and BatchNorm: option B
    assert count(build(name)) == CIFAR_RESNETS[name] + projections


def test_counts_of_alexnet() -> None:
    assert count(alexnet(1000, image_size=224)) == 61_100_840  # published by torchvision
    first = (11 * 11 - 3 * 3) * 3 * 64
    second = (5 * 5 - 3 * 3) * 64 * 192
    classifier = linear(256 * 6 * 6, 4096) - linear(256 * 2 * 2, 4096)
    assert count(alexnet(1000, image_size=32)) == 61_100_840 - first - second - classifier


def test_counts_of_the_small_nets_by_hand() -> None:
    assert count(build("conv4")) == 4 * (3 * 3 * 3 * 3 + 3) + linear(3 * 8 * 8, 10)
    convolutions = 9 * (1 * 16 + 16 * 32 + 32 * 32 + 32 * 32)
    norms = 2 * (16 + 32 + 32 + 32)
    assert count(digits_net()) == convolutions + norms + linear(4 * 32, 10) == 24_698


@pytest.mark.parametrize("name", NETS)
def test_counts_depend_on_the_classes_only_in_the_head(name: str) -> None:
    few, many = build(name, num_classes=10), build(name, num_classes=11)
    head = [module for module in few.modules() if isinstance(module, nn.Linear)][-1]
    assert count(many) - count(few) == head.in_features + 1


@pytest.mark.parametrize("name", NETS)
def test_shapes_and_gradients_reach_every_parameter(name: str) -> None:
    # On the meta device: shapes without arithmetic.
    with torch.device("meta"):
        net = build(name, num_classes=7)
        images = torch.empty(2, 1, 8, 8) if name == "digits_net" else torch.empty(2, 3, 32, 32)
        logits = net(images)
        logits.sum().backward()
    assert logits.shape == (2, 7)
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_alexnet_at_224_accepts_images_of_224() -> None:
    with torch.device("meta"):
        assert alexnet(5, image_size=224)(torch.empty(1, 3, 224, 224)).shape == (1, 5)


@pytest.mark.parametrize("name", [name for name in NETS if name.startswith("resnet")])
def test_width_scales_every_stage(name: str) -> None:
    with torch.device("meta"):
        wide, narrow = build(name), build(name, width=8)
    ratio = wide.get_submodule("conv1").out_channels / 8
    assert wide.get_submodule("fc").in_features == ratio * narrow.get_submodule("fc").in_features


def test_the_resnet_is_the_sum_of_its_branches() -> None:
    torch.manual_seed(0)
    block = build("resnet20", width=4).eval().get_submodule("stages.1.0")
    x = torch.randn(2, 4, 8, 8)
    inner = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
    assert torch.equal(block(x), torch.relu(inner + block.shortcut(x)))
    assert not torch.allclose(block(x), torch.relu(inner))


def test_fresh_weights_follow_the_seed() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(build("resnet20").parameters())

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_digits_net_learns_the_digits() -> None:
    torch.manual_seed(0)
    splits = digits()
    batches = Batches(splits.train, 64, augmentation=splits.augmentation)
    fitted = fit(digits_net(), batches, Recipe(epochs=8, lr=0.1, warmup_epochs=1))
    assert evaluate(fitted.model, Batches(splits.test, 256, shuffle=False)).accuracy >= 0.97


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'resnet18'"):
        build("resnet-18")


def test_bad_options_say_what_there_is() -> None:
    with pytest.raises(InputError, match=r"depth.*num_classes"):
        build("resnet18", depth=3)
    with pytest.raises(SecateurError, match="image_size=64"):
        alexnet(image_size=64)
