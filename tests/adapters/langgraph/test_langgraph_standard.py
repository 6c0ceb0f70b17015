"""LangChain's own test suites for chat models, on `ChatMaestro` before the stub engine."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from langchain_core.messages import AIMessage
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from openai import DefaultAsyncHttpxClient
from pytest_benchmark.fixture import BenchmarkFixture

from maestro_agents.testing import StubEngine
from maestro_langgraph import ChatMaestro

BASE_URL = "http://127.0.0.1:9/v1"
DETAILS = ["reasoning_output", "cache_read_input"]


class TestUnit(ChatModelUnitTests):
    chat_model_class = ChatMaestro
    chat_model_params = {"model": "stub", "base_url": BASE_URL}
    supports_json_mode = True
    init_from_env_params = (
        {"MAESTRO_BASE_URL": BASE_URL, "MAESTRO_API_KEY": "key"},
        {"model": "stub"},
        {"openai_api_base": BASE_URL, "openai_api_key": "key", "model_name": "stub"},
    )

    @pytest.fixture
    def benchmark(self, benchmark: BenchmarkFixture) -> BenchmarkFixture:
        """Only runs what is to be measured: a table of figures has no place among tests."""
        benchmark.disabled = True
        return benchmark


@pytest.fixture(scope="module")
def engine() -> Iterator[StubEngine]:
    """A stub that calls tools by itself, and thinks first when it is asked for effort."""
    with StubEngine(
        ("stub", "other"),
        auto_tools=True,
        reasoning_tokens=lambda body: 8 if body.get("reasoning_effort") else 0,
    ) as engine:
        yield engine


class TestStandard(ChatModelIntegrationTests):
    chat_model_class = ChatMaestro
    supports_json_mode = True
    supports_anthropic_inputs = True
    model_override_value = "other"
    supported_usage_metadata_details = {"invoke": DETAILS, "stream": DETAILS}

    @pytest.fixture(autouse=True)
    async def aimed(
        self, engine: StubEngine, monkeypatch: pytest.MonkeyPatch
    ) -> AsyncIterator[None]:
        monkeypatch.setenv("MAESTRO_BASE_URL", engine.base_url)
        # LangChain's own client outlives the test's event loop, and its connections do not.
        async with DefaultAsyncHttpxClient() as self.http:
            yield

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "stub", "http_async_client": self.http}

    def invoke_with_reasoning_output(self, *, stream: bool = False) -> AIMessage:
        return self.asked(stream=stream, reasoning_effort="low")

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        return self.asked(stream=stream)

    def asked(self, **options: Any) -> AIMessage:
        stream = options.pop("stream")
        return ChatMaestro(model="stub", streaming=stream, **options).invoke("Hello")
