"""The networks of the studies: plain modules, each made by a function of its number of classes."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from secateur.errors import InputError, UnknownNameError
from secateur.nets.plain import alexnet, conv4, vgg11, vgg13, vgg16, vgg19
from secateur.nets.resnets import resnet18, resnet20, resnet34, resnet50, resnet56, resnet101
from secateur.nets.small import digits_net

NETS: Mapping[str, Callable[..., nn.Module]] = {
    "alexnet": alexnet,
    "conv4": conv4,
    "digits_net": digits_net,
    "resnet101": resnet101,
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet56": resnet56,
    "vgg11": vgg11,
    "vgg13": vgg13,
    "vgg16": vgg16,
    "vgg19": vgg19,
}


def build(name: str, **options: Any) -> nn.Module:
    """The network of that name, its fresh weights drawn from torch's global generator.

    Args:
        name: one of `NETS`.
        options: of that network's function; every one takes `num_classes`.

    Raises:
        UnknownNameError: there is no network of that name.
        InputError: it has no such option.
    """
    if name not in NETS:
        raise UnknownNameError("network", name, NETS)
    try:
        inspect.signature(NETS[name]).bind(**options)
    except TypeError as error:
        raise InputError(f"{name}: {error}. It takes {inspect.signature(NETS[name])}.") from error
    return NETS[name](**options)


__all__ = [
    "NETS",
    "alexnet",
    "build",
    "conv4",
    "digits_net",
    "resnet18",
    "resnet20",
    "resnet34",
    "resnet50",
    "resnet56",
    "resnet101",
    "vgg11",
    "vgg13",
    "vgg16",
    "vgg19",
]
