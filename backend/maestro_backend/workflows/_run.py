"""One run as the backend follows it: where it stands, what it is expected to do, what it did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from maestro_agents.protocol import END, Announcement, Slo, Workflow
from maestro_backend.scheduler import LIKELY, ForecastCall

from ._forecast import Expected, next_stages
from ._transitions import Transitions


@dataclass(slots=True)
class Run:
    """Position and forecast of one run. Times are seconds on the gateway's clock.

    Calls and events of one run take different ways and may overtake each other; `order` counts
    both as they come in, so that a late "ended, next is x" does not announce an x that has begun.
    """

    run: str
    workflow: str
    started: float
    conversation: str | None = None
    slo: Slo = field(default_factory=Slo)
    tenant: str = "default"
    ended: float | None = None
    failed: bool = False
    forecast: tuple[ForecastCall, ...] = ()
    lead_times_s: list[tuple[str, float | None]] = field(default_factory=list)
    announced_never_made: int = 0
    events_seen: bool = False
    executing: Counter[str] = field(default_factory=Counter)
    calling: Counter[str] = field(default_factory=Counter)
    calls_since_start: Counter[str] = field(default_factory=Counter)
    announcements: dict[str, Announcement] = field(default_factory=dict)
    pending: dict[str, Expected] = field(default_factory=dict)
    order: int = 0
    begun: dict[str, int] = field(default_factory=dict)
    foreseen: dict[str, float] = field(default_factory=dict)
    met: set[str] = field(default_factory=set)

    def live(self, stage: str) -> bool:
        return self.executing[stage] > 0 or self.calling[stage] > 0

    def begin(self, stage: str) -> None:
        """The stage has started, by event or by its call: it is no longer to come."""
        self.order += 1
        self.begun[stage] = self.order
        self.pending.pop(stage, None)

    def expect_after(self, stage: str, expected: list[Expected]) -> None:
        """`stage` has ended: wait for these, unless they began since it did."""
        since = self.begun.get(stage, 0)
        for item in expected:
            if self.begun.get(item.stage, 0) <= since and item.stage != END:
                self.pending[item.stage] = item

    def starts(self, workflow: Workflow, transitions: Transitions) -> list[Expected]:
        """The stages that may start next: pending ones, and successors of those that run."""
        starts = dict(self.pending)
        for stage in [s for s in {*self.executing, *self.calling} if self.live(s)]:
            chosen = _chosen(self.announcements.get(stage))
            for item in next_stages(workflow, stage, transitions, chosen):
                known = starts.get(item.stage)
                if known is None or known.probability < item.probability:
                    starts[item.stage] = item
        return list(starts.values())

    def believe(self, forecast: tuple[ForecastCall, ...], now: float) -> None:
        """Take a new forecast; note when a stage becomes likely, and which never came."""
        self.forecast = forecast
        likely = {c.stage for c in forecast if c.probability >= LIKELY}
        for stage in likely - self.foreseen.keys():
            self.foreseen[stage] = now
        for stage in [s for s in self.foreseen if s not in likely]:
            if stage not in self.met and not self.live(stage):
                del self.foreseen[stage]
                self.announced_never_made += 1

    def meet(self, stage: str, now: float) -> float | None:
        """A call of `stage` arrived: its lead time in seconds, None if it was not foreseen."""
        since = self.foreseen.get(stage)
        lead_s = None if since is None else now - since
        self.lead_times_s.append((stage, lead_s))
        self.met.add(stage)
        return lead_s

    def leave(self, stage: str) -> None:
        """The stage is over: what was foreseen of it has come true (or it calls nobody)."""
        if not self.live(stage):
            self.foreseen.pop(stage, None)
            self.met.discard(stage)

    def finish(self, now: float, failed: bool) -> None:
        """The run is over; whatever is still foreseen was never made."""
        self.ended, self.failed = now, failed
        self.announced_never_made += sum(
            1 for stage in self.foreseen if stage not in self.met and not self.live(stage)
        )
        self.forecast, self.pending, self.foreseen = (), {}, {}


def _chosen(announcement: Announcement | None) -> list[Expected] | None:
    """The announced successors, if the client narrowed them: certain, or with a probability."""
    if announcement is None or announcement.open_ended:
        return None
    known = [s for s in announcement.successors if s.certain or s.probability is not None]
    if len(known) != len(announcement.successors) or not known:
        return None
    return [Expected(s.stage, 1.0 if s.certain else (s.probability or 0.0)) for s in known]
