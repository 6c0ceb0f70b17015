import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypedDict

import pytest
from anyio.from_thread import start_blocking_portal
from gateway.gateways import gateway
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    HumanMessage,
    ToolMessage,
)
from langchain_core.tools import tool
from langgraph.graph import END, START, StateGraph
from pydantic import BaseModel, SecretStr
from sdk.recording_backend import RecordingBackend

import maestro_langgraph
from maestro_agents import ConfigError, _openai_hook, workflow
from maestro_agents.adapter import CallContext, current_caller
from maestro_agents.protocol import Annotation, CallIdentity
from maestro_agents.testing import StubEngine
from maestro_langgraph import ChatMaestro

# langchain-openai dumps the typed event that ends a structured stream.
noisy_parse = pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")


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


def test_a_model_brings_the_hook_that_annotates_it(backend: RecordingBackend) -> None:
    _openai_hook.uninstall()
    model = ChatMaestro(model="stub")
    call = CallContext(CallIdentity(run="r", workflow="w@1", stage="a"), Annotation(role="a"))
    reset = current_caller.set(lambda: call)
    try:
        model.invoke("hi", extra_headers={"x-mine": "1"})
        model.with_structured_output(Answer, method="json_schema").invoke("hi")
        list(model.stream("hi"))
    finally:
        current_caller.reset(reset)
    assert backend.stages() == [("a", "0")] * 3
    assert [body["maestro"]["role"] for _, body in backend.chats] == ["a", "a", "a"]
    assert backend.chats[0][0]["x-mine"] == "1"


def test_it_is_annotated_once(backend: RecordingBackend) -> None:
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


@pytest.fixture(scope="module")
def thinker() -> Iterator[StubEngine]:
    with StubEngine(output_tokens=4, reasoning_tokens=5, auto_tools=True) as stub:
        yield stub


@pytest.fixture
def thinking(thinker: StubEngine, monkeypatch: pytest.MonkeyPatch) -> ChatMaestro:
    monkeypatch.setenv("MAESTRO_BASE_URL", thinker.base_url)
    return ChatMaestro(model="stub")


def merged(chunks: Iterable[AIMessageChunk]) -> AIMessageChunk:
    total, *others = chunks
    for chunk in others:
        total += chunk
    return total


def blocks(message: AIMessage) -> list[str]:
    return [block["type"] for block in message.content_blocks]


def thought(message: AIMessage) -> str:
    """The reasoning, which must be there once, in five words."""
    (found,) = [b["reasoning"] for b in message.content_blocks if b["type"] == "reasoning"]
    assert len(found.split()) == 5
    assert message.additional_kwargs["reasoning_content"] == found
    assert found not in message.text
    assert message.usage_metadata
    assert message.usage_metadata["output_token_details"]["reasoning"] == 5
    return found


def test_reasoning_is_kept_plain_and_streamed(thinking: ChatMaestro) -> None:
    whole = thinking.invoke("hi")
    streamed = merged(thinking.stream("hi"))
    assert blocks(whole) == blocks(streamed) == ["reasoning", "text"]
    assert thought(whole) == thought(streamed)
    assert whole.text == streamed.text and len(whole.text.split()) == 4


@pytest.mark.asyncio(loop_scope="module")
async def test_reasoning_is_kept_async(thinking: ChatMaestro) -> None:
    whole = await thinking.ainvoke("hi")
    streamed = merged([chunk async for chunk in thinking.astream("hi")])
    assert blocks(whole) == blocks(streamed) == ["reasoning", "text"]
    assert thought(whole) == thought(streamed)


@pytest.mark.parametrize("version", [None, "v1"])
def test_reasoning_beside_tool_calls(thinking: ChatMaestro, version: str | None) -> None:
    thinking.output_version = version
    model = thinking.bind_tools([calc])
    for message in (model.invoke("hi"), merged(model.stream("hi"))):
        assert blocks(message) == ["reasoning", "tool_call"]
        assert thought(message)
        (call,) = message.tool_calls
        assert call["name"] == "calc" and isinstance(call["args"]["x"], int)


@noisy_parse
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_reasoning_beside_structured_output(thinking: ChatMaestro, method: Any) -> None:
    model = thinking.with_structured_output(Answer, method=method, include_raw=True)
    whole: Any = model.invoke("hi")
    assert isinstance(whole["parsed"], Answer)
    pieces: list[Any] = list(model.stream("hi"))
    raw = merged(piece["raw"] for piece in pieces if "raw" in piece)
    assert thought(raw) == thought(whole["raw"])
    assert [p["parsed"] for p in pieces if "parsed" in p][-1] == whole["parsed"]


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_either_name_of_the_field_is_read_once(thinking: ChatMaestro, field: str) -> None:
    said = {"role": "assistant", "content": "x", "reasoning": None, field: "because"}
    if field == "reasoning":
        said["reasoning_content"] = "because"  # as vLLM did for a while
    choice = {"index": 0, "message": said, "finish_reason": "stop"}
    result = thinking._create_chat_result({"model": "stub", "choices": [choice]})
    (block, _) = result.generations[0].message.content_blocks
    assert block["type"] == "reasoning" and block["reasoning"] == "because"


