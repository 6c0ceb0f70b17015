"""The finished past of one run, as far as its future depends on it. Counts and names, no text."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log2
from zlib import crc32

from maestro_backend.predictor import CallOutcome, CallShape

_MAX_STAGES = 256
"""Stages of one run that are told apart; further ones count as never met (ours)."""
_EXACT = 8
"""Counts are exact up to here, then four to a doubling (ours)."""


@dataclass(slots=True)
class Journey:
    """All calls that ended before a point in a run, oldest first.

    `last`, `previous` and `earlier` are the stages of the last three calls; `role`, `finish` and
    `output` (tokens) are those of the last one. `visits` counts by (stage, role), `rounds` by
    stage; `followed` says what came after each stage when it was left last. `path` is a checksum
    of the stages so far without repeats; `streak` counts the last stage's calls in a row.
    """

    calls: int = 0
    last: str = ""
    previous: str = ""
    earlier: str = ""
    role: str = ""
    finish: str = ""
    output: float = 0.0
    tokens: float = 0.0
    path: int = 0
    streak: int = 0
    visits: dict[tuple[str, str], int] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)
    followed: dict[str, str] = field(default_factory=dict)

    def add(self, shape: CallShape, outcome: CallOutcome) -> None:
        """A call has ended. `output` is that of one choice."""
        stage = shape.stage
        if stage != self.last or not self.calls:
            self.path, self.streak = crc32(stage.encode(), self.path), 0
        if self.calls and (self.last in self.followed or len(self.followed) < _MAX_STAGES):
            self.followed[self.last] = stage
        self.earlier, self.previous, self.last = self.previous, self.last, stage
        self.role, self.finish = shape.role, outcome.finish
        self.output = outcome.output_tokens / max(1, shape.n)
        self.calls, self.tokens = self.calls + 1, self.tokens + self.output
        self.streak += 1
        if stage in self.rounds or len(self.rounds) < _MAX_STAGES:
            self.rounds[stage] = self.rounds.get(stage, 0) + 1
        visit = stage, shape.role
        if visit in self.visits or len(self.visits) < _MAX_STAGES:
            self.visits[visit] = self.visits.get(visit, 0) + 1

    def copy(self) -> Journey:
        values = {name: getattr(self, name) for name in self.__slots__}
        for name in ("visits", "rounds", "followed"):
            values[name] = dict(values[name])
        return Journey(**values)


def intent(finish: str) -> int:
    """2 where a call asked for tools, 1 where it did not, 0 where nobody says."""
    return 2 if finish in ("tool_calls", "tool_use") else int(bool(finish))


def coarse(count: int) -> int:
    """A count, exact while it is small."""
    return count if count < _EXACT else _EXACT + int(4 * log2(count / _EXACT))


def octaves(amount: float, per: int = 2) -> int:
    """An amount on a log scale, so many steps to a doubling; what is not known counts as 0."""
    return int(per * log2(1.0 + max(0.0, amount)))
