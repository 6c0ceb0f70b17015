"""What the scheduler knows of one run."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

from ._events import ForecastCall, Rest, RunStarted

LIKELY = 0.5
"""A forecast call counts as expected from this probability on (the bound of lead time too)."""
_FEW = 4
"""The times of so many runs say when a model is next needed (ours)."""


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
    workflow: str = ""
    slo: str = "standard"
    tenant: str = "default"
    started: float = 0.0
    """When it was first heard of (seconds)."""
    deadline: float | None = None
    forecast: tuple[ForecastCall, ...] = ()
    future_s: float = 0.0
    """Predicted seconds of work after what runs now: the longest likely path of the forecast."""
    rest: Rest | None = None
    """What it still had before it, when a call of it came last."""
    models: dict[str, float] = field(default_factory=dict)
    """What the likely part of the forecast needs, and when at the earliest (seconds)."""
    attained_s: float = 0.0
    """Time that its ended calls have spent on workers."""
    waited_s: float = 0.0
    """Time that they had spent in queues before."""
    last_ended: dict[str, EndedCall] = field(default_factory=dict)
    """By model."""
    absorbed: list[tuple[str, str]] = field(default_factory=list)
    """Worker and call of kept prefixes that a later call has taken over: to be let go of."""
    live_calls: set[str] = field(default_factory=set)
    paused_at: float | None = None
    paused_s: float = 0.0
    """Of all pauses that are over."""
    last_seen: float = 0.0
    ended: bool = False

    def start(self, event: RunStarted, now: float) -> None:
        """Take over what the event says; a run may be known from its first call already."""
        self.workflow, self.slo, self.tenant = event.workflow, event.slo, event.tenant
        self.deadline = None if event.deadline_s is None else now + event.deadline_s

    def pause(self, now: float) -> None:
        self.paused_at = now if self.paused_at is None else self.paused_at

    def resume(self, now: float) -> None:
        """Move the deadline by the length of the pause."""
        if self.paused_at is not None:
            self.paused_s += now - self.paused_at
            if self.deadline is not None:
                self.deadline += now - self.paused_at
        self.paused_at = None


class RunTable:
    """All runs the scheduler knows, and which of them expect each model."""

    def __init__(self, bound: float = LIKELY) -> None:
        self._bound = bound
        """A forecast call is expected from this probability on."""
        self.by_id: dict[str, Run] = {}
        self._silent: list[tuple[float, int, Run]] = []
        """A heap: each run, and until when at least it was not silent."""
        self._known = 0
        self._expecting: dict[str, dict[str, float]] = {}
        self._soonest: dict[str, list[tuple[float, str]]] = {}
        """By model, a heap of times and runs; what `_expecting` does not say any more is void."""

    def get(self, run: str) -> Run | None:
        return self.by_id.get(run)

    def ensure(self, run: str, now: float) -> Run:
        """The run, new if it was unknown; it has been seen now."""
        state = self.by_id.get(run)
        if state is None:
            state = self.by_id[run] = Run(run, started=now)
            self._known += 1
            heapq.heappush(self._silent, (now, self._known, state))
            if len(self._silent) > 2 * len(self.by_id) + 64:
                known = self.by_id
                self._silent = [one for one in self._silent if known.get(one[2].run) is one[2]]
                heapq.heapify(self._silent)
        state.last_seen = now
        return state

    def silent_since(self, limit: float, now: float) -> Iterator[Run]:
        """The runs without calls that were last seen before `limit`.

        A run that turns out not to be silent is asked again only once it may be.
        """
        while self._silent and self._silent[0][0] < limit:
            _, number, run = heapq.heappop(self._silent)
            if self.by_id.get(run.run) is not run:
                continue
            if run.live_calls or run.last_seen >= limit:
                seen = now if run.live_calls else run.last_seen
                heapq.heappush(self._silent, (seen, number, run))
            else:
                yield run

    @property
    def expected(self) -> dict[str, float]:
        """The models that some run will likely call, and when at the earliest; soonest first."""
        soonest = [(self.expected_at(model), model) for model in self._expecting]
        return {model: at for at, model in sorted((a, m) for a, m in soonest if a is not None)}

    def expected_at(self, model: str) -> float | None:
        """When some run will likely call `model`, at the earliest; None if none will."""
        runs = self._expecting.get(model)
        if not runs:
            return None
        heap = self._soonest[model]
        while runs.get(heap[0][1]) != heap[0][0]:
            heapq.heappop(heap)
        return heap[0][0]

    def expecting(self, model: str) -> tuple[float, ...]:
        """When runs will likely call `model`, each at the earliest: the soonest few of them."""
        return tuple(heapq.nsmallest(_FEW, self._expecting.get(model, _NO_RUNS).values()))

    def believe(self, run: Run, forecast: tuple[ForecastCall, ...], now: float) -> None:
        """Replace the run's forecast."""
        name, before = run.run, run.models
        likely_s = 0.0
        models: dict[str, float] = {}
        for call in forecast:
            start_s, probability = call.earliest_start_s, call.probability
            if probability >= LIKELY and start_s + call.service_s > likely_s:
                likely_s = start_s + call.service_s
            if probability >= self._bound:
                at = now + start_s
                if at < models.get(call.model, _NEVER):
                    models[call.model] = at
        run.forecast, run.future_s, run.models = forecast, likely_s, models
        for model in before:
            if model not in models:
                runs = self._expecting[model]
                del runs[name]
                if not runs:
                    del self._expecting[model], self._soonest[model]
        for model, at in models.items():
            self._expect(model, name, at)

    def _expect(self, model: str, run: str, at: float) -> None:
        runs = self._expecting.get(model)
        if runs is None:
            self._expecting[model], self._soonest[model] = {run: at}, [(at, run)]
            return
        runs[run] = at
        heap = self._soonest[model]
        heapq.heappush(heap, (at, run))
        if len(heap) > 4 * len(runs) + 64:
            heap[:] = [(at, run) for run, at in runs.items()]
            heapq.heapify(heap)

    def forget(self, run: Run) -> None:
        self.believe(run, (), 0.0)
        self.by_id.pop(run.run, None)


_NEVER = float("inf")
_NO_RUNS: dict[str, float] = {}
