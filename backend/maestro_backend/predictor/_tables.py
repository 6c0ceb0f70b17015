"""What calls produced before, by stage, role, model ...: the memory across runs."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from math import log2
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from maestro_agents.protocol import ConfigError
from maestro_backend.scheduler import Length

from ._call import CallShape
from ._kinds import kind_of
from ._recent import Recent
from ._sketch import BINS, Sketch, Summary

_MAX_KEYS = 20_000
"""Keys remembered, those used last (ours)."""
_MANY = 20
"""Values of other apps that make a prediction for a new one (ours)."""
_LEVELS = np.array([0.5, 0.9, 0.95, 0.99])
_STRETCH = ((10, 1.5), (20, 2.0), (100, 3.0))
"""With fewer values than this, the 90th, 95th, 99th percentile is so many medians at least
(ours)."""
_MAX_INDEX = 8
"""The eighth call of a stage in a run and all later ones are one (ours)."""
_CAUTION = 8.0
"""So many values of nothing unusual are mixed into each mean (ours)."""

Key = tuple[Hashable, ...]

CLASS_DEFAULT = Length(256, 512, 1024, 4096)
"""Before anything is known (ours)."""

_NOTHING = Summary(0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Keys:
    """Under what a call is remembered, the most exact first; "" stands for not known.

    `same`: calls of the same stage with a prompt of the very same size, such as a task done again;
    None where the size is unknown.
    `step` tells how many calls the run has made.
    """

    same: Key | None
    model: Key
    index: Key
    stage: Key
    role: Key
    kind: Key
    app: Key
    step: Key
    everything: Key
    verbosity: Key

    def futures(self) -> Iterator[Key]:
        yield from (self.index, self.stage, self.role, self.step)

    def lengths(self) -> Iterator[Key]:
        yield from (self.model, self.index, self.stage)
        yield from (self.role, self.kind, self.app, self.everything)


def app_of(workflow: str) -> str:
    """A workflow's name without the hash of its content: a small change is no new app."""
    return workflow.partition("@")[0]


def keys_of(shape: CallShape, index: int, calls: int) -> Keys:
    """`index` counts the finished calls of this stage and role in the run, `calls` all of them."""
    app, stage, role = app_of(shape.workflow), shape.stage, shape.role
    sizes = shape.prompt_chars, shape.prompt_lines, shape.code_chars
    wanted = shape.output_format or shape.tool_choice or str(shape.tools > 0)
    return Keys(
        same=(app, stage, role, *sizes) if shape.prompt_chars >= 0 else None,
        model=("model", app, stage, role, shape.model),
        index=("index", app, stage, role, min(index, _MAX_INDEX)),
        stage=("stage", app, stage, role),
        role=("role", role) if role else ("app", app),
        kind=("kind", kind_of(stage, role), wanted),
        app=("app", app),
        step=("step", app, int(log2(1.0 + calls) * 2)),
        everything=("all",),
        verbosity=("verbosity", shape.model),
    )


