"""Training rows out of recorded runs: each row as it would have looked before its call."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
import numpy.typing as npt

from ._call import RunExamples
from ._features import features
from ._replay import remaining, replay_run
from ._tables import Keys, Tables, app_of

FOLDS = 5
"""A row's tables never saw its own task: they come from the other folds (ours)."""
_COLD_CALLS = 1500
"""Calls of each source that are also met as if its apps were new (ours)."""
_COLD_WEIGHT = 0.3
"""What such a row weighs beside a usual one (ours)."""

Matrix = npt.NDArray[np.float32]
Vector = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Known:
    """What one finished call adds to the tables."""

    keys: Keys
    tokens: float
    future: float
    residual: float


@dataclass(frozen=True, slots=True)
class Rows:
    """`x`: (n, features) float32. `tokens`, `rest`: (n,) output tokens of the call, and those on
    the critical path from it on. `weights`: (n,). `sources`, `tasks`, `apps`: (n,) names.
    `cold`: (n,) whether the tables had seen little or nothing of the app.
    """

    x: Matrix
    tokens: Vector
    rest: Vector
    weights: Vector
    sources: npt.NDArray[np.str_]
    tasks: npt.NDArray[np.str_]
    apps: npt.NDArray[np.str_]
    cold: Mask

    def __len__(self) -> int:
        return len(self.tokens)

    def part(self, mask: Mask) -> Rows:
        return Rows(
            self.x[mask],
            self.tokens[mask],
            self.rest[mask],
            self.weights[mask],
            self.sources[mask],
            self.tasks[mask],
            self.apps[mask],
            self.cold[mask],
        )


def known_of(run: RunExamples, tables: Tables) -> list[Known]:
    """What a run that has ended would add to the tables; nothing is added yet."""
    return [
        Known(
            seen.keys,
            seen.call.length,
            rest - seen.call.length,
            tables.residual(seen.keys, seen.call.length),
        )
        for seen, rest in zip(replay_run(run, tables), remaining(run), strict=True)
    ]


def learn_run(run: RunExamples, tables: Tables) -> list[Known]:
    """Let tables remember all calls of a run; returns what was added."""
    known = known_of(run, tables)
    for one in known:
        tables.add(one.keys, one.tokens, one.future, one.residual)
    return known


def follow_run(run: RunExamples, tables: Tables) -> None:
    """As `learn_run`, online: old calls are forgotten by and by."""
    for one in known_of(run, tables):
        tables.learn(one.keys, one.tokens, one.future, one.residual)


def training_rows(runs: Sequence[RunExamples], seed: int = 0) -> Rows:
    """Rows of known apps, by folds of tasks, and of the same apps as if they were new.

    The second kind teaches how far to trust tables that have seen little: each source in turn is
    unknown, and its runs come one by one.
    """
    order = [*runs]
    random.Random(seed).shuffle(order)
    tables = Tables()
    added: dict[str, list[Known]] = defaultdict(list)
    for run in order:
        added[group_of(run)] += learn_run(run, tables)
    builder = _Builder()
    for fold in range(FOLDS):
        others = _tables_of(known for group, known in added.items() if _fold(group, seed) != fold)
        for run in runs:
            if _fold(group_of(run), seed) == fold:
                builder.add(run, others)
    warm = len(builder.tokens)
    _add_cold(builder, order, added)
    return builder.rows(warm)


def _add_cold(
    builder: _Builder, order: Iterable[RunExamples], added: dict[str, list[Known]]
) -> None:
    """Each source in turn is met as if it were new; where there is only one, each of its apps."""
    by_source: dict[str, list[RunExamples]] = defaultdict(list)
    for run in order:
        by_source[run.source].append(run)
    if len(by_source) == 1:
        by_source.clear()
        for run in order:
            by_source[app_of(run.workflow)].append(run)
    for mine in by_source.values() if len(by_source) > 1 else ():
        its = {group_of(run) for run in mine}
        others = _tables_of(known for group, known in added.items() if group not in its)
        met = 0
        for run in mine:
            builder.add(run, others)
            learn_run(run, others)
            met += len(run.calls)
            if met > _COLD_CALLS:
                break


def rows_of(runs: Iterable[RunExamples], tables: Tables) -> Rows:
    """Rows of runs of which the tables know nothing; nothing is learned from them."""
    builder = _Builder()
    for run in runs:
        builder.add(run, tables)
    return builder.rows(len(builder.tokens))


class _Builder:
    def __init__(self) -> None:
        self.x: list[list[float]] = []
        self.tokens: list[float] = []
        self.rest: list[float] = []
        self.sources: list[str] = []
        self.tasks: list[str] = []
        self.apps: list[str] = []

    def add(self, run: RunExamples, tables: Tables) -> None:
        for seen in replay_run(run, tables):
            row = features(seen.call.shape, seen.keys, seen.history, tables)
            self.x.append([*row.values()])
            self.tokens.append(seen.call.length)
            self.apps.append(app_of(seen.call.shape.workflow))
        self.rest += remaining(run)
        self.sources += [run.source] * len(run.calls)
        self.tasks += [group_of(run)] * len(run.calls)

    def rows(self, warm: int) -> Rows:
        """`warm`: so many rows are of known apps, the others cold."""
        sources = np.array(self.sources)
        cold = np.arange(len(self.tokens)) >= warm
        return Rows(
            np.array(self.x, np.float32),
            np.array(self.tokens),
            np.array(self.rest),
            np.where(cold, _COLD_WEIGHT, 1.0),
            sources,
            np.array(self.tasks),
            np.array(self.apps),
            cold,
        )


def _tables_of(groups: Iterable[list[Known]]) -> Tables:
    tables = Tables()
    for group in groups:
        for one in group:
            tables.add(one.keys, one.tokens, one.future, one.residual)
    return tables


def group_of(run: RunExamples) -> str:
    """What must not be split between training and validation: the task, else the run."""
    return f"{run.source}/{run.task or run.run}"


def _fold(group: str, seed: int) -> int:
    return crc32(f"{seed}|{group}".encode()) % FOLDS


def log_tokens(tokens: Vector) -> Vector:
    """log2(1 + tokens)."""
    return np.asarray(np.log2(1.0 + np.maximum(tokens, 0.0)))
