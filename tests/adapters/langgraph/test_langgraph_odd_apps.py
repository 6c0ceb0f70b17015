"""Apps that do what few do: each call still has its stage, and nothing is claimed that is not."""

import asyncio
from copy import deepcopy
from threading import Barrier, Thread
from typing import Annotated, Any, TypedDict

import openai
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, interrupt
from sdk.recording_backend import RecordingBackend
from sdk.small_graphs import State, asks, model, shape, silent, the_run, told, two_steps

import maestro_agents
from maestro_agents import workflow
from maestro_agents._control import control


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


def test_a_wrapped_graph_can_be_copied_deeply(backend: RecordingBackend) -> None:
    llm = model(backend.base_url)
    graph = workflow(StateGraph(State).add_node("a", asks(llm)).add_edge(START, "a").compile())
    deepcopy(graph.config)
    deepcopy(graph.config["callbacks"])
    graph.invoke({"n": 0})
    assert backend.stages() == [("a", "0")]
