"""Whatever goes wrong with us, the graph does not notice; wherever it runs, we do not block it."""

import asyncio
import json
import logging
import os
import subprocess
import sys
import textwrap
from collections import Counter
from threading import Thread
from typing import Any

import openai
import pytest
from langgraph.graph import END, START, StateGraph
from sdk.recording_backend import FAULTS, RecordingBackend
from sdk.small_graphs import State, model, run_async, run_sync, shape, silent, told, two_steps

from maestro_agents import workflow
from maestro_agents._control import control
from maestro_agents._tracker import Tracker

SHAPE = [
    "run_started",
    "stage_started plan",
    "stage_ended plan",
    "stage_started write",
    "stage_ended write",
    "run_ended",
]
DONE = {"n": 2, "route": ""}
NAMES = [f"{n:03}" + "x" * 200 for n in range(110)]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# -- a control plane that fails ------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("run", [run_sync, run_async])
def test_a_control_plane_that_breaks_has_no_effect(
    backend: RecordingBackend, caplog: pytest.LogCaptureFixture, fault: str, run: Any
) -> None:
    backend.fault = fault
    graph = workflow(two_steps(model(backend.base_url)).compile())
    for _ in range(2):
        run(graph)
    assert backend.stages() == 2 * [("plan", "0"), ("write", "0"), ("write", "1")]
    assert not backend.over.is_set(), "a hanging reply was not waited for"
    assert not control.flush(5)
    backend.over.set()
    assert len(warnings(caplog)) == 1 and "takes no events" in warnings(caplog)[0]


