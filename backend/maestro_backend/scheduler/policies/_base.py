"""A policy says which queued call goes first."""

from __future__ import annotations

from typing import Protocol

from maestro_backend.scheduler._calls import Call
from maestro_backend.scheduler._runs import Run


class Policy(Protocol):
    """Pure: the answer depends on the arguments only."""

    name: str

    def key(self, call: Call, run: Run | None, now: float) -> tuple[float, ...]:
        """Sort key of a queued call at `now` (seconds): the smallest goes first."""

    def priority(self, call: Call, run: Run | None, now: float) -> int:
        """The engine's second-layer priority, 0 and up; vLLM's polarity: lower = sooner."""
