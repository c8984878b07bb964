"""Factors of the learning rate by step."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping


def check_schedule(schedule: Mapping[int, float]) -> None:
    """Raise ValueError unless it is {step: factor}, both of at least 0, and not empty."""
    if not isinstance(schedule, Mapping) or not schedule:
        raise ValueError(f"lr_schedule must be a dictionary {{step: factor}}, not {schedule!r}")
    for step, factor in schedule.items():
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ValueError(f"lr_schedule's steps must be whole numbers from 0, not {step!r}")
        if not isinstance(factor, numbers.Real) or not 0 <= float(factor) < math.inf:
            raise ValueError(f"lr_schedule's factors must be finite and at least 0, not {factor!r}")


def piecewise_linear(step: int, schedule: Mapping[int, float]) -> float:
    """The factor at ``step``, linear between the schedule's (step, factor) and constant after the
    last; without an entry for step 0 it begins at 0 there (bojone/tiger)."""
    points = sorted(schedule.items())
    if points[0][0] != 0:
        points = [(0, 0.0), *points]
    before, factor = points[0]
    for at, value in points[1:]:
        if step < at:
            return factor + (value - factor) * (step - before) / (at - before)
        before, factor = at, value
    return float(factor)
