"""One run as the backend follows it: where it stands, what it is expected to do, what it did."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass, field

from maestro_agents.protocol import END, MAX_STAGES, Announcement, Slo, Workflow
from maestro_backend.predictor import Recent
from maestro_backend.scheduler import LIKELY, ForecastCall

from ._forecast import Expected, next_stages
from ._transitions import Transitions

_MAX_CALLS = 1_000
"""Calls of a run whose lead times are kept, the last ones (ours)."""
_MAX_ANNOUNCEMENTS = 100
"""Announcements of a run that are kept, one a stage, the last ones (ours)."""
_MAX_PENDING = 256
"""Stages that a run may wait for: enough for a wide fork, few enough to forecast (ours)."""


@dataclass(slots=True)
class Run:
    """Position and forecast of one run. Times are seconds on the gateway's clock.

    Calls and events of one run take different ways and may overtake each other; `order` counts
    both as they come in, so that a late "ended, next is x" does not announce an x that has begun.
    `lead_times_s` holds the last 1,000 calls; a retry is no call of its own.
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
    calling: dict[str, int] = field(default_factory=dict)
    executing: Recent[str, int] = field(default_factory=lambda: Recent(MAX_STAGES))
    calls_since_start: Recent[str, int] = field(default_factory=lambda: Recent(MAX_STAGES))
    announcements: Recent[str, Announcement] = field(
        default_factory=lambda: Recent(_MAX_ANNOUNCEMENTS)
    )
    pending: Recent[str, Expected] = field(default_factory=lambda: Recent(_MAX_PENDING))
    causes: Recent[str, str] = field(default_factory=lambda: Recent(MAX_STAGES))
    order: int = 0
    begun: Recent[str, int] = field(default_factory=lambda: Recent(MAX_STAGES))
    foreseen: Recent[str, float] = field(default_factory=lambda: Recent(2 * MAX_STAGES))
    met: Recent[str, None] = field(default_factory=lambda: Recent(MAX_STAGES))
    leads: Recent[tuple[str, int], float | None] = field(default_factory=lambda: Recent(_MAX_CALLS))

    def live(self, stage: str) -> bool:
        return stage in self.executing or stage in self.calling

    def anew(self, now: float) -> Run:
        """The same run, started again after its end; calls that are still open stay counted."""
        return Run(
            self.run,
            self.workflow,
            now,
            self.conversation,
            self.slo,
            self.tenant,
            calling=self.calling,
        )

    # --- stages ---------------------------------------------------------------------------------

    def begin(self, stage: str) -> None:
        """The stage has started, by event or by its call: it is no longer to come."""
        self.order += 1
        self.begun[stage] = self.order
        if item := self.pending.pop(stage, None):
            self.causes[stage] = item.after

    def in_round(self, stage: str, following: Iterable[str]) -> bool:
        """Whether `stage` runs, or has run and nothing of what follows it has begun since."""
        began = self.begun.get(stage)
        return self.live(stage) or (
            began is not None and all(self.begun.get(s, 0) <= began for s in following)
        )

    def enter(self, stage: str) -> None:
        _more(self.executing, stage)

    def exit(self, stage: str) -> None:
        _less(self.executing, stage)

    def expect_after(self, stage: str, expected: list[Expected]) -> None:
        """`stage` has ended: wait for these, unless they began since it did.

        What was a candidate beside `stage`, and has not begun by now, was not chosen.
        """
        cause = self.causes.pop(stage, None)
        for rival in [e for e in self.pending.values() if e.after == cause and not e.certain]:
            del self.pending[rival.stage]
        for item in self._to_come(stage, expected):
            self.pending[item.stage] = item

    def starts(self, workflow: Workflow, transitions: Transitions) -> list[Expected]:
        """The stages that may start next: pending ones, and successors of those that run."""
        starts = dict(self.pending)
        for stage in {**self.executing, **self.calling}:
            announcement = self.announcements.get(stage)
            following = next_stages(workflow, stage, transitions, announcement)
            for item in self._to_come(stage, following):
                known = starts.get(item.stage)
                if known is None or known.probability < item.probability:
                    starts[item.stage] = item
        return list(starts.values())

    def _to_come(self, stage: str, following: list[Expected]) -> list[Expected]:
        since = self.begun.get(stage, 0)
        return [e for e in following if e.stage != END and self.begun.get(e.stage, 0) <= since]

    def leave(self, stage: str) -> None:
        """The stage is over: what was foreseen of it has come true (or it calls nobody)."""
        if not self.live(stage):
            self.announcements.pop(stage, None)
            self.foreseen.pop(stage, None)
            self.met.pop(stage, None)

    # --- calls ----------------------------------------------------------------------------------

    def meet(self, stage: str, instance: int, now: float, *, expected: bool) -> float | None:
        """A call of `stage` arrived: its lead time in seconds, None if it was not foreseen.

        A retry has the lead time of its first attempt. A missing instance reads as 0, so where
        the stage is `expected` to start, another 0 is a loop's next round.
        """
        call = (stage, instance)
        if call in self.leads and not (expected and instance == 0):
            return self.leads.use(call, lambda: None)
        since = self.foreseen.get(stage)
        lead_s = None if since is None else now - since
        self.leads[call] = lead_s
        self.lead_times_s.append((stage, lead_s))
        del self.lead_times_s[:-_MAX_CALLS]
        self.met[stage] = None
        return lead_s

    def call(self, stage: str) -> None:
        _more(self.calling, stage)
        _more(self.calls_since_start, stage)

    def hang_up(self, stage: str) -> None:
        _less(self.calling, stage)

    # --- the future -----------------------------------------------------------------------------

    def believe(self, forecast: tuple[ForecastCall, ...], now: float) -> None:
        """Take a new forecast; note when a stage becomes likely, and which never came."""
        self.forecast = forecast
        likely = {c.stage for c in forecast if c.probability >= LIKELY}
        for stage in sorted(likely - self.foreseen.keys()):
            self.foreseen[stage] = now
        for stage in [s for s in self.foreseen if s not in likely]:
            if stage not in self.met and not self.live(stage):
                del self.foreseen[stage]
                self.announced_never_made += 1

    def finish(self, now: float, failed: bool) -> None:
        """The run is over; whatever is still foreseen was never made."""
        self.ended, self.failed, self.forecast = now, failed, ()
        self.announced_never_made += sum(
            1 for stage in self.foreseen if stage not in self.met and not self.live(stage)
        )
        for kept in (self.executing, self.calls_since_start, self.announcements, self.pending):
            kept.clear()
        for told in (self.begun, self.causes, self.foreseen, self.met, self.leads):
            told.clear()


def _more(counts: MutableMapping[str, int], key: str) -> None:
    counts[key] = counts.get(key, 0) + 1


def _less(counts: MutableMapping[str, int], key: str) -> None:
    """Down to nothing, never below: a count that is zero takes no room."""
    left = counts.pop(key, 0) - 1
    if left > 0:
        counts[key] = left
