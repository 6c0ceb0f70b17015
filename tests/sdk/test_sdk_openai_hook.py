"""The hook on the installed `openai` package, against the stub engine."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from itertools import count
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from maestro_agents import _openai_hook
from maestro_agents._context import CallContext, current_caller
from maestro_agents.protocol import (
    BODY_KEY,
    MAX_ANNOTATION_BYTES,
    Annotation,
    Announcement,
    CallIdentity,
    Successor,
)
from maestro_agents.testing import StubEngine

MESSAGES: Any = [{"role": "user", "content": "hello"}]
CALL = CallContext(
    CallIdentity(run="r", workflow="w@1", stage="a/b", instance=2), Annotation(role="planner")
)
HEADERS = {
    "x-maestro-run": "r",
    "x-maestro-workflow": "w@1",
    "x-maestro-stage": "a/b",
    "x-maestro-instance": "2",
}


class Answer(BaseModel):
    word: str


@pytest.fixture(scope="module")
def stub() -> Iterator[StubEngine]:
    with StubEngine(models=("stub",)) as stub:
        yield stub


@pytest.fixture(autouse=True)
def hooked(stub: StubEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MAESTRO_BASE_URL", stub.base_url)
    _openai_hook.install()
    token = current_caller.set(lambda: CALL)
    yield
    current_caller.reset(token)
    _openai_hook.uninstall()


@pytest.fixture
def client(stub: StubEngine) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=stub.base_url, api_key="x", max_retries=0) as client:
        yield client


def sent(stub: StubEngine) -> tuple[dict[str, str], Any]:
    """Our headers and our body key on the latest request."""
    request = list(stub.requests)[-1]
    headers = {k: v for k, v in request.headers.items() if k.startswith("x-maestro")}
    return headers, request.body.get(BODY_KEY)


def plain(client: openai.OpenAI) -> None:
    client.chat.completions.create(model="stub", messages=MESSAGES)


def streamed(client: openai.OpenAI) -> None:
    list(client.chat.completions.create(model="stub", messages=MESSAGES, stream=True))


def parsed(client: openai.OpenAI) -> None:
    client.chat.completions.parse(model="stub", messages=MESSAGES, response_format=Answer)


def raw(client: openai.OpenAI) -> None:
    client.chat.completions.with_raw_response.create(model="stub", messages=MESSAGES)


def with_options(client: openai.OpenAI) -> None:
    client.with_options(timeout=9).chat.completions.create(model="stub", messages=MESSAGES)


@pytest.mark.parametrize("ask", [plain, streamed, parsed, raw, with_options])
def test_every_kind_of_sync_call_is_annotated(
    stub: StubEngine, client: openai.OpenAI, ask: Any
) -> None:
    ask(client)
    headers, body = sent(stub)
    assert headers == HEADERS
    assert body == {"version": 1, "role": "planner"}


@pytest.mark.parametrize("stream", [False, True])
async def test_async_calls_are_annotated(stub: StubEngine, stream: bool) -> None:
    async with openai.AsyncOpenAI(base_url=stub.base_url, api_key="x") as client:
        reply = await client.chat.completions.create(model="stub", messages=MESSAGES, stream=stream)
        if stream:
            _ = [chunk async for chunk in reply]  # type: ignore[union-attr]  # it is a stream
    assert sent(stub) == (HEADERS, {"version": 1, "role": "planner"})


def test_the_users_own_headers_and_body_stay(stub: StubEngine, client: openai.OpenAI) -> None:
    client.chat.completions.create(
        model="stub", messages=MESSAGES, extra_headers={"x-mine": "1"}, extra_body={"seed": 7}
    )
    request = list(stub.requests)[-1]
    assert request.headers["x-mine"] == "1"
    assert request.body["seed"] == 7
    assert sent(stub)[0] == HEADERS


def counting() -> Any:
    """A caller whose every call is another instance."""
    numbers = count()

    def begin() -> CallContext:
        number = next(numbers)
        return CallContext(CALL.identity.model_copy(update={"instance": number}), CALL.annotation)

    return begin


def instances(stub: StubEngine, since: int) -> list[str]:
    return [r.headers["x-maestro-instance"] for r in list(stub.requests)[since:]]


def test_a_retry_is_the_same_call_and_the_next_request_another(stub: StubEngine) -> None:
    since = len(stub.requests)
    current_caller.set(counting())
    stub.fail_next("error", status=500)
    stub.fail_next("error", status=500)
    with openai.OpenAI(base_url=stub.base_url, api_key="x", max_retries=2) as client:
        plain(client)
        plain(client)
    assert instances(stub, since) == ["0", "0", "0", "1"]


async def test_side_by_side_each_request_has_its_own_identity(stub: StubEngine) -> None:
    since = len(stub.requests)
    current_caller.set(counting())
    stub.fail_next("error", status=500)
    async with openai.AsyncOpenAI(base_url=stub.base_url, api_key="x", max_retries=2) as client:
        create = client.chat.completions.create
        await asyncio.gather(*(create(model="stub", messages=MESSAGES) for _ in range(3)))
    assert Counter(instances(stub, since)).total() == 4
    assert set(instances(stub, since)) == {"0", "1", "2"}


def test_only_a_chat_with_maestro_begins_a_call(
    stub: StubEngine, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    current_caller.set(counting())
    client.completions.create(model="stub", prompt="hello")
    client.models.list()
    client.chat.completions.create(
        model="stub", messages=MESSAGES, extra_body={"maestro": {"role": "mine"}}
    )
    with monkeypatch.context() as patch:
        patch.setenv("MAESTRO_BASE_URL", "http://127.0.0.1:9/v1")
        plain(client)
    plain(client)
    assert sent(stub)[0]["x-maestro-instance"] == "0"


def test_an_absolute_url_elsewhere_is_elsewhere(
    stub: StubEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAESTRO_BASE_URL", "http://127.0.0.1:9/v1")
    with openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="x") as client:
        url = f"{stub.base_url}/chat/completions"
        client.post(url, cast_to=object, body={"model": "stub", "messages": MESSAGES})
    assert sent(stub) == ({}, None)


def test_calls_that_go_elsewhere_are_hinted_at_once(
    stub: StubEngine,
    client: openai.OpenAI,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "maestro_agents")
    monkeypatch.setenv("MAESTRO_BASE_URL", "http://127.0.0.1:9/v1")
    plain(client)
    plain(client)
    assert caplog.text.count("not annotated") == 1
    assert stub.base_url in caplog.text and "http://127.0.0.1:9/v1" in caplog.text


def test_what_is_annotated_already_is_left_alone(stub: StubEngine, client: openai.OpenAI) -> None:
    client.chat.completions.create(
        model="stub", messages=MESSAGES, extra_headers={"X-Maestro-Run": "mine"}
    )
    assert sent(stub) == ({"x-maestro-run": "mine"}, None)


def test_no_context_no_annotation(stub: StubEngine, client: openai.OpenAI) -> None:
    token = current_caller.set(None)
    plain(client)
    current_caller.reset(token)
    assert sent(stub) == ({}, None)


def test_a_foreign_origin_is_never_told(
    stub: StubEngine, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAESTRO_BASE_URL", "http://127.0.0.1:9/v1")
    plain(client)
    assert sent(stub) == ({}, None)
    monkeypatch.delenv("MAESTRO_BASE_URL")
    plain(client)
    assert sent(stub) == ({}, None)


def test_only_chat_completions_are_annotated(stub: StubEngine, client: openai.OpenAI) -> None:
    client.completions.create(model="stub", prompt="hello")
    assert sent(stub) == ({}, None)


def test_off_and_on_again(stub: StubEngine, client: openai.OpenAI) -> None:
    _openai_hook.install()
    _openai_hook.uninstall()
    plain(client)
    assert sent(stub) == ({}, None)
    _openai_hook.install()
    plain(client)
    assert sent(stub)[0] == HEADERS


MANY = tuple(Successor(stage=f"{n}" + "x" * 200) for n in range(MAX_ANNOTATION_BYTES // 200))


@pytest.mark.parametrize(
    ("annotation", "left"),
    [
        (Annotation(role="planner", tenant="t"), {"version": 1, "role": "planner", "tenant": "t"}),
        (Annotation.model_construct(role="x" * MAX_ANNOTATION_BYTES), None),
    ],
)
def test_over_the_size_limit_the_announcement_goes_first(
    stub: StubEngine,
    client: openai.OpenAI,
    caplog: pytest.LogCaptureFixture,
    annotation: Annotation,
    left: Any,
) -> None:
    told = annotation.model_copy(update={"announcement": Announcement(successors=MANY)})
    current_caller.set(lambda: CallContext(CALL.identity, told))
    plain(client)
    plain(client)
    assert sent(stub) == (HEADERS, left)
    assert caplog.text.count("dropped") == 1


def test_an_error_of_ours_never_reaches_the_call(
    stub: StubEngine,
    client: openai.OpenAI,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MAESTRO_BASE_URL", "nonsense")
    plain(client)
    plain(client)
    assert sent(stub) == ({}, None)
    assert caplog.text.count("goes on without it") == 1
