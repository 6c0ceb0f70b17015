"""What LangGraph does now and then: each case told right, or passed over in silence."""

import asyncio
import time
from collections import OrderedDict
from threading import Barrier, Thread
from typing import Annotated, Any, TypedDict

import httpx
import openai
import pytest
from langchain_core.runnables import RunnableLambda
from langchain_openai import ChatOpenAI
from langgraph.cache.memory import InMemoryCache
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.errors import GraphRecursionError
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, StateGraph
from langgraph.pregel.remote import RemoteGraph
from langgraph.types import CachePolicy, Command, RetryPolicy, Send, interrupt
from sdk.recording_backend import RecordingBackend
from sdk.small_graphs import State, asks, model, shape, silent, the_run, told, two_steps

import maestro_agents
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


# -- beyond the list -----------------------------------------------------------------------------


class Topics(TypedDict, total=False):
    topic: str
    n: Annotated[int, lambda old, new: (old or 0) + new]


def test_a_graph_called_in_a_function_several_times_at_once(backend: RecordingBackend) -> None:
    llm = model(backend.base_url)
    inner = StateGraph(Topics).add_node("look", asks(llm)).add_node("sum", asks(llm))
    look = inner.add_edge(START, "look").add_edge("look", "sum").compile()

    async def host(state: Topics) -> Topics:
        await asyncio.gather(*(look.ainvoke({"topic": "x"}) for _ in range(2)))
        return {"n": 1}

    builder = StateGraph(Topics).add_node("host", host).add_node("after", asks(llm))
    graph = workflow(builder.add_edge(START, "host").add_edge("host", "after").compile())
    asyncio.run(graph.ainvoke({"n": 0}))
    expected = [("after", "0"), *((f"host/{s}", i) for s in ("look", "sum") for i in "01")]
    assert sorted(backend.stages()) == expected
    sums = backend.announced()["host/sum"]["successors"]
    assert [(s["stage"], s["certain"]) for s in sums] == [("after", True), ("host/look", False)]


def test_tasks_of_an_entrypoint_are_stages(backend: RecordingBackend) -> None:
    llm = model(backend.base_url)

    @task
    def draft(topic: str) -> str:
        return llm.invoke(topic).text

    @task
    async def check(text: str) -> str:
        return (await llm.ainvoke(text)).text

    @entrypoint()
    async def flow(topic: str) -> str:
        drafts = await asyncio.gather(*(draft(topic) for _ in range(2)))
        return await check(drafts[0])

    asyncio.run(workflow(flow, name="flow").ainvoke("cats"))
    assert sorted(backend.stages()) == [
        ("flow/check", "0"),
        ("flow/draft", "0"),
        ("flow/draft", "1"),
    ]
    announced = {s["stage"] for s in backend.announced()["flow/draft"]["successors"]}
    assert announced == {"flow/draft", "flow/check"}
    assert shape(the_run(backend))[-1] == "run_ended"
    assert {"flow", "flow/draft", "flow/check"} == {
        e["stage"] for e in the_run(backend) if e["type"] == "stage_ended"
    }


def test_stages_without_a_call_report_nothing_else(backend: RecordingBackend) -> None:
    builder = StateGraph(State).add_node("a", silent).add_edge(START, "a")
    workflow(builder.compile()).invoke({"n": 0})
    assert backend.chats == []
    assert shape(the_run(backend)) == [
        "run_started",
        "stage_started a",
        "stage_ended a",
        "run_ended",
    ]


# -- what a review found -------------------------------------------------------------------------


class Proxy:
    """Raises when it is looked at outside of a request, as those of web frameworks do."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("outside of a request")


PROXY = Proxy()


def look_at_the_proxy() -> Any:
    return PROXY.user


def test_what_a_node_refers_to_may_raise_when_it_is_looked_at(backend: RecordingBackend) -> None:
    llm = model(backend.base_url)

    def node(state: State) -> State:
        if state["n"] > 100:
            look_at_the_proxy()
        llm.invoke("hi")
        return {"n": 1}

    workflow(StateGraph(State).add_node("a", node).add_edge(START, "a").compile()).invoke({"n": 0})
    assert backend.stages() == [("a", "0")]


def test_a_raw_call_inside_a_graph_that_a_node_calls_after_its_model(
    backend: RecordingBackend,
) -> None:
    llm = model(backend.base_url)

    async def raw(state: State) -> State:
        async with openai.AsyncOpenAI(base_url=backend.base_url, api_key="x") as client:
            messages: Any = [{"role": "user", "content": "hi"}]
            await client.chat.completions.create(model="stub", messages=messages)
        return {"n": 1}

    inner = StateGraph(State).add_node("raw", raw).add_edge(START, "raw").compile()

    async def outer(state: State) -> State:
        await llm.ainvoke("hi")
        await inner.ainvoke({"n": 0})
        return {"n": 1}

    graph = workflow(StateGraph(State).add_node("outer", outer).add_edge(START, "outer").compile())
    asyncio.run(graph.ainvoke({"n": 0}))
    assert backend.stages() == [("outer", "0"), ("outer/raw", "0")]


def test_a_join_that_may_wait_in_vain_is_not_certain(backend: RecordingBackend) -> None:
    llm = model(backend.base_url)
    builder = StateGraph(State)
    for name in ("a", "b", "x", "c"):
        builder.add_node(name, asks(llm))
    builder.add_edge(START, "a").add_conditional_edges(START, lambda _: "x", ["b", "x"])
    builder.add_edge(["a", "b"], "c").add_edge("x", END).add_edge("c", END)
    workflow(builder.compile()).invoke({"n": 0})
    announced = backend.announced()["a"]["successors"]
    assert announced == [{"stage": "c", "certain": False}]
    assert sorted(stage for stage, _ in backend.stages()) == ["a", "x"]
    assert control.flush(5)
    [(_, sent)] = backend.workflows
    assert sent["joins"] == [{"sources": ["a", "b"], "target": "c"}]


def test_any_object_may_have_tool_calls(backend: RecordingBackend) -> None:
    """`openai`'s own messages have some that are no dicts; what has neither form tells nothing."""

    class Odd:
        def __init__(self, *calls: Any) -> None:
            self.tool_calls = calls

    function = type("Call", (), {"function": type("F", (), {"name": "look"})})
    llm = model(backend.base_url)

    def node(said: Odd) -> Any:
        def ask(state: dict[str, Any]) -> Any:
            llm.invoke("hi")
            return {"said": said}

        return ask

    builder = StateGraph(dict).add_node("one", node(Odd(function())))
    builder.add_node("two", node(Odd(object())))
    workflow(builder.add_edge(START, "one").add_edge("one", "two").compile()).invoke({})
    assert shape(the_run(backend)) == [
        "run_started",
        "stage_started one",
        "tools_requested one",
        "stage_ended one",
        "stage_started two",
        "stage_ended two",
        "run_ended",
    ]


