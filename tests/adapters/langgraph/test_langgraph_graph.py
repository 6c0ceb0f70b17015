"""What is read out of a graph, construct by construct."""

import operator
from typing import Annotated, Any, Literal, TypedDict

import pytest
from langchain.agents import create_agent
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.tools import tool
from langgraph.func import entrypoint
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, Send

from maestro_agents import ConfigError, UnsupportedError, agent
from maestro_agents._adapters import Options
from maestro_agents.protocol import MAX_STAGES, Workflow
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


def plain() -> Any:
    return graph_of("a", "b").add_edge(START, "a").add_edge("a", "b").add_edge("b", END)


def join() -> Any:
    builder = graph_of("a", "b", "c").add_edge(START, "a").add_edge(START, "b")
    return builder.add_edge(["a", "b"], "c").add_edge("c", END)


def conditional_with_map() -> Any:
    builder = graph_of("a", "b", "c").add_edge(START, "a")
    builder.add_conditional_edges("a", lambda s: "x", {"x": "b", "y": "c", "z": END})
    return builder.add_edge("b", "a").add_edge("c", END)


def conditional_by_literal() -> Any:
    def route(state: State) -> Literal["b", "__end__"]:
        return "b"

    builder = graph_of("a", "b").add_edge(START, "a").add_conditional_edges("a", route)
    return builder.add_edge("b", "a")


def conditional_unmapped() -> Any:
    builder = graph_of("a", "b", "c").add_edge(START, "a")
    builder.add_conditional_edges("a", lambda s: "b")
    return builder.add_edge("b", END).add_edge("c", END)


def conditional_start() -> Any:
    builder = graph_of("a", "b").add_conditional_edges(START, lambda s: "a", ["a", "b"])
    return builder.add_edge("a", END).add_edge("b", END)


def send() -> Any:
    builder = graph_of("a", "b", "c").add_edge(START, "a")
    builder.add_conditional_edges("a", lambda s: [Send("b", {})], ["b"])
    return builder.add_edge("b", "c").add_edge("c", END)


def command() -> Any:
    def jump(state: State) -> Command[Literal["b", "__end__"]]:
        return Command(goto="b")

    builder = graph_of("b").add_node("a", jump).add_edge(START, "a")
    return builder.add_edge("b", END)


def silent_end() -> Any:
    return graph_of("a").add_edge(START, "a")


def subgraph() -> Any:
    inner = graph_of("x", "y").add_edge(START, "x").add_edge("x", "y").add_edge("y", END)
    builder = graph_of("a", "b").add_node("sub", inner.compile())
    return builder.add_edge(START, "a").add_edge("a", "sub").add_edge("sub", "b").add_edge("b", END)


def subgraph_with_routing() -> Any:
    """Conditional inside, conditional outside, two levels deep, entered by a choice."""
    leaf = graph_of("x").add_edge(START, "x").add_edge("x", END)
    inner = graph_of("y").add_node("deep", leaf.compile())
    inner.add_conditional_edges(START, lambda s: "y", ["y", "deep"])
    inner.add_edge("deep", END)
    inner.add_conditional_edges("y", lambda s: "deep", ["deep", END])
    builder = graph_of("b").add_node("sub", inner.compile()).add_edge(START, "sub")
    builder.add_conditional_edges("sub", lambda s: "b", ["b", END])
    return builder.add_edge("b", END)


def join_over_subgraphs() -> Any:
    one = graph_of("x", "y").add_edge(START, "x").add_edge("x", "y").add_edge("y", END)
    two = graph_of("u", "v").add_edge("u", END).add_edge("v", END)
    two.add_conditional_edges(START, lambda s: "u", ["u", "v"])
    builder = graph_of("a", "z").add_node("one", one.compile()).add_node("two", two.compile())
    for name in ("a", "one", "two"):
        builder.add_edge(START, name)
    return builder.add_edge(["a", "one", "two"], "z").add_edge("z", END)


@tool
def calc(x: int) -> int:
    """Add one."""
    return x + 1


class ToolModel(FakeListChatModel):
    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self


MODEL = ToolModel(responses=["hi"])


