"""What is left of a run, said twice: by the trees and by the journeys of past runs. One out of two.

Trees know apps that they were trained on better; journeys learn a new app within a few runs. Which
of them to trust is learned per app (docs/prediction.md has the comparison).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2

from maestro_backend.predictor import Recent
from maestro_backend.scheduler import Rest

_POWER = 4.0
"""How fast trust goes to the better one: weights are errors to the minus fourth (ours)."""
_PRIOR = 10.0
"""Calls that an app's errors are mixed with (ours)."""
_TREES, _JOURNEYS = 1.0, 1.5
"""Errors in octaves that are thought of an app at first: the trees weigh 0.84 (ours)."""
_MEMORY = 200
"""Calls that the running errors go back (ours)."""
_MAX_APPS = 10_000


@dataclass(slots=True)
class _Errors:
    trees: float = 0.0
    journeys: float = 0.0
    calls: int = 0

    def weight(self) -> float:
        """Of the trees; the journeys have the rest."""
        trees = (self.trees * self.calls + _TREES * _PRIOR) / (self.calls + _PRIOR)
        journeys = (self.journeys * self.calls + _JOURNEYS * _PRIOR) / (self.calls + _PRIOR)
        # The prior keeps both above 0.
        return float(1.0 / (1.0 + (trees / journeys) ** _POWER))

    def add(self, trees: float, journeys: float) -> None:
        self.calls = min(_MEMORY, self.calls + 1)
        self.trees += (trees - self.trees) / self.calls
        self.journeys += (journeys - self.journeys) / self.calls


class RestMix:
    """The mean of both in log2(1 + tokens), weighed by how wrong each was on the app of late."""

    def __init__(self) -> None:
        self._errors: Recent[str, _Errors] = Recent(_MAX_APPS)

    def of(self, app: str, trees: Rest, journeys: Rest) -> Rest:
        """What to believe of a call that is about to run."""
        weight = self._errors.get(app, _Errors()).weight()
        p50 = _between(weight, trees.p50, journeys.p50)
        p90 = max(p50, _between(weight, trees.p90, journeys.p90))
        return Rest(p50, p90, journeys.calls)

    def learn(self, app: str, said: Sequence[tuple[Rest, Rest]], actual: Sequence[float]) -> None:
        """A run has ended: what trees and journeys had said of each call, and what came."""
        errors = self._errors.use(app, _Errors)
        for (trees, journeys), tokens in zip(said, actual, strict=True):
            came = log2(1.0 + tokens)
            errors.add(abs(log2(1.0 + trees.p50) - came), abs(log2(1.0 + journeys.p50) - came))


def _between(weight: float, first: float, second: float) -> float:
    return float(2.0 ** (weight * log2(1.0 + first) + (1.0 - weight) * log2(1.0 + second)) - 1.0)
