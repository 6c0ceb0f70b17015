"""One training: learn from the older runs, judge on the newest, install what is better."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from math import isfinite
from pathlib import Path
from typing import Any, Protocol, cast

from maestro_agents.protocol import BackendError
from maestro_backend.predictor import RunExamples

from ._versions import Manifest, Version, Versions

_log = logging.getLogger("maestro.trainer")

VALIDATION = 0.2
"""The newest part of the runs, which a model is judged on and never learns from (ours)."""

LEARNER = "maestro_backend.predictor._fit"
"""The module that learns, unless told otherwise: a `Learner`."""

_CLEARLY = 1.05
"""A model in use goes if the plain tables are better by so much: less is noise (ours)."""
_LEAST_LEARNED = 200
_LEAST_JUDGED = 50
"""Fewer calls than these teach nothing, or prove nothing (ours)."""

_LIBRARIES = ("lightgbm", "numpy", "maestro-mas")


@dataclass(frozen=True, slots=True)
class Judgement:
    """How a model did on `calls` calls: mean and median of |actual - predicted| in output tokens
    of one choice, and the part of the calls at or below their p90."""

    mae: float
    median_error: float
    p90_coverage: float
    calls: int


class Model(Protocol):
    """What was learned."""

    def save(self, folder: Path) -> None:
        """Write it into an empty folder, plain files only."""


class Learner(Protocol):
    """The module that knows how to learn. None as a model stands for the plain tables.

    It may have `base_model()` as well: what is used while there is no version, and what a first
    version has to beat.
    """

    def fit(self, runs: Sequence[RunExamples], seed: int = 0, threads: int = 1) -> Any: ...

    def load_model(self, folder: Path) -> Any: ...

    def judge(
        self, model: Any, runs: Sequence[RunExamples], learned_from: Sequence[RunExamples]
    ) -> Any: ...


class Outcome(StrEnum):
    """How a training ended."""

    INSTALLED = "installed"
    KEPT = "kept"
    ROLLED_BACK = "rolled_back"
    TOO_FEW = "too_few"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Training:
    """What came of a training. `version` is current now ("": the plain tables); `runs` and `calls`
    were read; `seconds` it took; the judgements are on the same newest runs."""

    outcome: Outcome
    detail: str
    version: str = ""
    runs: int = 0
    calls: int = 0
    seconds: float = 0.0
    new: Judgement | None = None
    current: Judgement | None = None
    fallback: Judgement | None = None


def split(
    runs: Sequence[RunExamples], share: float = VALIDATION
) -> tuple[list[RunExamples], list[RunExamples]]:
    """Older runs to learn from, and the newest `share` of them to judge on.

    A run whose task is also among those to judge on is in neither: it would give the answer away.
    """
    border = len(runs) - round(share * len(runs))
    judged = list(runs[border:])
    tasks = {run.task for run in judged if run.task}
    return [run for run in runs[:border] if run.task not in tasks], judged


def decide(new: Judgement, current: Judgement | None, fallback: Judgement) -> tuple[Outcome, str]:
    """What to do, and why.

    A new model is installed if its mean error is below that of the plain tables and not above that
    of the current model, and its median error not above the tables'. Else the current one stays,
    unless its mean error is more than 5 % above that of the tables.
    """
    told = f"off by {_tokens(new)}, the plain tables by {_tokens(fallback)}"
    if current:
        told += f", the current model by {_tokens(current)}"
    better = new.mae < fallback.mae and new.median_error <= fallback.median_error
    if better and (current is None or not new.mae > current.mae):
        return Outcome.INSTALLED, told
    if current is not None and current.mae > _CLEARLY * fallback.mae:
        return Outcome.ROLLED_BACK, told
    return Outcome.KEPT, told


def train(
    runs: Sequence[RunExamples],
    versions: Versions,
    learner: Learner,
    *,
    seed: int = 0,
    threads: int = 1,
    clock: Callable[[], float] = time.time,
) -> Training:
    """Learn from `runs` (in order of arrival), judge, and install or roll back.

    Raises:
        ConfigError: the versions' folder cannot be written.
    """
    began = time.monotonic()
    older, judged = split(runs)
    learned, calls = _calls(older), _calls(runs)
    present = versions.current()
    if learned < _LEAST_LEARNED or _calls(judged) < _LEAST_JUDGED:
        detail = f"{calls} calls of {len(runs)} runs are stored: too few to learn from"
        name = present.name if present else ""
        return Training(Outcome.TOO_FEW, detail, name, len(runs), calls)
    model = learner.fit(older, seed=seed, threads=threads)
    new = _judged(learner, _read_back(learner, model, versions), judged, older)
    fallback = _judged(learner, None, judged, older)
    current = _judged_current(learner, present, judged, older)
    outcome, detail = decide(new, current, fallback)
    if outcome is Outcome.ROLLED_BACK and present is None:
        outcome = Outcome.KEPT
    if outcome is Outcome.INSTALLED:
        metrics = _metrics(new=new, fallback=fallback, current=current)
        manifest = Manifest(clock(), learned, metrics, libraries=_libraries())
        present = versions.add(model.save, manifest)
    elif present is not None and outcome is Outcome.ROLLED_BACK:
        present = versions.rollback(f"in training: {detail}", present.name)
    return Training(
        outcome,
        detail,
        present.name if present else "",
        len(runs),
        calls,
        time.monotonic() - began,
        new,
        current,
        fallback,
    )


def _read_back(learner: Learner, model: Model, versions: Versions) -> Model:
    """The model as it will be used: what does not survive the disk must not count for it."""
    with versions.scratch() as folder:
        model.save(folder)
        return cast(Model, learner.load_model(folder))


def _judged(
    learner: Learner,
    model: object,
    runs: Sequence[RunExamples],
    learned_from: Sequence[RunExamples],
) -> Judgement:
    found = learner.judge(model, runs, learned_from)
    judgement = Judgement(
        float(found.mae), float(found.median_error), float(found.p90_coverage), int(found.calls)
    )
    if not (isfinite(judgement.mae) and isfinite(judgement.median_error)):
        raise BackendError(f"a model was judged to be off by {judgement.mae} tokens")
    return judgement


def _judged_current(
    learner: Learner,
    version: Version | None,
    runs: Sequence[RunExamples],
    learned_from: Sequence[RunExamples],
) -> Judgement | None:
    """How the model in use does, None if there is none or it cannot be used any more."""
    base = getattr(learner, "base_model", None)
    try:
        if version is not None:
            model = learner.load_model(version.folder)
        elif base is not None:
            model = base()
        else:
            return None
        return _judged(learner, model, runs, learned_from)
    except Exception as error:
        _log.warning("%s cannot be used: %r", version.name if version else "the base model", error)
        return None


def _metrics(**judgements: Judgement | None) -> dict[str, float]:
    """One number by name; the new model's own without a prefix."""
    return {
        name if of == "new" else f"{of}_{name}": getattr(judgement, name)
        for of, judgement in judgements.items()
        if judgement is not None
        for name in ("mae", "median_error", "p90_coverage", "calls")
    }


def _libraries() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _calls(runs: Sequence[RunExamples]) -> int:
    return sum(len(run.calls) for run in runs)


def _tokens(judgement: Judgement) -> str:
    return f"{judgement.mae:.1f} tokens a call ({judgement.median_error:.1f} in the median)"
