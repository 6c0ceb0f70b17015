"""What the scheduler knows of one run."""

from __future__ import annotations

from dataclasses import dataclass, field

from ._events import ForecastCall, RunStarted

LIKELY = 0.5
"""A forecast call counts as expected from this probability on (the bound of lead time too)."""


@dataclass(frozen=True, slots=True)
class EndedCall:
    """A call that ended well on `worker`, at `at` seconds, with so many tokens in all."""

    call: str
    worker: str
    tokens: int
    at: float


@dataclass(slots=True)
class Run:
    """One run: deadline, forecast and its live calls. Only the scheduler mutates it."""

    run: str
    slo: str = "standard"
    tenant: str = "default"
    deadline: float | None = None
    forecast: tuple[ForecastCall, ...] = ()
    models: dict[str, float] = field(default_factory=dict)
    """What the likely part of the forecast needs, and when at the earliest (seconds)."""
    last_ended: dict[str, EndedCall] = field(default_factory=dict)
    """By model."""
    absorbed: list[tuple[str, str]] = field(default_factory=list)
    """Worker and call of kept prefixes that a later call has taken over: to be let go of."""
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
    """All runs the scheduler knows, and which of them expect each model."""

    def __init__(self, bound: float = LIKELY) -> None:
        self._bound = bound
        """A forecast call is expected from this probability on."""
        self.by_id: dict[str, Run] = {}
        self._expecting: dict[str, dict[str, float]] = {}

    def get(self, run: str) -> Run | None:
        return self.by_id.get(run)

    def ensure(self, run: str, now: float) -> Run:
        """The run, new if it was unknown; it has been seen now."""
        state = self.by_id.setdefault(run, Run(run))
        state.last_seen = now
        return state

    @property
    def expected(self) -> dict[str, float]:
        """The models that some run will likely call, and when at the earliest; soonest first."""
        soonest = {model: min(runs.values()) for model, runs in self._expecting.items()}
        return dict(sorted(soonest.items(), key=lambda item: (item[1], item[0])))

    def expected_at(self, model: str) -> float | None:
        """When some run will likely call `model`, at the earliest; None if none will."""
        return min(self._expecting.get(model, {}).values(), default=None)

    def believe(self, run: Run, forecast: tuple[ForecastCall, ...], now: float) -> None:
        """Replace the run's forecast."""
        for model in run.models:
            del self._expecting[model][run.run]
            if not self._expecting[model]:
                del self._expecting[model]
        run.forecast, run.models = forecast, {}
        for call in forecast:
            if call.probability >= self._bound:
                at = now + call.earliest_start_s
                run.models[call.model] = min(at, run.models.get(call.model, at))
        for model, at in run.models.items():
            self._expecting.setdefault(model, {})[run.run] = at

    def forget(self, run: Run) -> None:
        self.believe(run, (), 0.0)
        self.by_id.pop(run.run, None)

    def forget_if_over(self, run: Run) -> None:
        """Forget a run that has ended, once its last call has too."""
        if run.ended and not run.live_calls:
            self.forget(run)
