"""The stub as the `openai` package sees it."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel, Field

from maestro_agents.testing import StubEngine

ADD = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a", "b"],
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "add", "parameters": ADD}},
    {"type": "function", "function": {"name": "noop"}},
]


def ask(text: str) -> list[Any]:
    return [{"role": "system", "content": "You help."}, {"role": "user", "content": text}]


@pytest.fixture(scope="module")
def stub() -> Iterator[StubEngine]:
    with StubEngine(models=("stub", "other"), max_model_len=1000) as engine:
        yield engine


@pytest.fixture
def client(stub: StubEngine) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=stub.base_url, api_key="none", max_retries=0) as client:
        yield client


def test_the_same_prompt_gives_the_same_text_and_another_one_another(client: openai.OpenAI) -> None:
    def text(prompt: str) -> str | None:
        reply = client.chat.completions.create(model="stub", messages=ask(prompt))
        return reply.choices[0].message.content

    assert text("one") == text("one")
    assert text("one") != text("two")


def test_usage_counts_exactly_what_is_streamed(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="stub", messages=ask("count"))
    chunks = list(
        client.chat.completions.create(
            model="stub",
            messages=ask("count"),
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    deltas = [c.choices[0].delta.content for c in chunks if c.choices]
    assert "".join(d or "" for d in deltas) == whole.choices[0].message.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.completion_tokens == sum(1 for d in deltas if d)
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert {c.id for c in chunks} == {chunks[0].id}


def test_a_stream_carries_usage_only_when_asked(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="stub", messages=ask("x"), stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_the_token_limit_is_kept(client: openai.OpenAI, limit: str) -> None:
    options: Any = {limit: 5}
    reply = client.chat.completions.create(model="stub", messages=ask("long"), **options)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 5


def test_stop_cuts_the_text_before_the_stop_string(client: openai.OpenAI) -> None:
    full = client.chat.completions.create(model="stub", messages=ask("go")).choices[0].message
    assert full.content
    third = full.content.split()[2]
    cut = client.chat.completions.create(model="stub", messages=ask("go"), stop=third).choices[0]
    assert cut.message.content == full.content.partition(third)[0]
    assert cut.finish_reason == "stop"


def test_n_gives_different_choices(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="stub", messages=ask("many"), n=3)
    assert len({choice.message.content for choice in reply.choices}) == 3
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(
        model="stub", messages=ask("many"), n=3, stream=True
    ):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == [choice.message.content for choice in reply.choices]


def test_quoted_text_of_the_user_is_echoed(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="stub", messages=ask("Don't lose '你好啊集团'."))
    assert reply.choices[0].message.content
    assert reply.choices[0].message.content.startswith('"你好啊集团"')


def test_a_named_tool_is_called_with_what_the_user_said(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="stub",
        messages=ask("add 3 and 14"),
        tools=TOOLS,
        tool_choice={"type": "function", "function": {"name": "add"}},
    )
    (called,) = reply.choices[0].message.tool_calls or []
    assert called.type == "function"
    assert called.function.name == "add"
    assert json.loads(called.function.arguments) == {"a": 3, "b": 14}
    assert reply.choices[0].finish_reason == "tool_calls"
    assert reply.choices[0].message.content is None


def test_a_required_tool_is_the_one_the_user_names(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="stub", messages=ask("call noop"), tools=TOOLS, tool_choice="required"
    )
    (called,) = reply.choices[0].message.tool_calls or []
    assert called.type == "function"
    assert (called.function.name, called.function.arguments) == ("noop", "{}")


def test_a_streamed_tool_call_spells_the_same_arguments(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="stub", messages=ask("add 3 and 14"), tools=TOOLS, tool_choice="required"
    ) as stream:
        final = stream.get_final_completion()
    (called,) = final.choices[0].message.tool_calls or []
    assert called.function.name == "add"
    assert json.loads(called.function.arguments) == {"a": 3, "b": 14}


def test_offered_tools_alone_give_text(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="stub", messages=ask("add 3"), tools=TOOLS)
    assert reply.choices[0].message.tool_calls is None
    assert reply.choices[0].message.content


def test_auto_tools_calls_first_and_answers_after_the_result() -> None:
    with (
        StubEngine(auto_tools=True) as stub,
        openai.OpenAI(base_url=stub.base_url, api_key="none") as client,
    ):
        messages = ask("add 1 and 2")
        first = client.chat.completions.create(model="stub", messages=messages, tools=TOOLS)
        (called,) = first.choices[0].message.tool_calls or []
        messages += [
            first.choices[0].message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": called.id, "content": "3"},
        ]
        second = client.chat.completions.create(model="stub", messages=messages, tools=TOOLS)
    assert second.choices[0].message.tool_calls is None
    assert second.choices[0].message.content


class Source(BaseModel):
    title: str = Field(min_length=30, max_length=40)
    year: int = Field(ge=1990, lt=2000)
    kind: Literal["paper", "page"]
    score: float = Field(gt=0, le=1)
    cites: "Source | None" = None


class Report(BaseModel):
    sources: list[Source] = Field(min_length=3, max_length=3)
    tags: set[str] = Field(min_length=2)
    code: str = Field(pattern=r"^[A-Z]+\d$")
    checked: bool
    version: Literal[2]
    pair: tuple[int, str]
    extra: dict[str, int] | None = None


def test_structured_output_parses_into_a_demanding_model(client: openai.OpenAI) -> None:
    schema = {"name": "report", "schema": Report.model_json_schema()}
    reply = client.chat.completions.create(
        model="stub",
        messages=ask("report"),
        response_format={"type": "json_schema", "json_schema": schema},
    )
    Report.model_validate_json(reply.choices[0].message.content or "")


def test_parse_returns_the_model_with_the_users_words(client: openai.OpenAI) -> None:
    class Person(BaseModel):
        name: str
        age: int

    message = ask('"Ada" is 36')
    reply = client.chat.completions.parse(model="stub", messages=message, response_format=Person)
    assert reply.choices[0].message.parsed == Person(name="Ada", age=36)


def test_json_object_is_an_object(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="stub", messages=ask("x"), response_format={"type": "json_object"}
    )
    assert isinstance(json.loads(reply.choices[0].message.content or ""), dict)


def test_json_object_has_the_keys_that_the_user_quotes(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="stub",
        messages=ask("A joke as JSON with 'setup' and 'punchline' keys, in \"plain words\"."),
        response_format={"type": "json_object"},
    )
    answer = json.loads(reply.choices[0].message.content or "")
    assert set(answer) == {"setup", "punchline"}
    assert answer["setup"] == "plain words"


@pytest.fixture(scope="module")
def thinker() -> Iterator[openai.OpenAI]:
    with (
        StubEngine(output_tokens=4, reasoning_tokens=6) as stub,
        openai.OpenAI(base_url=stub.base_url, api_key="none", max_retries=0) as client,
    ):
        yield client


def streamed(client: openai.OpenAI, **options: Any) -> list[dict[str, Any]]:
    stream = client.chat.completions.create(
        model="stub", messages=ask("go"), stream=True, **options
    )
    return [chunk.choices[0].delta.to_dict() for chunk in stream if chunk.choices]


def test_a_model_that_reasons_does_so_first_and_counts_it(thinker: openai.OpenAI) -> None:
    whole = thinker.chat.completions.create(model="stub", messages=ask("go"))
    said: Any = whole.choices[0].message
    assert (len(said.reasoning.split()), len(said.content.split())) == (6, 4)
    assert whole.usage and whole.usage.completion_tokens_details
    assert whole.usage.completion_tokens == 10
    assert whole.usage.completion_tokens_details.reasoning_tokens == 6
    first, *deltas = streamed(thinker)
    assert first == {"role": "assistant", "content": ""}
    assert [set(delta) for delta in deltas] == 6 * [{"reasoning"}] + 4 * [{"content"}] + [set()]
    assert "".join(delta.get("reasoning", "") for delta in deltas) == said.reasoning
    assert "".join(delta.get("content", "") for delta in deltas) == said.content


def test_the_limit_holds_for_reasoning_too(thinker: openai.OpenAI) -> None:
    reply = thinker.chat.completions.create(model="stub", messages=ask("go"), max_tokens=3)
    said: Any = reply.choices[0].message
    assert (len(said.reasoning.split()), said.content) == (3, None)
    assert reply.choices[0].finish_reason == "length"


def test_reasoning_that_is_not_wanted_is_counted_but_not_sent(thinker: openai.OpenAI) -> None:
    hidden = {"extra_body": {"include_reasoning": False}}
    reply = thinker.chat.completions.create(model="stub", messages=ask("go"), **hidden)
    said: Any = reply.choices[0].message
    assert said.reasoning is None and len(said.content.split()) == 4
    assert reply.usage and reply.usage.completion_tokens == 10
    assert not any("reasoning" in delta for delta in streamed(thinker, **hidden))


def test_a_tool_is_called_after_the_reasoning(thinker: openai.OpenAI) -> None:
    options: Any = {"tools": TOOLS, "tool_choice": "required"}
    whole = thinker.chat.completions.create(model="stub", messages=ask("3 and 14"), **options)
    said: Any = whole.choices[0].message
    assert said.reasoning and said.tool_calls[0].function.name == "add"
    deltas = [delta for delta in streamed(thinker, **options) if delta]
    kinds = [next(iter(delta.keys() - {"role"})) for delta in deltas]
    assert kinds[:8] == ["content", *6 * ["reasoning"], "tool_calls"]
    (head,), *tails = [delta["tool_calls"] for delta in deltas[7:]]
    assert head["id"] and head["function"] == {"name": "add", "arguments": ""}
    spelled = "".join(tail[0]["function"]["arguments"] for tail in tails)
    assert set(json.loads(spelled)) == {"a", "b"}


def test_a_tool_is_not_called_when_reasoning_used_up_the_limit(thinker: openai.OpenAI) -> None:
    options: Any = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 6}
    reply = thinker.chat.completions.create(model="stub", messages=ask("3 and 14"), **options)
    assert reply.choices[0].message.tool_calls is None
    assert reply.choices[0].finish_reason == "length"
    assert not any("tool_calls" in delta for delta in streamed(thinker, **options))


def test_how_long_it_reasons_may_depend_on_the_body() -> None:
    with (
        StubEngine(reasoning_tokens=lambda body: body.get("seed", 0)) as stub,
        openai.OpenAI(base_url=stub.base_url, api_key="none") as client,
    ):
        usages = [
            client.chat.completions.create(model="stub", messages=ask("x"), seed=seed).usage
            for seed in (0, 7)
        ]
    details = [usage.completion_tokens_details for usage in usages if usage]
    assert [detail.reasoning_tokens for detail in details if detail] == [0, 7]


def test_a_schema_that_cannot_be_filled_is_a_clear_400(client: openai.OpenAI) -> None:
    schema = {"name": "s", "schema": {"type": "string", "pattern": "^never{99}$"}}
    with pytest.raises(openai.BadRequestError, match="cannot match") as caught:
        client.chat.completions.create(
            model="stub",
            messages=ask("x"),
            response_format={"type": "json_schema", "json_schema": schema},
        )
    assert caught.value.param == "response_format"


def test_text_completions_plain_and_streamed_agree(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="stub", prompt=["a", "b"])
    assert len(whole.choices) == 2
    text = ""
    for chunk in client.completions.create(model="stub", prompt="a", stream=True):
        text += chunk.choices[0].text
    assert text == whole.choices[0].text


async def test_the_async_client_streams(stub: StubEngine) -> None:
    async with openai.AsyncOpenAI(base_url=stub.base_url, api_key="none") as client:
        stream = await client.chat.completions.create(
            model="other", messages=ask("hello"), stream=True
        )
        parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert len("".join(parts).split()) >= 12


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["stub", "other"]


def test_an_unknown_model_is_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-0", messages=ask("x"))
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


def test_a_prompt_beyond_the_context_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="stub", messages=ask("long " * 1000))
    assert (caught.value.param, caught.value.code) == ("messages", "context_length_exceeded")


MESSAGES = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": MESSAGES, "max_tokens": "many"}, "max_tokens"),
        ({"messages": MESSAGES, "n": 0}, "n"),
        ({"messages": MESSAGES, "tools": [{}]}, "tools[0].function.name"),
        ({"messages": MESSAGES, "tool_choice": "required"}, "tool_choice"),
        ({"messages": MESSAGES, "stream_options": 1}, "stream_options"),
        ([], "body"),
    ],
)
def test_a_malformed_body_is_400_naming_the_field(stub: StubEngine, body: Any, field: str) -> None:
    reply = httpx.post(f"{stub.base_url}/chat/completions", json=body)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == field
    assert error["message"].startswith(field)


def test_unknown_paths_and_methods_are_openai_shaped_errors(stub: StubEngine) -> None:
    assert httpx.get(f"{stub.url}/nope").status_code == 404
    wrong = httpx.get(f"{stub.base_url}/chat/completions")
    assert wrong.status_code == 405
    assert "POST" in wrong.json()["error"]["message"]
