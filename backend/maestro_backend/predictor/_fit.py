"""From recorded runs to a model: rows, boosters, calibration on tasks that were left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from statistics import fmean, median

import numpy as np

from maestro_agents.protocol import ConfigError

from ._boosters import RECIPES, Boosters, Recipe, train_boosters
from ._call import RunExamples
from ._estimator import Estimator
from ._features import FEATURES
from ._matrix import Mask, Rows, learn_run, log_tokens, training_rows
from ._model import NAMES, Model, base_model, load_model
from ._offsets import Offsets
from ._tables import Tables

LEVELS = (0.9, 0.95, 0.99)
"""Upper bounds that are predicted of each length, next to its median."""
TARGETS = (0.905, 0.953, 0.991)
"""What they are calibrated to: a little more, as the next calls are never quite like the last
(ours)."""
REST_TARGETS = (0.9,)

__all__ = ["Errors", "fit", "judge", "load_model"]

_MIN_CALLS = 50
"""Fewer calls are no basis for a model (ours)."""


def fit(
    runs: Sequence[RunExamples],
    seed: int = 0,
    threads: int = 1,
    recipes: Mapping[str, Recipe] = RECIPES,
) -> Model:
    """Train on recorded runs.

    Calibration: the boosters are first fitted without a fifth of the tasks, and their quantiles
    shifted so that they cover those; then fitted again on everything.

    Raises:
        ConfigError: too few calls, or lightgbm is not installed.
    """
    calls = sum(len(run.calls) for run in runs)
    if calls < _MIN_CALLS:
        raise ConfigError(f"{calls} calls are too few to train on: {_MIN_CALLS} is the least")
    rows = training_rows(runs, seed)
    return fit_rows(rows, tables_of(runs), seed, threads, recipes)


@dataclass(frozen=True, slots=True)
class Errors:
    """On `calls` calls: mean and median of |actual - predicted| in output tokens of one choice,
    and the part of the calls at or below their p90."""

    mae: float
    median_error: float
    p90_coverage: float
    calls: int


def judge(
    model: Model | None, runs: Sequence[RunExamples], learned_from: Sequence[RunExamples]
) -> Errors:
    """How a model does on runs it has not seen, learning from each as it ends.

    None stands for what serves without a trained model: the base model after `learned_from`.
    """
    estimator = Estimator(model or base_model())
    for run in learned_from if model is None else ():
        estimator.follow(run)
    errors: list[float] = []
    covered = 0
    for run in runs:
        for call, estimate in zip(run.calls, estimator.follow(run), strict=True):
            errors.append(abs(call.length - estimate.p50))
            covered += call.length <= estimate.p90
    calls = len(errors)
    return Errors(fmean(errors), median(errors), covered / calls, calls) if calls else _NO_ERRORS


_NO_ERRORS = Errors(nan, nan, nan, 0)


def tables_of(runs: Sequence[RunExamples]) -> Tables:
    tables = Tables()
    for run in runs:
        learn_run(run, tables)
    return tables


def fit_rows(
    rows: Rows,
    tables: Tables,
    seed: int = 0,
    threads: int = 1,
    recipes: Mapping[str, Recipe] = RECIPES,
) -> Model:
    """As `fit`, from rows that are made already."""
    held = left_out(rows, seed)
    if held.all():
        raise ConfigError("all calls are of one task: train on two or more")
    first = train_boosters(rows.part(~held), FEATURES, recipes, seed=seed, threads=threads)
    offsets, rest_offsets = calibrate(first, rows.part(held & ~rows.cold))
    boosters = train_boosters(rows, FEATURES, recipes, seed=seed, threads=threads)
    warm = ~rows.cold
    about = {
        "calls": int(warm.sum()),
        "sources": sorted({*rows.sources[warm].tolist()}),
        "seed": seed,
    }
    return Model(boosters, offsets, rest_offsets, tables, about)


def left_out(rows: Rows, seed: int) -> Mask:
    """A mask of a fifth of the tasks, all their rows."""
    tasks, which = np.unique(rows.tasks, return_inverse=True)
    chosen = np.random.default_rng(seed).permutation(len(tasks)) < max(1, len(tasks) // 5)
    return np.asarray(chosen[which])


def calibrate(boosters: Boosters, rows: Rows) -> tuple[Offsets, Offsets]:
    """Offsets of the bounds of a call's length, and of its run's remaining tokens."""
    raw = boosters.predict(rows.x, NAMES)
    bounds, rest = raw[:, 1:4], raw[:, 5:6]
    lengths = Offsets.fit(TARGETS, log_tokens(rows.tokens)[:, None] - bounds, rows.apps)
    rests = Offsets.fit(REST_TARGETS, log_tokens(rows.rest)[:, None] - rest, rows.apps)
    return lengths, rests
