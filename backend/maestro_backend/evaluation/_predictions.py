"""What a trained model says of each call of recorded runs before it runs, beside what came.

Frozen, the model stays as it was trained. Online it learns from each run at the run's end, before
the next one is predicted (prequential). Never does a later call or run change what was said.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from math import nan

import numpy as np
import numpy.typing as npt

from maestro_backend.predictor import Estimate, Estimator, Example, RunExamples, app_of
from maestro_backend.predictor._features import FEATURES
from maestro_backend.predictor._replay import remaining
from maestro_backend.scheduler import Rest
from maestro_backend.workflows import RestMix

from ._forecast_state import copied
from ._futures import Forecaster, Foreseen
from ._model_folder import Trained

RESERVABLE = 4096
"""Output tokens that a call without a bound may take: what is reserved without a prediction."""

_KNOWN = 3
"""A median over fewer values is no baseline (ours)."""

_BASE, _MODEL, _MODEL_N = (FEATURES.index(name) for name in ("base", "model_median", "model_n"))

_OTHER = ("baselines", "foreseen")
"""Fields that are no arrays."""

Vector = npt.NDArray[np.float64]
Names = npt.NDArray[np.str_]


@dataclass(frozen=True, slots=True)
class Predicted:
    """Calls, each with what was said of it. All are output tokens of one choice, (calls,) each.

    `point` is the predicted median; `p50` to `p99` the calibrated quantiles. `rest` is T_rem: the
    longest way from the call, itself included, to the end of its run; `rest_p50` and `rest_p90` are
    said of it (`RestMix`), `paper_rest` is the paper's conditional median (nan where nothing was
    learned). `baselines` are point predictions.
    """

    sources: Names
    runs: Names
    roles: Names
    index: npt.NDArray[np.int64]
    actual: Vector
    p50: Vector
    p90: Vector
    p95: Vector
    p99: Vector
    rest: Vector
    rest_p50: Vector
    rest_p90: Vector
    paper_rest: Vector
    baselines: Mapping[str, Vector]
    foreseen: tuple[Foreseen, ...]

    @property
    def point(self) -> Vector:
        return self.p50

    def __len__(self) -> int:
        return len(self.actual)

    def part(self, mask: npt.NDArray[np.bool_]) -> Predicted:
        """Those calls only; `foreseen` is left out."""
        found = {
            one.name: getattr(self, one.name)[mask]
            for one in fields(self)
            if one.name not in _OTHER
        }
        baselines = {name: values[mask] for name, values in self.baselines.items()}
        return Predicted(**found, baselines=baselines, foreseen=())

    def by_source(self) -> dict[str, Predicted]:
        return {str(name): self.part(self.sources == name) for name in np.unique(self.sources)}


def predict(
    trained: Trained,
    runs: Sequence[RunExamples],
    *,
    online: bool = False,
    estimator: Estimator | None = None,
) -> Predicted:
    """Every call of the runs. Neither the model nor what its forecaster knows is changed.

    Online, the runs of all sources take turns, each source at an even pace and in its own order.
    `estimator` stands for a new one of the model; online, it learns.
    """
    estimator = estimator or Estimator(trained.model)
    forecaster = trained.forecaster
    if online:
        forecaster = copied(forecaster) if forecaster else Forecaster()
    collector = _Collector()
    mix = RestMix()
    for run in interleaved(runs) if online else runs:
        usual = estimator.tables.read(("all",)).median
        if online:
            estimates = estimator.follow(run)
        else:
            estimates = [estimate for _, estimate in estimator.replayed(run)]
        foreseen = [] if forecaster is None else _foreseen(forecaster, run, estimates)
        said = _said(estimates, foreseen)
        app = app_of(run.workflow)
        rest = [mix.of(app, *both) for both in said]
        collector.add(run, estimates, foreseen, rest, usual)
        if online and forecaster is not None:
            forecaster.learn(run)
            mix.learn(app, said, remaining(run))
    return collector.predicted(trained)


def interleaved(runs: Iterable[RunExamples]) -> list[RunExamples]:
    """The i-th of a source's n runs comes at (i + 1/2) / n of the way."""
    by_source: dict[str, list[RunExamples]] = defaultdict(list)
    for run in runs:
        by_source[run.source].append(run)
    placed = [
        ((at + 0.5) / len(found), order, run)
        for order, found in enumerate(by_source.values())
        for at, run in enumerate(found)
    ]
    return [run for *_, run in sorted(placed, key=lambda item: item[:2])]


