"""The control that every comparison needs."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from secateur.coupling.groups import Group
from secateur.evidence import Evidence


def random(group: Group, evidence: Evidence) -> Tensor:
    """Uniform in [0, 1), drawn per group from the evidence's seed: the mandatory baseline.

    Source: Li 2022, arXiv 2205.05676.
    """
    # the generator takes 32 bits of seed, so the seed and the name are hashed together
    generator = torch.Generator().manual_seed(zlib.crc32(f"{evidence.seed}:{group.name}".encode()))
    return torch.rand(group.channels, generator=generator)
