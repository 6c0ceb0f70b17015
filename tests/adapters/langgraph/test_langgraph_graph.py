"""What is read out of a graph, construct by construct."""

from typing import Any, Literal

import pytest
from langgraph.func import entrypoint, task
from langgraph.graph import END, START
from langgraph.types import Command, Send
from sdk.read_graphs import State, edges, graph_of, joins, node, read

from maestro_agents import ConfigError, UnsupportedError
from maestro_agents.protocol import MAX_STAGES


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


def undeclared_command() -> Any:
    def jump(state: State) -> Any:
        return Command(goto="b")

    return graph_of("b").add_node("a", jump).add_edge(START, "a")


def undeclared_command_elsewhere() -> Any:
    def jump(state: State) -> Any:
        return make_command()

    return graph_of("b").add_node("a", jump).add_edge(START, "a")


def make_command() -> Any:
    return Command(goto="b")


def list_of_literals() -> Any:
    """LangGraph reads no targets from this annotation: any node may follow."""

    def route(state: State) -> list[Literal["b"]]:
        return ["b"]

    builder = graph_of("a", "b").add_edge(START, "a").add_conditional_edges("a", route)
    return builder.add_edge("b", END)


def loop() -> Any:
    builder = graph_of("a", "b").add_edge(START, "a").add_edge("a", "b")
    return builder.add_conditional_edges("b", lambda s: "a", ["a", "b", END])


INNER = graph_of("x", "y").add_edge(START, "x").add_edge("x", "y").add_edge("y", END)
NAMED, UNNAMED = INNER.compile(name="inner"), INNER.compile()


def called_in_a_function() -> Any:
    def host(state: State) -> Any:
        return run_inner(state)

    builder = graph_of("a").add_node("host", host).add_edge(START, "host")
    return builder.add_edge("host", "a").add_edge("a", END)


def run_inner(state: State) -> Any:
    return UNNAMED.invoke(state)


def two_called_in_a_function() -> Any:
    def host(state: State) -> Any:
        return [graph.invoke(state) for graph in (NAMED, UNNAMED)]

    return graph_of().add_node("host", host).add_edge(START, "host").add_edge("host", END)


def calls_itself() -> Any:
    def host(state: State) -> Any:
        return compiled.invoke(state)

    builder = graph_of().add_node("host", host).add_edge(START, "host").add_edge("host", END)
    compiled = builder.compile()
    return builder


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
    (silent_end, {"__start__ -> a", "a -> __end__"}, set(), ()),
    (
        undeclared_command,
        {"__start__ -> a", "a ~> __end__", "b -> __end__"},
        set(),
        ("a",),
    ),
    (
        undeclared_command_elsewhere,
        {"__start__ -> a", "a ~> __end__", "b -> __end__"},
        set(),
        ("a",),
    ),
    (
        list_of_literals,
        {"__start__ -> a", "a ~> b", "a ~> __end__", "b -> __end__"},
        set(),
        ("a",),
    ),
    (loop, {"__start__ -> a", "a -> b", "b ~> a", "b ~> b", "b ~> __end__"}, set(), ()),
    (
        called_in_a_function,
        {
            "__start__ -> host",
            "host ~> host/x",
            "host -> a",
            "host/x -> host/y",
            "host/y ~> host/x",
            "host/y -> a",
            "a -> __end__",
        },
        set(),
        (),
    ),
    (
        two_called_in_a_function,
        {
            "__start__ -> host",
            "host ~> host/inner/x",
            "host ~> host/x",
            "host -> __end__",
            "host/inner/x -> host/inner/y",
            "host/inner/y ~> host/inner/x",
            "host/inner/y ~> host/x",
            "host/inner/y -> __end__",
            "host/x -> host/y",
            "host/y ~> host/inner/x",
            "host/y ~> host/x",
            "host/y -> __end__",
        },
        set(),
        (),
    ),
    (calls_itself, {"__start__ -> host", "host -> __end__"}, set(), ()),
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


def test_an_entrypoint_is_one_stage() -> None:
    @entrypoint()
    def job(x: int) -> int:
        return x

    workflow = read(job)
    assert [stage.path for stage in workflow.stages] == ["job"]
    assert edges(workflow) == {"__start__ -> job", "job -> __end__"}


def test_the_tasks_of_an_entrypoint_may_come_in_any_order() -> None:
    @task
    def draft(x: int) -> int:
        return x

    @task
    def check(x: int) -> int:
        return x

    @entrypoint()
    def job(x: int) -> int:
        return check(sum(draft(n).result() for n in range(x))).result()

    anywhere = {"job/draft", "job/check", "__end__"}
    expected = {f"{a} ~> {b}" for a in ("job/draft", "job/check") for b in anywhere}
    assert edges(read(job)) == expected | {
        "__start__ -> job",
        "job -> __end__",
        "job ~> job/draft",
        "job ~> job/check",
    }


def test_a_deferred_node_says_so() -> None:
    builder = graph_of("a").add_node("late", node, defer=True)
    builder.add_edge(START, "a").add_edge("a", "late")
    assert [(s.path, s.deferred) for s in read(builder.compile()).stages] == [
        ("a", False),
        ("late", True),
    ]


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
