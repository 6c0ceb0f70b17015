"""A histogram of token counts on a log scale: small, and what was added can be undone."""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

import numpy as np
import numpy.typing as npt

PER_OCTAVE = 8
BINS = 20 * PER_OCTAVE
"""From 0 to 2^20 tokens; neighbours differ by 9%, half of which is the error (ours)."""

_FORGET = 1.0 / 4096
"""Share of what was known that each new value takes the place of, once there are 4,096 (ours)."""


@dataclass(frozen=True, slots=True)
class Summary:
    """`count` values (fewer after forgetting); quantiles in log2(1 + tokens)."""

    count: float
    low: float
    median: float
    high: float


_EMPTY = Summary(0.0, 0.0, 0.0, 0.0)
_QUANTILES = np.array([0.1, 0.5, 0.9])


class Sketch:
    """Counts per bin. Its summary's `low` and `high` are the 10th and 90th percentile."""

    __slots__ = ("_known", "counts")

    def __init__(self, counts: npt.NDArray[np.float32] | None = None) -> None:
        self.counts = np.zeros(BINS, np.float32) if counts is None else counts
        self._known: Summary | None = None

    def add(self, tokens: float, weight: float = 1.0) -> None:
        self.counts[_bin(tokens)] += weight
        self._known = None

    def follow(self, tokens: float) -> None:
        """Add, and forget: so that a change of habit shows within some thousand calls."""
        if float(self.counts.sum()) >= 1 / _FORGET:
            self.counts *= 1 - _FORGET
        self.add(tokens)

    def summary(self) -> Summary:
        if self._known is None:
            low, median, high = self.quantiles(_QUANTILES)
            total = float(self.counts.sum())
            self._known = Summary(total, low, median, high) if total > 0.5 else _EMPTY
        return self._known

    def quantiles(self, levels: npt.NDArray[np.float64]) -> tuple[float, ...]:
        """In log2(1 + tokens), spread evenly inside a bin; zeros while it is empty."""
        sums = np.cumsum(self.counts)
        if sums[-1] <= 0:
            return (0.0,) * len(levels)
        wanted = levels * sums[-1]
        at = np.minimum(np.searchsorted(sums, wanted), BINS - 1)
        inside = np.maximum(self.counts[at], 1e-9)
        found = (at + 1 - np.clip((sums[at] - wanted) / inside, 0.0, 1.0)) / PER_OCTAVE
        return tuple(found.tolist())


def _bin(tokens: float) -> int:
    return min(BINS - 1, int(log2(1.0 + max(0.0, tokens)) * PER_OCTAVE))
