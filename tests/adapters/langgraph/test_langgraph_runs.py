"""What the backend is told while a wrapped graph runs: stock `ChatOpenAI`, over HTTP."""

import asyncio
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import openai
import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Command, Send
from sdk.recording_backend import RecordingBackend
from sdk.small_graphs import (
    State,
    asks,
    model,
    run_async,
    run_sync,
    shape,
    silent,
    the_run,
    told,
    two_steps,
)

from maestro_agents import agent, workflow
from maestro_agents._context import current_caller

# -- identity ------------------------------------------------------------------------------------


def run_stream(graph: Any) -> None:
    assert list(graph.stream({"n": 0}, stream_mode="updates"))


def run_messages(graph: Any) -> None:
    assert list(graph.stream({"n": 0}, stream_mode="messages"))


def run_astream(graph: Any) -> None:
    async def main() -> None:
        assert [chunk async for chunk in graph.astream({"n": 0}, stream_mode="messages")]

    asyncio.run(main())


def run_batch(graph: Any) -> None:
    graph.batch([{"n": 0}])


@pytest.mark.parametrize(
    "run", [run_sync, run_async, run_stream, run_messages, run_astream, run_batch]
)
def test_every_way_to_run_carries_the_identity(backend: RecordingBackend, run: Any) -> None:
    graph = workflow(two_steps(model(backend.base_url)).compile(name="team"))
    run(graph)
    assert backend.stages() == [("plan", "0"), ("write", "0"), ("write", "1")]
    runs = {head["run"] for head in backend.identities()}
    assert runs == set(told(backend))
    ((found, content),) = backend.workflows
    assert {head["workflow"] for head in backend.identities()} == {found}
    assert content["name"] == "team"
    assert all("conversation" not in head for head in backend.identities())


async def test_async_nodes_that_call_side_by_side_keep_their_own_identity(
    backend: RecordingBackend,
) -> None:
    llm = model(backend.base_url)

    def node(name: str) -> Any:
        async def call(state: State) -> State:
            await asyncio.gather(llm.ainvoke(name), llm.ainvoke(name))
            return {"n": 1}

        return call

    builder = StateGraph(State)
    for name in ("left", "right"):
        builder.add_node(name, node(name)).add_edge(START, name).add_edge(name, END)
    await workflow(builder.compile()).ainvoke({"n": 0})
    assert Counter(backend.stages()) == Counter(
        [("left", "0"), ("left", "1"), ("right", "0"), ("right", "1")]
    )
    for head, (_, body) in zip(backend.identities(), backend.chats, strict=True):
        assert head["stage"] == body["messages"][0]["content"]
    assert backend.announced()["left"]["barrier"] == {"step": 1, "width": 2}


def test_the_annotation_has_role_slo_and_tenant(backend: RecordingBackend) -> None:
    graph = workflow(
        two_steps(model(backend.base_url)).compile(),
        slo="interactive",
        deadline=20,
        tenant="acme",
        roles={"plan": "planner"},
    )
    graph.invoke({"n": 0}, {"configurable": {"thread_id": 7}})
    body = backend.chats[0][1]["maestro"]
    assert body["role"] == "planner"
    assert body["slo"] == {"class": "interactive", "deadline_s": 20}
    assert body["tenant"] == "acme"
    started = the_run(backend)[0]
    assert started["slo"] == body["slo"]
    assert started["tenant"] == "acme"
    assert started["conversation"] == "7"
    assert {head["conversation"] for head in backend.identities()} == {"7"}


def test_runs_on_one_thread_are_different_runs_of_one_conversation(
    backend: RecordingBackend,
) -> None:
    graph = workflow(two_steps(model(backend.base_url)).compile(checkpointer=InMemorySaver()))
    for _ in range(2):
        graph.invoke({"n": 0}, {"configurable": {"thread_id": "t"}})
    assert len(told(backend)) == 2
    assert {head["instance"] for head in backend.identities()} == {"0", "1"}


def test_no_call_outside_a_node_is_annotated(backend: RecordingBackend) -> None:
    llm = model(backend.base_url)
    graph = workflow(two_steps(llm).compile())
    graph.invoke({"n": 0})
    llm.invoke("hi")
    assert backend.identities()[-1] == {}
    assert current_caller.get() is None


def raw_call(base_url: str) -> None:
    with openai.OpenAI(base_url=base_url, api_key="x") as client:
        client.chat.completions.create(model="stub", messages=[{"role": "user", "content": "hi"}])


async def araw_call(base_url: str) -> None:
    async with openai.AsyncOpenAI(base_url=base_url, api_key="x") as client:
        await client.chat.completions.create(
            model="stub", messages=[{"role": "user", "content": "hi"}]
        )


