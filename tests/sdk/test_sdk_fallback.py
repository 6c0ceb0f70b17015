"""A data plane that is down: the SDK's ordinary error, or the fallback."""

from collections.abc import Iterator
from threading import Thread
from typing import Any

import openai
import pytest
from pydantic import BaseModel
from sdk.recording_backend import RecordingBackend

from maestro_agents import _fallback, _openai_hook
from maestro_agents._context import CallContext, current_caller
from maestro_agents.protocol import Annotation, CallIdentity
from maestro_agents.testing import RecordedRequest, StubEngine

MESSAGES: Any = [{"role": "user", "content": "hello"}]
CALL = CallContext(CallIdentity(run="r", stage="a"), Annotation(role="planner"))
KEY = "maestro-key"


class Answer(BaseModel):
    word: str


@pytest.fixture
def stub() -> Iterator[StubEngine]:
    with StubEngine(models=("stub",)) as stub:
        yield stub


@pytest.fixture
def fallback(stub: StubEngine, monkeypatch: pytest.MonkeyPatch) -> StubEngine:
    """Where calls go when `backend` drops them."""
    monkeypatch.setenv("MAESTRO_FALLBACK_BASE_URL", stub.base_url)
    return stub


@pytest.fixture(autouse=True)
def backend(stub: StubEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingBackend]:
    """A Maestro that drops every chat."""
    monkeypatch.setattr(_fallback, "_down_until", {})
    with RecordingBackend(stub.base_url) as backend:
        backend.chat_fault = "drop"
        monkeypatch.setenv("MAESTRO_BASE_URL", backend.base_url)
        monkeypatch.setenv("MAESTRO_API_KEY", KEY)
        _openai_hook.install()
        token = current_caller.set(lambda: CALL)
        yield backend
        current_caller.reset(token)
        _openai_hook.uninstall()


@pytest.fixture
def client(backend: RecordingBackend) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=backend.base_url, api_key=KEY, max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, **arguments: Any) -> Any:
    return client.chat.completions.create(model="stub", messages=MESSAGES, **arguments)


def only(stub: StubEngine) -> RecordedRequest:
    (request,) = stub.requests
    return request


def plain(client: openai.OpenAI) -> None:
    assert ask(client).choices[0].message.content


def streamed(client: openai.OpenAI) -> None:
    assert list(ask(client, stream=True))


def parsed(client: openai.OpenAI) -> None:
    reply = client.chat.completions.parse(model="stub", messages=MESSAGES, response_format=Answer)
    assert reply.choices[0].message.parsed


def raw(client: openai.OpenAI) -> None:
    reply = client.chat.completions.with_raw_response.create(model="stub", messages=MESSAGES)
    assert reply.parse().choices


def streamed_raw(client: openai.OpenAI) -> None:
    create = client.chat.completions.with_streaming_response.create
    with create(model="stub", messages=MESSAGES) as reply:
        assert reply.parse().choices


@pytest.mark.parametrize("way", [plain, streamed, parsed, raw, streamed_raw])
def test_without_a_fallback_it_is_the_ordinary_error(client: openai.OpenAI, way: Any) -> None:
    with pytest.raises(openai.APIConnectionError) as caught:
        way(client)
    assert type(caught.value.__cause__).__name__ == "RemoteProtocolError"


@pytest.mark.parametrize("way", [plain, streamed, parsed, raw, streamed_raw])
def test_every_kind_of_sync_call_goes_to_the_fallback(
    fallback: StubEngine, client: openai.OpenAI, way: Any
) -> None:
    way(client)
    assert only(fallback).path.endswith("/v1/chat/completions")


@pytest.mark.parametrize("stream", [False, True])
async def test_async_calls_go_to_the_fallback(
    fallback: StubEngine, backend: RecordingBackend, stream: bool
) -> None:
    async with openai.AsyncOpenAI(base_url=backend.base_url, api_key=KEY, max_retries=0) as client:
        for _ in range(2):
            reply = await client.chat.completions.create(
                model="stub", messages=MESSAGES, stream=stream
            )
            if stream:
                assert [chunk async for chunk in reply]  # type: ignore[union-attr]  # a stream
        parsed = await client.chat.completions.parse(
            model="stub", messages=MESSAGES, response_format=Answer
        )
        assert parsed.choices[0].message.parsed
    assert len(fallback.requests) == 3
    assert len(backend.chats) == 1, "only the first tried Maestro"


