"""What LangGraph does now and then: each case told right, or passed over in silence."""

import asyncio
import time
from collections import OrderedDict
from typing import Any

import httpx
import pytest
from langchain_core.runnables import RunnableLambda
from langchain_openai import ChatOpenAI
from langgraph.cache.memory import InMemoryCache
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.errors import GraphRecursionError
from langgraph.graph import END, START, StateGraph
from langgraph.pregel.remote import RemoteGraph
from langgraph.types import CachePolicy, Command, RetryPolicy, Send, interrupt
from sdk.recording_backend import RecordingBackend
from sdk.small_graphs import State, asks, model, shape, the_run, told, two_steps

from maestro_agents import UnsupportedError, workflow
from maestro_agents._control import control
from maestro_agents.testing import StubEngine
from maestro_langgraph import _handler


def nexts(events: list[dict[str, Any]]) -> dict[str, list[str] | None]:
    """What each stage routed to, the last time it ended."""
    return {
        event["stage"]: [s["stage"] for s in event["next"]] if "next" in event else None
        for event in events
        if event["type"] == "stage_ended"
    }


def widths(backend: RecordingBackend) -> dict[str, int | None]:
    return {
        stage: (announcement.get("barrier") or {}).get("width")
        for stage, announcement in backend.announced().items()
    }


# 1 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hosted", [False, True], ids=["as a node", "in a function"])
def test_a_command_for_the_graph_above_is_routing_and_no_failure(
    backend: RecordingBackend, hosted: bool
) -> None:
    llm = model(backend.base_url)

    def jump(state: State) -> Command[Any]:
        llm.invoke("hi")
        return Command(goto="b", graph=Command.PARENT)

    inner = StateGraph(State).add_node("jump", jump).add_edge(START, "jump").compile(name="inner")
    node: Any = (lambda state: inner.invoke(state)) if hosted else inner
    builder = StateGraph(State).add_node("a", node, destinations=("b", "c"))
    builder.add_node("b", asks(llm)).add_node("c", asks(llm)).add_edge(START, "a")
    workflow(builder.compile()).invoke({"n": 0})
    events = the_run(backend)
    assert not any(event.get("failed") for event in events)
    inside = "a/inner/jump" if hosted else "a/jump"
    assert nexts(events) == {inside: ["b"], "b": None} | ({"a": ["b"]} if hosted else {})
    assert [stage for stage, _ in backend.stages()] == [inside, "b"]


# 2 ----------------------------------------------------------------------------------------------


def test_a_node_that_is_tried_again_counts_its_attempts(backend: RecordingBackend) -> None:
    llm, failures = model(backend.base_url), iter([True, True, False])

    def node(state: State) -> State:
        llm.invoke("hi")
        if next(failures):
            raise ConnectionError
        return {"n": 1}

    retry = RetryPolicy(initial_interval=0, jitter=False, max_attempts=3)
    builder = StateGraph(State).add_node("a", node, retry_policy=retry).add_edge(START, "a")
    workflow(builder.compile()).invoke({"n": 0})
    starts = [e for e in the_run(backend) if e["type"] == "stage_started"]
    assert [(e["instance"], e["attempt"], e["step"]) for e in starts] == [
        (0, 0, 1),
        (1, 1, 1),
        (2, 2, 1),
    ]
    barriers = [body["maestro"]["announcement"]["barrier"] for _, body in backend.chats]
    assert {barrier["width"] for barrier in barriers} == {1}, "it is one task all the time"
    assert backend.stages() == [("a", "0"), ("a", "1"), ("a", "2")]


def test_an_sdk_retry_is_the_same_call(backend: RecordingBackend, stub: StubEngine) -> None:
    llm = ChatOpenAI(model="stub", base_url=backend.base_url, api_key="x", max_retries=2)
    stub.fail_next("error", times=2)
    builder = StateGraph(State).add_node("a", asks(llm)).add_edge(START, "a")
    workflow(builder.compile()).invoke({"n": 0})
    assert backend.stages() == [("a", "0")] * 3
    assert shape(the_run(backend)).count("stage_started a") == 1


# 3 ----------------------------------------------------------------------------------------------


