"""One run as the backend follows it: what it is, where it stands, what it did and will do."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from maestro_agents.protocol import MAX_STAGES, Announcement, Slo
from maestro_backend.predictor import Recent
from maestro_backend.scheduler import LIKELY, ForecastCall, Rest

from ._call_log import CallLog
from ._futures import Future
from ._position import Position, less, more

_MAX_CALLS = 1_000
"""Calls of a run whose lead times are kept, the last ones (ours)."""
_MAX_ANNOUNCEMENTS = 100
"""Announcements of a run that are kept, one a stage, the last ones (ours)."""


@dataclass(slots=True)
class Run:
    """Position and forecast of one run. Times are seconds on the gateway's clock.

    Calls and events of one run take different ways: a call may come `ahead` of the events that
    tell what led to it, never behind the end of its own stage. Once there are events, they say
    where the run stands, and a call ahead of them is one that is no longer to come.
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
    paused: bool = False
    forecast: tuple[ForecastCall, ...] = ()
    rest: Rest | None = None
    """Remaining output tokens and calls; None while nothing is known, and after the end."""
    charted: tuple[Future, bool] | None = None
    """What the announced graph says comes after the calls in progress, and whether it must."""
    lead_times_s: list[tuple[str, float | None]] = field(default_factory=list)
    announced_never_made: int = 0
    told: bool = False
    """The scheduler knows of it."""
    events_seen: bool = False
    position: Position = field(default_factory=Position)
    calling: dict[str, int] = field(default_factory=dict)
    made: Recent[str, int] = field(default_factory=lambda: Recent(MAX_STAGES))
    """Calls of each stage that belong to no execution that has ended."""
    step_width: Recent[str, int] = field(default_factory=lambda: Recent(MAX_STAGES))
    """Of stages whose calls are ahead: how many tasks their superstep has, whichever they are."""
    announcements: Recent[str, Announcement] = field(
        default_factory=lambda: Recent(_MAX_ANNOUNCEMENTS)
    )
    foreseen: Recent[str, list[float]] = field(default_factory=lambda: Recent(2 * MAX_STAGES))
    """Since when each call that is likely to come has been: of a stage, the next one first."""
    leads: Recent[tuple[str, int], float | None] = field(default_factory=lambda: Recent(_MAX_CALLS))
    log: CallLog = field(default_factory=CallLog)

    def live(self, stage: str) -> bool:
        return stage in self.position.executing or stage in self.calling

    def running(self) -> dict[str, int]:
        """Executions in progress, by stage: as events tell, else as calls do."""
        return dict(self.position.executing if self.events_seen else self.calling)

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

    # --- calls ----------------------------------------------------------------------------------

    def meet(self, stage: str, instance: int, now: float, *, expected: bool) -> float | None:
        """A call of `stage` arrived: its lead time in seconds, None if it was not foreseen.

        A retry has the lead time of its first attempt. A missing instance reads as 0, so where
        the stage is `expected` to start, another 0 is a loop's next round.
        """
        call = (stage, instance)
        if call in self.leads and not (expected and instance == 0):
            return self.leads.use(call, lambda: None)
        more(self.made, stage)
        times = self.foreseen.get(stage)
        lead_s = now - times.pop(0) if times else None
        self.leads[call] = lead_s
        self.lead_times_s.append((stage, lead_s))
        del self.lead_times_s[:-_MAX_CALLS]
        return lead_s

    def awaits(self, stage: str, expected: bool) -> bool:
        """Whether a first call is due: of an execution that runs, or of one that is `expected`
        and of which no call has come yet."""
        running = self.position.executing.get(stage, 0)
        made = self.made.get(stage, 0) if self.events_seen else 0
        return running > made or (expected and made <= running)

    def excuse(self, stage: str) -> None:
        """An execution is over without a call: what was foreseen of it did come, in its way."""
        if times := self.foreseen.get(stage):
            times.pop(0)

    def call(self, stage: str) -> None:
        more(self.calling, stage)

    def hang_up(self, stage: str) -> None:
        less(self.calling, stage)

    def settle(self, stage: str, *, several: bool) -> int:
        """An execution of `stage` is over: how many of the calls made were its own.

        One, unless the stage is known to make `several`: then those of all that run are shared.
        """
        made, running = self.made.get(stage, 0), self.position.executing.get(stage, 1)
        own = -(-made // max(1, running)) if several else min(1, made)
        for _ in range(own):
            less(self.made, stage)
        return own

    def ahead(self, stage: str, *, several: bool) -> int:
        """How many executions of `stage` have called of which no event has told yet."""
        if not self.events_seen:
            return 0
        made, running = self.made.get(stage, 0), self.position.executing.get(stage, 0)
        return (made > 0 and not running) if several else max(0, made - running)

    # --- the future -----------------------------------------------------------------------------

    def believe(self, forecast: tuple[ForecastCall, ...], now: float) -> None:
        """Take a new forecast; note when a call becomes likely, and which never came."""
        self.forecast = forecast
        likely = Counter(call.stage for call in forecast if call.probability >= LIKELY)
        for stage in sorted({*likely, *self.foreseen}):
            times = self.foreseen.use(stage, list)
            times += [now] * (likely[stage] - len(times))
            self.announced_never_made += len(times) - likely[stage]
            del times[likely[stage] :]
            if not times:
                del self.foreseen[stage]

    def pause(self) -> None:
        """A human is asked: what runs is given up, its calls were for nothing."""
        self.paused = True
        for stage in self.position.executing:
            self.made.pop(stage, None)
        self.position.stop()

    def finish(self, now: float, failed: bool) -> None:
        """The run is over; whatever is still foreseen was never made."""
        self.ended, self.failed, self.forecast, self.paused = now, failed, (), False
        self.announced_never_made += sum(map(len, self.foreseen.values()))
        self.position, self.rest = Position(), None
        for kept in (self.announcements, self.made, self.step_width, self.foreseen, self.leads):
            kept.clear()