def test_the_openai_sdk_called_by_hand_in_a_node_is_a_call_of_that_node(
    backend: RecordingBackend,
) -> None:
    llm = model(backend.base_url)

    def node(state: State) -> State:
        llm.invoke("hi")
        raw_call(backend.base_url)
        return {}

    async def anode(state: State) -> State:
        await asyncio.gather(araw_call(backend.base_url), llm.ainvoke("hi"))
        return {}

    builder = StateGraph(State).add_node("a", node).add_node("b", anode)
    builder.add_edge(START, "a").add_edge("a", "b").add_edge("b", END)
    asyncio.run(workflow(builder.compile()).ainvoke({"n": 0}))
    assert backend.stages()[:2] == [("a", "0"), ("a", "1")]
    assert sorted(backend.stages()[2:]) == [("b", "0"), ("b", "1")]


def test_a_thread_started_by_hand_is_seen_when_it_is_given_the_config(
    backend: RecordingBackend,
) -> None:
    llm = model(backend.base_url)

    def node(state: State, config: RunnableConfig) -> State:
        with ThreadPoolExecutor() as pool:
            pool.submit(llm.invoke, "hi").result()
            pool.submit(llm.invoke, "hi", config).result()
        return {}

    builder = StateGraph(State).add_node("a", node).add_edge(START, "a").add_edge("a", END)
    workflow(builder.compile()).invoke({"n": 0})
    assert [head.get("stage") for head in backend.identities()] == [None, "a"]


@pytest.mark.filterwarnings("ignore:Unexpected type for token usage")  # langchain-openai's
def test_two_prompts_in_one_generate_are_two_calls_of_the_node(backend: RecordingBackend) -> None:
    llm = model(backend.base_url)

    def node(state: State, config: RunnableConfig) -> State:
        prompts = [[HumanMessage("a")], [HumanMessage("b")]]
        llm.generate(prompts, callbacks=config["callbacks"])
        return {}

    builder = StateGraph(State).add_node("a", node).add_edge(START, "a").add_edge("a", END)
    workflow(builder.compile()).invoke({"n": 0})
    assert backend.stages() == [("a", "0"), ("a", "1")]


def test_announcements_follow_the_graph(backend: RecordingBackend) -> None:
    llm = model(backend.base_url)

    def route(state: State) -> Literal["plan", "__end__"]:
        return "plan" if state["n"] < 4 else END

    builder = StateGraph(State).add_node("plan", asks(llm)).add_node("write", asks(llm))
    builder.add_edge(START, "plan").add_edge("plan", "write")
    builder.add_conditional_edges("write", route)
    workflow(builder.compile()).invoke({"n": 0})
    assert backend.stages() == [("plan", "0"), ("write", "0"), ("plan", "1"), ("write", "1")]
    assert backend.announced() == {
        "plan": {
            "successors": [{"stage": "write", "certain": True}],
            "open_ended": False,
            "barrier": {"step": 3, "width": 1},
        },
        "write": {
            "successors": [{"stage": "plan", "certain": False}],
            "open_ended": False,
            "barrier": {"step": 4, "width": 1},
        },
    }
    ends = [e for e in the_run(backend) if e["type"] == "stage_ended"]
    assert [(e["stage"], e["instance"], e.get("next")) for e in ends] == [
        ("plan", 0, None),
        ("write", 0, [{"stage": "plan", "certain": True}]),
        ("plan", 1, None),
        ("write", 1, []),
    ]


@pytest.mark.parametrize("run", [run_sync, run_async], ids=["sync", "async"])
def test_send_fans_a_subgraph_out(backend: RecordingBackend, run: Any) -> None:
    llm = model(backend.base_url)
    inner = StateGraph(State).add_node("ask", asks(llm)).add_node("tell", silent)
    inner.add_edge(START, "ask").add_edge("ask", "tell").add_edge("tell", END)
    builder = StateGraph(State).add_node("plan", silent).add_node("write", silent)
    builder.add_node("work", inner.compile()).add_edge(START, "plan")
    builder.add_conditional_edges("plan", lambda s: [Send("work", {"n": 0})] * 3, ["work"])
    builder.add_edge("work", "write").add_edge("write", END)
    graph = workflow(builder.compile())
    if run is run_sync:
        graph.invoke({"n": 0})
    else:
        asyncio.run(graph.ainvoke({"n": 0}))
    assert sorted(backend.stages()) == [("work/ask", "0"), ("work/ask", "1"), ("work/ask", "2")]
    assert backend.announced()["work/ask"]["barrier"] == {"step": 2, "width": 3}
    events = the_run(backend)
    (plan_end,) = [e for e in events if e["type"] == "stage_ended" and e["stage"] == "plan"]
    assert plan_end["next"] == [{"stage": "work/ask", "certain": True, "width": 3}]
    begun = Counter(e["stage"] for e in events if e["type"] == "stage_started")
    assert begun == {"plan": 1, "work/ask": 3, "work/tell": 3, "write": 1}


def test_a_join_counts_as_one_task(backend: RecordingBackend) -> None:
    llm = model(backend.base_url)
    builder = StateGraph(State)
    for name in ("a", "b", "c"):
        builder.add_node(name, asks(llm))
    builder.add_node("b2", asks(llm)).add_edge("b", "b2")
    builder.add_edge(START, "a").add_edge(START, "b").add_edge(["a", "b2"], "c").add_edge("c", END)
    workflow(builder.compile()).invoke({"n": 0})
    barriers = {stage: said["barrier"] for stage, said in backend.announced().items()}
    assert barriers == {
        "a": {"step": 1, "width": 2},
        "b": {"step": 1, "width": 2},
        "b2": {"step": 2, "width": 1},
        "c": {"step": 3, "width": 1},
    }


