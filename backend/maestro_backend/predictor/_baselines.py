"""What the length model is measured against: fitted on the same rows, with the same learner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ._boosters import RECIPES, Recipe, read_booster, save_booster, train_plain
from ._features import FEATURES
from ._matrix import Mask, Matrix, Rows, Vector, log_tokens

if TYPE_CHECKING:
    from lightgbm import Booster

SHORT = 512
"""Where the paper's two-phase model splits short from long calls, in tokens (ours; the best of the
splits that were tried)."""

STRUCTURE = (
    "prompt_tokens",
    "messages",
    "prompt_lines",
    "code_chars",
    "line_chars",
    "code_share",
    "verbosity",
    "verbosity_n",
)
"""What is known of a call without its workflow: the prompt's size and structure, and the model."""


class Baselines:
    """`no_agent_semantics`: one regressor on `STRUCTURE`. `two_phase`: a classifier of short and
    long calls, and a regressor for each, mixed by its probability (the paper's, soft)."""

    def __init__(self, models: Mapping[str, Booster]) -> None:
        self.models = dict(models)

    def predict(self, x: Matrix) -> dict[str, Vector]:
        """Output tokens by name: (rows,) each."""
        bare = x[:, _columns()]
        plain = np.asarray(self.models["no_agent_semantics"].predict(bare, num_threads=1))
        long = np.asarray(self.models["is_long"].predict(x, num_threads=1))
        low = np.asarray(self.models["short"].predict(x, num_threads=1))
        high = np.asarray(self.models["long"].predict(x, num_threads=1))
        mixed = (1.0 - long) * low + long * high
        return {"no_agent_semantics": 2.0**plain - 1.0, "two_phase": 2.0**mixed - 1.0}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, model in self.models.items():
            save_booster(model, folder / f"{name}.txt.xz")

    @classmethod
    def load(cls, folder: Path) -> Baselines | None:
        """None where none were saved: a model retrained online has none."""
        if not folder.is_dir():
            return None
        return cls({p.name.partition(".")[0]: read_booster(p) for p in folder.glob("*.txt.xz")})


def fit_baselines(
    rows: Rows,
    seed: int = 0,
    threads: int = 1,
    recipe: Recipe = RECIPES["p50"],
) -> Baselines:
    """On the rows of known apps."""
    rows = rows.part(~rows.cold)
    label, long = log_tokens(rows.tokens), rows.tokens > SHORT
    bare = rows.x[:, _columns()]
    smaller = replace(recipe, leaves=min(63, recipe.leaves))

    def train(x: Matrix, y: Vector, mask: Mask, how: Recipe, objective: str = "") -> Booster:
        weights = rows.weights[mask]
        return train_plain(x[mask], y[mask], weights, how, seed, threads, objective)

    everything = np.ones(len(rows), bool)
    models = {
        "no_agent_semantics": train(bare, label, everything, recipe),
        "is_long": train(rows.x, long.astype(float), everything, smaller, "binary"),
        "short": train(rows.x, label, ~long if not long.all() else everything, smaller),
        "long": train(rows.x, label, long if long.any() else everything, smaller),
    }
    return Baselines(models)


def _columns() -> list[int]:
    return [FEATURES.index(name) for name in STRUCTURE]