class Tables:
    """Sketches by key. In `Keys.verbosity` lies how much more a model writes than others."""

    def __init__(self) -> None:
        self.sketches: Recent[Key, Sketch] = Recent(_MAX_KEYS)
        self.same: Recent[Key, tuple[float, float]] = Recent(_MAX_KEYS)
        self.futures: Recent[Key, Sketch] = Recent(_MAX_KEYS)
        self.means: Recent[Key, tuple[float, float]] = Recent(_MAX_KEYS)

    def read(self, key: Key) -> Summary:
        found = self.sketches.get(key)
        return found.summary() if found is not None else _NOTHING

    def future(self, key: Key) -> Summary:
        """What runs still produced, on their critical path, after such a call."""
        found = self.futures.get(key)
        return found.summary() if found is not None else _NOTHING

    def usual(self, keys: Keys) -> float:
        """The median under the most exact stable key, in log2(1 + tokens)."""
        for key in (keys.stage, keys.role, keys.kind, keys.app, keys.everything):
            known = self.read(key)
            if known.count >= 3:
                return known.median
        return _UNSEEN

    def length(self, keys: Keys) -> Length:
        """Quantiles under the most exact key that is known: stage, role, app, kind of work, all.

        Upper ones are stretched while few values stand behind them. `CLASS_DEFAULT` before
        anything is known.
        """
        for key, least in (
            (keys.stage, 1),
            (keys.role, 1),
            (keys.app, 3),
            (keys.kind, _MANY),
            (keys.everything, _MANY),
        ):
            sketch = self.sketches.get(key)
            if sketch is not None and (count := sketch.summary().count) >= least:
                found = [2.0**q - 1.0 for q in sketch.quantiles(_LEVELS)]
                for at, (few, stretch) in enumerate(_STRETCH, start=1):
                    least_tokens = found[0] * stretch if count < few else found[at - 1]
                    found[at] = max(found[at], least_tokens)
                return Length(*found)
        return CLASS_DEFAULT

    def residual(self, keys: Keys, tokens: float) -> float:
        """log2(actual / usual) of a call."""
        return log2(1.0 + max(0.0, tokens)) - self.usual(keys)

    def verbosity(self, keys: Keys) -> tuple[float, float]:
        """Mean residual of the model's calls, shrunk to 0, and how many there were."""
        total, count = self.means.get(keys.verbosity, (0.0, 0.0))
        return total / (count + _CAUTION), count

    def repeated(self, keys: Keys) -> tuple[float, float]:
        """Mean of log2(1 + tokens) of calls with a prompt of this size, and how many there were."""
        total, count = self.same.get(keys.same, (0.0, 0.0)) if keys.same else (0.0, 0.0)
        return total / max(1.0, count), count

    def add(
        self, keys: Keys, tokens: float, future: float, residual: float, weight: float = 1.0
    ) -> None:
        """Remember a call's output, and what its run produced after it; weight -1 undoes it."""
        for key in keys.lengths():
            self.sketches.use(key, Sketch).add(tokens, weight)
        for key in keys.futures():
            self.futures.use(key, Sketch).add(future, weight)
        self._add_means(keys, tokens, residual, weight)

    def learn(self, keys: Keys, tokens: float, future: float, residual: float) -> None:
        """As `add`, but forgetting old calls by and by."""
        for key in keys.lengths():
            self.sketches.use(key, Sketch).follow(tokens)
        for key in keys.futures():
            self.futures.use(key, Sketch).follow(future)
        self._add_means(keys, tokens, residual, 1.0)

    def _add_means(self, keys: Keys, tokens: float, residual: float, weight: float) -> None:
        total, count = self.means.get(keys.verbosity, (0.0, 0.0))
        self.means[keys.verbosity] = total + weight * residual, count + weight
        if keys.same is not None:
            total, count = self.same.get(keys.same, (0.0, 0.0))
            value = log2(1.0 + max(0.0, tokens))
            self.same[keys.same] = total + weight * value, count + weight

    # --- files ----------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """One compressed file of arrays. What is known of prompts of one size is left out."""
        keys: list[list[Hashable]] = []
        counts: list[npt.NDArray[np.float32]] = []
        for part, sketches in (("length", self.sketches), ("future", self.futures)):
            for key, sketch in sketches.items():
                if sketch.summary().count:
                    keys.append([part, *key])
                    counts.append(sketch.counts)
        means = [[[*key], *value] for key, value in self.means.items()]
        names = json.dumps({"keys": keys, "means": means}).encode()
        table = np.array(counts, np.float32).reshape(len(keys), BINS)
        row, column = np.nonzero(table)
        np.savez_compressed(
            path,
            names=np.frombuffer(names, np.uint8),
            row=row.astype(np.uint32),
            column=column.astype(np.uint16),
            count=table[row, column].astype(np.float32),
        )

    @classmethod
    def load(cls, path: Path) -> Tables:
        """Read what `save` wrote.

        Raises:
            ConfigError: the file is missing or broken.
        """
        tables = cls()
        try:
            with np.load(path, allow_pickle=False) as file:
                names = json.loads(file["names"].tobytes())
                table = np.zeros((len(names["keys"]), BINS), np.float32)
                table[file["row"], file["column"]] = file["count"]
            for (part, *key), counts in zip(names["keys"], table, strict=True):
                into = tables.futures if part == "future" else tables.sketches
                into[tuple(key)] = Sketch(counts)
            for key, total, count in names["means"]:
                tables.means[tuple(key)] = float(total), float(count)
        except (OSError, EOFError, ValueError, LookupError, TypeError, BadZipFile) as error:
            raise ConfigError(f"{path} holds no usable tables: {error}") from error
        return tables

    def copy(self) -> Tables:
        """To learn from what is judged, without changing what was trained."""
        other = Tables()
        for mine, its in ((self.sketches, other.sketches), (self.futures, other.futures)):
            for key, sketch in mine.items():
                its[key] = Sketch(sketch.counts.copy())
        other.same.update(self.same)
        other.means.update(self.means)
        return other


_UNSEEN = 8.0
"""256 tokens: before anything is known (ours)."""
