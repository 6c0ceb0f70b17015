"""How far figures would have come out otherwise, had other runs been recorded: the bootstrap."""

from __future__ import annotations

import numpy as np

from ._futures import FEW_CALLS
from ._predictions import RESERVABLE, Predicted, Vector

RESAMPLES = 1000
"""(ours)"""

RIVALS = ("role_median", "role_model_median", "no_agent_semantics", "two_phase")
"""Baselines that our gain is told over."""


def intervals(
    predicted: Predicted, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, dict[str, list[float]]]:
    """`macro` and `micro`: by figure, what 95 % of the resamples lie between.

    In each resample the runs of each source are drawn anew, as many as there are: calls of a run
    are alike, so whole runs are drawn. Gains are 1 - MAE / MAE of the baseline.
    """
    rng = np.random.default_rng(seed)
    parts = [*predicted.by_source().values()]
    sums = [_drawn(part, rng, resamples) for part in parts]
    large = [found for part, found in zip(parts, sums, strict=True) if len(part) >= FEW_CALLS]
    means = {"micro": _means(np.sum(sums, axis=0))}
    if large:
        means["macro"] = np.mean([_means(found) for found in large], axis=0)
    names = [*_summed(predicted)]
    return {kind: _named(names, values) for kind, values in sorted(means.items())}


def _drawn(part: Predicted, rng: np.random.Generator, resamples: int) -> Vector:
    """(resamples, figures) sums over the calls of the runs that were drawn."""
    _, which = np.unique(part.runs, return_inverse=True)
    runs = int(which.max()) + 1
    by_run = np.array([np.bincount(which, values, runs) for values in _summed(part).values()])
    times = rng.multinomial(runs, np.full(runs, 1.0 / runs), resamples)
    return np.asarray(times @ by_run.T)


def _means(sums: Vector) -> Vector:
    """(resamples, figures): the first figure counts the calls."""
    return np.asarray(sums / sums[:, :1])


def _named(names: list[str], values: Vector) -> dict[str, list[float]]:
    found = {name: _bounds(values[:, at]) for at, name in enumerate(names) if at}
    errors = values[:, names.index("mae")]
    for name in RIVALS:
        if name in names:
            gain = 1.0 - errors / np.maximum(values[:, names.index(name)], 1e-9)
            found[f"gain over {name}"] = _bounds(gain)
    return found


def _summed(part: Predicted) -> dict[str, Vector]:
    """(calls,) each: what is summed over calls; first 1, then errors, then shares."""
    reserved = np.minimum(part.p99, RESERVABLE)
    rivals = [name for name in RIVALS if name in part.baselines]
    return {
        "calls": np.ones(len(part)),
        "mae": np.abs(part.point - part.actual),
        **{name: np.abs(part.baselines[name] - part.actual) for name in rivals},
        "p90 coverage": (part.actual <= part.p90).astype(np.float64),
        "p95 coverage": (part.actual <= part.p95).astype(np.float64),
        "p99 coverage": (part.actual <= part.p99).astype(np.float64),
        "p99 output saving": 1.0 - reserved / RESERVABLE,
        "p99 under-reservation": (part.actual > reserved).astype(np.float64),
        "t_rem mae": np.abs(part.rest_p50 - part.rest),
    }


def _bounds(values: Vector) -> list[float]:
    low, high = np.percentile(values, (2.5, 97.5)).tolist()
    return [low, high]
