"""`instrument()`: every graph of the process, and back again."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import openai
import pytest
from langchain_core.runnables import RunnableLambda
from langgraph.func import entrypoint
from langgraph.graph import END, START, StateGraph
from langgraph.pregel import Pregel
from sdk.recording_backend import RecordingBackend
from sdk.small_graphs import State, asks, model, run_async, run_sync, shape, told, two_steps

import maestro_agents as maestro
from maestro_agents import ConfigError, workflow


@pytest.fixture(autouse=True)
def off() -> Iterator[None]:
    yield
    maestro.uninstrument()


def patched() -> tuple[Any, ...]:
    methods = (Pregel.stream, Pregel.astream)
    return (*methods, openai.OpenAI.request, openai.AsyncOpenAI.request)


def run_stream(graph: Any) -> None:
    assert list(graph.stream({"n": 0}))


def run_batch(graph: Any) -> None:
    assert len(graph.batch([{"n": 0}])) == 1


def run_events(graph: Any) -> None:
    async def main() -> None:
        assert [event async for event in graph.astream_events({"n": 0}, version="v2")]

    asyncio.run(main())


def run_in_a_chain(graph: Any) -> None:
    (RunnableLambda(lambda x: {"n": x}) | graph).invoke(0)


@pytest.mark.parametrize(
    "run", [run_sync, run_async, run_stream, run_batch, run_events, run_in_a_chain]
)
def test_a_graph_nobody_wrapped_is_followed(backend: RecordingBackend, run: Any) -> None:
    graph = two_steps(model(backend.base_url)).compile(name="pair")
    maestro.instrument(slo="interactive", tenant="me")
    run(graph)
    assert backend.stages() == [("plan", "0"), ("write", "0"), ("write", "1")]
    _, body = backend.chats[0]
    assert body["maestro"]["slo"]["class"] == "interactive"
    assert body["maestro"]["tenant"] == "me"
    assert backend.identities()[0]["workflow"].startswith("pair@")
    [events] = told(backend).values()
    assert (shape(events)[0], shape(events)[-1]) == ("run_started", "run_ended")


def test_an_entrypoint_and_the_sdk_by_hand_too(backend: RecordingBackend) -> None:
    @entrypoint()
    def job(text: str) -> str:
        with openai.OpenAI(base_url=backend.base_url, api_key="x") as client:
            messages: Any = [{"role": "user", "content": text}]
            reply = client.chat.completions.create(model="stub", messages=messages)
        return reply.choices[0].message.content or ""

    maestro.instrument()
    assert job.invoke("hi")
    assert backend.stages() == [("job", "0")]


def test_graphs_in_graphs_are_one_run(backend: RecordingBackend) -> None:
    llm = model(backend.base_url)
    inner = StateGraph(State).add_node("a", asks(llm)).add_edge(START, "a").compile()
    builder = StateGraph(State).add_node("in", inner)
    builder.add_node("call", lambda state: inner.invoke(state))
    graph = builder.add_edge(START, "in").add_edge("in", "call").add_edge("call", END).compile()
    maestro.instrument()
    graph.invoke({"n": 0})
    assert backend.stages() == [("in/a", "0"), ("call/a", "0")]
    assert len(told(backend)) == 1
    [(workflow_id, _)] = backend.workflows
    assert {head["workflow"] for head in backend.identities()} == {workflow_id}


def test_a_wrapped_graph_keeps_its_own_options(backend: RecordingBackend) -> None:
    maestro.instrument(slo="batch")
    graph = workflow(two_steps(model(backend.base_url)).compile(), slo="interactive")
    run_sync(graph)
    assert [body["maestro"]["slo"]["class"] for _, body in backend.chats] == ["interactive"] * 3
    assert len(told(backend)) == 1


def test_twice_is_once_and_the_last_options_hold(backend: RecordingBackend) -> None:
    graph = two_steps(model(backend.base_url)).compile()
    before = patched()
    maestro.instrument(slo="batch")
    maestro.instrument(slo="interactive")
    run_sync(graph)
    assert {body["maestro"]["slo"]["class"] for _, body in backend.chats} == {"interactive"}
    assert len(told(backend)) == 1
    maestro.uninstrument()
    assert patched() == before


def test_undone_it_leaves_nothing(backend: RecordingBackend) -> None:
    graph = two_steps(model(backend.base_url)).compile()
    before = patched()
    maestro.instrument()
    assert patched() != before
    maestro.uninstrument()
    maestro.uninstrument()
    assert patched() == before
    run_sync(graph)
    assert backend.identities() == [{}] * 3
    assert told(backend) == {}


def test_what_workflow_wrapped_is_followed_after_the_undoing(backend: RecordingBackend) -> None:
    graph = workflow(two_steps(model(backend.base_url)).compile())
    maestro.instrument()
    maestro.uninstrument()
    run_sync(graph)
    assert backend.stages() == [("plan", "0"), ("write", "0"), ("write", "1")]


def test_copies_of_a_graph_are_one_workflow(backend: RecordingBackend) -> None:
    graph = two_steps(model(backend.base_url)).compile()
    maestro.instrument()
    for number in range(3):
        run_sync(graph.with_config(tags=[str(number)]))
    assert told(backend) and len(backend.workflows) == 1


def test_an_inactive_one_does_nothing(
    backend: RecordingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAESTRO_ENABLED", "0")
    maestro.instrument()
    run_sync(two_steps(model(backend.base_url)).compile())
    assert backend.identities() == [{}] * 3


def test_wrong_arguments_are_loud() -> None:
    with pytest.raises(ConfigError, match="slo"):
        maestro.instrument(deadline=-1)


def test_a_factory_that_yields_a_graph(backend: RecordingBackend) -> None:
    built = two_steps(model(backend.base_url)).compile()
    closed = []

    @workflow(slo="batch")
    @contextmanager
    def make_graph() -> Iterator[Any]:
        yield built
        closed.append("sync")

    @workflow(slo="batch")
    @asynccontextmanager
    async def make_graph_async(config: dict[str, Any]) -> AsyncIterator[Any]:
        assert config == {"x": 1}
        yield built
        closed.append("async")

    async def main() -> None:
        async with make_graph_async({"x": 1}) as graph:
            await graph.ainvoke({"n": 0})

    with make_graph() as graph:
        run_sync(graph)
    asyncio.run(main())
    assert closed == ["sync", "async"]
    names = [head["workflow"].split("@")[0] for head in backend.identities()]
    assert names == ["make_graph"] * 3 + ["make_graph_async"] * 3
