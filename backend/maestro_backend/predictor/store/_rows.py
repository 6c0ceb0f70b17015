"""A finished call as a row of the store, and back. Names and counts, never text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from math import isnan, nan
from typing import Any

from maestro_backend.predictor import CallOutcome, CallShape, Example, RunExamples

_MOST = 2**62
_LONGEST_NAME = 500
"""SQLite holds 64 bits; a name that is longer than 500 characters is cut (ours)."""


@dataclass(frozen=True, slots=True)
class Predicted:
    """What was foretold of a call, None where nothing was.

    Output tokens of one choice: the best single guess (`point`) and quantiles; `rest_p50` is the
    median that was foretold for its run from this call on, along the critical path.
    """

    point: float | None = None
    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    rest_p50: float | None = None


@dataclass(frozen=True, slots=True)
class StoredCall:
    """A finished call, what was foretold of it by which model version ("": the plain tables), and
    when it ended (`at`, seconds since the epoch)."""

    example: Example
    predicted: Predicted
    version: str
    at: float


_SHAPE = tuple(field.name for field in fields(CallShape))
_OUTCOME = tuple(field.name for field in fields(CallOutcome))
_PREDICTED = tuple(field.name for field in fields(Predicted))
_GAP = _SHAPE.index("gap_s")
_TOTAL = _OUTCOME.index("total_s")

COLUMNS = (
    "idx",
    "parents",
    "started_s",
    "at",
    "version",
    *_SHAPE,
    *(f"actual_{name}" for name in _OUTCOME),
    *(f"predicted_{name}" for name in _PREDICTED),
)
"""What the table of calls holds of each, beside its run."""

_OF_RUN, _OWN = 3, 5


def row_of(call: StoredCall) -> tuple[Any, ...]:
    """The values of `COLUMNS`; nan becomes NULL. Whatever a client sent, it can be stored."""
    example = call.example
    own = (example.index, json.dumps(example.parents), example.started_s, call.at, call.version)
    told = (*astuple(example.shape), *astuple(example.outcome), *astuple(call.predicted))
    return tuple(plain(value) for value in (*own, *told))


def plain(value: Any) -> Any:
    """What SQLite can hold of `value`: whole numbers within 64 bits, sound text, no nan."""
    match value:
        case str():
            return value[:_LONGEST_NAME].encode("utf-8", "replace").decode("utf-8")
        case int():
            return max(-_MOST, min(_MOST, value))
        case float() if isnan(value):
            return None
    return value


def call_of(row: Sequence[Any]) -> StoredCall:
    """The call of a row: its run's source, name and task, and the values of `COLUMNS`."""
    (source, run, task), row = row[:_OF_RUN], row[_OF_RUN:]
    index, parents, started_s, at, version = row[:_OWN]
    shape, outcome = list(row[_OWN : _OWN + len(_SHAPE)]), list(row[_OWN + len(_SHAPE) :])
    shape[_GAP] = _or_nan(shape[_GAP])
    outcome[_TOTAL] = outcome[_TOTAL] or 0.0
    example = Example(
        source=source,
        run=run,
        index=index,
        shape=CallShape(*shape),
        outcome=CallOutcome(*outcome[: len(_OUTCOME)]),
        parents=tuple(json.loads(parents)),
        task=task,
        started_s=_or_nan(started_s),
    )
    return StoredCall(example, Predicted(*outcome[len(_OUTCOME) :]), version, at)


def _or_nan(value: float | None) -> float:
    return nan if value is None else value


def closed_up(source: str, run: str, calls: Sequence[Example]) -> RunExamples:
    """A run of the calls that are there, in order of arrival.

    Calls can be missing: one that failed, still runs, or was dropped. Then the others are counted
    anew from 0, and links to what is missing are left out.
    """
    position = {call.index: at for at, call in enumerate(calls)}
    return RunExamples(
        source, run, tuple(_moved(call, at, position) for at, call in enumerate(calls))
    )


def _moved(call: Example, at: int, position: dict[int, int]) -> Example:
    """`call` as number `at`, its parents by their new numbers; only earlier calls are parents."""
    known = {position.get(parent, at) for parent in call.parents}
    parents = tuple(sorted(parent for parent in known if parent < at))
    if (at, parents) == (call.index, call.parents):
        return call
    return Example(
        call.source, call.run, at, call.shape, call.outcome, parents, call.task, call.started_s
    )
