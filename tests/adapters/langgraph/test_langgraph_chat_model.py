import subprocess
import sys
from typing import Any, TypedDict

import pytest
from langchain_core.tools import tool
from langgraph.graph import END, START, StateGraph
from pydantic import BaseModel, SecretStr
from sdk.recording_backend import RecordingBackend

import maestro_langgraph
from maestro_agents import ConfigError, workflow
from maestro_agents.testing import StubEngine
from maestro_langgraph import ChatMaestro


class Answer(BaseModel):
    word: str


@tool
def calc(x: int) -> int:
    """Add one."""
    return x + 1


class State(TypedDict, total=False):
    x: int


def in_a_graph(call: Any) -> Any:
    """A wrapped graph whose one node makes the call."""

    def node(state: State) -> State:
        call()
        return {}

    builder = StateGraph(State).add_node("a", node).add_edge(START, "a").add_edge("a", END)
    return workflow(builder.compile())


@pytest.fixture
def aimed(stub: StubEngine, monkeypatch: pytest.MonkeyPatch) -> StubEngine:
    monkeypatch.setenv("MAESTRO_BASE_URL", stub.base_url)
    return stub


def test_plain_and_async(aimed: StubEngine) -> None:
    model = ChatMaestro(model="stub")
    reply = model.invoke("hi")
    assert reply.text
    assert reply.usage_metadata and reply.usage_metadata["output_tokens"] > 0
    assert reply.response_metadata["model_name"] == "stub"


async def test_async(aimed: StubEngine) -> None:
    assert (await ChatMaestro(model="stub").ainvoke("hi")).text


def test_streams_report_usage(aimed: StubEngine) -> None:
    chunks = list(ChatMaestro(model="stub").stream("hi"))
    assert len(chunks) > 2
    total: Any = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert total.text and total.usage_metadata["output_tokens"] > 0


def test_tools(aimed: StubEngine) -> None:
    model = ChatMaestro(model="stub").bind_tools([calc], tool_choice="calc")
    (call,) = model.invoke("What is 1 + 1?").tool_calls
    assert call["name"] == "calc" and isinstance(call["args"]["x"], int)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(aimed: StubEngine, method: Any) -> None:
    model = ChatMaestro(model="stub").with_structured_output(Answer, method=method)
    assert isinstance(model.invoke("Say a word"), Answer)


def test_its_calls_are_annotated_without_the_hook(
    backend: RecordingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    from maestro_agents import _openai_hook

    monkeypatch.setattr(_openai_hook, "install", lambda: None)
    model = ChatMaestro(model="stub")
    kinds: list[Any] = [
        lambda: model.invoke("hi", extra_headers={"x-mine": "1"}),
        lambda: model.with_structured_output(Answer, method="json_schema").invoke("hi"),
    ]
    for call in kinds:
        in_a_graph(call).invoke({"x": 0})
    assert [head["x-maestro-stage"] for head, _ in backend.chats] == ["a", "a"]
    assert [body["maestro"]["role"] for _, body in backend.chats] == ["a", "a"]
    assert backend.chats[0][0]["x-mine"] == "1"


def test_with_the_hook_it_is_annotated_once(backend: RecordingBackend) -> None:
    model = ChatMaestro(model="stub")
    in_a_graph(lambda: model.invoke("hi")).invoke({"x": 0})
    ((head, body),) = backend.chats
    assert head["x-maestro-instance"] == "0"
    assert body["maestro"]["role"] == "a"


def test_elsewhere_it_says_nothing(backend: RecordingBackend, stub: StubEngine) -> None:
    model = ChatMaestro(model="stub", base_url=stub.base_url)
    in_a_graph(lambda: model.invoke("hi")).invoke({"x": 0})
    request = stub.requests[-1]
    assert not [name for name in request.headers if name.startswith("x-maestro")]
    assert "maestro" not in request.body


ELSEWHERE = "http://elsewhere/v1"


@pytest.mark.parametrize(
    ("environment", "arguments", "base_url", "key"),
    [
        ({}, {}, None, "EMPTY"),
        ({"OPENAI_BASE_URL": ELSEWHERE, "OPENAI_API_KEY": "o"}, {}, ELSEWHERE, "o"),
        ({"MAESTRO_BASE_URL": "http://m/v1"}, {}, "http://m/v1", "EMPTY"),
        (
            {"MAESTRO_BASE_URL": "http://m/v1", "OPENAI_API_KEY": "o"},
            {},
            "http://m/v1",
            "EMPTY",
        ),
        (
            {"MAESTRO_BASE_URL": "http://m/v1", "MAESTRO_API_KEY": "k", "OPENAI_API_KEY": "o"},
            {"base_url": ELSEWHERE},
            ELSEWHERE,
            "o",
        ),
        ({"MAESTRO_BASE_URL": "http://m/v1", "MAESTRO_API_KEY": "k"}, {}, "http://m/v1", "k"),
        ({"MAESTRO_BASE_URL": "http://m/v1"}, {"api_key": "mine"}, "http://m/v1", "mine"),
    ],
)
def test_where_it_aims_and_with_which_key(
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    arguments: dict[str, Any],
    base_url: str | None,
    key: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    model = ChatMaestro(model="stub", **arguments)
    assert model.openai_api_base == base_url
    assert isinstance(model.openai_api_key, SecretStr)
    assert model.openai_api_key.get_secret_value() == key


def test_a_wrong_environment_is_loud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAESTRO_BASE_URL", "maestro:8000")
    with pytest.raises(ConfigError, match="MAESTRO_BASE_URL"):
        ChatMaestro(model="stub")


def test_what_tracers_see() -> None:
    model = ChatMaestro(model="stub", api_key="secret")
    assert model._llm_type == "chat-maestro"
    assert model._get_ls_params()["ls_provider"] == "maestro"
    assert "secret" not in repr(model)


def test_the_public_names() -> None:
    assert maestro_langgraph.__all__ == ["ChatMaestro", "adapter", "agent", "workflow"]
    assert maestro_langgraph.workflow is workflow
    with pytest.raises(AttributeError, match="ChatMistral"):
        _ = maestro_langgraph.ChatMistral


def test_finding_the_adapter_imports_no_framework() -> None:
    code = (
        "import sys, maestro_langgraph; maestro_langgraph.adapter.handles(1); print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert not {"langgraph", "langchain_core", "langchain_openai"} & set(done.stdout.split())
