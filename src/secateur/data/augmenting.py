"""Random crops, flips and small rotations of a whole batch at once, by tensor indexing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.errors import InputError


@dataclass(frozen=True)
class Augmentation:
    """What may happen to an image at random without its label becoming false."""

    crop: int = 4  # pixels by which it may move in each direction; 0 for none
    flip: bool = True  # left to right, every other image
    rotate: float = 0.0  # degrees by which it may turn in each direction
    padding: Literal["reflect", "zero"] = "reflect"  # what comes in from outside

    def __post_init__(self) -> None:
        if self.crop < 0 or self.rotate < 0:
            raise InputError(f"crop (pixels) and rotate (degrees) are at least 0; got {self.crop}, {self.rotate}.")
        if self.padding not in ("reflect", "zero"):
            raise InputError(f"padding is 'reflect' or 'zero', got {self.padding!r}.")


NOTHING = Augmentation(crop=0, flip=False)


def augment(images: Tensor, generator: torch.Generator, augmentation: Augmentation | None = None) -> Tensor:
    """A randomly changed copy of `images` (N, C, H, W): same shape, type and device, channels last in memory.

    What happens to image i follows from `generator` alone (on the CPU, whatever the device of the images).
    """
    how = Augmentation() if augmentation is None else augmentation
    count, _, height, width = images.shape
    if how.rotate:
        images = _rotated(images, how, generator)
    rows, columns = torch.arange(height).expand(count, -1), torch.arange(width).expand(count, -1)
    if how.flip:
        flipped = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
    if how.crop:
        moves = torch.randint(2 * how.crop + 1, (2, count, 1), generator=generator)
        if how.padding == "zero":
            images = F.pad(images, (how.crop,) * 4)
            rows, columns = rows + moves[0], columns + moves[1]
        else:
            rows = _reflected(rows + moves[0] - how.crop, height, how.crop)
            columns = _reflected(columns + moves[1] - how.crop, width, how.crop)
    rows, columns = rows.to(images.device), columns.to(images.device)
    samples = torch.arange(count, device=images.device)
    picked = images.movedim(1, 3)[samples[:, None, None], rows[:, :, None], columns[:, None, :]]  # (N, H, W, C)
    return picked.movedim(3, 1)


def _reflected(positions: Tensor, length: int, reach: int) -> Tensor:
    # Mirrored at the centre of the outermost pixels: -1 -> 1, length -> length - 2.
    if reach >= length:
        raise InputError(f"cannot reflect {reach} pixels into an image {length} pixels wide: lower crop.")
    inside = positions.abs()
    return length - 1 - (length - 1 - inside).abs()


def _rotated(images: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    # grid_sample works on floats; bytes come back rounded.
    angles = (torch.rand(len(images), generator=generator) * 2 - 1) * math.radians(how.rotate)
    cosine, sine = angles.cos(), angles.sin()
    height, width = images.shape[2:]
    aspect = width / height  # coordinates run over [-1, 1] in both directions, so that a turn must undo their scales
    matrix = torch.stack([cosine, -sine / aspect, 0 * sine, sine * aspect, cosine, 0 * sine], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix.to(images.device), list(images.shape), align_corners=False)
    mode = "reflection" if how.padding == "reflect" else "zeros"
    turned = F.grid_sample(images.float(), grid, padding_mode=mode, align_corners=False)
    return turned if images.dtype.is_floating_point else turned.round().to(images.dtype)
