"""What all calls of all runs taught, and what it says of one live run: its habits and its rest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import exp2, hypot, log2

from maestro_agents.protocol import END, START, Workflow
from maestro_backend.predictor import CallOutcome, CallShape, Prediction, Recent, app_of, remaining
from maestro_backend.scheduler import Rest

from ._call_log import CallLog, Logged
from ._futures import Future
from ._journey import Journey
from ._journeys import Journeys, steps
from ._learned_graph import LearnedGraphs, LearnedTransitions, LearnedWidths
from ._nouns import Habits
from ._rest_mix import RestMix
from ._run import Run

SILENT_S = 600.0
"""A run of which only calls tell is over after so much silence: as the predictor has it (ours)."""
_MAX_SILENT = 10_000
_MODEL_RUNS = 16
"""What the model says of the rest counts as so many runs of the stage (ours)."""
_GRAPH_RUNS = 4.0
"""What the graph says of the rest counts as so many runs of the stage (ours)."""
_MANY_RUNS = 16
"""So many runs of a stage say more of the rest than a graph with choices in it (ours)."""


class Outlook:
    """Learns from calls alone, announced or not; apps are told apart by the workflow's name."""

    def __init__(self) -> None:
        self.journeys = Journeys()
        self._mix = RestMix()
        self._graphs = LearnedGraphs(self.journeys)
        self._unheard: Recent[str, Run] = Recent(_MAX_SILENT)

    # --- calls ----------------------------------------------------------------------------------

    def arrived(
        self,
        run: Run,
        stage: str,
        instance: int,
        shape: CallShape,
        told: Prediction,
        now: float,
        call: str = "",
    ) -> None:
        """A call has arrived; `stage` is under what it is learned (`identity.stage`, or a role),
        `call` its unique name, if it has one."""
        self._end_silent(now)
        app = app_of(run.workflow)
        shape = replace(shape, stage=stage, workflow=run.workflow)
        if shape.prompt_tokens < 0:
            shape = replace(shape, prompt_tokens=told.prompt_tokens)
        if not run.log.calls:
            self.journeys.branches.learn(app, Journey(last=START), stage)
        for parent in run.log.ended.values():
            if stage not in parent.led_to:
                parent.led_to.add(stage)
                self.journeys.branches.learn(app, parent.after, stage)
        logged = run.log.arrive(stage, instance, shape, told.length, now, call)
        logged.future = self.journeys.future(app, logged.shape, logged.before)
        logged.taught = logged.future.runs
        self._unheard[run.run] = run

    def predicted(
        self, run: Run, stage: str, instance: int, prediction: Prediction, call: str = ""
    ) -> None:
        """What the model says of a call in progress, and of its run from there on."""
        logged = run.log.find(stage, instance, call)
        if logged is None:
            return
        own = logged.current = prediction.length
        if prediction.rest is None:
            return
        trees, journeys = Rest(*prediction.rest), _rest(logged, True, None)
        run.log.say(logged, trees, journeys)
        mixed = self._mix.of(app_of(run.workflow), trees, journeys)
        p50, p90 = max(0.0, mixed.p50 - own.p50), max(0.0, mixed.p90 - own.p50)
        logged.future = Future(p50, p90, mixed.calls, max(logged.taught, _MODEL_RUNS))

    def ended(
        self,
        run: Run,
        stage: str,
        instance: int,
        outcome: CallOutcome | None,
        now: float,
        call: str = "",
    ) -> None:
        """A call is over; without an outcome it failed. The run's silence begins now."""
        logged = run.log.find(stage, instance, call)
        if logged is not None:
            run.log.end(logged, outcome, now)
            self._unheard[run.run] = run

    def over(self, run: Run, *, failed: bool) -> None:
        """The run has ended: learn what became of each of its calls. Not of a run that failed, or
        was given up."""
        log, run.log = run.log, CallLog()
        self._unheard.pop(run.run, None)
        if failed or not log.calls:
            return
        app = app_of(run.workflow)
        leaves = list(log.leaves())
        if leaves and not log.open:
            self.journeys.branches.learn(app, leaves[-1].after, END)
        if log.whole:
            examples = log.examples(run.run, run.workflow)
            self._mix.learn(app, *log.said(remaining(examples)))
            self.journeys.learn_rest(examples, list(steps(examples)))

    def _end_silent(self, now: float) -> None:
        while self._unheard:
            name, run = next(iter(self._unheard.items()))
            if now - run.log.heard_s < SILENT_S:
                return
            del self._unheard[name]  # an open call puts it back when it ends
            if not run.events_seen and not run.log.open:
                self.over(run, failed=False)

    # --- what it says ---------------------------------------------------------------------------

    def graph(self, run: Run, announced: Iterable[str] = ()) -> Workflow:
        """The learned graph of the run's app, with the stages that were announced to the run."""
        return self._graphs.graph(app_of(run.workflow), announced)

    def habits(self, run: Run, habits: Habits, *, learned: bool) -> Habits:
        """`habits` with the gaps and growth of the run's app; with its branches and fan-outs too
        where the graph is a `learned` one."""
        app = app_of(run.workflow)
        found = replace(
            habits,
            gap_s=lambda source, target: self.journeys.gap_s(app, source, target),
            growth_tokens=lambda stage: self.journeys.growth_tokens(app, stage),
        )
        if not learned:
            return found
        transitions = LearnedTransitions(self.journeys, app, run.log.at)
        return replace(found, transitions=transitions, widths=LearnedWidths(self.journeys, app))

    def taught(self, run: Run) -> bool:
        """Whether enough runs taught of where the run stands to leave a graph with choices aside;
        what the model says is not counted."""
        front = run.log.front()
        return bool(front) and all(call.taught >= _MANY_RUNS for call in front)

    def rest(self, run: Run, graph: tuple[Future, bool] | None) -> Rest | None:
        """T_rem of a run: over its calls in progress the longest, else after those that ended.

        `graph`: what the announced graph says of what comes after them, and whether all of that
        is certain; then it alone counts, else as four runs. None before anything is known.
        """
        found = [_rest(call, call.index in run.log.open, graph) for call in run.log.front()]
        if not found:
            return Rest(graph[0].p50, graph[0].p90, graph[0].calls) if graph else None
        longest = max(found, key=lambda rest: rest.p50)
        return Rest(longest.p50, max(rest.p90 for rest in found), longest.calls)


def _rest(call: Logged, running: bool, graph: tuple[Future, bool] | None) -> Rest:
    future = call.future if graph is None else _blended(call.future, *graph)
    if not running:
        return Rest(future.p50, future.p90, future.calls)
    p50 = call.current.p50 + future.p50
    spread = hypot(call.current.p90 - call.current.p50, future.p90 - future.p50)
    return Rest(p50, p50 + spread, future.calls)


def _blended(learned: Future, graph: Future, certain: bool) -> Future:
    if certain or not learned.runs:
        return graph
    share = _GRAPH_RUNS / (_GRAPH_RUNS + learned.runs)
    return Future(
        _between(learned.p50, graph.p50, share),
        _between(learned.p90, graph.p90, share),
        learned.calls + share * (graph.calls - learned.calls),
        learned.runs,
    )


def _between(low: float, high: float, share: float) -> float:
    """On a log scale."""
    return exp2((1.0 - share) * log2(1.0 + low) + share * log2(1.0 + high)) - 1.0
