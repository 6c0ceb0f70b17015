"""`ChatMaestro`: LangChain's OpenAI chat model, aimed at Maestro."""

from __future__ import annotations

import os
from typing import Any, Final, Self

from langchain_core.language_models import LangSmithParams
from langchain_core.language_models.base import LanguageModelInput
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_openai.chat_models.base import BaseChatOpenAI
from pydantic import Field, model_validator

from maestro_agents.adapter import annotate_openai, fail_open, is_maestro, settings

from . import _replies

PROVIDER: Final = "maestro"


class ChatMaestro(BaseChatOpenAI):
    """A chat model served by Maestro, or by any OpenAI-compatible server.

        model = ChatMaestro(model="qwen3-8b")

    Without `base_url` and `api_key` it reads MAESTRO_BASE_URL and MAESTRO_API_KEY (default
    "EMPTY"); while MAESTRO_BASE_URL is unset, OPENAI_BASE_URL and OPENAI_API_KEY. Streams report
    token usage. Inside a wrapped graph its calls are annotated, on their way to Maestro only.

    What a model thinks before it answers is kept: a `reasoning` block of `content_blocks`, and
    `additional_kwargs["reasoning_content"]`. On later turns it goes back to Maestro, since chat
    templates show it to the model again between tool calls; never to another server, and not
    while MAESTRO_FALLBACK_BASE_URL is set, which could be one.

    `response_metadata["maestro"]` says how a reply was served, as far as the server told:
    `worker` (its name), `queue_ms` (milliseconds until it was started) and `predicted_tokens`
    (the length that was expected of it).
    """

    stream_usage: bool = True
    use_responses_api: bool | None = False
    model_name: str = Field(alias="model")

    @model_validator(mode="before")
    @classmethod
    def _aim(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        if not {"base_url", "openai_api_base"} & values.keys():
            values["base_url"] = _default_base_url()
        if not {"api_key", "openai_api_key"} & values.keys():
            values["api_key"] = _key_for(values.get("base_url") or values.get("openai_api_base"))
        return values

    @model_validator(mode="after")
    def _listen(self) -> Self:
        annotate_openai()
        for client in (self.root_client, self.root_async_client):
            if client is not None:
                _replies.listen(client)
        return self

    @property
    def _llm_type(self) -> str:
        return "chat-maestro"

    @property
    def lc_secrets(self) -> dict[str, str]:
        return {"openai_api_key": "MAESTRO_API_KEY"}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = PROVIDER
        return params

    def _get_request_payload(
        self, input_: LanguageModelInput, *, stop: list[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        payload = super()._get_request_payload(input_, stop=stop, **kwargs)
        self._send_reasoning_back(input_, payload)
        return payload

    @fail_open
    def _send_reasoning_back(self, input_: LanguageModelInput, payload: dict[str, Any]) -> None:
        # A request that may have to go to the fallback is one that any server can take.
        elsewhere = not is_maestro(self.openai_api_base or "") or settings().fallback_base_url
        if elsewhere or "messages" not in payload:
            return
        messages = self._convert_input(input_).to_messages()
        for message, wire in zip(messages, payload["messages"], strict=True):
            ours = message.response_metadata.get("model_provider") == PROVIDER
            if ours and (text := message.additional_kwargs.get(_replies.REASONING)):
                wire["reasoning"] = text

    def _create_chat_result(
        self, response: Any, generation_info: dict[str, Any] | None = None
    ) -> ChatResult:
        result = super()._create_chat_result(response, generation_info)
        served = _replies.take_served()
        choices = _replies.read(response, "choices")
        for generation, choice in zip(result.generations, choices, strict=True):
            _complete(generation.message, _replies.read(choice, "message"))
            _add_served(generation.message, served)
        return result

    def _convert_chunk_to_generation_chunk(
        self,
        chunk: dict[str, Any],
        default_chunk_class: type,
        base_generation_info: dict[str, Any] | None,
    ) -> ChatGenerationChunk | None:
        converted = super()._convert_chunk_to_generation_chunk(
            chunk, default_chunk_class, base_generation_info
        )
        if converted is None:
            return None
        # Structured output streams events, of which one kind wraps the chunk.
        choices = chunk.get("choices") or chunk.get("chunk", {}).get("choices")
        if choices:
            _complete(converted.message, choices[0]["delta"])
        _add_served(converted.message, _replies.take_served())
        if self.output_version == "v1":
            _keep_apart(converted.message)
        return converted

    def _get_generation_chunk_from_completion(self, completion: Any) -> ChatGenerationChunk:
        chunk = super()._get_generation_chunk_from_completion(completion)
        chunk.message.additional_kwargs.pop(_replies.REASONING, None)  # was streamed already
        return chunk


def _complete(message: BaseMessage, said: object) -> None:
    """Add to a message what LangChain's OpenAI class leaves out of the wire's."""
    # Under "openai", LangChain would not look for reasoning when it makes content blocks.
    message.response_metadata["model_provider"] = PROVIDER
    if text := _replies.reasoning_of(said):
        message.additional_kwargs[_replies.REASONING] = text


def _add_served(message: BaseMessage, served: dict[str, Any] | None) -> None:
    if served:
        message.response_metadata[PROVIDER] = dict(served)


def _keep_apart(message: BaseMessage) -> None:
    """LangChain numbers the blocks of a stream from 0 up, and so does the server its tool calls:
    a tool call would be merged into the text or reasoning before it. So they count down."""
    for call in getattr(message, "tool_call_chunks", ()):
        if call["index"] is not None:
            call["index"] = -1 - call["index"]


def _default_base_url() -> str | None:
    current = settings()
    return current.base_url if current.explicit else os.environ.get("OPENAI_BASE_URL")


def _key_for(base_url: object) -> str:
    """The key that belongs to where the calls go: neither is ever sent to the other's origin."""
    if is_maestro(str(base_url)):
        return settings().api_key or "EMPTY"
    return os.environ.get("OPENAI_API_KEY") or "EMPTY"
