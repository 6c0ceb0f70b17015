"""Graphs that do nothing, and what the adapter reads out of them."""

import operator
from typing import Annotated, Any, TypedDict

from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.tools import tool
from langgraph.graph import StateGraph

from maestro_agents._adapters import Options
from maestro_agents.protocol import Workflow
from maestro_langgraph._graph import read_graph


class State(TypedDict, total=False):
    xs: Annotated[list[str], operator.add]


def node(state: State) -> State:
    return {}


def graph_of(*nodes: str) -> Any:
    builder = StateGraph(State)
    for name in nodes:
        builder.add_node(name, node)
    return builder


def read(graph: Any, default_name: str | None = None, **options: Any) -> Workflow:
    return read_graph(graph, Options(**options), default_name).workflow


def edges(workflow: Workflow) -> set[str]:
    return {f"{e.source} {'~>' if e.candidate else '->'} {e.target}" for e in workflow.edges}


def joins(workflow: Workflow) -> set[str]:
    return {f"{'+'.join(join.sources)} -> {join.target}" for join in workflow.joins}


@tool
def calc(x: int) -> int:
    """Add one."""
    return x + 1


class ToolModel(FakeListChatModel):
    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self


MODEL = ToolModel(responses=["hi"])
