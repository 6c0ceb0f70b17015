"""Messages survive the wire, ignore what they do not know, and refuse what breaks a limit."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from protocol.strategies import annotations, identities, posts, workflows
from pydantic import ValidationError

from maestro_agents.protocol import (
    MAX_EDGES,
    MAX_EVENTS,
    MAX_STAGES,
    Annotation,
    Announcement,
    Barrier,
    Edge,
    Join,
    Message,
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
    schema_text,
    wire_schema,
)

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"

RESEARCH = Workflow(
    name="research-team",
    stages=(
        Stage(path="plan", role="planner", model="large", calls=True),
        Stage(path="research/model", role="researcher", calls=True),
        Stage(path="research/tools", calls=False),
        Stage(path="write"),
        Stage(path="überprüfen", role="critic"),
    ),
    edges=(
        Edge(source="__start__", target="plan"),
        Edge(source="plan", target="research/model", candidate=True),
        Edge(source="research/model", target="research/tools", candidate=True),
        Edge(source="research/tools", target="research/model"),
        Edge(source="write", target="überprüfen"),
        Edge(source="überprüfen", target="write", candidate=True),
        Edge(source="überprüfen", target="__end__", candidate=True),
    ),
    joins=(Join(sources=("research/model", "research/tools"), target="write"),),
    open_ended=("plan",),
    supersteps=True,
)
ANNOTATION = Annotation(
    role="planner",
    announcement=Announcement(
        successors=(
            Successor(stage="research/model", certain=True, width=3),
            Successor(stage="write", probability=0.75),
        ),
        open_ended=True,
        barrier=Barrier(step=2, width=3),
    ),
    slo=Slo(class_="interactive", deadline_s=20),
    tenant="team-a",
)
EVENTS = RunEvents(
    events=(
        RunStarted(at=1.5, workflow=RESEARCH.id, conversation="c1", slo=Slo(), tenant="team-a"),
        StageStarted(at=2, stage="plan", instance=0, step=1),
        ToolsRequested(at=2.5, stage="plan", tools=("search",)),
        StageEnded(at=3, stage="plan", next=(Successor(stage="research/model", width=2),)),
        ToolStarted(at=4, stage="research/tools", tool="search"),
        ToolEnded(at=5, stage="research/tools", tool="search", duration_s=0.25),
        RunPaused(at=6),
        RunResumed(at=7),
        RunEnded(at=8, failed=True),
    )
)


def sent(message: Message) -> Any:
    return json.loads(message.model_dump_json(by_alias=True, exclude_none=True))


@pytest.mark.parametrize(
    ("name", "message"),
    [("workflow", RESEARCH), ("annotation", ANNOTATION), ("events", EVENTS)],
)
def test_the_wire_form_is_the_committed_one(name: str, message: Message) -> None:
    golden = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    assert sent(message) == golden
    assert type(message).model_validate(golden) == message


def test_the_committed_schema_is_that_of_the_messages() -> None:
    committed = (ROOT / "docs" / "protocol.schema.json").read_text(encoding="utf-8")
    assert json.loads(committed) == wire_schema()
    assert committed == schema_text()


@given(st.one_of(annotations, identities, posts, workflows()))
def test_every_message_survives_the_wire(message: Message) -> None:
    assert type(message).model_validate_json(message.model_dump_json(by_alias=True)) == message


def with_unknown_fields(value: Any) -> Any:
    if isinstance(value, dict):
        known = {key: with_unknown_fields(item) for key, item in value.items()}
        return {**known, "from_the_future": {"x": 1}}
    return [with_unknown_fields(item) for item in value] if isinstance(value, list) else value


@given(st.one_of(annotations, posts, workflows()))
def test_unknown_fields_are_ignored_at_every_level(message: Message) -> None:
    assert type(message).model_validate(with_unknown_fields(sent(message))) == message


def test_messages_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ANNOTATION.role = "other"  # type: ignore[misc]  # the point of the test


STAGES = [{"path": "a"}]
STEP = {"source": "a", "target": "a"}


@pytest.mark.parametrize(
    ("kind", "body", "where"),
    [
        (Annotation, {"role": ""}, "role"),
        (Annotation, {"role": "r" * 257}, "role"),
        (Annotation, {"slo": {"deadline_s": 0}}, "slo.deadline_s"),
        (
            Annotation,
            {"announcement": {"successors": [{"stage": "a", "probability": 1.1}]}},
            "announcement.successors.0.probability",
        ),
        (
            Annotation,
            {"announcement": {"successors": [{"stage": "a"}] * 1001}},
            "announcement.successors",
        ),
        (RunEvents, {"events": [{"type": "run_paused"}] * (MAX_EVENTS + 1)}, "events"),
        (RunEvents, {"events": [{"type": "coffee_break"}]}, "events.0"),
        (RunEvents, {"events": [{"type": "stage_started"}]}, "events.0.stage_started.stage"),
        (Workflow, {"name": "a@b", "stages": STAGES}, "name"),
        (Workflow, {"name": "a b", "stages": STAGES}, "name"),
        (Workflow, {"name": "w", "stages": [{"path": f"{i}"} for i in range(1001)]}, "stages"),
        (Workflow, {"name": "w", "stages": STAGES, "edges": [STEP] * (MAX_EDGES + 1)}, "edges"),
        (
            Workflow,
            {"name": "w", "stages": STAGES, "joins": [{"sources": [], "target": "a"}]},
            "joins.0.sources",
        ),
    ],
)
def test_a_broken_limit_is_refused_and_located(
    kind: type[Message], body: dict[str, Any], where: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert [".".join(map(str, e["loc"])) for e in caught.value.errors()] == [where]


def test_the_limits_themselves_are_allowed() -> None:
    stages = [{"path": f"{i}"} for i in range(MAX_STAGES)]
    edges = [{"source": "0", "target": "1"}] * MAX_EDGES
    assert len(Workflow.model_validate({"name": "w", "stages": stages, "edges": edges}).stages)
    posted = RunEvents.model_validate({"events": [{"type": "run_paused"}] * MAX_EVENTS})
    assert len(posted.events) == MAX_EVENTS
