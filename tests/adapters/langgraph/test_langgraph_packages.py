"""What is read out of graphs that LangChain's own packages build."""

import pytest
from langchain.agents import create_agent
from langchain_core.tools import tool
from langgraph_supervisor import create_supervisor
from langgraph_swarm import create_handoff_tool, create_swarm
from sdk.read_graphs import MODEL, calc, edges, read


def test_an_agent_with_tools() -> None:
    workflow = read(create_agent(MODEL, [calc], name="calculator"))
    assert edges(workflow) == {
        "__start__ -> model",
        "model ~> tools",
        "model ~> __end__",
        "tools ~> model",
    }
    assert workflow.name == "calculator"
    assert [stage.role for stage in workflow.stages] == ["calculator", "calculator"]


def test_a_supervisor_of_the_package() -> None:
    agents = [create_agent(MODEL, [calc], name=name) for name in ("maths", "search")]
    with pytest.warns(DeprecationWarning):
        builder = create_supervisor(agents, model=MODEL)
    workflow = read(builder.compile())
    assert edges(workflow) == {
        "__start__ -> supervisor/agent",
        "supervisor/agent ~> supervisor/tools",
        "supervisor/agent ~> __end__",
        "supervisor/tools ~> supervisor/agent",
        "supervisor/tools ~> maths",
        "supervisor/tools ~> search",
        *(
            edge
            for name in ("maths", "search")
            for edge in (
                f"{name} -> supervisor/agent",
                f"{name} ~> {name}/model",
                f"{name}/model ~> {name}/tools",
                f"{name}/model ~> {name}/model",
                f"{name}/model ~> supervisor/agent",
                f"{name}/tools ~> {name}/model",
            )
        ),
    }
    assert {s.path: s.role for s in workflow.stages if s.calls is None} == {
        "supervisor/agent": "supervisor",
        "maths": "maths",
        "maths/model": "maths",
        "search": "search",
        "search/model": "search",
    }


def test_a_swarm_of_the_package() -> None:
    alice = create_agent(MODEL, [create_handoff_tool(agent_name="bob"), calc], name="alice")
    bob = create_agent(MODEL, [create_handoff_tool(agent_name="alice")], name="bob")
    workflow = read(create_swarm([alice, bob], default_active_agent="alice").compile())
    assert edges(workflow) == {
        "__start__ ~> alice/model",
        "__start__ ~> bob/model",
        "alice/model ~> alice/tools",
        "alice/model ~> __end__",
        "alice/tools ~> alice/model",
        "alice/tools ~> bob/model",
        "bob/model ~> bob/tools",
        "bob/model ~> __end__",
        "bob/tools ~> bob/model",
        "bob/tools ~> alice/model",
    }


def test_agents_that_are_tools_of_an_agent() -> None:
    helpers = {name: create_agent(MODEL, [calc], name=name) for name in ("maths", "search")}

    @tool
    def ask_maths(question: str) -> str:
        """Ask the mathematician."""
        return str(helpers["maths"].invoke({"messages": [("user", question)]}))

    search = helpers["search"]

    @tool
    async def ask_search(question: str) -> str:
        """Ask the searcher."""
        return str(await search.ainvoke({"messages": [("user", question)]}))

    workflow = read(create_agent(MODEL, [ask_maths, ask_search], name="boss"))
    stages = {stage.path: stage.role for stage in workflow.stages if stage.calls is None}
    assert stages == {
        "model": "boss",
        "tools/maths/model": "maths",
        "tools/search/model": "search",
    }
    assert {"tools ~> tools/search/model", "tools/search/model ~> model"} <= edges(workflow)
