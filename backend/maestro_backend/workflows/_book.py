"""All workflows and runs: wire messages in, scheduler events out. Pure but for its own state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from maestro_agents.protocol import (
    END,
    MAX_STAGES,
    START,
    Announcement,
    CallIdentity,
    RunEnded,
    RunEvent,
    RunPaused,
    RunResumed,
    RunStarted,
    Slo,
    Stage,
    StageEnded,
    StageStarted,
    ToolEnded,
    ToolStarted,
    Workflow,
)
from maestro_backend import scheduler as core
from maestro_backend.predictor import CallShape, Predictor, Recent

from ._forecast import Expected, forecast, leads, next_stages
from ._memory import StageMemory
from ._run import Run
from ._transitions import Transitions

_MAX_RUNS = 10_000
_MAX_WORKFLOWS = 1_000
"""Kept: the runs heard of last, the workflows put last (ours)."""

_UNKNOWN = Workflow(name="unknown", stages=())


class WorkflowBook:
    """Follows every run. `deadlines` caps each SLO class, in seconds (None = no deadline)."""

    def __init__(self, predictor: Predictor, deadlines: dict[str, float | None]) -> None:
        self.workflows: Recent[str, Workflow] = Recent(_MAX_WORKFLOWS)
        self.runs: Recent[str, Run] = Recent(_MAX_RUNS)
        self._predictor = predictor
        self._deadlines = deadlines
        self._transitions = Transitions()
        self._memory = StageMemory()

    def put(self, workflow: Workflow) -> None:
        self.workflows[workflow.id] = workflow

    # --- calls ----------------------------------------------------------------------------------

    def call_arrived(
        self,
        identity: CallIdentity,
        announcement: Announcement | None,
        shape: CallShape,
        slo: Slo | None,
        now: float,
    ) -> tuple[list[core.Event], float | None]:
        """A call arrived. Returns scheduler events and the lead time in seconds, None if none.

        A run that has ended starts anew. A retry (the same run, stage and instance again) has the
        lead time of its first attempt.
        """
        if identity.run is None:
            return [], None
        self._renew(identity.run, now)
        events = list(self._ensure(identity.run, identity, slo, now))
        run = self.runs[identity.run]
        stage = identity.stage
        if stage is None:
            return events, None
        expected = self._expected(run, stage)
        lead_s = run.meet(stage, identity.instance, now, expected=expected)
        self._begin(run, stage, expected=expected)
        run.call(stage)
        self._note(run, stage, shape)
        if announcement is not None:
            run.announcements[stage] = announcement
            events.append(_announced(run.run, stage, announcement))
        return [*events, *self._forecast(run, now)], lead_s

    def call_ended(self, identity: CallIdentity, now: float) -> list[core.Event]:
        """The call is over, however it went."""
        run = self.runs.get(identity.run or "")
        if run is None or identity.stage is None:
            return []
        run.hang_up(identity.stage)
        if not run.events_seen and not run.live(identity.stage):
            # No adapter tells us about stages: the end of the call stands for the stage's.
            run.expect_after(identity.stage, self._following(run, identity.stage))
            run.leave(identity.stage)
        return list(self._forecast(run, now)) if run.ended is None else []

    def waits_for(self, identity: CallIdentity) -> tuple[str, ...]:
        """The sources of the stage's join, if it has one."""
        workflow = self.workflows.get(identity.workflow or "")
        return workflow.join_sources(identity.stage) if workflow and identity.stage else ()

    # --- run events -----------------------------------------------------------------------------

    def run_event(self, run: str, event: RunEvent, now: float) -> list[core.Event]:
        """One event of a run, as posted. Returns what the scheduler should know."""
        return list(self._follow(run, event, now))

    def _follow(self, name: str, event: RunEvent, now: float) -> Iterator[core.Event]:
        if isinstance(event, RunStarted):
            self._renew(name, now)
            identity = CallIdentity(workflow=event.workflow, conversation=event.conversation)
            yield from self._ensure(name, identity, event.slo, now, event.tenant)
        else:
            yield from self._ensure(name, CallIdentity(), None, now)
        run = self.runs[name]
        run.events_seen = True
        if run.ended is None:
            self._advance(run, event, now)
        yield from _told(name, event)
        if run.ended is None:
            yield from self._forecast(run, now)

    def _advance(self, run: Run, event: RunEvent, now: float) -> None:
        match event:
            case StageStarted():
                self._begin(run, event.stage, expected=self._expected(run, event.stage))
                run.enter(event.stage)
            case StageEnded():
                self._stage_ended(run, event)
            case RunEnded():
                run.finish(now, event.failed)

    def _expected(self, run: Run, stage: str) -> bool:
        starts = run.starts(self._graph(run), self._transitions)
        return any(e.stage == stage for e in starts)

    def _begin(self, run: Run, stage: str, *, expected: bool) -> None:
        """A stage begins. If nothing led there, and it is no further call or instance: a jump."""
        certain, candidates = self._graph(run).successors(stage)
        if not expected and not run.in_round(stage, (*certain, *candidates)):
            self._jump(run, stage)
        run.begin(stage)

    def _jump(self, run: Run, stage: str) -> None:
        """Pending stages that lead to `stage` were passed; if none does, the run is elsewhere.

        Who passes a certain stage shows that it makes no call. Not so with events, which tell that
        themselves, nor in a run first seen here: it may have resumed behind that stage.
        """
        graph, watched = self._graph(run), bool(run.begun)
        passed = [e for e in run.pending.values() if leads(graph, e.stage, stage, run.begun)]
        if not (passed and watched):
            run.pending.clear()
            return
        for item in passed:
            if item.certain and not run.events_seen:
                self._memory.facts(run.workflow, item.stage).silent += 1
            run.begin(item.stage)

    def _stage_ended(self, run: Run, event: StageEnded) -> None:
        stage = event.stage
        run.exit(stage)
        if event.next is None:
            expected = [] if event.failed else self._following(run, stage)
        else:
            expected = [Expected(s.stage, 1.0, after=stage) for s in event.next]
            self._learn_route(run, stage, expected)
        run.expect_after(stage, expected)
        if not run.live(stage):
            calls = run.calls_since_start.pop(stage, 0)
            if not calls and not event.failed:
                self._memory.facts(run.workflow, stage).silent += 1
        run.leave(stage)

    def _learn_route(self, run: Run, stage: str, chosen: list[Expected]) -> None:
        workflow = self.workflows.get(run.workflow)
        candidates = workflow.successors(stage).candidates if workflow else ()
        for target in [e.stage for e in chosen] or [END]:
            if target in candidates:
                self._transitions.learn(run.workflow, stage, target)

    # --- forecasts ------------------------------------------------------------------------------

    def _ensure(
        self,
        name: str,
        identity: CallIdentity,
        slo: Slo | None,
        now: float,
        tenant: str | None = None,
    ) -> Iterator[core.Event]:
        """Make sure the run is known; complete what its first message may have left out."""
        run = self.runs.use(name, lambda: Run(name, identity.workflow or "", now))
        changed = (
            run.order == 0 or (identity.workflow and not run.workflow) or slo not in (None, run.slo)
        )
        run.order += 1
        run.workflow = run.workflow or identity.workflow or ""
        run.conversation = run.conversation or identity.conversation
        run.slo, run.tenant = slo or run.slo, tenant or run.tenant
        if changed:
            if not run.begun:
                run.expect_after(START, self._following(run, START))
            deadline_s = self.deadline_s(run.slo)
            yield core.RunStarted(name, run.workflow, run.slo.class_, deadline_s, run.tenant)

    def deadline_s(self, slo: Slo) -> float | None:
        """Seconds: what the client asks for, but never tighter than its class (no queue jumping).

        A class without a deadline has none; an unknown class counts as `standard`.
        """
        tightest = self._deadlines.get(slo.class_, self._deadlines.get("standard"))
        if tightest is None or slo.deadline_s is None:
            return tightest
        return max(tightest, slo.deadline_s)

    def _renew(self, name: str, now: float) -> None:
        run = self.runs.get(name)
        if run is not None and run.ended is not None:
            self.runs[name] = run.anew(now)

    def _following(self, run: Run, stage: str) -> list[Expected]:
        announcement = run.announcements.get(stage)
        return next_stages(self._graph(run), stage, self._transitions, announcement)

    def _forecast(self, run: Run, now: float) -> Iterator[core.Event]:
        starts = run.starts(self._graph(run), self._transitions)
        workflow = self.workflows.get(run.workflow) or _made_of(starts)
        calls = forecast(
            workflow, starts, self._transitions, lambda stage: self._expected_call(run, stage)
        )
        before = run.forecast
        run.believe(calls, now)
        if calls != before:
            yield core.ForecastChanged(run.run, calls)

    def _graph(self, run: Run) -> Workflow:
        return self.workflows.get(run.workflow, _UNKNOWN)

    def _expected_call(self, run: Run, stage: Stage) -> core.ForecastCall | None:
        if not self._memory.makes_calls(run.workflow, stage):
            return None
        facts = self._memory.known(run.workflow, stage.path)
        shape = CallShape(
            model=facts.model or stage.model or "",
            workflow=run.workflow,
            stage=stage.path,
            role=facts.role or stage.role or "",
            prompt_bytes=facts.prompt_bytes,
            max_tokens=facts.max_tokens,
        )
        predicted = self._predictor.predict(shape)
        return core.ForecastCall(
            stage=stage.path,
            role=shape.role,
            model=shape.model,
            probability=1.0,
            earliest_start_s=0.0,
            prompt_tokens=predicted.prompt_tokens,
            length=predicted.length,
            service_s=predicted.service_s,
        )

    def _note(self, run: Run, stage: str, shape: CallShape) -> None:
        facts = self._memory.facts(run.workflow, stage)
        facts.calls, facts.silent = facts.calls + 1, 0
        facts.model, facts.role = shape.model, shape.role
        facts.prompt_bytes, facts.max_tokens = shape.prompt_bytes, shape.max_tokens


