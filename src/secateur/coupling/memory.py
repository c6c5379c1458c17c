"""Whether two views of one memory share an element."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def overlaps(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors over the same storage share an element; True where that is not plain to see.

    Views that step alike differ by an offset alone. They meet iff the offset is a sum of steps, fewer along every
    dimension than the view is long.
    """
    if left.numel() == 0 or right.numel() == 0:
        return False
    if left.dtype != right.dtype:  # their offsets count different units
        return True
    first, second = sorted((left, right), key=Tensor.storage_offset)
    distance = int(second.storage_offset() - first.storage_offset())
    if distance > _reach(first.shape, first.stride()):
        return False
    if left.stride() != right.stride():
        return True
    lengths = zip(first.stride(), first.shape, second.shape, strict=True)
    steps = sorted(((step, behind - 1, ahead - 1) for step, behind, ahead in lengths), reverse=True)
    return _is_sum_of_steps(distance, steps)


def _reach(shape: Sequence[int], strides: Sequence[int]) -> int:
    """How far the last element lies behind the first."""
    return sum((size - 1) * step for size, step in zip(shape, strides, strict=True))


def _is_sum_of_steps(distance: int, steps: Sequence[tuple[int, int, int]]) -> bool:
    """Whether `distance` = sum of n * step with -back <= n <= on; `steps` are (step, on, back), the longest first."""
    if not steps:
        return distance == 0
    (step, on, back), inner = steps[0], steps[1:]
    if step == 0:
        return _is_sum_of_steps(distance, inner)
    reach_on, reach_back = (sum(size * entry[way] for size, *entry in inner) for way in (0, 1))
    lowest = max(-back, -((reach_on - distance) // step))
    highest = min(on, (distance + reach_back) // step)
    return any(_is_sum_of_steps(distance - n * step, inner) for n in range(lowest, highest + 1))
