"""Means over seeds with their intervals, from Student's t."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, nan
from statistics import fmean, stdev

_T975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""The 97.5 % point of Student's t for 1 to 30 degrees of freedom (any table of it)."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over `n` seeds, and the 95 % interval; nan where there are too few for one."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2


def estimate(values: Sequence[float | None]) -> Estimate:
    """What is missing or infinite counts for nothing."""
    found = [value for value in values if value is not None and isfinite(value)]
    if not found:
        return Estimate(nan, nan, nan, 0)
    mean = fmean(found)
    if len(found) == 1:
        return Estimate(mean, nan, nan, 1)
    half = t975(len(found) - 1) * stdev(found) / len(found) ** 0.5
    return Estimate(mean, mean - half, mean + half, len(found))


def t975(freedom: int) -> float:
    """Beyond the table: its last value, a little too wide."""
    return _T975[min(freedom, len(_T975)) - 1]
