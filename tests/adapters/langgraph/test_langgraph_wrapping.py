"""Wrapping a graph, and what may go wrong while it runs."""

import asyncio
import json
from collections import Counter
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import Command, RetryPolicy, interrupt
from sdk.recording_backend import RecordingBackend
from sdk.small_graphs import (
    State,
    asks,
    model,
    run_sync,
    shape,
    the_run,
    told,
    two_steps,
)

from maestro_agents import workflow
from maestro_agents._control import control
from maestro_agents.testing import StubEngine

# -- wrapping ------------------------------------------------------------------------------------


def test_the_copy_is_of_the_same_class_and_the_original_is_untouched(
    backend: RecordingBackend,
) -> None:
    plain = two_steps(model(backend.base_url)).compile()
    wrapped = workflow(plain)
    assert type(wrapped) is type(plain) is CompiledStateGraph
    assert wrapped is not plain
    plain.invoke({"n": 0})
    assert backend.identities() == [{}, {}, {}]


def test_wrapping_twice_counts_once_and_the_last_options_hold(backend: RecordingBackend) -> None:
    graph = workflow(two_steps(model(backend.base_url)).compile(), slo="batch")
    graph = workflow(graph, slo="interactive")
    graph.invoke({"n": 0})
    assert backend.stages() == [("plan", "0"), ("write", "0"), ("write", "1")]
    assert backend.chats[0][1]["maestro"]["slo"]["class"] == "interactive"
    assert len(told(backend)) == 1


def test_a_wrapped_graph_inside_a_wrapped_graph_is_part_of_the_outer_run(
    backend: RecordingBackend,
) -> None:
    inner = workflow(two_steps(model(backend.base_url)).compile(), name="inner")
    builder = StateGraph(State).add_node("sub", inner).add_edge(START, "sub").add_edge("sub", END)
    workflow(builder.compile(), name="outer").invoke({"n": 0})
    assert backend.stages()[0] == ("sub/plan", "0")
    assert {head["workflow"].split("@")[0] for head in backend.identities()} == {"outer"}
    assert len(told(backend)) == 1


def test_a_wrapped_graph_inside_a_plain_graph_is_a_run_of_its_own(
    backend: RecordingBackend,
) -> None:
    inner = workflow(two_steps(model(backend.base_url)).compile(), name="inner")
    builder = StateGraph(State).add_node("sub", inner).add_edge(START, "sub").add_edge("sub", END)
    builder.compile().invoke({"n": 0})
    assert backend.stages() == [("plan", "0"), ("write", "0"), ("write", "1")]


def test_the_users_own_callbacks_still_run(backend: RecordingBackend) -> None:
    class Mine(BaseCallbackHandler):
        seen = 0

        def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
            self.seen += 1

    bound, passed = Mine(), Mine()
    graph = two_steps(model(backend.base_url)).compile().with_config(callbacks=[bound])
    workflow(graph).invoke({"n": 0}, {"callbacks": [passed]})
    assert (bound.seen, passed.seen) == (3, 3)
    assert len(backend.stages()) == 3


def test_a_factory_gives_the_name(backend: RecordingBackend) -> None:
    @workflow(slo="batch")
    def make_team() -> Any:
        return two_steps(model(backend.base_url)).compile()

    make_team().invoke({"n": 0})
    assert {head["workflow"].split("@")[0] for head in backend.identities()} == {"make_team"}


# -- what goes wrong -----------------------------------------------------------------------------


def test_a_failing_node_fails_its_run_and_the_error_is_the_apps_own(
    backend: RecordingBackend,
) -> None:
    def fail(state: State) -> State:
        raise LookupError("mine")

    builder = StateGraph(State).add_node("a", fail).add_edge(START, "a").add_edge("a", END)
    with pytest.raises(LookupError, match="mine"):
        workflow(builder.compile()).invoke({"n": 0})
    ended = [e for e in the_run(backend) if e["type"].endswith("ended")]
    assert [(e["type"], e["failed"]) for e in ended] == [("stage_ended", True), ("run_ended", True)]


def test_a_node_that_is_tried_again_is_another_instance(backend: RecordingBackend) -> None:
    tries = []

    def flaky(state: State) -> State:
        tries.append(1)
        if len(tries) == 1:
            raise ConnectionError
        return {"n": 1}

    builder = StateGraph(State)
    builder.add_node("a", flaky, retry_policy=RetryPolicy(initial_interval=0.001, jitter=False))
    workflow(builder.add_edge(START, "a").add_edge("a", END).compile()).invoke({"n": 0})
    events = the_run(backend)
    assert [(e["instance"], e["failed"]) for e in events if e["type"] == "stage_ended"] == [
        (0, True),
        (1, False),
    ]
    assert events[-1]["type"] == "run_ended" and not events[-1]["failed"]


