"""What a trained model gets wrong about one stage of one app, learned call by call."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from statistics import median

from ._recent import Recent

_WINDOW = 64
"""Residuals kept of a stage (ours)."""
_SHRINK = 8.0
"""So many calls without error are mixed in (ours)."""
_FEW = 5
"""Before so many calls there is no correction (ours)."""
_SLOW = 0.05
"""Weight of the newest error in the running errors (ours)."""
_GAIN = 0.9
"""A correction is used once it has brought the running error below this share (ours)."""
_MAX_STAGES = 10_000


@dataclass(slots=True)
class _Stage:
    residuals: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    shift: float = 0.0
    plain: float = 0.0
    shifted: float = 0.0


class Corrections:
    """A shift in octaves per stage: the median residual, shrunk, and only where it has helped."""

    def __init__(self) -> None:
        self._stages: Recent[Hashable, _Stage] = Recent(_MAX_STAGES)

    def of(self, stage: Hashable) -> float:
        """What to add to log2(1 + tokens) as the model predicts it."""
        known = self._stages.get(stage)
        if known is None or len(known.residuals) < _FEW:
            return 0.0
        if known.shifted >= _GAIN * known.plain:
            return 0.0
        return known.shift

    def learn(self, stage: Hashable, predicted: float, actual: float) -> None:
        """log2(1 + tokens) as the model predicted, uncorrected, and as it was."""
        known = self._stages.use(stage, _Stage)
        tokens = 2.0**actual
        weight = max(_SLOW, 1.0 / (1.0 + len(known.residuals)))
        known.plain += weight * (abs(2.0**predicted - tokens) - known.plain)
        known.shifted += weight * (abs(2.0 ** (predicted + known.shift) - tokens) - known.shifted)
        known.residuals.append(actual - predicted)
        count = len(known.residuals)
        known.shift = median(known.residuals) * count / (count + _SHRINK)
