"""A model and what has been learned since it was trained: rows in, calibrated quantiles out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ._call import CallShape, RunExamples
from ._corrections import Corrections
from ._features import features
from ._history import History
from ._matrix import Matrix, Vector, follow_run
from ._model import Model
from ._offsets import Offsets
from ._replay import replay_run
from ._tables import Keys


@dataclass(frozen=True, slots=True)
class Estimate:
    """Output tokens of one choice of a call, and of its run from it on (critical path).

    `row` and `raw` are what went into the model and what came out, to explain and to learn from.
    """

    p50: float
    p90: float
    p95: float
    p99: float
    rest_p50: float
    rest_p90: float
    row: Matrix
    raw: Vector


class Estimator:
    """Predicts rows, and learns from calls that have ended: online correction and calibration."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.tables = model.tables.copy()
        self.offsets = Offsets.restore(model.offsets.state())
        self.rest_offsets = model.rest_offsets
        self.corrections = Corrections()

    def row(self, shape: CallShape, keys: Keys, history: History) -> list[float]:
        return [*features(shape, keys, history, self.tables).values()]

    def estimates(self, x: Matrix, keys: Sequence[Keys]) -> list[Estimate]:
        """One per row. (rows, features) float32."""
        return [
            self._calibrated(row, raw, key)
            for row, raw, key in zip(x, self.model.raw(x), keys, strict=True)
        ]

    def _calibrated(self, row: Matrix, raw: Vector, keys: Keys) -> Estimate:
        app = str(keys.app[1])
        bounds = raw[:4] + self.corrections.of(keys.stage)
        bounds[1:] += self.offsets.of(app)
        rest = raw[4:].copy()
        rest[1:] += self.rest_offsets.of(app)
        p50, p90, p95, p99 = _tokens(bounds)
        rest_p50, rest_p90 = _tokens(np.maximum(rest, bounds[0]))
        return Estimate(p50, p90, p95, p99, rest_p50, rest_p90, row, raw)

    def replayed(self, run: RunExamples) -> list[tuple[Keys, Estimate]]:
        """What is estimated of each call of a recorded run, knowing of it only each call's past."""
        seen = [
            (one.keys, self.row(one.call.shape, one.keys, one.history))
            for one in replay_run(run, self.tables)
        ]
        keys = [key for key, _ in seen]
        x = np.array([row for _, row in seen], np.float32)
        return list(zip(keys, self.estimates(x, keys), strict=True))

    def learn_call(self, keys: Keys, estimate: Estimate, tokens: float) -> None:
        """A call has ended: at once, for the calls of other runs too."""
        actual = float(np.log2(1.0 + tokens))
        shifted = estimate.raw[1:4] + self.corrections.of(keys.stage)
        self.offsets.learn(str(keys.app[1]), actual - shifted)
        self.corrections.learn(keys.stage, float(estimate.raw[0]), actual)

    def learn_run(self, run: RunExamples) -> None:
        """A run has ended: the tables remember its calls, and forget old ones by and by."""
        follow_run(run, self.tables)

    def follow(self, run: RunExamples) -> list[Estimate]:
        """Estimate a recorded run, then learn from it."""
        found = self.replayed(run)
        for (keys, estimate), call in zip(found, run.calls, strict=True):
            self.learn_call(keys, estimate, call.length)
        self.learn_run(run)
        return [estimate for _, estimate in found]


def _tokens(logs: Vector) -> list[float]:
    """Tokens, in order: no quantile is below the one before."""
    return [float(value) for value in 2.0 ** np.maximum.accumulate(logs) - 1.0]