def test_a_stream_that_nobody_reads_on_ends_its_run(backend: RecordingBackend) -> None:
    graph = workflow(two_steps(model(backend.base_url)).compile())
    stream = graph.stream({"n": 0})
    next(stream)
    stream.close()
    last = the_run(backend)[-1]
    assert (last["type"], last["failed"]) == ("run_ended", False)


def asking_a_human(llm: ChatOpenAI) -> Any:
    def ask(state: State) -> State:
        llm.invoke("before")
        return {"route": interrupt("ok?")}

    builder = StateGraph(State).add_node("ask", ask).add_node("last", asks(llm))
    return builder.add_edge(START, "ask").add_edge("ask", "last").add_edge("last", END)


def test_an_interrupt_pauses_the_run_and_resuming_continues_it(backend: RecordingBackend) -> None:
    graph = workflow(asking_a_human(model(backend.base_url)).compile(checkpointer=InMemorySaver()))
    config: Any = {"configurable": {"thread_id": "t"}}
    assert graph.invoke({"n": 0}, config)["__interrupt__"]
    assert shape(the_run(backend)) == [
        "run_started",
        "stage_started ask",
        "stage_ended ask",
        "run_paused",
    ]
    assert not the_run(backend)[2]["failed"]
    assert graph.invoke(Command(resume="yes"), config)["route"] == "yes"
    assert shape(the_run(backend))[4:] == [
        "run_resumed",
        "stage_started ask",
        "stage_ended ask",
        "stage_started last",
        "stage_ended last",
        "run_ended",
    ]
    assert backend.stages() == [("ask", "0"), ("ask", "1"), ("last", "0")]
    assert len({head["run"] for head in backend.identities()}) == 1


def test_an_interrupt_inside_a_subgraph_pauses_once(backend: RecordingBackend) -> None:
    inner = asking_a_human(model(backend.base_url)).compile()
    builder = StateGraph(State).add_node("sub", inner).add_edge(START, "sub").add_edge("sub", END)
    graph = workflow(builder.compile(checkpointer=InMemorySaver()))
    config: Any = {"configurable": {"thread_id": "t"}}
    asyncio.run(graph.ainvoke({"n": 0}, config))
    asyncio.run(graph.ainvoke(Command(resume="yes"), config))
    kinds = Counter(event["type"] for event in the_run(backend))
    assert (kinds["run_paused"], kinds["run_resumed"], kinds["run_ended"]) == (1, 1, 1)


def test_a_breakpoint_pauses_too(backend: RecordingBackend) -> None:
    builder = two_steps(model(backend.base_url))
    graph = workflow(builder.compile(checkpointer=InMemorySaver(), interrupt_before=["write"]))
    config: Any = {"configurable": {"thread_id": "t"}}
    graph.invoke({"n": 0}, config)
    graph.invoke(None, config)
    assert [kind for kind in shape(the_run(backend)) if kind.startswith("run_")] == [
        "run_started",
        "run_paused",
        "run_resumed",
        "run_ended",
    ]


def test_a_new_question_ends_the_run_that_was_paused(backend: RecordingBackend) -> None:
    graph = workflow(asking_a_human(model(backend.base_url)).compile(checkpointer=InMemorySaver()))
    config: Any = {"configurable": {"thread_id": "t"}}
    graph.invoke({"n": 0}, config)
    graph.invoke({"n": 0}, config)
    first, second = told(backend).values()
    assert shape(first)[-1] == "run_ended"
    assert shape(second)[-1] == "run_paused"


def test_a_dead_control_plane_has_no_visible_effect(
    stub: StubEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MAESTRO_BASE_URL", "http://127.0.0.1:9/v1")
    before = len(stub.requests)
    graph = workflow(two_steps(model(stub.base_url)).compile())
    run_sync(graph)
    assert not control.flush(5)
    made = stub.requests[before:]
    assert len(made) == 3
    assert "x-maestro" not in json.dumps([request.headers for request in made])
    assert len(caplog.records) == 1


@pytest.mark.parametrize("change", [{"MAESTRO_ENABLED": "0"}, {"MAESTRO_BASE_URL": ""}])
def test_nothing_happens_while_inactive(
    backend: RecordingBackend, monkeypatch: pytest.MonkeyPatch, change: dict[str, str]
) -> None:
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    run_sync(workflow(two_steps(model(backend.base_url)).compile()))
    assert backend.identities() == [{}, {}, {}]
    assert "maestro" not in backend.chats[0][1]
    assert told(backend) == {} and backend.workflows == []


def test_nothing_is_remembered_of_runs_that_are_over(backend: RecordingBackend) -> None:
    from maestro_langgraph import _handler

    graph = workflow(two_steps(model(backend.base_url)).compile())
    graph.invoke({"n": 0})
    with pytest.raises(Exception, match="recursion"):
        graph.invoke({"n": 0}, {"recursion_limit": 1})
    assert _handler._frames == {}