def joined(first: Predicted, second: Predicted) -> Predicted:
    """The calls of both."""
    arrays = {
        one.name: np.concatenate([getattr(first, one.name), getattr(second, one.name)])
        for one in fields(Predicted)
        if one.name not in _OTHER
    }
    baselines = {
        name: np.concatenate([values, second.baselines[name]])
        for name, values in first.baselines.items()
    }
    foreseen = (*first.foreseen, *second.foreseen)
    return Predicted(**arrays, baselines=baselines, foreseen=foreseen)


def _foreseen(
    forecaster: Forecaster, run: RunExamples, estimates: Sequence[Estimate]
) -> list[Foreseen]:
    current = {
        (call.run, call.index): estimate.p50
        for call, estimate in zip(run.calls, estimates, strict=True)
    }
    return [*forecaster.judge(run, current)]


def _said(estimates: Sequence[Estimate], foreseen: Sequence[Foreseen]) -> list[tuple[Rest, Rest]]:
    """Of the rest of the run, by the trees and by the journeys; by the trees alone, if need be."""
    trees = [Rest(one.rest_p50, one.rest_p90) for one in estimates]
    journeys = [Rest(one.p50, one.p90) for one in foreseen] or trees
    return [*zip(trees, journeys, strict=True)]


class _Collector:
    def __init__(self) -> None:
        self.calls: list[Example] = []
        self.estimates: list[Estimate] = []
        self.rest: list[Rest] = []
        self.actual_rest: list[float] = []
        self.usual: list[float] = []
        self.foreseen: list[Foreseen] = []

    def add(
        self,
        run: RunExamples,
        estimates: Sequence[Estimate],
        foreseen: Sequence[Foreseen],
        rest: Sequence[Rest],
        usual: float,
    ) -> None:
        self.calls += run.calls
        self.estimates += estimates
        self.foreseen += foreseen
        self.rest += rest
        self.actual_rest += remaining(run)
        self.usual += [usual] * len(run.calls)

    def predicted(self, trained: Trained) -> Predicted:
        found = self.estimates
        rows = np.array([one.row for one in found], np.float32).reshape(-1, len(FEATURES))
        baselines = _medians(rows, np.array(self.usual))
        if trained.baselines is not None and len(rows):
            baselines |= trained.baselines.predict(rows)
        unknown = [nan] * len(found)
        return Predicted(
            sources=np.array([call.source for call in self.calls], np.str_),
            runs=np.array([call.run for call in self.calls], np.str_),
            roles=np.array([call.shape.role for call in self.calls], np.str_),
            index=np.array([call.index for call in self.calls], np.int64),
            actual=np.array([call.length for call in self.calls]),
            p50=np.array([one.p50 for one in found]),
            p90=np.array([one.p90 for one in found]),
            p95=np.array([one.p95 for one in found]),
            p99=np.array([one.p99 for one in found]),
            rest=np.array(self.actual_rest),
            rest_p50=np.array([one.p50 for one in self.rest]),
            rest_p90=np.array([one.p90 for one in self.rest]),
            paper_rest=np.array([one.paper for one in self.foreseen] or unknown),
            baselines=baselines,
            foreseen=tuple(self.foreseen),
        )


def _medians(rows: npt.NDArray[np.float32], usual: Vector) -> dict[str, Vector]:
    """Baselines that the tables give: medians, by role and model, by role, of everything."""
    base = rows[:, _BASE].astype(np.float64)
    known = rows[:, _MODEL_N] >= np.log2(1.0 + _KNOWN)
    by_model = np.where(known, base + np.nan_to_num(rows[:, _MODEL]), base)
    return {
        "global_median": 2.0**usual - 1.0,
        "role_median": 2.0**base - 1.0,
        "role_model_median": 2.0**by_model - 1.0,
        "max_tokens": np.full(len(rows), float(RESERVABLE)),
    }
