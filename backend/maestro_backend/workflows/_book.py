"""All workflows and runs: wire messages in, scheduler events out. Pure but for its own state."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from maestro_agents.protocol import (
    END,
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
from maestro_backend.predictor import CallShape, Predictor

from ._forecast import Expected, forecast
from ._memory import StageMemory
from ._run import Run
from ._transitions import Transitions

_MAX_RUNS = 10_000
_MAX_WORKFLOWS = 1_000


class WorkflowBook:
    """Follows every run. `deadlines` caps each SLO class, in seconds (None = no deadline)."""

    def __init__(self, predictor: Predictor, deadlines: dict[str, float | None]) -> None:
        self.workflows: OrderedDict[str, Workflow] = OrderedDict()
        self.runs: OrderedDict[str, Run] = OrderedDict()
        self._predictor = predictor
        self._deadlines = deadlines
        self._transitions = Transitions()
        self._memory = StageMemory()

    def put(self, workflow: Workflow) -> None:
        self.workflows[workflow.id] = workflow
        while len(self.workflows) > _MAX_WORKFLOWS:
            self.workflows.popitem(last=False)

    # --- calls ----------------------------------------------------------------------------------

    def call_arrived(
        self,
        identity: CallIdentity,
        announcement: Announcement | None,
        shape: CallShape,
        slo: Slo | None,
        now: float,
    ) -> tuple[list[core.Event], float | None]:
        """A call of a known run and stage. Returns scheduler events and the lead time, seconds."""
        if identity.run is None:
            return [], None
        events = list(self._ensure(identity.run, identity, slo, now))
        run = self.runs[identity.run]
        stage = identity.stage
        if stage is None:
            return events, None
        lead_s = run.meet(stage, now)
        self._begin(run, stage)
        run.calling[stage] += 1
        run.calls_since_start[stage] += 1
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
        run.calling[identity.stage] -= 1
        if not run.events_seen and not run.live(identity.stage):
            # No adapter tells us about stages: the end of the call stands for the stage's.
            run.expect_after(identity.stage, self._graph_next(run, identity.stage))
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
            identity = CallIdentity(workflow=event.workflow, conversation=event.conversation)
            yield from self._ensure(name, identity, event.slo, now, event.tenant)
        else:
            yield from self._ensure(name, CallIdentity(), None, now)
        run = self.runs[name]
        run.events_seen = True
        match event:
            case StageStarted():
                self._begin(run, event.stage)
                run.executing[event.stage] += 1
                yield core.StageStarted(name, event.stage, event.instance)
            case StageEnded():
                self._stage_ended(run, event)
                yield core.StageEnded(name, event.stage, event.instance)
            case ToolStarted():
                yield core.ToolStarted(name, event.stage, event.tool)
            case ToolEnded():
                yield core.ToolEnded(name, event.stage, event.tool, event.duration_s)
            case RunPaused():
                yield core.RunPaused(name)
            case RunResumed():
                yield core.RunResumed(name)
            case RunEnded():
                run.finish(now, event.failed)
                yield core.RunEnded(name)
        if run.ended is None:
            yield from self._forecast(run, now)

    def _begin(self, run: Run, stage: str) -> None:
        """A stage begins. If nothing led there, the run has jumped: nothing else is pending."""
        if stage not in {e.stage for e in run.starts(self._graph(run), self._transitions)}:
            for skipped in run.pending if not run.events_seen else ():
                self._memory.facts(run.workflow, skipped).silent += 1
            run.pending.clear()
        run.begin(stage)

    def _stage_ended(self, run: Run, event: StageEnded) -> None:
        stage = event.stage
        run.executing[stage] = max(0, run.executing[stage] - 1)
        if event.next is None:
            expected = [] if event.failed else self._graph_next(run, stage)
        else:
            expected = [Expected(s.stage, 1.0) for s in event.next]
            self._learn_route(run, stage, expected)
        run.expect_after(stage, expected)
        if not run.live(stage):
            if not run.calls_since_start[stage] and not event.failed:
                self._memory.facts(run.workflow, stage).silent += 1
            del run.calls_since_start[stage]
            run.announcements.pop(stage, None)
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
        run = self.runs.get(name)
        if run is None:
            run = self.runs[name] = Run(name, identity.workflow or "", now)
            while len(self.runs) > _MAX_RUNS:
                self.runs.popitem(last=False)
        changed = (
            run.order == 0 or (identity.workflow and not run.workflow) or slo not in (None, run.slo)
        )
        run.order += 1
        run.workflow = run.workflow or identity.workflow or ""
        run.conversation = run.conversation or identity.conversation
        run.slo, run.tenant = slo or run.slo, tenant or run.tenant
        if changed:
            if not run.begun:
                run.expect_after(START, self._graph_next(run, START))
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

    def _graph_next(self, run: Run, stage: str) -> list[Expected]:
        workflow = self.workflows.get(run.workflow)
        if workflow is None:
            return []
        chances = self._transitions.probabilities(workflow, stage)
        return [Expected(target, p) for target, p in chances.items()]

    def _forecast(self, run: Run, now: float) -> Iterator[core.Event]:
        workflow = self._graph(run)
        starts = run.starts(workflow, self._transitions)
        calls = forecast(
            workflow, starts, self._transitions, lambda stage: self._expected_call(run, stage)
        )
        before = run.forecast
        run.believe(calls, now)
        if calls != before:
            yield core.ForecastChanged(run.run, calls)

    def _graph(self, run: Run) -> Workflow:
        return self.workflows.get(run.workflow) or _from_announcements(run)

    def _expected_call(self, run: Run, stage: Stage) -> core.ForecastCall | None:
        if not self._memory.makes_calls(run.workflow, stage):
            return None
        facts = self._memory.facts(run.workflow, stage.path)
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
        facts.calls += 1
        facts.model, facts.role = shape.model, shape.role
        facts.prompt_bytes, facts.max_tokens = shape.prompt_bytes, shape.max_tokens


def _announced(run: str, stage: str, announcement: Announcement) -> core.Announced:
    certain = tuple(s.stage for s in announcement.successors if s.certain)
    candidates = tuple(s.stage for s in announcement.successors if not s.certain)
    return core.Announced(run, stage, certain, candidates)


def _from_announcements(run: Run) -> Workflow:
    """An unregistered workflow: all that is known of it is what its calls announced."""
    stages = {s.stage: None for a in run.announcements.values() for s in a.successors}
    stages |= dict.fromkeys([s for s in run.announcements if s not in stages])
    paths = [path for path in stages if not path.startswith("__")]
    return Workflow(name="unknown", stages=tuple(Stage(path=path) for path in paths))
