"""How long one prediction takes: features, model and calibration of a single call, one thread."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import chain, islice

import numpy as np

from maestro_backend.predictor import Estimator, Model, RunExamples
from maestro_backend.predictor._replay import Seen, replay_run

CALLS = 300
WARM_UP = 30
"""Calls that are measured, and that come before them (ours)."""


def prediction_ms(
    model: Model, runs: Sequence[RunExamples], calls: int = CALLS
) -> dict[str, float]:
    """Median and 99th percentile in milliseconds, over calls spread over all runs; nan without."""
    estimator = Estimator(model)
    total = sum(len(run.calls) for run in runs)
    every = max(1, total // calls)
    for seen in islice(_seen(estimator, runs), WARM_UP):
        _once(estimator, seen)
    spread = islice(_seen(estimator, runs), 0, None, every)
    times = [_once(estimator, seen) for seen in islice(spread, calls)]
    if not times:
        return {"p50": np.nan, "p99": np.nan}
    p50, p99 = np.percentile(times, (50, 99)).tolist()
    return {"p50": p50, "p99": p99}


def _seen(estimator: Estimator, runs: Sequence[RunExamples]) -> Iterator[Seen]:
    return chain.from_iterable(replay_run(run, estimator.tables) for run in runs)


def _once(estimator: Estimator, seen: Seen) -> float:
    started = time.perf_counter()
    row = estimator.row(seen.call.shape, seen.keys, seen.history)
    estimator.estimates(np.array([row], np.float32), [seen.keys])
    return (time.perf_counter() - started) * 1000.0
