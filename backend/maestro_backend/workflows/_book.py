"""All workflows and runs: wire messages in, scheduler events out. Pure but for its own state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

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
    ToolsRequested,
    Workflow,
)
from maestro_backend import scheduler as core
from maestro_backend.predictor import CallOutcome, CallShape, Prediction, Predictor, Recent

from ._critical_path import certain, critical_path
from ._following import chances, leads, next_stages
from ._forecast import forecast
from ._futures import Future
from ._memory import StageMemory
from ._nouns import Expected, Habits, Past
from ._outlook import Outlook
from ._position import Position
from ._reach import Reach
from ._run import Run
from ._telling import announced, told

_MAX_RUNS = 10_000
_MAX_WORKFLOWS = 1_000
"""Kept: the runs heard of last, the workflows put last (ours)."""
_NEAR = 32
"""Stages of a forecast that the model predicts; plain tables do for the others (ours)."""
_MAX_PAUSED = 100
"""Paused runs of one conversation that are known to be (ours)."""


class WorkflowBook:
    """Follows every run. `deadlines` caps each SLO class, in seconds (None = no deadline)."""

    def __init__(self, predictor: Predictor, deadlines: dict[str, float | None]) -> None:
        self.workflows: Recent[str, Workflow] = Recent(_MAX_WORKFLOWS)
        self.runs: Recent[str, Run] = Recent(_MAX_RUNS)
        self._predictor = predictor
        self._deadlines = deadlines
        self._habits = Habits()
        self._memory = StageMemory()
        self.outlook = Outlook()
        self._paused: Recent[tuple[str, str], Recent[str, None]] = Recent(_MAX_RUNS)

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
        call: str = "",
    ) -> tuple[list[core.Event], float | None]:
        """A call arrived. Returns scheduler events and the lead time in seconds, None if none.

        A run that has ended starts anew. A retry (the same run, stage and instance again) has the
        lead time of its first attempt. `call` is a unique name: parallel calls of one stage and
        instance are told apart by it.
        """
        if identity.run is None:
            return [], None
        self._renew(identity.run, now)
        events = list(self._ensure(identity.run, identity, slo, now))
        run = self.runs[identity.run]
        stage = identity.stage or shape.role
        if not stage:
            return events, None
        expected = self._expected(run, stage)
        lead_s = run.meet(stage, identity.instance, now, expected=run.awaits(stage, expected))
        beside = announcement.barrier.width if announcement and announcement.barrier else 1
        if not run.events_seen:
            self._begin(run, stage, expected=expected, beside=beside)
        if not run.events_seen or self._ahead(run, stage):
            run.step_width[stage] = beside
        run.call(stage)
        run.position.again.pop(stage, None)
        self._note(run, stage, shape)
        quick = self._predictor.predict(shape)
        self.outlook.arrived(run, stage, identity.instance, shape, quick, now, call)
        if announcement is not None:
            run.announcements[stage] = announcement
            events.append(announced(run.run, stage, announcement))
        return [*events, *self._forecast(run, now)], lead_s

    def call_predicted(
        self, identity: CallIdentity, role: str, prediction: Prediction, call: str = ""
    ) -> list[core.Event]:
        """The model has said what a call will take, and what is left of its run."""
        run = self.runs.get(identity.run or "")
        if run is None or run.ended is not None:
            return []
        stage = identity.stage or role
        self.outlook.predicted(run, stage, identity.instance, prediction, call)
        before, run.rest = run.rest, self.outlook.rest(run, run.charted)
        return [core.ForecastChanged(run.run, run.forecast, run.rest)] if run.rest != before else []

    def call_ended(
        self,
        identity: CallIdentity,
        now: float,
        outcome: CallOutcome | None = None,
        role: str = "",
        call: str = "",
    ) -> list[core.Event]:
        """The call is over, however it went; with an `outcome` it is learned from. A call that
        came without a stage is known by its `role`."""
        run = self.runs.get(identity.run or "")
        stage = identity.stage or role
        if run is None or not stage:
            return []
        run.hang_up(stage)
        self.outlook.ended(run, stage, identity.instance, outcome, now, call)
        if not run.events_seen and not run.live(stage):
            # No adapter tells us about stages: the end of the call stands for the stage's.
            run.position.expect_after(stage, self._following(run, stage))
            run.announcements.pop(stage, None)
        return list(self._forecast(run, now)) if run.ended is None else []

    def waits_for(self, identity: CallIdentity) -> tuple[str, ...]:
        """The sources of the stage's join, if it has one."""
        workflow = self.workflows.get(identity.workflow or "")
        return workflow.join_sources(identity.stage) if workflow and identity.stage else ()

    def next_of(self, run: str, stage: str) -> dict[str, float]:
        """What is believed to follow a stage of a run: probability by stage, END among them."""
        known = self.runs[run]
        announcement = known.announcements.get(stage)
        visit = self._visit(known, stage)
        transitions = self._habits_of(known).transitions
        return chances(self._graph(known), stage, transitions, announcement, visit)

    # --- run events -----------------------------------------------------------------------------

    def run_event(self, run: str, event: RunEvent, now: float) -> list[core.Event]:
        """One event of a run, as posted. Returns what the scheduler should know."""
        return list(self._follow(run, event, now))

    def _follow(self, name: str, event: RunEvent, now: float) -> Iterator[core.Event]:
        if isinstance(event, RunStarted):
            self._renew(name, now)
            identity = CallIdentity(workflow=event.workflow, conversation=event.conversation)
            yield from self._ensure(name, identity, event.slo, now, event.tenant)
            yield from self._end_paused(self.runs[name], now)
        else:
            yield from self._ensure(name, CallIdentity(), None, now)
        run = self.runs[name]
        if run.ended is None:
            self._hear(run, event)
            self._advance(run, event, now)
        yield from told(name, event)
        if run.ended is None:
            yield from self._forecast(run, now)

    def _hear(self, run: Run, event: RunEvent) -> None:
        """The first event of a run: from now on events say where it stands.

        If it is the run's start, all that calls have told is told again, and in order.
        """
        if run.events_seen:
            return
        run.events_seen = True
        if isinstance(event, RunStarted):
            run.position = Position()
            run.position.expect_after(START, self._following(run, START))
            return
        for stage, calls in run.calling.items():
            run.position.executing[stage] = run.made[stage] = calls

    def _advance(self, run: Run, event: RunEvent, now: float) -> None:
        match event:
            case StageStarted():
                if not event.attempt:
                    self._begin(run, event.stage, expected=self._expected(run, event.stage))
                run.position.enter(event.stage)
                run.step_width.pop(event.stage, None)
            case StageEnded():
                self._stage_ended(run, event)
            case ToolsRequested():
                run.position.again[event.stage] = None
            case RunPaused():
                run.pause()
                run.log.strike()
                key = (run.workflow, run.conversation or run.run)
                self._paused.use(key, lambda: Recent(_MAX_PAUSED))[run.run] = None
            case RunResumed():
                run.paused = False
            case RunEnded():
                dropped = event.failed or run.paused  # who never came back shows no end
                if not dropped:
                    self._learn_the_end(run)
                self.outlook.over(run, failed=dropped)
                run.finish(now, event.failed)

    def _end_paused(self, run: Run, now: float) -> Iterator[core.Event]:
        """A conversation that goes on with a new run has given up its paused ones."""
        for name in self._paused.pop((run.workflow, run.conversation or run.run), ()):
            other = self.runs.get(name)
            if name != run.run and other is not None and other.paused:
                self.outlook.over(other, failed=True)
                other.finish(now, failed=False)
                yield core.RunEnded(name)

    def _expected(self, run: Run, stage: str) -> bool:
        return any(e.stage == stage for e in self._starts(run))

    def _begin(self, run: Run, stage: str, *, expected: bool, beside: int = 1) -> None:
        """A stage begins. If nothing led there, and it is no further call or instance: a jump."""
        certain, candidates = self._graph(run).successors(stage)
        position = run.position
        if not expected:
            if run.live(stage) or position.in_round(stage, (*certain, *candidates)):
                return self._go_on(run, stage)
            self._jump(run, stage)
        item = position.begin(stage, beside)
        if item is not None and not item.certain and run.events_seen:
            visit = position.visits.get(item.after, 1)
            self._habits_of(run).transitions.learn(self._graph(run), item.after, visit, stage)

    def _go_on(self, run: Run, stage: str) -> None:
        """Where only calls tell of a stage, several may be of one execution."""
        if run.events_seen:
            run.position.begin(stage)

    def _jump(self, run: Run, stage: str) -> None:
        """Pending stages that lead to `stage` were passed; if none does, the run is elsewhere.

        Who passes a certain stage shows that it makes no call. Not so with events, which tell that
        themselves, nor in a run first seen here: it may have resumed behind that stage.
        """
        position, graph = run.position, self._graph(run)
        watched = bool(position.begun)
        position.whole = position.whole and watched
        pending = position.pending.values()
        passed = [e for e in pending if leads(graph, e.stage, stage, position.begun)]
        if not (passed and watched):
            position.pending.clear()
            return
        for item in passed:
            if item.certain and not run.events_seen:
                self._memory.facts(run.workflow, item.stage).silent += 1
            position.begin(item.stage)
            position.pending.pop(item.stage, None)

    def _stage_ended(self, run: Run, event: StageEnded) -> None:
        stage, position = event.stage, run.position
        self._learn_calls(run, event)
        position.exit(stage)
        visit = event.instance + 1
        if event.failed:
            position.expect_after(stage, [])
        elif event.next is None:
            position.expect_after(stage, self._following(run, stage, visit))
        else:
            position.expect_after(stage, list(_chosen(event)))
            position.again.pop(stage, None)
            self._learn_route(run, event, visit)
        if not run.live(stage):
            run.announcements.pop(stage, None)

    # --- learning -------------------------------------------------------------------------------

    def _learn_route(self, run: Run, event: StageEnded, visit: int) -> None:
        workflow, stage = self._graph(run), event.stage
        transitions = self._habits_of(run).transitions
        certain, _ = workflow.successors(stage)
        followers = [s for s in event.next or () if s.stage not in certain]
        if not followers:
            transitions.learn(workflow, stage, visit, END)
        for successor in followers:
            if successor.certain:  # else it is still open, and learned when it begins
                transitions.learn(workflow, stage, visit, successor.stage)
                key = (run.workflow, stage, successor.stage)
                self._habits.widths.learn(key, successor.width or 1)

    def _learn_calls(self, run: Run, event: StageEnded) -> None:
        several = self._several(run, event.stage)
        own = run.settle(event.stage, several=several)
        if own == 0 and not event.failed:
            run.excuse(event.stage)
            self._memory.facts(run.workflow, event.stage).silent += 1
        elif own and several:
            self._habits.calls.learn((run.workflow, event.stage), own)

    def _learn_the_end(self, run: Run) -> None:
        """Candidates that nobody said were not chosen, and calls that are left over: now it shows
        that the run ended instead, and that a stage makes several calls in one execution."""
        position, graph = run.position, self._graph(run)
        for stage in dict.fromkeys(e.after for e in position.pending.values() if not e.certain):
            visit = position.visits.get(stage, 1)
            self._habits_of(run).transitions.learn(graph, stage, visit, END)
        for stage in run.made:
            if stage in position.visits and stage not in position.executing:
                self._memory.facts(run.workflow, stage).several = True

    def _several(self, run: Run, stage: str) -> bool:
        return self._memory.known(run.workflow, stage).several

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
            not run.told or (identity.workflow and not run.workflow) or slo not in (None, run.slo)
        )
        run.told = True
        run.workflow = run.workflow or identity.workflow or ""
        run.conversation = run.conversation or identity.conversation
        run.slo, run.tenant = slo or run.slo, tenant or run.tenant
        if changed:
            if not run.position.begun:
                run.position.expect_after(START, self._following(run, START))
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

    def _following(self, run: Run, stage: str, visit: int | None = None) -> list[Expected]:
        return self._follow_up(run)(stage, self._visit(run, stage) if visit is None else visit)

    def _follow_up(self, run: Run) -> Callable[[str, int], list[Expected]]:
        """What follows a stage of the run on a visit."""
        graph, transitions = self._graph(run), self._habits_of(run).transitions
        told = run.announcements.get
        return lambda stage, visit: next_stages(graph, stage, transitions, told(stage), visit)

    def _visit(self, run: Run, stage: str) -> int:
        """The execution of `stage` that was heard of last, counted from 1."""
        return max(1, run.position.visits.get(stage, 0) + self._ahead(run, stage))

    def _ahead(self, run: Run, stage: str) -> int:
        return run.ahead(stage, several=self._several(run, stage))

    def _starts(self, run: Run) -> list[Expected]:
        follow = self._follow_up(run)
        return run.position.starts(
            run.running(),
            lambda s: follow(s, self._visit(run, s)),
            lambda s: self._ahead(run, s),
        )

    def _forecast(self, run: Run, now: float) -> Iterator[core.Event]:
        starts, habits, past = self._starts(run), self._habits_of(run), self._past(run)
        workflow = self._graph(run, starts)
        expected: dict[str, core.ForecastCall | None] = {}

        def predict(stage: Stage) -> core.ForecastCall | None:
            if stage.path not in expected:
                near = len(expected) < _NEAR
                expected[stage.path] = self._expected_call(run, stage, near=near)
            return expected[stage.path]

        reached = Reach(workflow, habits, past).of(starts)
        calls = forecast(workflow, starts, habits, predict, past, reached)
        ahead: tuple[Future, bool] | None = None
        if run.workflow in self.workflows:
            sure = _sure(run, workflow) and certain(workflow, starts, habits, past, reached)
            if sure or not self.outlook.taught(run):
                future, _ = critical_path(workflow, starts, habits, predict, past, reached)
                ahead = future, sure
        before = run.forecast, run.rest
        run.believe(calls, now)
        run.charted, run.rest = ahead, self.outlook.rest(run, ahead)
        if (calls, run.rest) != before:
            yield core.ForecastChanged(run.run, calls, run.rest)

    def _past(self, run: Run) -> Past:
        running = run.running() if run.events_seen else {}
        return Past(
            visits=run.position.visits,
            arrived=run.position.arrived,
            copies=run.position.copies,
            running={s: (number, run.made.get(s, 0)) for s, number in running.items()},
            ahead=lambda stage: self._ahead(run, stage),
            step_width=run.step_width if run.events_seen else {},
        )

    def _graph(self, run: Run, starts: Iterable[Expected] = ()) -> Workflow:
        """The announced graph; else the learned one, with what was announced or chosen in it."""
        known = self.workflows.get(run.workflow)
        return known or self.outlook.graph(run, (e.stage for e in starts))

    def _habits_of(self, run: Run) -> Habits:
        return self.outlook.habits(run, self._habits, learned=run.workflow not in self.workflows)

    def _expected_call(self, run: Run, stage: Stage, *, near: bool) -> core.ForecastCall | None:
        chance = self._memory.calls_chance(run.workflow, stage)
        if not chance:
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
        predicted = self._predictor.expect(shape) if near else self._predictor.predict(shape)
        prompt = run.log.prompts.get(stage.path)
        if prompt is not None:
            grown = self.outlook.journeys.growth_tokens(run.workflow, stage.path, shape.role)
            prompt = max(0, prompt + int(grown))
        return core.ForecastCall(
            stage=stage.path,
            role=shape.role,
            model=shape.model,
            probability=chance,
            earliest_start_s=0.0,
            prompt_tokens=predicted.prompt_tokens if prompt is None else prompt,
            length=predicted.length,
            service_s=predicted.service_s,
        )

    def _note(self, run: Run, stage: str, shape: CallShape) -> None:
        facts = self._memory.facts(run.workflow, stage)
        facts.calls += 1
        facts.model, facts.role = shape.model, shape.role
        facts.prompt_bytes, facts.max_tokens = shape.prompt_bytes, shape.max_tokens


def _chosen(event: StageEnded) -> Iterator[Expected]:
    """What routing said: certain successors, and those that share what is still open."""
    said = event.next or ()
    share = 1.0 / max(1, sum(not s.certain for s in said))
    for s in said:
        stated = share if s.probability is None else s.probability
        yield Expected(s.stage, 1.0 if s.certain else stated, s.certain, event.stage, s.width)


def _sure(run: Run, workflow: Workflow) -> bool:
    """Whether the graph, or what the calls announced, tells all that follows where the run
    stands."""
    for call in run.log.front():
        said = run.announcements.get(call.stage)
        closed = said is not None and said.successors and not said.open_ended
        if call.stage not in workflow.stage_by_path:
            return False
        if call.stage in workflow.open_ended and not closed:
            return False
    return not run.paused