def test_a_cached_node_is_passed_over(backend: RecordingBackend) -> None:
    llm = model(backend.base_url)
    builder = StateGraph(State).add_node("a", asks(llm), cache_policy=CachePolicy())
    builder.add_node("b", asks(llm)).add_edge(START, "a").add_edge("a", "b")
    graph = workflow(builder.compile(cache=InMemoryCache()))
    for _ in range(2):
        graph.invoke({"n": 0})
    first, second = told(backend).values()
    assert "stage_started a" in shape(first)
    assert shape(second) == ["run_started", "stage_started b", "stage_ended b", "run_ended"]
    assert [stage for stage, _ in backend.stages()] == ["a", "b", "b"]


# 4 ----------------------------------------------------------------------------------------------


def test_a_deferred_node_says_so_and_is_in_nobodys_way(backend: RecordingBackend) -> None:
    llm = model(backend.base_url)
    builder = StateGraph(State).add_node("a", asks(llm)).add_node("b", asks(llm))
    builder.add_node("c", asks(llm)).add_node("late", asks(llm), defer=True)
    builder.add_edge(START, "a").add_edge("a", "b").add_edge("b", "c")
    builder.add_edge("a", "late").add_edge("c", "late")
    workflow(builder.compile()).invoke({"n": 0})
    assert [stage for stage, _ in backend.stages()] == ["a", "b", "c", "late"]
    assert widths(backend) == {"a": 1, "b": 1, "c": 1, "late": None}
    assert control.flush(5)
    [(_, sent)] = backend.workflows
    assert [s["path"] for s in sent["stages"] if s["deferred"]] == ["late"]


def test_the_width_of_a_fan_out_is_told_before_it_begins(backend: RecordingBackend) -> None:
    llm = model(backend.base_url)
    builder = StateGraph(State).add_node("a", asks(llm)).add_node("part", asks(llm))
    builder.add_edge(START, "a")
    builder.add_conditional_edges("a", lambda _: [Send("part", {})] * 3, ["part"])
    workflow(builder.compile()).invoke({"n": 0})
    events = the_run(backend)
    [ended] = [e for e in events if e["type"] == "stage_ended" and e["stage"] == "a"]
    assert ended["next"] == [{"stage": "part", "certain": True, "width": 3}]
    assert sorted(backend.stages()[1:]) == [("part", "0"), ("part", "1"), ("part", "2")]
    assert widths(backend) == {"a": 1, "part": 3}


# 5 ----------------------------------------------------------------------------------------------


def test_a_run_out_of_steps_ends_failed_and_leaves_nothing(backend: RecordingBackend) -> None:
    llm = model(backend.base_url)
    builder = StateGraph(State).add_node("a", asks(llm)).add_edge(START, "a").add_edge("a", "a")
    graph = workflow(builder.compile())
    with pytest.raises(GraphRecursionError):
        graph.invoke({"n": 0}, {"recursion_limit": 3})
    events = the_run(backend)
    assert events[-1]["type"] == "run_ended" and events[-1]["failed"]
    assert not [f for f in _handler._frames.values() if f.owner is graph.config["callbacks"][0]]


# 6 ----------------------------------------------------------------------------------------------