def test_nobody_listening_is_a_connection_error_too(
    fallback: StubEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAESTRO_BASE_URL", "http://127.0.0.1:9/v1")
    with openai.OpenAI(base_url="http://localhost:9/v1", api_key=KEY, max_retries=0) as client:
        plain(client)
    assert only(fallback)


def test_a_reset_connection_after_retries(fallback: StubEngine, backend: RecordingBackend) -> None:
    with openai.OpenAI(base_url=backend.base_url, api_key=KEY, max_retries=1) as client:
        plain(client)
    assert len(backend.chats) == 2 and only(fallback)


def test_nothing_of_ours_goes_there(fallback: StubEngine, backend: RecordingBackend) -> None:
    with openai.OpenAI(
        base_url=backend.base_url,
        api_key=KEY,
        max_retries=0,
        default_headers={"authorization": f"Bearer {KEY}", "X-Api-Key": KEY, "x-team": "blue"},
    ) as client:
        ask(
            client,
            extra_headers={"X-Maestro-Run": "mine", "x-token": KEY, "x-mine": "1"},
            extra_body={"maestro": {"role": "planner"}, "top_k": 7},
        )
    request = only(fallback)
    assert KEY not in str(request.headers)
    assert request.headers["authorization"] == "Bearer EMPTY"
    assert not [name for name in request.headers if name.startswith("x-maestro")]
    assert not {"x-team", "x-mine"} & request.headers.keys(), "they may be Maestro's host's only"
    assert "maestro" not in request.body and request.body["top_k"] == 7
    assert request.body["messages"] == MESSAGES
    assert backend.chats[0][0]["authorization"] == f"Bearer {KEY}"


def test_an_annotated_call_is_told_to_maestro_only(
    fallback: StubEngine, backend: RecordingBackend, client: openai.OpenAI
) -> None:
    plain(client)
    assert backend.identities() == [{"run": "r", "stage": "a", "instance": "0"}]
    assert "maestro" in backend.chats[0][1] and "maestro" not in only(fallback).body


@pytest.mark.parametrize(
    ("variables", "key"),
    [
        ({"MAESTRO_FALLBACK_API_KEY": "own", "OPENAI_API_KEY": "openai"}, "own"),
        ({"OPENAI_API_KEY": "openai"}, "EMPTY"),
        ({"OPENAI_API_KEY": "openai", "OPENAI_BASE_URL": "{stub}"}, "openai"),
        ({"OPENAI_API_KEY": "openai", "OPENAI_BASE_URL": "{maestro}"}, "EMPTY"),
    ],
)
def test_the_key_is_the_fallbacks_own(
    fallback: StubEngine,
    backend: RecordingBackend,
    client: openai.OpenAI,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    key: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(stub=fallback.base_url, maestro=backend.base_url))
    plain(client)
    assert only(fallback).headers["authorization"] == f"Bearer {key}"


def test_credentials_that_cannot_be_taken_out_stay_here(
    fallback: StubEngine, backend: RecordingBackend, caplog: pytest.LogCaptureFixture
) -> None:
    mine: list[dict[str, Any]] = [
        {"default_query": {"api-key": "secret"}},
        {"http_client": openai.DefaultHttpxClient(headers={"x-mine": KEY})},
        {"http_client": openai.DefaultHttpxClient(auth=("me", "secret"))},
    ]
    for arguments in mine:
        with (
            openai.OpenAI(
                base_url=backend.base_url, api_key=KEY, max_retries=0, **arguments
            ) as client,
            pytest.raises(openai.APIConnectionError),
        ):
            plain(client)
    assert not fallback.requests
    assert caplog.text.count("MAESTRO_FALLBACK_BASE_URL") == 1


def test_an_outage_is_known_for_a_while_and_logged_once(
    fallback: StubEngine,
    backend: RecordingBackend,
    client: openai.OpenAI,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for _ in range(3):
        plain(client)
    assert len(backend.chats) == 1 and len(fallback.requests) == 3
    monkeypatch.setattr(_fallback, "RETRY_S", 0.0)
    monkeypatch.setattr(_fallback, "_down_until", dict.fromkeys(_fallback._down_until, 0.0))
    plain(client)
    assert len(backend.chats) == 2 and len(fallback.requests) == 4
    assert caplog.text.count("cannot be reached") == 1
    backend.chat_fault = None
    plain(client)
    assert len(backend.chats) == 3
    backend.chat_fault = "drop"
    plain(client)
    assert caplog.text.count("cannot be reached") == 2


def test_one_call_looks_whether_maestro_is_back_and_the_others_do_not_wait(
    fallback: StubEngine,
    backend: RecordingBackend,
    client: openai.OpenAI,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain(client)
    monkeypatch.setattr(_fallback, "_down_until", dict.fromkeys(_fallback._down_until, 0.0))
    backend.chat_fault = "hang"
    looking = Thread(target=plain, args=(client,))
    looking.start()
    fallback.wait(lambda: len(backend.chats) == 2)
    plain(client)
    assert len(fallback.requests) == 2
    backend.over.set()
    looking.join()
    assert len(backend.chats) == 2 and len(fallback.requests) == 3


def test_a_slow_reply_is_no_reason(fallback: StubEngine, backend: RecordingBackend) -> None:
    backend.chat_fault = "hang"
    with (
        openai.OpenAI(base_url=backend.base_url, api_key=KEY, max_retries=0, timeout=0.1) as client,
        pytest.raises(openai.APITimeoutError),
    ):
        plain(client)
    assert not fallback.requests


@pytest.mark.parametrize("status", [400, 429, 500, 503])
def test_an_http_error_is_no_reason(
    fallback: StubEngine, backend: RecordingBackend, client: openai.OpenAI, status: int
) -> None:
    backend.chat_fault, backend.chat_status = None, status
    with pytest.raises(openai.APIStatusError) as caught:
        plain(client)
    assert caught.value.status_code == status
    assert not fallback.requests


def test_with_both_down_the_error_is_the_fallbacks_from_the_first(
    backend: RecordingBackend, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAESTRO_FALLBACK_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(openai.APIConnectionError) as caught:
        plain(client)
    first = caught.value.__cause__
    assert isinstance(first, openai.APIConnectionError)
    assert (caught.value.request.url.port, first.request.url.port) == (9, backend.port)
    with pytest.raises(openai.APIConnectionError) as caught:
        plain(client)
    assert type(caught.value.__cause__).__name__ == "ConnectError"


def test_the_fallbacks_own_errors_come_through(fallback: StubEngine, client: openai.OpenAI) -> None:
    fallback.fail_next("error", status=401)
    with pytest.raises(openai.AuthenticationError) as caught:
        plain(client)
    assert isinstance(caught.value.__cause__, openai.APIConnectionError)


def test_other_servers_are_not_concerned(fallback: StubEngine) -> None:
    other = openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="x", max_retries=0)
    with other, pytest.raises(openai.APIConnectionError):
        plain(other)
    assert not fallback.requests