@pytest.mark.parametrize("status", [400, 404, 500, 503])
def test_a_control_plane_that_refuses_has_no_effect(
    backend: RecordingBackend, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    backend.status = status
    graph = workflow(two_steps(model(backend.base_url)).compile())
    for _ in range(2):
        run_sync(graph)
    control.flush(5)
    assert backend.stages() == 2 * [("plan", "0"), ("write", "0"), ("write", "1")]
    messages = warnings(caplog)
    assert len([line for line in messages if "takes no events" in line]) == 1
    assert len([line for line in messages if "refused" in line]) == (status == 400)


def test_a_control_plane_that_is_not_there_has_no_effect(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MAESTRO_BASE_URL", "http://127.0.0.1:7/v1")
    builder = StateGraph(State).add_node("plan", silent).add_node("write", silent)
    builder.add_edge(START, "plan").add_edge("plan", "write").add_edge("write", END)
    graph = workflow(builder.compile())
    for _ in range(3):
        run_sync(graph)
        assert not control.flush(5)
    assert len(warnings(caplog)) == 1


# -- too much to say -----------------------------------------------------------------------------


def wide(node: Any, routers: int, path_map: list[str] | None) -> Any:
    """Any node of NAMES may follow each of the first `routers`; the first ends it."""
    builder = StateGraph(State)
    for name in NAMES:
        builder.add_node(name, node)
    for name in NAMES[:routers]:
        builder.add_conditional_edges(name, lambda _: END, path_map)
    return workflow(builder.add_edge(START, NAMES[0]).compile())


def test_an_announcement_over_the_limit_is_left_out(
    backend: RecordingBackend, caplog: pytest.LogCaptureFixture
) -> None:
    def ask(state: State) -> State:
        model(backend.base_url).invoke("hi")
        return {"n": 1}

    assert wide(ask, 1, [*NAMES[1:], END]).invoke({"n": 0})["n"] == 1
    ((headers, body),) = backend.chats
    assert headers["x-maestro-stage"] == NAMES[0]
    assert body["maestro"]["role"] == NAMES[0] and "announcement" not in body["maestro"]
    assert ["dropped" in line for line in warnings(caplog)] == [True]


def test_a_workflow_over_the_limit_is_not_sent(
    backend: RecordingBackend, caplog: pytest.LogCaptureFixture
) -> None:
    assert wide(silent, len(NAMES), None).invoke({"n": 0})["n"] == 1
    (events,) = told(backend).values()
    assert len(shape(events)) == 4 and not backend.workflows
    assert ["not sent" in line for line in warnings(caplog)] == [True]


# -- wrong settings, and errors of our own -------------------------------------------------------


def test_settings_that_break_between_two_runs(
    backend: RecordingBackend, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = workflow(two_steps(model(backend.base_url)).compile())
    monkeypatch.setenv("MAESTRO_BASE_URL", "nonsense")
    run_sync(graph)
    run_async(graph)
    assert backend.identities() == 6 * [{}]
    assert ["MAESTRO_BASE_URL" in line for line in warnings(caplog)] == [True]


def test_settings_that_break_in_mid_run(
    backend: RecordingBackend, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(state: State) -> State:
        monkeypatch.setenv("MAESTRO_ENABLED", "perhaps")
        model(backend.base_url).invoke("hi")
        return {"n": 1}

    builder = StateGraph(State).add_node("a", spoil).add_edge(START, "a").add_edge("a", END)
    assert workflow(builder.compile()).invoke({"n": 0})["n"] == 1
    assert backend.identities() == [{}]
    assert ["MAESTRO_ENABLED" in line for line in warnings(caplog)] == [True]


MOMENTS = ("run_started", "stage_started", "call_started", "routed", "stage_ended", "run_ended")


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("run", [run_sync, run_async])
def test_an_error_of_our_own_stays_ours(
    backend: RecordingBackend,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    run: Any,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("ours")

    monkeypatch.setattr(Tracker, moment, fail)
    graph = workflow(two_steps(model(backend.base_url)).compile())
    run(graph)
    run(graph)
    assert len(backend.chats) == 6
    assert len(warnings(caplog)) == (moment != "routed"), "this graph has nothing to route"


# -- event loops, threads, processes -------------------------------------------------------------


def run_python(code: str, base_url: str) -> Any:
    """What a fresh interpreter prints, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM) + textwrap.dedent(code)],
        env={
            **os.environ,
            "MAESTRO_BASE_URL": base_url,
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        timeout=120,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


PROGRAM = """
    import asyncio, json, logging, os
    from threading import Thread
    import openai
    from langgraph.graph import END, START, StateGraph
    from sdk.small_graphs import State
    from maestro_agents import workflow
    from maestro_agents._control import control

    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("maestro_agents").addHandler(handler)
    where = {"base_url": os.environ["MAESTRO_BASE_URL"], "api_key": "x", "max_retries": 0}
    question = {"model": "stub", "messages": [{"role": "user", "content": "hi"}]}

    def ask(state):
        with openai.OpenAI(**where) as client:
            client.chat.completions.create(**question)
        return {"n": 1}

    def build(node):
        builder = StateGraph(State).add_node("plan", node).add_node("write", node)
        return builder.add_edge(START, "plan").add_edge("plan", "write").add_edge("write", END)
"""


def whole_runs(backend: RecordingBackend) -> int:
    """How many runs there were, each told from its start to its end."""
    assert all(shape(events) == SHAPE for events in backend.events.values())
    return len(backend.events)


def test_nothing_of_ours_blocks_an_event_loop(backend: RecordingBackend) -> None:
    """Nor a factory that is called in one, the very first event, or other threads."""
    code = """
    from blockbuster import blockbuster_ctx

    @workflow
    def make(node):
        return build(node).compile()

    async def main():
        client = openai.AsyncOpenAI(**where)

        async def aask(state):
            await client.chat.completions.create(**question)
            return {"n": 1}

        await build(aask).compile().ainvoke({"n": 0})  # what the libraries read once
        with blockbuster_ctx():
            graph = workflow(make(aask))
            await graph.ainvoke({"n": 0})
            shared = make(lambda state: {"n": 1})
            others = [Thread(target=lambda: [shared.invoke({"n": 0}) for _ in range(20)])
                      for _ in range(3)]
            for thread in others:
                thread.start()
            while any(thread.is_alive() for thread in others):
                await graph.ainvoke({"n": 0})
                await shared.ainvoke({"n": 0})
        await client.close()

    asyncio.run(main())
    assert control.flush(10)
    print(json.dumps(lines))
    """
    assert run_python(code, backend.base_url) == []
    assert whole_runs(backend) >= 62
    assert {head.get("stage") for head in backend.identities()[2:]} == {"plan", "write"}


def test_forked_workers_each_tell_their_own_runs(backend: RecordingBackend) -> None:
    code = """
    graph = workflow(build(ask).compile())
    graph.invoke({"n": 0})  # the parent has a thread now
    children = []
    for number in range(3):
        if (child := os.fork()) == 0:
            done = graph.invoke({"n": 0}) if number else asyncio.run(graph.ainvoke({"n": 0}))
            os._exit(0 if done["n"] == 2 and control.flush(10) and not lines else 1)
        children.append(child)
    failed = [child for child in children if os.waitpid(child, 0)[1]]
    graph.invoke({"n": 0})
    assert control.flush(10)
    print(json.dumps([failed, lines]))
    """
    assert run_python(code, backend.base_url) == [[], []]
    assert whole_runs(backend) == 5
    assert Counter(backend.stages()) == {("plan", "0"): 5, ("write", "0"): 5}


def each_asks(base_url: str) -> Any:
    """Two nodes with a client of their own: none is shared between event loops."""

    async def ask(state: State) -> State:
        async with openai.AsyncOpenAI(base_url=base_url, api_key="x", max_retries=0) as client:
            await client.chat.completions.create(
                model="stub", messages=[{"role": "user", "content": "hi"}]
            )
        return {"n": 1}

    builder = StateGraph(State).add_node("plan", ask).add_node("write", ask)
    return builder.add_edge(START, "plan").add_edge("plan", "write").add_edge("write", END)


def test_several_event_loops_use_one_graph(backend: RecordingBackend) -> None:
    graph = workflow(each_asks(backend.base_url).compile())
    results = []

    def loop() -> None:
        async def main() -> None:
            runs = (graph.ainvoke({"n": 0}) for _ in range(3))
            results.extend(await asyncio.gather(*runs))

        asyncio.run(main())

    threads = [Thread(target=loop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == 12 * [DONE]
    told(backend)
    assert whole_runs(backend) == 12
    of_runs = Counter((head["run"], head["stage"]) for head in backend.identities())
    assert len(of_runs) == 24 and set(of_runs.values()) == {1}


def test_each_input_of_a_batch_is_a_run(backend: RecordingBackend) -> None:
    graph = workflow(two_steps(model(backend.base_url)).compile())
    assert graph.batch(4 * [{"n": 0}]) == 4 * [DONE]
    assert asyncio.run(graph.abatch(4 * [{"n": 0}])) == 4 * [DONE]
    told(backend)
    assert whole_runs(backend) == 8
    assert Counter(backend.stages()) == {("plan", "0"): 8, ("write", "0"): 8, ("write", "1"): 8}