def _announced(run: str, stage: str, announcement: Announcement) -> core.Announced:
    certain = tuple(s.stage for s in announcement.successors if s.certain)
    candidates = tuple(s.stage for s in announcement.successors if not s.certain)
    return core.Announced(run, stage, certain, candidates)


def _made_of(starts: Iterable[Expected]) -> Workflow:
    """An unregistered workflow: all that is known of it is what was announced or chosen."""
    paths = (e.stage for e in starts if e.stage not in (START, END))
    stages = tuple(Stage(path=path) for path in islice(paths, MAX_STAGES))
    return Workflow(name=_UNKNOWN.name, stages=stages)


def _told(run: str, event: RunEvent) -> Iterator[core.Event]:
    """What the scheduler hears of the event itself."""
    match event:
        case StageStarted():
            yield core.StageStarted(run, event.stage, event.instance)
        case StageEnded():
            yield core.StageEnded(run, event.stage, event.instance)
        case ToolStarted():
            yield core.ToolStarted(run, event.stage, event.tool)
        case ToolEnded():
            yield core.ToolEnded(run, event.stage, event.tool, event.duration_s)
        case RunPaused():
            yield core.RunPaused(run)
        case RunResumed():
            yield core.RunResumed(run)
        case RunEnded():
            yield core.RunEnded(run)
