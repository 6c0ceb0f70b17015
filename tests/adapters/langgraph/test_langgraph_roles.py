"""Which role each stage plays."""

from typing import Any

import pytest
from langchain.agents import create_agent
from langgraph.graph import START
from sdk.read_graphs import MODEL, State, calc, graph_of, node, read

from maestro_agents import ConfigError, agent


def team_with_roles() -> Any:
    @agent(role="marked", model="big")
    def marked(state: State) -> State:
        return {}

    async def async_marked(state: State) -> State:
        return {}

    inner = graph_of("agent", "step").add_edge(START, "agent").add_edge("agent", "step")
    expert = create_agent(MODEL, [calc], name="expert")
    builder = graph_of("plan").add_node("marked", marked)
    builder.add_node("async_marked", agent(role="async")(async_marked))
    builder.add_node("tagged", node, metadata={"role": "tagged-role"})
    builder.add_node("sub", inner.compile()).add_node("hired", expert)
    return builder.add_edge(START, "plan").compile()


def roles(**options: Any) -> dict[str, str | None]:
    return {stage.path: stage.role for stage in read(team_with_roles(), **options).stages}


def test_roles_by_default() -> None:
    assert roles() == {
        "plan": "plan",
        "marked": "marked",
        "async_marked": "async",
        "tagged": "tagged-role",
        "sub/agent": "sub",
        "sub/step": "step",
        "hired/model": "expert",
        "hired/tools": "expert",
    }


def test_roles_given_win_by_path_then_by_parent_then_by_name() -> None:
    given = {"marked": "m", "sub": "s", "sub/step": "exact", "tools": "t", "tagged": "x"}
    assert roles(roles=given) == {
        "plan": "plan",
        "marked": "m",
        "async_marked": "async",
        "tagged": "x",
        "sub/agent": "s",
        "sub/step": "exact",
        "hired/model": "expert",
        "hired/tools": "t",
    }


def test_roles_for_what_is_not_there_are_loud() -> None:
    with pytest.raises(ConfigError, match=r"\['plam'\].*'plan'"):
        roles(roles={"plam": "planner"})


def test_agent_says_the_model() -> None:
    stages = read(team_with_roles()).stage_by_path
    assert (stages["marked"].model, stages["plan"].model) == ("big", None)
