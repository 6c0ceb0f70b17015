"""A trained model: boosters, their offsets and the tables, as one folder of plain files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from maestro_agents.protocol import ConfigError

from ._boosters import Boosters
from ._features import FEATURES
from ._matrix import Matrix, Vector
from ._offsets import Offsets
from ._tables import Tables

FORMAT = 1
"""Of the folder's files; another one is refused."""

NAMES = ("p50", "p90", "p95", "p99", "rest_p50", "rest_p90")


@dataclass(slots=True)
class Model:
    """Boosters, the offsets that calibrate them, and the tables that their rows are read from.

    `rest_offsets` calibrate the quantiles of a run's remaining tokens; `about` says what the model
    was trained on.
    """

    boosters: Boosters
    offsets: Offsets
    rest_offsets: Offsets
    tables: Tables
    about: Mapping[str, Any] = field(default_factory=dict)

    def raw(self, x: Matrix) -> Vector:
        """(rows, NAMES): log2(1 + tokens), not yet calibrated."""
        return self.boosters.predict(x, NAMES)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.boosters.save(folder / "boosters")
        self.tables.save(folder / "tables.npz")
        about = {
            "format": FORMAT,
            "features": FEATURES,
            "offsets": self.offsets.state(),
            "rest_offsets": self.rest_offsets.state(),
            "about": self.about,
        }
        (folder / "model.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


def load_model(folder: Path) -> Model:
    """Read what `Model.save` wrote. Nothing is unpickled.

    Raises:
        ConfigError: it is no such folder, is broken, or is of another version of Maestro.
    """
    try:
        about = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} holds no model: {error}; make one: maestro train") from error
    if not isinstance(about, dict):
        raise ConfigError(f"{folder} holds no model; make one: maestro train")
    if about.get("format") != FORMAT or tuple(about.get("features", ())) != FEATURES:
        raise ConfigError(f"{folder} is of another version of Maestro: make it anew: maestro train")
    try:
        return Model(
            Boosters.load(folder / "boosters"),
            Offsets.restore(about["offsets"]),
            Offsets.restore(about["rest_offsets"]),
            Tables.load(folder / "tables.npz"),
            about["about"],
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{folder} holds no usable model: {error!r}; make one: maestro train"
        ) from error


@lru_cache(maxsize=1)
def base_model() -> Model:
    """The model that ships with Maestro: numbers only, learned from public traces (base/NOTICE.md).

    Raises:
        ConfigError: it is broken, or lightgbm is not installed.
    """
    return load_model(Path(__file__).parent / "base")