CONSTRUCTS = [
    (plain, {"__start__ -> a", "a -> b", "b -> __end__"}, set(), ()),
    (join, {"__start__ -> a", "__start__ -> b", "c -> __end__"}, {"a+b -> c"}, ()),
    (
        conditional_with_map,
        {"__start__ -> a", "a ~> b", "a ~> c", "a ~> __end__", "b -> a", "c -> __end__"},
        set(),
        (),
    ),
    (conditional_by_literal, {"__start__ -> a", "a ~> b", "a ~> __end__", "b -> a"}, set(), ()),
    (
        conditional_unmapped,
        {"__start__ -> a", "a ~> b", "a ~> c", "a ~> __end__", "b -> __end__", "c -> __end__"},
        set(),
        ("a",),
    ),
    (
        conditional_start,
        {"__start__ ~> a", "__start__ ~> b", "a -> __end__", "b -> __end__"},
        set(),
        (),
    ),
    (send, {"__start__ -> a", "a ~> b", "b -> c", "c -> __end__"}, set(), ()),
    (command, {"__start__ -> a", "a ~> b", "a ~> __end__", "b -> __end__"}, set(), ()),
    (silent_end, {"__start__ -> a", "a ~> __end__"}, set(), ("a",)),
    (
        subgraph,
        {"__start__ -> a", "a -> sub/x", "sub/x -> sub/y", "sub/y -> b", "b -> __end__"},
        set(),
        (),
    ),
    (
        subgraph_with_routing,
        {
            "__start__ ~> sub/y",
            "__start__ ~> sub/deep/x",
            "sub/y ~> sub/deep/x",
            "sub/y ~> b",
            "sub/y ~> __end__",
            "sub/deep/x ~> b",
            "sub/deep/x ~> __end__",
            "b -> __end__",
        },
        set(),
        (),
    ),
    (
        join_over_subgraphs,
        {
            "__start__ -> a",
            "__start__ -> one/x",
            "__start__ ~> two/u",
            "__start__ ~> two/v",
            "one/x -> one/y",
            "two/u -> z",
            "two/v -> z",
            "z -> __end__",
        },
        {"a+one/y -> z"},
        (),
    ),
]


@pytest.mark.parametrize(
    ("build", "expected", "waits", "open_ended"),
    CONSTRUCTS,
    ids=[c[0].__name__ for c in CONSTRUCTS],
)
def test_construct(build: Any, expected: set[str], waits: set[str], open_ended: Any) -> None:
    workflow = read(build().compile())
    assert edges(workflow) == expected
    assert joins(workflow) == waits
    assert workflow.open_ended == open_ended
    assert workflow.supersteps


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


def test_an_entrypoint_is_one_stage() -> None:
    @entrypoint()
    def job(x: int) -> int:
        return x

    workflow = read(job)
    assert [stage.path for stage in workflow.stages] == ["job"]
    assert workflow.open_ended == ("job",)


def test_it_reads_the_same_graph_the_same_way() -> None:
    assert read(subgraph().compile()).id == read(subgraph().compile()).id
    assert read(subgraph().compile()).id != read(plain().compile()).id


@pytest.mark.parametrize(
    ("graph_name", "option", "default", "expected"),
    [
        (None, None, None, "langgraph"),
        (None, None, "make_graph", "make_graph"),
        ("team", None, "make_graph", "team"),
        ("my team@home", None, None, "my-team-home"),
        ("team", "mine", "make_graph", "mine"),
    ],
)
def test_name(graph_name: Any, option: Any, default: Any, expected: str) -> None:
    graph = plain().compile(**({"name": graph_name} if graph_name else {}))
    assert read(graph, default, name=option).name == expected


def test_a_name_that_cannot_be_used_is_loud() -> None:
    with pytest.raises(ConfigError, match="no spaces"):
        read(plain().compile(), name="my team")


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


def test_a_graph_beyond_the_protocol_is_told_so() -> None:
    graph = graph_of(*(f"n{n}" for n in range(MAX_STAGES + 1))).add_edge(START, "n0").compile()
    with pytest.raises(UnsupportedError, match="does not fit"):
        read(graph)


def test_a_large_open_ended_graph_keeps_its_certain_edges() -> None:
    names = [f"n{n}" for n in range(200)]
    builder = graph_of(*names).add_edge(START, "n0")
    for name in names[:-1]:
        builder.add_conditional_edges(name, lambda s: "n1")
    builder.add_edge("n199", END)
    found = edges(read(builder.compile()))
    assert {"__start__ -> n0", "n199 -> __end__"} <= found
