"""What text leaves the app beyond the calls themselves: none, unless it is asked for."""

import json
from typing import Any

import pytest
from langchain_core.tools import tool
from langgraph.graph import END, START, MessagesState, StateGraph
from sdk.recording_backend import RecordingBackend
from sdk.small_graphs import model, told

from maestro_agents import workflow

SECRET = "the-secret-of-the-prompt"


@tool
def look_up(question: str) -> str:
    """Look something up."""
    return f"found {question}"


def run(backend: RecordingBackend) -> list[dict[str, Any]]:
    """A run whose every text is secret: input, prompt, tool input and output, state, failure."""
    llm = model(backend.base_url)

    def ask(state: MessagesState) -> dict[str, Any]:
        found = look_up.invoke({"question": SECRET})
        return {"messages": [llm.invoke(f"{SECRET} {found}")]}

    def fail(state: MessagesState) -> dict[str, Any]:
        raise ValueError(SECRET)

    builder = StateGraph(MessagesState).add_node("ask", ask).add_node("fail", fail)
    builder.add_edge(START, "ask").add_edge("ask", "fail").add_edge("fail", END)
    with pytest.raises(ValueError, match=SECRET):
        workflow(builder.compile()).invoke({"messages": [("user", SECRET)]})
    [events] = told(backend).values()
    return events


def test_no_text_leaves_but_in_the_call(backend: RecordingBackend) -> None:
    run(backend)
    [(headers, body)] = backend.chats
    assert SECRET in json.dumps(body["messages"])
    told_beside = [headers, body["maestro"], backend.events, backend.workflows, backend.headers]
    assert SECRET not in json.dumps(told_beside)


def test_what_goes_into_tools_and_comes_out_leaves_when_asked_for(
    backend: RecordingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAESTRO_SEND_CONTENT", "1")
    events = run(backend)
    [started] = [e for e in events if e["type"] == "tool_started"]
    [ended] = [e for e in events if e["type"] == "tool_ended"]
    assert SECRET in started["input"]
    assert ended["output"] == f"found {SECRET}"
    others = [e for e in events if e not in (started, ended)]
    assert SECRET not in json.dumps([others, backend.workflows])