def test_commands_route_and_a_parent_command_is_no_failure(backend: RecordingBackend) -> None:
    llm = model(backend.base_url)

    def jump(state: State) -> Command[Literal["sub"]]:
        llm.invoke("hi")
        return Command(goto="sub", update={"n": 1})

    def leave(state: State) -> Command[str]:
        llm.invoke("hi")
        return Command(goto="last", graph=Command.PARENT)

    inner = StateGraph(State).add_node("leave", leave).add_edge(START, "leave").compile()
    builder = StateGraph(State).add_node("jump", jump).add_node("last", asks(llm))
    builder.add_node("sub", inner, destinations=("last",))
    builder.add_edge(START, "jump").add_edge("last", END)
    workflow(builder.compile()).invoke({"n": 0})
    ends = {e["stage"]: e for e in the_run(backend) if e["type"] == "stage_ended"}
    assert ends["jump"]["next"] == [{"stage": "sub/leave", "certain": True}]
    assert ends["sub/leave"]["next"] == [{"stage": "last", "certain": True}]
    assert not any(end["failed"] for end in ends.values())
    assert backend.announced()["last"]["barrier"] == {"step": 3, "width": 1}


def test_plain_edges_lead_on_whatever_routing_chooses(backend: RecordingBackend) -> None:
    builder = StateGraph(State)
    for name in ("a", "b", "c", "d"):
        builder.add_node(name, silent)
    builder.add_edge(START, "a").add_edge("a", "b")
    builder.add_conditional_edges("a", lambda s: "c", ["c", "d"])
    workflow(builder.compile()).invoke({"n": 0})
    (end,) = [e for e in the_run(backend) if e["type"] == "stage_ended" and e["stage"] == "a"]
    assert {said["stage"] for said in end["next"]} == {"b", "c"}


@tool
def calc(x: int) -> int:
    """Add one."""
    return x + 1


def test_tools_of_an_agent(backend: RecordingBackend) -> None:
    llm = model(backend.base_url).bind_tools([calc], tool_choice="calc")

    def ask(state: dict[str, Any]) -> dict[str, Any]:
        reply = llm.invoke("What is 1 + 1?")
        assert isinstance(reply, AIMessage) and reply.tool_calls
        return {"messages": [reply]}

    def use(state: dict[str, Any]) -> dict[str, Any]:
        calc.invoke({"x": 1})
        return {}

    builder = StateGraph(MessagesState).add_node("ask", ask).add_node("use", use)
    builder.add_edge(START, "ask").add_edge("ask", "use").add_edge("use", END)
    workflow(builder.compile()).invoke({"messages": []})
    events = the_run(backend)
    assert shape(events) == [
        "run_started",
        "stage_started ask",
        "tools_requested ask",
        "stage_ended ask",
        "stage_started use",
        "tool_started use",
        "tool_ended use",
        "stage_ended use",
        "run_ended",
    ]
    assert (events[5]["tool"], events[6]["tool"]) == ("calc", "calc")
    assert events[6]["duration_s"] >= 0
    assert all(event["at"] > 1e9 for event in events)


def test_a_nested_agent_has_its_path_and_role(backend: RecordingBackend) -> None:
    expert = create_agent(model(backend.base_url), [calc], name="expert")
    builder = StateGraph(expert.builder.state_schema).add_node("hired", expert)
    builder.add_edge(START, "hired").add_edge("hired", END)
    workflow(builder.compile()).invoke({"messages": [("user", "hi")]})
    assert backend.stages() == [("hired/model", "0")]
    assert backend.chats[0][1]["maestro"]["role"] == "expert"
    assert backend.announced()["hired/model"]["successors"] == [
        {"stage": "hired/tools", "certain": False}
    ]


def test_an_agent_made_inside_a_node_is_followed_too(backend: RecordingBackend) -> None:
    llm = model(backend.base_url)

    def node(state: State) -> State:
        create_agent(llm, [calc], name="expert").invoke({"messages": [("user", "hi")]})
        return {}

    builder = StateGraph(State).add_node("host", node).add_node("last", silent)
    builder.add_edge(START, "host").add_edge("host", "last").add_edge("last", END)
    workflow(builder.compile()).invoke({"n": 0})
    assert backend.stages() == [("host/model", "0")]
    assert backend.chats[0][1]["maestro"]["role"] == "expert"
    said = backend.announced()["host/model"]
    assert said["successors"] == [{"stage": "last", "certain": False}]
    assert said["open_ended"]
    assert len(told(backend)) == 1


def test_marked_functions_keep_their_role_at_run_time(backend: RecordingBackend) -> None:
    node = agent(role="planner")(asks(model(backend.base_url)))
    builder = StateGraph(State).add_node("p", node).add_edge(START, "p").add_edge("p", END)
    workflow(builder.compile()).invoke({"n": 0})
    assert backend.chats[0][1]["maestro"]["role"] == "planner"
