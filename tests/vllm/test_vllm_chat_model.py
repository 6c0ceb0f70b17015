"""LangChain's own test suites for chat models: `ChatMaestro`, the gateway, and real vLLM."""

from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import pytest
from anyio.from_thread import start_blocking_portal
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from openai import DefaultAsyncHttpxClient
from pytest_benchmark.fixture import BenchmarkFixture

from maestro_backend.config import Config
from maestro_backend.gateway import serving
from maestro_backend.node import LocalNode
from maestro_langgraph import ChatMaestro

pytestmark = pytest.mark.vllm

# A model of 135M parameters: greedy, with just enough of a penalty to leave its loops of blanks.
DECODING = {"temperature": 0, "frequency_penalty": 0.5, "max_tokens": 100}


@pytest.fixture(scope="module")
def gateway(vllm_config: Config, vllm_node: LocalNode) -> Iterator[str]:
    """The base URL of a gateway before the session's engines, in a thread of its own."""
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(
            serving(vllm_config, vllm_node, host="127.0.0.1", port=0)
        ) as served,
    ):
        yield served.url


@pytest.fixture(autouse=True)
def aimed(gateway: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAESTRO_BASE_URL", gateway)


class TestUnit(ChatModelUnitTests):
    chat_model_class = ChatMaestro
    chat_model_params = {"model": "smollm2"}
    supports_json_mode = True
    init_from_env_params = (
        {"MAESTRO_API_KEY": "key"},
        {"model": "smollm2"},
        {"openai_api_key": "key", "model_name": "smollm2"},
    )

    @pytest.fixture
    def benchmark(self, benchmark: BenchmarkFixture) -> BenchmarkFixture:
        """Only runs what is to be measured: a table of figures has no place among tests."""
        benchmark.disabled = True
        return benchmark


class TestStandard(ChatModelIntegrationTests):
    chat_model_class = ChatMaestro
    supports_json_mode = True
    supports_anthropic_inputs = True
    model_override_value = "tiny"

    @pytest.fixture(autouse=True)
    async def http(self) -> AsyncIterator[None]:
        # LangChain's own client outlives the test's event loop, and its connections do not.
        async with DefaultAsyncHttpxClient() as self.http_client:
            yield

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": "smollm2",
            "timeout": 300,
            "http_async_client": self.http_client,
            **DECODING,
        }

    @pytest.mark.xfail(
        reason="SmolLM2-135M never decides to call a tool, not even with a template that shows it",
        raises=AssertionError,
    )
    @pytest.mark.parametrize("model", [{}, {"output_version": "v1"}], indirect=True)
    def test_agent_loop(self, model: ChatMaestro) -> None:
        super().test_agent_loop(model)

    @pytest.mark.xfail(
        reason="in JSON mode SmolLM2-135M leaves out one of the two keys that the prompt asks for",
        raises=OutputParserException,
    )
    def test_json_mode(self, model: ChatMaestro) -> None:
        super().test_json_mode(model)


def merged(chunks: Iterable[AIMessageChunk]) -> AIMessageChunk:
    total, *others = chunks
    for chunk in others:
        total += chunk
    return total


def test_how_a_reply_was_served() -> None:
    model = ChatMaestro(model="smollm2", temperature=0, max_tokens=8)
    whole, streamed = model.invoke("Hello"), merged(model.stream("Hello"))
    assert whole.text == streamed.text != ""
    for message in (whole, streamed):
        served = message.response_metadata["maestro"]
        assert served["worker"] == "here/smollm2"
        assert served["queue_ms"] >= 0
        assert served["predicted_tokens"] > 0


def test_vllm_takes_reasoning_back() -> None:
    model = ChatMaestro(model="smollm2", temperature=0, max_tokens=1)
    thought = {"reasoning_content": "because"}
    told = {"model_provider": "maestro"}
    reply = AIMessage("x", additional_kwargs=thought, response_metadata=told)
    messages = [HumanMessage("hi"), reply, HumanMessage("why?")]
    assert model._get_request_payload(messages)["messages"][1]["reasoning"] == "because"
    assert model.invoke(messages).usage_metadata
