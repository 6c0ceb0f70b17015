"""Whatever clients send, in whatever order: the book does not fail and stays sane."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from maestro_agents.protocol import (
    END,
    START,
    Announcement,
    CallIdentity,
    Edge,
    Join,
    RunEnded,
    RunEvent,
    RunPaused,
    RunStarted,
    Slo,
    Stage,
    StageEnded,
    StageStarted,
    Successor,
    ToolEnded,
    Workflow,
)
from maestro_backend import scheduler as core
from maestro_backend.predictor import CallShape, Predictor
from maestro_backend.workflows import Run, WorkflowBook

PATHS = ("a", "b", "c", "d")


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


# Few names, so that messages meet; "e" is in no graph, the pseudo-stages are in every one.
stages = st.sampled_from((*PATHS, "e", START, END))
sources, targets = st.sampled_from((*PATHS, START)), st.sampled_from((*PATHS, END))
graphs = st.builds(
    Workflow,
    name=st.just("w"),
    stages=st.just(tuple(Stage(path=path) for path in PATHS)),
    edges=st.lists(
        st.builds(Edge, source=sources, target=targets, candidate=st.booleans()), max_size=10
    ).map(tuple),
    joins=st.lists(
        st.builds(
            Join,
            sources=st.lists(sources, min_size=1, max_size=3, unique=True).map(tuple),
            target=targets,
        ),
        max_size=2,
    ).map(tuple),
)
successors = st.builds(
    Successor, stage=stages, certain=st.booleans(), probability=maybe(st.floats(0, 1))
)
many = st.integers(0, 1).map(
    lambda part: tuple(Successor(stage=f"{part}-{n}", certain=True) for n in range(600))
)
announcements = st.builds(
    Announcement,
    successors=st.lists(successors, max_size=5).map(tuple) | many,
    open_ended=st.booleans(),
)
slos = st.builds(Slo, class_=st.sampled_from(("interactive", "batch", "odd")))
runs = st.sampled_from(("r", "q"))
events = st.one_of(
    st.builds(RunStarted, slo=maybe(slos)),
    st.builds(StageStarted, stage=stages, instance=st.integers(0, 2)),
    st.builds(
        StageEnded,
        stage=stages,
        failed=st.booleans(),
        next=maybe(st.lists(successors, max_size=3).map(tuple)),
    ),
    st.builds(ToolEnded, stage=stages, tool=st.just("t")),
    st.builds(RunPaused),
    st.builds(RunEnded),
)
calls = st.tuples(
    maybe(runs), maybe(stages), st.integers(0, 2), st.booleans(), maybe(announcements), maybe(slos)
)
steps = st.lists(calls | st.tuples(runs, events) | st.none(), max_size=40)


class Feed:
    """Tells a book one step after the other; None ends the oldest open call."""

    def __init__(self, workflow: Workflow, *, registered: bool) -> None:
        self.book = WorkflowBook(Predictor(), {"standard": 120.0, "batch": None})
        self.workflow = workflow.id
        self.open: list[CallIdentity] = []
        if registered:
            self.book.put(workflow)

    def tell(self, step: Any, now: float) -> None:
        match step:
            case None:
                if self.open:
                    self.book.call_ended(self.open.pop(0), now)
            case (str() as run, event):
                self.event(run, event, now)
            case (run, stage, instance, named, announcement, slo):
                workflow = self.workflow if named else None
                identity = CallIdentity(run=run, workflow=workflow, stage=stage, instance=instance)
                self.call(identity, announcement, slo, now)

    def event(self, run: str, event: RunEvent, now: float) -> None:
        sane(self.book.run_event(run, event, now))

    def call(
        self, identity: CallIdentity, announcement: Announcement | None, slo: Slo | None, now: float
    ) -> None:
        shape = CallShape("m", identity.workflow or "", identity.stage or "")
        events, lead_s = self.book.call_arrived(identity, announcement, shape, slo, now)
        sane(events)
        assert lead_s is None or lead_s >= 0
        self.book.waits_for(identity)
        self.open.append(identity)


def sane(events: list[core.Event]) -> None:
    for event in events:
        if isinstance(event, core.ForecastChanged):
            assert all(0.0 <= call.probability <= 1.0 for call in event.calls)
            assert all(call.earliest_start_s >= 0.0 for call in event.calls)


def balanced(feed: Feed, run: Run) -> None:
    """The calls that count as running are those that have not ended."""
    calling = [i.stage for i in feed.open if i.run == run.run and i.stage is not None]
    assert run.calling == {stage: calling.count(stage) for stage in calling}


@given(graphs, st.booleans(), steps)
def test_no_order_of_messages_makes_the_book_fail(
    workflow: Workflow, registered: bool, told: list[Any]
) -> None:
    feed = Feed(workflow, registered=registered)
    for now, step in enumerate(told):
        feed.tell(step, float(now))
        for run in feed.book.runs.values():
            assert run.announced_never_made >= 0
            assert all(lead is None or lead >= 0 for _, lead in run.lead_times_s)
            assert run.ended is None or not run.forecast
            balanced(feed, run)
