"""Schedules: progress in [0, 1] -> the fraction of the target that is due."""

from __future__ import annotations

from collections.abc import Callable

from secateur.errors import UnknownNameError

Schedule = Callable[[float], float]


def one_shot(progress: float) -> float:
    """Everything at the first step."""
    return 1.0 if progress > 0 else 0.0


def linear(progress: float) -> float:
    """Equal parts: cumulative levels such as 10/20/30/40 %."""
    return progress


def cubic(progress: float) -> float:
    """Much at first, little at the end: 1 - (1 - t)^3 (Zhu and Gupta 2017, arXiv 1710.01878, eq. 1)."""
    return 1.0 - (1.0 - progress) ** 3


SCHEDULES: dict[str, Schedule] = {"cubic": cubic, "linear": linear, "one_shot": one_shot}


def resolve(schedule: str | Schedule) -> Schedule:
    """The schedule of that name; a callable is its own."""
    if not isinstance(schedule, str):
        return schedule
    if schedule not in SCHEDULES:
        raise UnknownNameError("schedule", schedule, SCHEDULES)
    return SCHEDULES[schedule]
