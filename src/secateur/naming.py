"""Models by name: `package.module:callable`, `timm:NAME`, `torchvision:NAME`, or one of our own networks."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from torch import Tensor, nn


def named_model(name: str, seed: int = 0) -> nn.Module:
    """Build the model of that name, its fresh weights drawn with `seed`.

    `package.module:callable` is imported (also from the current folder) and called without arguments; it may also name
    a module instance. `timm:NAME` and `torchvision:NAME` need those packages. A bare name is one of our own networks.

    Raises InputError for a name of no such form, a package that is missing, or a callable that returns no module;
    UnknownNameError, which suggests the nearest, for an unknown name. Errors of the user's own code come through.
    """
    import torch

    source, _, rest = name.partition(":")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if not rest:
            return _own(name)
        if source in COLLECTIONS:
            return COLLECTIONS[source](rest)
        return _users(source, rest)


def example_inputs(shapes: Iterable[str], seed: int = 0) -> tuple[Tensor, ...]:
    """One float tensor of standard normal values for each shape such as `1,3,32,32`. Raises InputError."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(_sizes(shape), generator=generator) for shape in shapes)


def _own(name: str) -> nn.Module:
    from secateur.nets import NETS, build

    if name not in NETS and "." in name:
        raise InputError(f"{name!r} names no callable: write package.module:callable, for example {name}:build.")
    return build(name)


def _timm(name: str) -> nn.Module:
    timm = _package("timm")
    if name not in (known := timm.list_models()):
        raise UnknownNameError("timm model", name, _near(name, known))
    return _module(timm.create_model(name), f"timm:{name}")


def _torchvision(name: str) -> nn.Module:
    models = _package("torchvision.models")
    if name not in (known := models.list_models()):
        raise UnknownNameError("torchvision model", name, _near(name, known))
    return _module(models.get_model(name, weights=None), f"torchvision:{name}")


COLLECTIONS: dict[str, Callable[[str], nn.Module]] = {"timm": _timm, "torchvision": _torchvision}


def _users(path: str, attribute: str) -> nn.Module:
    here = str(Path.cwd())
    if here not in sys.path:  # as `python -m` does, so that a script beside the user is found
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise  # an import inside the user's module failed
        raise InputError(
            f"no module named {error.name!r} to take {attribute!r} from: expected package.module:callable, with the "
            "module installed or in the current folder."
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UnknownNameError(f"attribute of {path}", part, [n for n in vars(found) if not n.startswith("_")])
        found = getattr(found, part)
    return _module(found, f"{path}:{attribute}")


def _module(found: Any, name: str) -> nn.Module:
    from torch import nn

    built = found if isinstance(found, nn.Module) or not callable(found) else found()
    if not isinstance(built, nn.Module):
        raise InputError(f"{name} gives {type(built).__name__}, not a torch.nn.Module.")
    return built


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise InputError(f"{package}: models need the package {package} ({error}): pip install {package}.") from error


def _near(name: str, known: Iterable[str]) -> list[str]:
    names = list(known)  # these lists are long: only the nearest are worth printing
    return difflib.get_close_matches(name, names, n=5, cutoff=0.3) or names[:5]


def _sizes(shape: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in shape.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise InputError(
            f"an input shape is whole numbers above 0, joined by commas, such as 1,3,32,32; got {shape!r}."
        )
    return sizes