def test_a_run_resumed_in_another_process_starts_in_the_middle(
    backend: RecordingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, saver = model(backend.base_url), InMemorySaver()

    def human(state: State) -> State:
        interrupt("go on?")
        return {"n": 1}

    builder = StateGraph(State).add_node("a", asks(llm)).add_node("human", human)
    builder.add_node("b", asks(llm)).add_edge(START, "a").add_edge("a", "human")
    builder.add_edge("human", "b")
    config = {"configurable": {"thread_id": "t"}}
    first, second = (workflow(builder.compile(checkpointer=saver)) for _ in "12")
    first.invoke({"n": 0}, config)
    monkeypatch.setattr(_handler, "_paused", OrderedDict())  # another process has none
    second.invoke(Command(resume="yes"), config)
    before, after = told(backend).values()
    assert before[-1]["type"] == "run_paused"
    assert shape(after) == [
        "run_started",
        "stage_started human",
        "stage_ended human",
        "stage_started b",
        "stage_ended b",
        "run_ended",
    ]
    assert {before[0]["conversation"], after[0]["conversation"]} == {"t"}
    assert widths(backend)["b"] == 1


# 7 ----------------------------------------------------------------------------------------------


def test_one_handler_on_the_outer_and_the_inner_graph_tells_once(backend: RecordingBackend) -> None:
    llm = model(backend.base_url)
    inner = StateGraph(State).add_node("a", asks(llm)).add_edge(START, "a").compile()
    builder = StateGraph(State).add_node("in", inner).add_edge(START, "in")
    outer = workflow(builder.compile())
    [handler] = outer.config["callbacks"]
    builder = StateGraph(State).add_node("in", inner.with_config(callbacks=[handler]))
    graph = builder.add_edge(START, "in").compile().with_config(callbacks=[handler])
    graph.invoke({"n": 0})
    assert shape(the_run(backend)) == [
        "run_started",
        "stage_started in/a",
        "stage_ended in/a",
        "run_ended",
    ]


# 8 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["sync", "async"])
def test_one_model_in_two_nodes_of_one_superstep(backend: RecordingBackend, way: str) -> None:
    llm = model(backend.base_url)

    async def node(state: State) -> State:
        await asyncio.gather(*(llm.ainvoke("hi") for _ in range(3)))
        return {"n": 1}

    chosen: Any = node if way == "async" else asks(llm, 3)
    builder = StateGraph(State).add_node("a", chosen).add_node("b", chosen)
    graph = workflow(builder.add_edge(START, "a").add_edge(START, "b").compile())
    _ = asyncio.run(graph.ainvoke({"n": 0})) if way == "async" else graph.invoke({"n": 0})
    assert sorted(backend.stages()) == [(s, str(i)) for s in "ab" for i in range(3)]
    assert widths(backend) == {"a": 2, "b": 2}


# 9 ----------------------------------------------------------------------------------------------


def test_a_chain_as_a_node_with_two_branches(backend: RecordingBackend) -> None:
    llm = model(backend.base_url)
    chain = RunnableLambda(lambda state: "hi") | llm | RunnableLambda(lambda reply: {"n": 1})
    builder = StateGraph(State).add_node("a", chain)
    for name in "bcde":
        builder.add_node(name, asks(llm))
    builder.add_edge(START, "a")
    builder.add_conditional_edges("a", lambda _: "no", {"yes": "b", "no": "c"})
    builder.add_conditional_edges(
        "a", RunnableLambda(lambda _: ["d", END], name="more"), ["d", "e", END]
    )
    workflow(builder.compile()).invoke({"n": 0})
    assert nexts(the_run(backend))["a"] == ["c", "d"]
    assert sorted(stage for stage, _ in backend.stages()) == ["a", "c", "d"]


# 10: several prompts in one `generate()` are in test_langgraph_runs.py --------------------------


# 11 ---------------------------------------------------------------------------------------------


def test_a_node_that_runs_elsewhere_or_calls_nobody_has_a_duration(
    backend: RecordingBackend,
) -> None:
    builder = StateGraph(State).add_node("code", lambda state: time.sleep(0.02) or {"n": 1})
    remote = RemoteGraph("assistant", url="http://127.0.0.1:9")
    builder.add_node("far", remote).add_edge(START, "code").add_edge("code", "far")
    graph = workflow(builder.compile())
    with pytest.raises(httpx.HTTPError):
        graph.invoke({"n": 0})
    events = the_run(backend)
    at = {(e["type"], e.get("stage")): e for e in events}
    began, ended = at["stage_started", "code"], at["stage_ended", "code"]
    assert ended["at"] - began["at"] >= 0.02 and not ended["failed"]
    assert at["stage_ended", "far"]["failed"] and backend.chats == []


def test_a_remote_graph_itself_is_told_where_to_be_wrapped() -> None:
    with pytest.raises(UnsupportedError, match="where the graph is"):
        workflow(RemoteGraph("assistant", url="http://127.0.0.1:9"))


def test_a_builder_is_told_to_be_compiled(backend: RecordingBackend) -> None:
    with pytest.raises(UnsupportedError, match=r"builder\.compile\(\)"):
        workflow(two_steps(model(backend.base_url)))


# 12: runs that share a `thread_id` are in test_langgraph_runs.py --------------------------------
