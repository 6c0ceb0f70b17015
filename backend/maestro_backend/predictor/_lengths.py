"""Output length from what the same stage, else the same role, produced before."""

from __future__ import annotations

from collections import deque
from statistics import quantiles

from maestro_backend.scheduler import Length

from ._recent import Recent

CLASS_DEFAULT = Length(256, 512)
"""Before anything is known (ours)."""

_WINDOW = 64
_MAX_KEYS = 10_000
"""Stages and roles remembered, those that ended a call last (ours)."""


class RoleMedians:
    """Medians over the last 64 calls of a (workflow, stage), else of a role, else the default."""

    def __init__(self) -> None:
        self._seen: Recent[tuple[str, ...], deque[float]] = Recent(_MAX_KEYS)

    def predict(self, workflow: str, stage: str, role: str, max_tokens: int | None) -> Length:
        """Tokens, never above `max_tokens`."""
        for key in _keys(workflow, stage, role):
            if seen := self._seen.get(key):
                return _clip(_summary(seen), max_tokens)
        return _clip(CLASS_DEFAULT, max_tokens)

    def learn(self, workflow: str, stage: str, role: str, output_tokens: float) -> None:
        for key in _keys(workflow, stage, role):
            self._seen.use(key, lambda: deque(maxlen=_WINDOW)).append(output_tokens)


def _keys(workflow: str, stage: str, role: str) -> list[tuple[str, ...]]:
    keys: list[tuple[str, ...]] = []
    if stage:
        keys.append((workflow, stage))
    if role:
        keys.append((role,))
    return keys


def _summary(seen: deque[float]) -> Length:
    if len(seen) == 1:
        return Length(seen[0], seen[0] * 1.5)
    cuts = quantiles(seen, n=10, method="inclusive")
    return Length(cuts[4], max(cuts[8], cuts[4]))


def _clip(length: Length, max_tokens: int | None) -> Length:
    if max_tokens is None:
        return length
    return Length(min(length.p50, max_tokens), min(length.p90, max_tokens))