def answered(model: ChatMaestro) -> list[BaseMessage]:
    """A turn in which the model thinks, calls a tool and gets the answer."""
    reply = model.bind_tools([calc]).invoke("hi")
    return [HumanMessage("hi"), reply, ToolMessage("2", tool_call_id=reply.tool_calls[0]["id"])]


@pytest.mark.parametrize("version", [None, "v1"])
def test_reasoning_goes_back_to_maestro(
    thinking: ChatMaestro, thinker: StubEngine, version: str | None
) -> None:
    thinking.output_version = version
    turn = answered(thinking)
    thinking.invoke(turn)
    user, assistant, tool = thinker.requests[-1].body["messages"]
    assert isinstance(turn[1], AIMessage)
    assert assistant["reasoning"] == thought(turn[1])
    assert assistant["tool_calls"] and not assistant["content"]
    assert "reasoning" not in user and "reasoning" not in tool


def test_reasoning_goes_nowhere_else(
    thinking: ChatMaestro, thinker: StubEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = answered(thinking)
    others = AIMessage("x", additional_kwargs={"reasoning_content": "not Maestro's"})
    thinking.invoke([*turn, others])
    assert "not Maestro's" not in str(thinker.requests[-1].body)
    monkeypatch.setenv("MAESTRO_FALLBACK_BASE_URL", ELSEWHERE)
    thinking.invoke(turn)
    assert "reasoning" not in str(thinker.requests[-1].body)
    monkeypatch.delenv("MAESTRO_FALLBACK_BASE_URL")
    monkeypatch.setenv("MAESTRO_BASE_URL", ELSEWHERE)
    thinking.invoke(turn)
    assert "reasoning" not in str(thinker.requests[-1].body)


@pytest.fixture(scope="module")
def maestro(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of a gateway before stubs, in a thread of its own."""
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(gateway(tmp_path_factory.mktemp("gateway"))) as g,
    ):
        yield g.url


@pytest.fixture
def served(maestro: str, monkeypatch: pytest.MonkeyPatch) -> ChatMaestro:
    monkeypatch.setenv("MAESTRO_BASE_URL", maestro)
    return ChatMaestro(model="big")


def assert_served(message: AIMessage) -> None:
    found = message.response_metadata["maestro"]
    assert found["worker"] == "n/big"
    assert found["queue_ms"] >= 0
    assert found["predicted_tokens"] > 0
    assert "headers" not in message.response_metadata


def test_how_a_reply_was_served(served: ChatMaestro) -> None:
    assert_served(served.invoke("hi"))
    assert_served(merged(served.stream("hi")))
    assert_served(ChatMaestro(model="big", streaming=True).invoke("hi"))


@pytest.mark.asyncio(loop_scope="module")
async def test_how_a_reply_was_served_async(served: ChatMaestro) -> None:
    assert_served(await served.ainvoke("hi"))
    assert_served(merged([chunk async for chunk in served.astream("hi")]))


@noisy_parse
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_how_structured_output_was_served(served: ChatMaestro, method: Any) -> None:
    model = served.with_structured_output(Answer, method=method, include_raw=True)
    whole: Any = model.invoke("hi")
    assert_served(whole["raw"])
    pieces: list[Any] = list(model.stream("hi"))
    assert_served(merged(piece["raw"] for piece in pieces if "raw" in piece))


def test_each_reply_has_its_own_story(served: ChatMaestro) -> None:
    replies = served.batch(["one", "two"], config={"max_concurrency": 2})
    for reply in (*replies, served.invoke("hi", model="big")):
        assert_served(reply)
    assert served.invoke("hi", model="small").response_metadata["maestro"]["worker"] == "n/small"


def test_another_server_tells_nothing(aimed: StubEngine) -> None:
    for message in (m := ChatMaestro(model="stub")).invoke("hi"), merged(m.stream("hi")):
        assert "maestro" not in message.response_metadata


def test_headers_are_there_for_who_asks(served: ChatMaestro) -> None:
    model = ChatMaestro(model="big", include_response_headers=True)
    for message in (model.invoke("hi"), merged(model.stream("hi"))):
        assert message.response_metadata["headers"]["x-maestro-worker"] == "n/big"
        assert message.response_metadata["maestro"]["worker"] == "n/big"


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
