"""LightGBM models of output length and of the rest of a run: training, files, prediction."""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maestro_agents.protocol import ConfigError

from ._matrix import Matrix, Rows, Vector, log_tokens

if TYPE_CHECKING:
    from lightgbm import Booster


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one booster is trained (ours, chosen by nested validation: docs/prediction.md).

    `alpha` is the quantile. `target` is what it predicts: a call's `tokens` or its run's `rest`.
    """

    alpha: float
    target: str = "tokens"
    leaves: int = 31
    rounds: int = 300
    rate: float = 0.05
    least: int = 20
    """Rows in a leaf."""


RECIPES: Mapping[str, Recipe] = {
    "p50": Recipe(0.5, leaves=127, rounds=500, rate=0.03),
    "p90": Recipe(0.9, least=40),
    "p95": Recipe(0.95, least=60),
    "p99": Recipe(0.99, rounds=200, least=100),
    "rest_p50": Recipe(0.5, "rest", leaves=63, rounds=300),
    "rest_p90": Recipe(0.9, "rest", rounds=200, least=40),
}


class Boosters:
    """Predict log2(1 + tokens) from rows of `columns`, relative to what the tables say."""

    def __init__(self, columns: Sequence[str], models: Mapping[str, Booster]) -> None:
        self.columns = tuple(columns)
        self.models = dict(models)
        self._future = [self.columns.index(f"future_{name}") for name in _FUTURES]

    def predict(self, x: Matrix, names: Sequence[str]) -> Vector:
        """(rows, names): log2(1 + tokens) of each model asked for."""
        found = np.empty((len(x), len(names)))
        for at, name in enumerate(names):
            raw = self.models[name].predict(x, num_threads=1)
            found[:, at] = np.asarray(raw) + self.origin(x, RECIPES[name].target)
        return found

    def origin(self, x: Matrix, target: str) -> Vector:
        """What the tables say, which a model corrects: log2(1 + tokens)."""
        base = x[:, 0].astype(np.float64)
        if target == "tokens":
            return base
        future = np.zeros(len(x))
        for column in reversed(self._future):  # the most exact that is known holds
            future = np.where(np.isnan(x[:, column]), future, x[:, column])
        return log_tokens(2.0**base + 2.0**future - 2.0)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "columns.json").write_text(json.dumps(self.columns), encoding="utf-8")
        for name, model in self.models.items():
            save_booster(model, folder / f"{name}.txt.xz")

    @classmethod
    def load(cls, folder: Path) -> Boosters:
        """Read what `save` wrote.

        Raises:
            ConfigError: a file is missing or broken, or lightgbm is not installed.
        """
        try:
            columns = json.loads((folder / "columns.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder} holds no usable model: {error}") from error
        files = sorted(folder.glob("*.txt.xz"))
        models = {path.name.partition(".")[0]: read_booster(path) for path in files}
        if missing := sorted(RECIPES.keys() - models.keys()):
            raise ConfigError(f"{folder} holds no usable model: {missing[0]}.txt.xz is missing")
        return cls(columns, models)


_FUTURES = ("index", "stage", "step")


def train_boosters(
    rows: Rows, columns: Sequence[str], recipes: Mapping[str, Recipe], *, seed: int, threads: int
) -> Boosters:
    """Fit one booster per recipe on the same rows."""
    boosters = Boosters(columns, {})
    for name, recipe in recipes.items():
        boosters.models[name] = train_one(boosters, rows, recipe, seed=seed, threads=threads)
    return boosters


def train_one(
    boosters: Boosters, rows: Rows, recipe: Recipe, *, seed: int, threads: int
) -> Booster:
    """One booster, for what is left over what the tables say."""
    label = log_tokens(rows.tokens if recipe.target == "tokens" else rows.rest)
    label = label - boosters.origin(rows.x, recipe.target)
    return train_plain(rows.x, label, rows.weights, recipe, seed, threads)


def train_plain(
    x: Matrix,
    y: Vector,
    weights: Vector,
    recipe: Recipe,
    seed: int,
    threads: int,
    objective: str = "",
) -> Booster:
    """One LightGBM booster: the `alpha` quantile of `y`, unless another objective is named."""
    lightgbm = _lightgbm()
    parameters = _parameters(recipe, seed, threads)
    if objective:
        parameters["objective"] = objective
    model: Booster = lightgbm.train(
        parameters, lightgbm.Dataset(x, y, weight=weights), recipe.rounds
    )
    return model


def save_booster(model: Booster, path: Path) -> None:
    """As LightGBM's own text, compressed."""
    path.write_bytes(lzma.compress(model.model_to_string().encode()))


def read_booster(path: Path) -> Booster:
    """Read what `save_booster` wrote.

    Raises:
        ConfigError: the file is missing or broken, or lightgbm is not installed.
    """
    lightgbm = _lightgbm()
    try:
        text = lzma.decompress(path.read_bytes()).decode()
        model: Booster = lightgbm.Booster(model_str=text)
    except (OSError, ValueError, lzma.LZMAError, lightgbm.basic.LightGBMError) as error:
        raise ConfigError(f"{path} holds no usable model: {error}") from error
    return model


def _parameters(recipe: Recipe, seed: int, threads: int) -> dict[str, Any]:
    return {
        "objective": "quantile",
        "alpha": recipe.alpha,
        "learning_rate": recipe.rate,
        "num_leaves": recipe.leaves,
        "min_data_in_leaf": recipe.least,
        "feature_fraction": 0.6,
        "bagging_fraction": 0.8,
        "bagging_freq": 1,
        "seed": seed,
        "num_threads": threads,
        "deterministic": True,
        "verbose": -1,
    }


def _lightgbm() -> Any:
    try:
        import lightgbm
    except ImportError as error:
        raise ConfigError(
            "the length model needs lightgbm: pip install 'maestro-mas[backend]'"
        ) from error
    return lightgbm
