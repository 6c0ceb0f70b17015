"""Split-conformal offsets: what is added to a predicted quantile so that it covers what it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ._recent import Recent

_STEP = 0.25
"""How far one call moves an app's offset at first, in octaves (ours)."""
_SHRINK = 10.0
"""An app whose calls exceed a level so often on average weighs as much as all others (ours)."""
_SETTLE = 20.0
"""After so many calls the steps have halved (ours)."""
_LEAST = 0.08
"""No step falls below this share of the first: habits may change (ours)."""
_MAX_APPS = 10_000


class Offsets:
    """In log2 of tokens, one per level; for all apps, and for each app that was seen.

    Online, each call moves its app's offsets up if it was longer than predicted, else down a
    little, so that in the long run the share of longer ones is right whatever happens (quantile
    tracking: Angelopoulos, Candes, Tibshirani, Conformal PID control, 2023; the steps are ours).
    """

    def __init__(self, targets: Sequence[float], everywhere: Sequence[float]) -> None:
        self.targets = np.array(targets, np.float64)
        self.everywhere = np.array(everywhere, np.float64)
        self._apps: Recent[str, tuple[npt.NDArray[np.float64], int]] = Recent(_MAX_APPS)

    def of(self, app: str) -> npt.NDArray[np.float64]:
        """(levels,) what to add for a call of `app`."""
        known = self._apps.get(app)
        return self.everywhere if known is None else known[0]

    def learn(self, app: str, scores: npt.NDArray[np.float64]) -> None:
        """`scores`: (levels,) log2 of actual over predicted, before any offset."""
        offsets, calls = self._apps.get(app, (self.everywhere, 0))
        missed = scores > offsets
        steps = _STEP * max(_LEAST, 1.0 / (1.0 + calls / _SETTLE))
        moved = offsets + steps * (missed - (1.0 - self.targets))
        self._apps[app] = np.where(np.isfinite(scores), moved, offsets), calls + 1

    @classmethod
    def fit(
        cls,
        targets: Sequence[float],
        scores: npt.NDArray[np.float64],
        apps: npt.NDArray[np.str_],
    ) -> Offsets:
        """`scores`: (calls, levels) log2 of actual over predicted on calls not trained on."""
        levels = list(enumerate(targets))
        offsets = cls(targets, [_quantile(scores[:, at], to) for at, to in levels])
        for app in np.unique(apps):
            mine = scores[apps == app]
            own = np.array([_quantile(mine[:, at], to) for at, to in levels])
            weight = len(mine) / (len(mine) + _SHRINK / (1.0 - offsets.targets))
            mixed = offsets.everywhere + weight * (own - offsets.everywhere)
            offsets._apps[str(app)] = mixed, len(mine)
        return offsets

    def state(self) -> dict[str, Any]:
        """As JSON can hold it."""
        apps = {app: [offsets.tolist(), calls] for app, (offsets, calls) in self._apps.items()}
        return {
            "targets": self.targets.tolist(),
            "everywhere": self.everywhere.tolist(),
            "apps": apps,
        }

    @classmethod
    def restore(cls, state: Mapping[str, Any]) -> Offsets:
        offsets = cls(state["targets"], state["everywhere"])
        for app, (values, calls) in state["apps"].items():
            offsets._apps[app] = np.array(values, np.float64), int(calls)
        return offsets


def _quantile(values: npt.NDArray[np.float64], level: float) -> float:
    """The conformal quantile: of n values the ceil((n + 1) * level)-th."""
    if not len(values):
        return 0.0
    rank = min(len(values), int(np.ceil((len(values) + 1) * level)))
    return float(np.sort(values)[rank - 1])
