"""The apps: runs start, their calls arrive as those before them end, and what is told of them.

What the backend believes of a run's future is made of what was foreseen of its calls: for each call
that runs, or has ended while a follower of it is still to come, what past runs let expect after it;
once it has ended and its app announces, the followers that its routing has named, instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from enum import Enum
from typing import Any, NamedTuple

from maestro_backend.scheduler import (
    LIKELY,
    CallArrived,
    CallFinished,
    Event,
    ForecastCall,
    ForecastChanged,
    Length,
    Rest,
    RunEnded,
    RunPaused,
    RunResumed,
    RunStarted,
)

from ._agenda import Agenda
from ._foresight import CallForesight, Foresight
from ._layout import Service
from ._outcome import Outcome, RunOutcome
from ._requests import Request
from ._system import System
from ._truth import Truth
from ._workload import SimCall, SimRun, Template

UNBOUNDED_TOKENS = 4096
"""Output that is reserved for a call where nothing is predicted: its `max_tokens` (ours)."""
BLOCK_TOKENS = 16
CLASS_DEFAULT = Length(256, 512)
"""What is thought of a call of which nothing is known."""


class Known(NamedTuple):
    """What of a call is the same in every run of its template."""

    told: tuple[Any, ...]
    """Its CallArrived after the names of call and run."""
    told_alone: tuple[Any, ...]
    """The same without the stages that it waited for."""
    waits_for: tuple[str, ...]
    alone_s: float
    """Seconds on an idle engine, in truth."""


class LiveRun:
    """A run between its start and its end."""

    __slots__ = (
        "came",
        "expect",
        "foreseen",
        "known",
        "left",
        "likely",
        "live",
        "name",
        "outcome",
        "people",
        "sim",
        "template",
        "to_wait",
        "truth",
    )

    def __init__(
        self,
        sim: SimRun,
        foreseen: tuple[CallForesight, ...] | None,
        truth: Truth | None,
        known: list[Known | None],
    ) -> None:
        self.sim = sim
        self.name = sim.run
        self.template: Template = sim.template
        self.foreseen = foreseen
        self.truth = truth
        self.known = known
        self.left = len(sim.template.calls)
        self.to_wait = [len(call.after) for call in sim.template.calls]
        """By call, how many of those before it have not ended."""
        self.people = 0
        """People that the run waits for."""
        self.live: dict[str, int] = {}
        """By stage: its calls between arrival and end."""
        self.came = bytearray(self.left)
        """By call, whether it has arrived."""
        self.expect: dict[int, tuple[ForecastCall, ...]] = {}
        self.likely: dict[str, float] = {}
        """Stages that are certain or hold P >= 0.5, and since when."""
        self.outcome: RunOutcome | None = RunOutcome(sim) if sim.measured else None


class Whereabouts(Enum):
    """Where a call is that was sent to a worker, or not yet."""

    OUTSIDE = "outside"
    ON_THE_WAY = "on the way"
    INSIDE = "inside"
    ON_THE_WAY_BACK = "on the way back"


class LiveCall:
    """A call between its arrival and its end."""

    __slots__ = (
        "alone_s",
        "arrived",
        "dispatched",
        "first_token",
        "index",
        "name",
        "place",
        "request",
        "reserved",
        "reserved_since",
        "run",
        "spec",
        "tries",
        "worker",
    )

    def __init__(self, name: str, run: LiveRun, index: int, spec: SimCall, now: float) -> None:
        self.name = name
        self.run = run
        self.index = index
        self.spec = spec
        self.alone_s = 0.0
        self.arrived = now
        self.dispatched = now
        self.first_token = now
        self.worker = ""
        self.tries = 0
        self.reserved = 0
        self.reserved_since = now
        self.place = Whereabouts.OUTSIDE
        self.request: Request | None = None


class Apps:
    """All runs. Events go out through `tell`; `arrived` hears of each call before the scheduler."""

    def __init__(
        self,
        agenda: Agenda,
        system: System,
        foresight: Foresight,
        service: Service,
        outcome: Outcome,
        tell: Callable[[Event], None],
        arrived: Callable[[LiveCall], None],
    ) -> None:
        self._agenda = agenda
        self._system = system
        self._foresight = foresight
        self._service = service
        self._outcome = outcome
        self._tell = tell
        self._arrived = arrived
        self._foresees = system.future != "none"
        self._needs = system.needs_foresight
        self._blind = system.lengths == "none"
        self._runs: Iterator[SimRun] = iter(())
        self._known: dict[tuple[str, str], list[Known | None]] = {}
        """By template: as much as is known so far."""
        self._closed = False
        self._measuring = False
        self.calls: dict[str, LiveCall] = {}
        self.measured_open = 0
        self.all_measured = False
        """No run that is to be measured is still to start."""

    # --- runs -----------------------------------------------------------------------------------

    def play(self, runs: Iterable[SimRun], closed: int | None) -> None:
        """Let the runs begin when they say; or, closed, always so many at once."""
        self._runs = iter(runs)
        self._closed = closed is not None
        for _ in range(1 if closed is None else closed):
            self._next_run()

    def go_on(self) -> bool:
        """Whether a run that is to be measured is still to end, or to start."""
        return self.measured_open > 0 or not self.all_measured

    def _next_run(self) -> None:
        sim = next(self._runs, None)
        if sim is None or (self._measuring and not sim.measured):
            self.all_measured = True
        if sim is not None:
            self._measuring = self._measuring or sim.measured
            self._agenda.at(self._agenda.now if self._closed else sim.at, self._start, sim)

    def _start(self, sim: SimRun) -> None:
        if not self._closed:
            self._next_run()
        template = sim.template
        foreseen = self._foresight[template.key] if self._needs else None
        truth = Truth(template, self._service) if self._system.future == "true" else None
        known = self._known.get(template.key)
        if known is None:
            known = self._known[template.key] = [None] * len(template.calls)
        run = LiveRun(sim, foreseen, truth, known)
        if run.outcome is not None:
            self._outcome.runs.append(run.outcome)
            self.measured_open += 1
        self._tell(
            RunStarted(run.name, template.workflow, template.slo, sim.deadline_s, template.tenant)
        )
        for index, call in enumerate(template.calls):
            if not call.after:
                self._release(run, index, call)

    def _end(self, run: LiveRun) -> None:
        now = self._agenda.now
        if run.outcome is not None:
            run.outcome.finish = now
            self.measured_open -= 1
        self._tell(RunEnded(run.name))
        if self._closed:
            self._next_run()

    # --- calls ----------------------------------------------------------------------------------

    def _release(self, run: LiveRun, index: int, call: SimCall) -> None:
        """All that the call waited for has ended: it comes after its gap."""
        if call.gap_s <= 0.0:
            self._arrive((run, index))
            return
        if call.human:
            run.people += 1
            if run.people == 1:
                self._tell(RunPaused(run.name))
        self._agenda.at(self._agenda.now + call.gap_s, self._arrive, (run, index))

    def _arrive(self, about: tuple[LiveRun, int]) -> None:
        run, index = about
        spec = run.template.calls[index]
        now = self._agenda.now
        if spec.human and spec.gap_s > 0.0:
            run.people -= 1
            if not run.people:
                self._tell(RunResumed(run.name))
        run.came[index] = 1
        call = LiveCall(f"{run.name}#{index}", run, index, spec, now)
        self.calls[call.name] = call
        self._outcome.calls_arrived += 1
        if self._foresees:
            self._expect_after(run, index, spec)
        known = run.known[index]
        if known is None:
            known = run.known[index] = self._tell_apart(run, index, spec)
        call.alone_s = known.alone_s
        told, live = known.told, run.live
        if live and any(stage in live for stage in known.waits_for):
            told = known.told_alone  # a branch beside it has a call of that stage
        live[spec.stage] = live.get(spec.stage, 0) + 1
        self._arrived(call)
        self._tell(CallArrived(call.name, run.name, *told))

    def _tell_apart(self, run: LiveRun, index: int, spec: SimCall) -> Known:
        """What is told of the call whenever a run of its template comes to it."""
        length, prompt = self._length(run, index, spec), spec.prompt_tokens
        service_s = self._service(spec.model, prompt, int(length.p50), 0)
        told = (
            spec.stage,
            spec.model,
            length,
            self._kv_tokens(prompt, length),
            service_s,
            spec.role,
            0,
            run.template.tenant,
            prompt,
        )
        stages = tuple(dict.fromkeys(run.template.calls[before].stage for before in spec.after))
        alone_s = self._service(spec.model, prompt, spec.output_tokens, 0)
        return Known((*told, stages), (*told, ()), stages, alone_s)

    def ended(self, call: LiveCall, cached_tokens: int) -> None:
        """The engine is done with the call, and its app has the answer."""
        run, index, spec = call.run, call.index, call.spec
        del self.calls[call.name]
        run.live[spec.stage] -= 1
        if not run.live[spec.stage]:
            del run.live[spec.stage]
        self._tell(CallFinished(call.name, spec.prompt_tokens, spec.output_tokens, cached_tokens))
        followers = run.template.followers[index]
        if self._foresees:
            self._routed(run, index, followers)
        for follower in followers:
            run.to_wait[follower] -= 1
            if not run.to_wait[follower]:
                self._release(run, follower, run.template.calls[follower])
        run.left -= 1
        if not run.left:
            self._end(run)

    def gave_up(self, call: LiveCall) -> None:
        """The call was refused: its run stays unfinished."""
        if call.run.outcome is not None:
            self.measured_open -= 1
            call.run.outcome = None
        self._tell(RunEnded(call.run.name))
        if self._closed:
            self._next_run()

    def _length(self, run: LiveRun, index: int, spec: SimCall) -> Length:
        lengths = self._system.lengths
        if lengths == "true":
            tokens = float(spec.output_tokens)
            return Length(tokens, tokens, tokens, tokens)
        if lengths == "none" or run.foreseen is None:
            return CLASS_DEFAULT
        foreseen = run.foreseen[index]
        return foreseen.length if lengths == "predicted" else foreseen.median

    def _kv_tokens(self, prompt_tokens: int, length: Length) -> int:
        match self._system.kv:
            case "quantile+growth":
                return prompt_tokens + int(length.p90)
            case "paged":
                return prompt_tokens + BLOCK_TOKENS
            case _:
                return prompt_tokens + UNBOUNDED_TOKENS

    # --- the future -----------------------------------------------------------------------------

    def _expect_after(self, run: LiveRun, index: int, spec: SimCall) -> None:
        """A call has arrived: what was expected of its arrival is over, what comes after counts."""
        since = run.likely.get(spec.stage)
        if since is not None:
            self._outcome.lead_s += self._agenda.now - since
        self._outcome.lead_calls += 1
        followers, routed = run.template.followers, self._system.future != "learned"
        awaited = False
        for before in spec.after:
            expected = run.expect.get(before, ())
            if routed and not all(run.came[follower] for follower in followers[before]):
                awaited = awaited or any(call.stage == spec.stage for call in expected)
            else:  # without announcements nobody knows that others are to follow
                run.expect.pop(before, None)
        if not awaited:
            run.likely.pop(spec.stage, None)
        ahead, rest = self._ahead(run, index)
        run.expect[index] = ahead
        self._believe(run, rest)

    def _ahead(self, run: LiveRun, index: int) -> tuple[tuple[ForecastCall, ...], Rest | None]:
        if run.truth is not None:
            return run.truth.ahead(index), run.truth.rest(index)
        if self._system.future == "routed" or run.foreseen is None:
            return (), None
        return run.foreseen[index].ahead, run.foreseen[index].rest

    def _routed(self, run: LiveRun, index: int, followers: tuple[int, ...]) -> None:
        """A call has ended; an app that announces says what comes next."""
        if self._system.future == "learned":
            return
        if not followers:
            run.expect.pop(index, None)
        elif run.truth is None and run.foreseen is not None:
            said = run.foreseen[index].confirmed
            calls = run.template.calls
            if any(calls[follower].human for follower in followers):  # nobody knows what people do
                sure = {calls[f].stage for f in followers if not calls[f].human}
                said = tuple(call for call in said if call.stage in sure)
            run.expect[index] = tuple(map(self._plain, said)) if self._blind else said
        self._believe(run, None)

    def _plain(self, call: ForecastCall) -> ForecastCall:
        """A follower of which nobody has learned anything."""
        service_s = self._service(call.model, call.prompt_tokens, int(CLASS_DEFAULT.p50), 0)
        return replace(call, earliest_start_s=0.0, length=CLASS_DEFAULT, service_s=service_s)

    def _believe(self, run: LiveRun, rest: Rest | None) -> None:
        """Tell the forecast. Of several that name a stage, the most probable one counts."""
        stages: dict[str, ForecastCall] = {}
        for calls in run.expect.values():
            for call in calls:
                known = stages.get(call.stage)
                if known is None or call.probability > known.probability:
                    stages[call.stage] = call
        now, before = self._agenda.now, run.likely
        run.likely = {
            stage: before.get(stage, now)
            for stage, call in stages.items()
            if call.probability >= LIKELY
        }
        self._tell(ForecastChanged(run.name, tuple(stages.values()), rest))