def test_a_model_that_routes_the_start_is_a_call_of_the_run(backend: RecordingBackend) -> None:
    llm = model(backend.base_url)

    def route(state: State) -> str:
        llm.invoke("where to?")
        return "a"

    builder = StateGraph(State).add_node("a", asks(llm))
    builder.add_conditional_edges(START, route, ["a"])
    workflow(builder.compile()).invoke({"n": 0})
    first, second = backend.identities()
    assert first["run"] == second["run"] and "stage" not in first and second["stage"] == "a"


def test_a_graph_made_anew_for_each_request_resumes_its_run(backend: RecordingBackend) -> None:
    saver = InMemorySaver()

    @workflow
    def make() -> Any:
        def human(state: State) -> State:
            return {"n": interrupt("go on?")}

        builder = StateGraph(State).add_node("human", human).add_edge(START, "human")
        return builder.compile(checkpointer=saver)

    config = {"configurable": {"thread_id": "t"}}
    make().invoke({"n": 0}, config)
    make().invoke(Command(resume=1), config)
    assert [kind for kind in shape(the_run(backend)) if kind.startswith("run")] == [
        "run_started",
        "run_paused",
        "run_resumed",
        "run_ended",
    ]


def test_whoever_stops_reading_at_the_interrupt_has_paused_the_run(
    backend: RecordingBackend,
) -> None:
    def human(state: State) -> State:
        return {"n": interrupt("go on?")}

    builder = StateGraph(State).add_node("human", human).add_edge(START, "human")
    graph = workflow(builder.compile(checkpointer=InMemorySaver()))
    config = {"configurable": {"thread_id": "t"}}
    stream = graph.stream({"n": 0}, config, stream_mode="updates")
    for chunk in stream:
        if "__interrupt__" in chunk:
            break
    stream.close()
    graph.invoke(Command(resume=1), config)
    assert [kind for kind in shape(the_run(backend)) if kind.startswith("run")] == [
        "run_started",
        "run_paused",
        "run_resumed",
        "run_ended",
    ]


def test_a_thread_id_may_be_long(backend: RecordingBackend) -> None:
    llm = model(backend.base_url)
    graph = workflow(StateGraph(State).add_node("a", asks(llm)).add_edge(START, "a").compile())
    for thread in ("x" * 1000, "x" * 1001):
        graph.invoke({"n": 0}, {"configurable": {"thread_id": thread}})
    first, second = (head["conversation"] for head in backend.identities())
    assert first != second and max(len(first), len(second)) <= 256


def test_a_run_that_is_given_up_has_not_failed(backend: RecordingBackend) -> None:
    begun = asyncio.Event()

    async def wait(state: State) -> State:
        begun.set()
        await asyncio.Event().wait()
        return {"n": 1}

    graph = workflow(StateGraph(State).add_node("a", wait).add_edge(START, "a").compile())

    async def main() -> None:
        run = asyncio.create_task(graph.ainvoke({"n": 0}))
        await begun.wait()
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)

    asyncio.run(main())
    assert not the_run(backend)[-1]["failed"]


def test_runs_that_begin_at_once_are_all_followed(backend: RecordingBackend) -> None:
    graph = two_steps(model(backend.base_url)).compile()
    maestro_agents.instrument()
    try:
        start = Barrier(6)

        def run() -> None:
            start.wait()
            graph.invoke({"n": 0})

        threads = [Thread(target=run) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        maestro_agents.uninstrument()
    assert len(told(backend)) == 6
    assert {head.get("stage") for head in backend.identities()} == {"plan", "write"}
