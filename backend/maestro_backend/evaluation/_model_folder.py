"""A trained model as a folder: the model itself, what it is measured against, what runs taught.

FOLDER/                 what `Model.save` writes: boosters, tables, calibration
FOLDER/baselines/       the regressors it is measured against, and the paper's medians
FOLDER/journeys.json    what finished runs taught of runs to come: branches, remaining work
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from maestro_agents.protocol import ConfigError
from maestro_backend.predictor import Model, RunExamples, load_model
from maestro_backend.predictor._baselines import Baselines, fit_baselines
from maestro_backend.predictor._boosters import RECIPES, Recipe
from maestro_backend.predictor._fit import fit_rows, tables_of
from maestro_backend.predictor._matrix import Rows, training_rows

from ._forecast_state import forecast_state, restored
from ._futures import Forecaster

LEAST_CALLS = 50
"""Fewer calls are no basis for a model (ours)."""

_JOURNEYS = "journeys.json"
_MEDIANS = "baselines/medians.json"


@dataclass(frozen=True, slots=True)
class Trained:
    """What `maestro evaluate` needs. None: the folder holds no such thing, as where a model was
    retrained while serving."""

    model: Model
    baselines: Baselines | None = None
    forecaster: Forecaster | None = None


def train(
    runs: Sequence[RunExamples],
    *,
    seed: int = 0,
    threads: int = 1,
    recipes: Mapping[str, Recipe] = RECIPES,
    say: Callable[[str], None] = lambda line: None,
) -> Trained:
    """Learn from recorded runs. The same runs, seed and recipes give the same model.

    Raises:
        ConfigError: too few calls or tasks, or lightgbm is not installed.
    """
    calls = sum(len(run.calls) for run in runs)
    if calls < LEAST_CALLS:
        raise ConfigError(f"{calls} calls are too few to train on: {LEAST_CALLS} is the least")
    say(f"making rows of {calls} calls of {len(runs)} runs")
    rows = training_rows(runs, seed)
    _check_tasks(rows)
    return train_rows(runs, rows, seed=seed, threads=threads, recipes=recipes, say=say)


def train_rows(
    runs: Sequence[RunExamples],
    rows: Rows,
    *,
    seed: int = 0,
    threads: int = 1,
    recipes: Mapping[str, Recipe] = RECIPES,
    say: Callable[[str], None] = lambda line: None,
) -> Trained:
    """As `train`, from rows that are made already."""
    say(f"training {len(recipes)} boosters on {len(rows)} rows, twice: to calibrate, to keep")
    model = fit_rows(rows, tables_of(runs), seed, threads, recipes)
    say("training what it is measured against")
    baselines = fit_baselines(rows, seed, threads, recipes["p50"])
    say("learning what follows what, and how much is left of a run")
    forecaster = Forecaster()
    for run in runs:
        forecaster.learn(run)
    return Trained(model, baselines, forecaster)


def shortened(rounds: int, recipes: Mapping[str, Recipe] = RECIPES) -> dict[str, Recipe]:
    """The same recipes with at most so many rounds: quick, and less exact."""
    return {name: replace(one, rounds=min(one.rounds, rounds)) for name, one in recipes.items()}


def check_target(folder: Path) -> None:
    """Before hours of training: may a model be written there?

    Raises:
        ConfigError: it is a file, or a folder that holds something else.
    """
    if folder.is_dir():
        if any(folder.iterdir()) and not (folder / "model.json").is_file():
            raise ConfigError(
                f"{folder} holds something that is no model: name an empty or a new folder"
            )
    elif folder.exists():
        raise ConfigError(f"{folder} is a file: name a folder for the model")


def save(trained: Trained, folder: Path) -> None:
    """Write the folder beside its place, then put it there: a reader never sees half of it.

    Raises:
        ConfigError: the folder holds something that is no model, or cannot be written.
    """
    check_target(folder)
    folder = folder.absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _write(trained, made / "new")
            if folder.exists():
                folder.rename(made / "old")
            (made / "new").rename(folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {error}") from error


def load(folder: Path) -> Trained:
    """Read what `save` wrote; nothing is unpickled.

    Raises:
        ConfigError: it holds no model, is broken, or is of another version.
    """
    model = load_model(folder)
    baselines = Baselines.load(folder / "baselines")
    journeys, medians = _json(folder / _JOURNEYS), _json(folder / _MEDIANS)
    if journeys is None or medians is None:
        return Trained(model, baselines)
    try:
        forecaster = restored(journeys, medians)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{folder / _JOURNEYS} is broken or of another version: make the model anew: "
            "maestro train"
        ) from error
    return Trained(model, baselines, forecaster)


def _write(trained: Trained, folder: Path) -> None:
    trained.model.save(folder)
    if trained.baselines is not None:
        trained.baselines.save(folder / "baselines")
    if trained.forecaster is not None:
        (folder / "baselines").mkdir(exist_ok=True)
        journeys, medians = forecast_state(trained.forecaster)
        for name, state in ((_JOURNEYS, journeys), (_MEDIANS, medians)):
            text = json.dumps(state, separators=(",", ":"), allow_nan=False)
            (folder / name).write_text(text, encoding="utf-8")


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} is broken: {error}; make the model anew: maestro train"
        ) from error
    return found if isinstance(found, dict) else {}


def _check_tasks(rows: Rows) -> None:
    tasks = len({*rows.tasks.tolist()})
    if tasks < 2:
        raise ConfigError(f"{tasks} task is too few to train on: some are left out to calibrate")


def cpus() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
