"""Running medians of small amounts by key, the most exact key that knows enough first."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from statistics import median
from typing import Any

from maestro_backend.predictor import Recent

from ._plain import keys_from_plain, plain_key

_WINDOW = 32
"""The last so many values of a key count (ours)."""
_MAX_KEYS = 10_000
_ENOUGH = 2
"""So many values make a key known (ours)."""

Key = tuple[Hashable, ...]


class Medians:
    """Medians of the last 32 values by key: tool gaps in seconds, growth of prompts in tokens."""

    def __init__(self) -> None:
        self._values: Recent[Key, deque[float]] = Recent(_MAX_KEYS)
        self._known: dict[Key, float] = {}

    def learn(self, keys: Iterable[Key], value: float) -> None:
        """One value, under all of these keys."""
        for key in keys:
            self._values.use(key, _window).append(value)
            self._known.pop(key, None)

    def median(self, keys: Iterable[Key], default: float = 0.0) -> float:
        """Under the first of the keys that has two values or more."""
        for key in keys:
            values = self._values.get(key)
            if values is not None and len(values) >= _ENOUGH:
                if len(self._known) > _MAX_KEYS:
                    self._known.clear()
                if key not in self._known:
                    self._known[key] = median(values)
                return self._known[key]
        return default

    def state(self) -> list[list[Any]]:
        """As plain JSON."""
        return [[plain_key(k), [round(v, 4) for v in vs]] for k, vs in self._values.items()]

    def restore(self, state: list[list[Any]]) -> None:
        """What `state` gave, in the place of what is known."""
        self._values.clear()
        self._known.clear()
        for key, values in keys_from_plain(state):
            self._values[key] = deque(values, maxlen=_WINDOW)


def _window() -> deque[float]:
    return deque(maxlen=_WINDOW)
