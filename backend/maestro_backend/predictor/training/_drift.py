"""Whether a model still predicts as it did when it was installed. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from math import log2, sqrt
from statistics import fmean, median, variance

ENOUGH = 200
"""Calls before anything is said, and in the window that is compared (ours)."""

_WINDOW = 400
_EVERY = 20
"""Calls that are remembered, and between two looks (ours)."""

_NOMINAL = 0.9
_LOW, _HIGH = 0.80, 0.97
_LOWER, _HIGHER = 0.10, 0.03
"""The p90 is to cover 90% of the calls. Alarm outside 80% to 97%; where it did not keep to that
when it was installed, at so much beyond what it did then (ours)."""

_RATIO, _RISE = 1.5, 0.1
"""Alarm when the median of |log2(actual / predicted)| is so many times what it was, and more than
this above it (ours)."""

_SIGMAS = 3.0
"""A model is worse than the tables if its mean error is greater by so many standard errors: it is
looked at again and again, and chance alone must not unseat it (ours)."""


class Trouble(StrEnum):
    DRIFT = "drift"
    WORSE = "worse"


@dataclass(frozen=True, slots=True)
class Alarm:
    """`DRIFT`: train again; `WORSE`: the plain tables have become the better ones, roll back."""

    trouble: Trouble
    reason: str


@dataclass(frozen=True, slots=True)
class _Seen:
    """Errors on one call: |log2(actual / point)|, and in tokens: the model's, the tables'."""

    log_error: float
    error: float
    fallback_error: float


class Drift:
    """Watches the calls that one model version predicted. Tells each trouble once.

    `coverage` is the part of calls at or below the p90 when the model was judged.
    """

    def __init__(self, coverage: float = _NOMINAL) -> None:
        known = coverage if 0.0 <= coverage <= 1.0 else _NOMINAL
        self._low = min(_LOW, known - _LOWER)
        self._high = max(_HIGH, known + _HIGHER)
        self._coverage = _NOMINAL
        self._usual: float | None = None
        self._seen: deque[_Seen] = deque(maxlen=_WINDOW)
        self._count = 0
        self._told: set[Trouble] = set()

    @property
    def coverage(self) -> float:
        """Moving average of the part of calls at or below their p90."""
        return self._coverage

    def add(self, actual: float, point: float, p90: float, fallback: float) -> Alarm | None:
        """A call has ended. Output tokens of one choice: what it wrote, the model's best guess and
        90th percentile for it, and what the plain tables would have said."""
        self._count += 1
        # A tie says nothing: it is what max_tokens, and stages that always write the same, make.
        covered = _NOMINAL if round(p90) == round(actual) else float(actual < p90)
        self._coverage += (covered - self._coverage) / ENOUGH
        error, fallback_error = abs(actual - point), abs(actual - fallback)
        self._seen.append(_Seen(abs(_log(actual) - _log(point)), error, fallback_error))
        if self._count < ENOUGH or self._count % _EVERY:
            return None
        if self._usual is None:
            self._usual = self._median()
        return self._first(Trouble.WORSE, self._worse()) or self._first(
            Trouble.DRIFT, self._off() or self._grown()
        )

    def settle(self) -> None:
        """Training again found nothing better: what is seen now is the usual from here on."""
        if self._count >= ENOUGH:
            self._usual = self._median()
            self._low = min(_LOW, self._coverage - _LOWER)
            self._high = max(_HIGH, self._coverage + _HIGHER)
        self._told.discard(Trouble.DRIFT)

    def _first(self, trouble: Trouble, reason: str) -> Alarm | None:
        if not reason or trouble in self._told:
            return None
        self._told.add(trouble)
        return Alarm(trouble, reason)

    def _worse(self) -> str:
        excess = [seen.error - seen.fallback_error for seen in self._seen]
        mean = fmean(excess)
        if mean <= _SIGMAS * sqrt(variance(excess) / len(excess)):
            return ""
        model = fmean(seen.error for seen in self._seen)
        return (
            f"off by {model:.0f} tokens a call over the last {len(excess)} calls,"
            f" the plain tables by {model - mean:.0f}"
        )

    def _off(self) -> str:
        if self._low <= self._coverage <= self._high:
            return ""
        return f"the 90th percentile covers {self._coverage:.0%} of the calls"

    def _grown(self) -> str:
        assert self._usual is not None
        now = self._median()
        if now <= max(_RATIO * self._usual, self._usual + _RISE):
            return ""
        return f"the median error has grown from {self._usual:.2f} to {now:.2f} (log2 of tokens)"

    def _median(self) -> float:
        """Of the newest 200 calls."""
        newest = list(self._seen)[-ENOUGH:]
        return median(seen.log_error for seen in newest)


def _log(tokens: float) -> float:
    return log2(1.0 + max(0.0, tokens))
