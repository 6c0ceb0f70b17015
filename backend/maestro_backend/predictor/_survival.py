"""What a call will still produce, given that it has produced so much: a survival update."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from math import log, log2

from maestro_backend.scheduler import Length

_LEVELS = (0.5, 0.9, 0.95, 0.99)
_STEEPEST = 0.02
"""Octaves between two levels at least: equal quantiles would leave no tail (ours)."""


def refreshed(length: Length, generated: float) -> Length:
    """The quantiles of a call's length once `generated` tokens have come without an end.

    P(L > x | L > t) = S(x) / S(t), with S read off the quantiles: log S is linear in
    log2(1 + tokens) between them, and goes on as steeply past the last; the 10th percentile is as
    far below the median as the 90th is above (ours).
    """
    if generated <= 0:
        return length
    points, survival = _curve(length)
    before = _survival(points, survival, log2(1.0 + generated))
    found = [
        2.0 ** _inverse(points, survival, before + log(1.0 - level)) - 1.0 for level in _LEVELS
    ]
    p50, p90, p95, p99 = (max(tokens, generated + 1.0) for tokens in found)
    return Length(p50, p90, p95, p99)


def _curve(length: Length) -> tuple[list[float], list[float]]:
    """Points in log2(1 + tokens), and log survival there; both strictly monotone."""
    p95 = length.p90 if length.p95 is None else length.p95
    p99 = p95 if length.p99 is None else length.p99
    middle, upper = (log2(1.0 + max(0.0, tokens)) for tokens in (length.p50, length.p90))
    found = [max(0.0, 2.0 * middle - upper), middle, upper, log2(1.0 + p95), log2(1.0 + p99)]
    points = [0.0]
    for point in found:
        points.append(max(point, points[-1] + _STEEPEST))
    return points, [0.0, log(0.9), *(log(1.0 - level) for level in _LEVELS)]


def _survival(points: Sequence[float], survival: Sequence[float], at: float) -> float:
    """log S at a point; on the last line past the last point."""
    right = min(max(1, bisect_left(points, at)), len(points) - 1)
    slope = (survival[right] - survival[right - 1]) / (points[right] - points[right - 1])
    return survival[right] + slope * (at - points[right])


def _inverse(points: Sequence[float], survival: Sequence[float], wanted: float) -> float:
    """Where log S has fallen to `wanted`."""
    right = 1
    while right < len(points) - 1 and survival[right] > wanted:
        right += 1
    slope = (points[right] - points[right - 1]) / (survival[right] - survival[right - 1])
    return points[right] + slope * (wanted - survival[right])
