"""What the scheduler knows of one run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from ._events import ForecastCall, RunStarted

LIKELY = 0.5
"""A forecast call counts as expected from this probability on (the bound of lead time too)."""


@dataclass(slots=True)
class Run:
    """One run: deadline, forecast and its live calls. Only the scheduler mutates it."""

    run: str
    slo: str = "standard"
    tenant: str = "default"
    deadline: float | None = None
    forecast: tuple[ForecastCall, ...] = ()
    models: frozenset[str] = frozenset()
    """What the likely part of the forecast needs."""
    live_calls: set[str] = field(default_factory=set)
    paused_at: float | None = None
    last_seen: float = 0.0
    ended: bool = False

    def start(self, event: RunStarted, now: float) -> None:
        """Take over what the event says; a run may be known from its first call already."""
        self.slo, self.tenant = event.slo, event.tenant
        self.deadline = None if event.deadline_s is None else now + event.deadline_s

    def pause(self, now: float) -> None:
        self.paused_at = now if self.paused_at is None else self.paused_at

    def resume(self, now: float) -> None:
        """Move the deadline by the length of the pause."""
        if self.paused_at is not None and self.deadline is not None:
            self.deadline += now - self.paused_at
        self.paused_at = None

    def future_s(self) -> float:
        """Predicted seconds of work after what runs now: the longest likely path."""
        likely = (c for c in self.forecast if c.probability >= LIKELY)
        return max((c.earliest_start_s + c.service_s for c in likely), default=0.0)


class RunTable:
    """All runs the scheduler knows, and how many of them expect each model."""

    def __init__(self) -> None:
        self.by_id: dict[str, Run] = {}
        self.expected: Counter[str] = Counter()

    def get(self, run: str) -> Run | None:
        return self.by_id.get(run)

    def ensure(self, run: str, now: float) -> Run:
        """The run, new if it was unknown; it has been seen now."""
        state = self.by_id.setdefault(run, Run(run))
        state.last_seen = now
        return state

    def believe(self, run: Run, forecast: tuple[ForecastCall, ...]) -> None:
        """Replace the run's forecast."""
        self.expected -= Counter(run.models)
        run.forecast = forecast
        run.models = frozenset(c.model for c in forecast if c.probability >= LIKELY)
        self.expected += Counter(run.models)

    def forget(self, run: Run) -> None:
        self.believe(run, ())
        self.by_id.pop(run.run, None)

    def forget_if_over(self, run: Run) -> None:
        """Forget a run that has ended, once its last call has too."""
        if run.ended and not run.live_calls:
            self.forget(run)
