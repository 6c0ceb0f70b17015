"""Small graphs whose nodes call a stock `ChatOpenAI`, and what a backend was told of their runs."""

import asyncio
import operator
from typing import Annotated, Any, TypedDict

from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from sdk.recording_backend import RecordingBackend

from maestro_agents._control import control


class State(TypedDict, total=False):
    n: Annotated[int, operator.add]
    route: Annotated[str, lambda old, new: new]


def model(base_url: str) -> ChatOpenAI:
    return ChatOpenAI(model="stub", base_url=base_url, api_key="x", max_retries=0)


def asks(llm: ChatOpenAI, times: int = 1) -> Any:
    def node(state: State) -> State:
        for _ in range(times):
            llm.invoke("hi")
        return {"n": 1}

    return node


def silent(state: State) -> State:
    return {"n": 1}


def told(backend: RecordingBackend) -> dict[str, list[dict[str, Any]]]:
    assert control.flush(5)
    return backend.events


def the_run(backend: RecordingBackend) -> list[dict[str, Any]]:
    (events,) = told(backend).values()
    return events


def shape(events: list[dict[str, Any]]) -> list[str]:
    return [f"{e['type']} {e.get('stage', '')}".strip() for e in events]


def two_steps(llm: ChatOpenAI) -> Any:
    builder = StateGraph(State).add_node("plan", asks(llm)).add_node("write", asks(llm, 2))
    return builder.add_edge(START, "plan").add_edge("plan", "write").add_edge("write", END)


def run_sync(graph: Any) -> None:
    assert graph.invoke({"n": 0})["n"] == 2


def run_async(graph: Any) -> None:
    async def main() -> None:
        assert (await graph.ainvoke({"n": 0}))["n"] == 2

    asyncio.run(main())
