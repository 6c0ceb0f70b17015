"""Hypothesis strategies for every wire message."""

from typing import Any

from hypothesis import strategies as st

from maestro_agents.protocol import (
    END,
    START,
    Annotation,
    Announcement,
    Barrier,
    CallIdentity,
    Edge,
    Join,
    RunEnded,
    RunEvents,
    RunPaused,
    RunResumed,
    RunStarted,
    Slo,
    Stage,
    StageEnded,
    StageStarted,
    Successor,
    ToolEnded,
    ToolsRequested,
    ToolStarted,
    Workflow,
)

names = st.text(min_size=1, max_size=256)
numbers = st.integers(0, 10**9 - 1)
seconds = st.floats(0, 1e9)


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


slos = st.builds(Slo, class_=names, deadline_s=maybe(st.floats(1e-3, 604_800)))
successors = st.builds(
    Successor,
    stage=names,
    certain=st.booleans(),
    probability=maybe(st.floats(0, 1)),
    width=maybe(st.integers(1, 100_000)),
)
announcements = st.builds(
    Announcement,
    successors=st.lists(successors, max_size=4).map(tuple),
    open_ended=st.booleans(),
    barrier=maybe(st.builds(Barrier, step=numbers, width=st.integers(1, 99))),
)
annotations = st.builds(
    Annotation,
    role=maybe(names),
    announcement=maybe(announcements),
    slo=maybe(slos),
    tenant=maybe(names),
)
identities = st.builds(
    CallIdentity,
    run=maybe(names),
    workflow=maybe(names),
    stage=names,
    instance=numbers,
    conversation=maybe(names),
)
events = st.one_of(
    st.builds(
        RunStarted,
        at=seconds,
        workflow=maybe(names),
        conversation=maybe(names),
        slo=maybe(slos),
        tenant=maybe(names),
    ),
    st.builds(StageStarted, at=seconds, stage=names, instance=numbers, step=maybe(numbers)),
    st.builds(
        StageEnded,
        at=seconds,
        stage=names,
        instance=numbers,
        failed=st.booleans(),
        next=maybe(st.lists(successors, max_size=3).map(tuple)),
    ),
    st.builds(
        ToolsRequested,
        at=seconds,
        stage=names,
        instance=numbers,
        tools=st.lists(names, max_size=4).map(tuple),
    ),
    st.builds(ToolStarted, at=seconds, stage=names, tool=names),
    st.builds(ToolEnded, at=seconds, stage=names, tool=names, duration_s=seconds),
    st.builds(RunPaused, at=seconds),
    st.builds(RunResumed, at=seconds),
    st.builds(RunEnded, at=seconds, failed=st.booleans()),
)
posts = st.builds(RunEvents, events=st.lists(events, max_size=5).map(tuple))


@st.composite
def workflows(draw: st.DrawFn) -> Workflow:
    stage_names = names.filter(lambda name: name not in (START, END))
    paths = draw(st.lists(stage_names, min_size=1, max_size=5, unique=True))
    stages = tuple(
        Stage(path=path, role=draw(maybe(names)), calls=draw(maybe(st.booleans())))
        for path in paths
    )
    inner, source, target = (
        st.sampled_from(paths),
        st.sampled_from([START, *paths]),
        st.sampled_from([*paths, END]),
    )
    edge = st.builds(Edge, source=source, target=target, candidate=st.booleans())
    join = st.builds(
        Join,
        sources=st.lists(inner, min_size=1, max_size=3, unique=True).map(tuple),
        target=target,
    )
    return Workflow(
        name=draw(st.from_regex(r"[a-z-]{1,20}", fullmatch=True)),
        stages=stages,
        edges=tuple(draw(st.lists(edge, max_size=8, unique=True))),
        joins=tuple(draw(st.lists(join, max_size=3, unique=True))),
        open_ended=tuple(draw(st.lists(inner, max_size=2, unique=True))),
        supersteps=draw(st.booleans()),
    )
