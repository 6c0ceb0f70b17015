"""`ChatMaestro`: LangChain's OpenAI chat model, aimed at Maestro."""

from __future__ import annotations

import os
from typing import Any

from langchain_core.language_models import LangSmithParams
from langchain_core.language_models.base import LanguageModelInput
from langchain_openai.chat_models.base import BaseChatOpenAI
from pydantic import Field, model_validator

from maestro_agents._context import current_call, render
from maestro_agents._log import fail_open
from maestro_agents._settings import is_maestro, settings


class ChatMaestro(BaseChatOpenAI):
    """A chat model served by Maestro, or by any OpenAI-compatible server.

        model = ChatMaestro(model="qwen3-8b")

    Without `base_url` and `api_key` it reads MAESTRO_BASE_URL and MAESTRO_API_KEY (default
    "EMPTY"); while MAESTRO_BASE_URL is unset, OPENAI_BASE_URL and OPENAI_API_KEY. Streams report
    token usage. Inside a wrapped graph its calls are annotated, on their way to Maestro only.
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

    @property
    def _llm_type(self) -> str:
        return "chat-maestro"

    @property
    def lc_secrets(self) -> dict[str, str]:
        return {"openai_api_key": "MAESTRO_API_KEY"}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = "maestro"
        return params

    def _get_request_payload(
        self, input_: LanguageModelInput, *, stop: list[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        payload = super()._get_request_payload(input_, stop=stop, **kwargs)
        return self._annotated(payload) or payload

    @fail_open
    def _annotated(self, payload: dict[str, Any]) -> dict[str, Any] | None:
        call = current_call.get()
        if call is None or not is_maestro(self.openai_api_base or ""):
            return None
        headers, body = render(call)
        return {
            **payload,
            "extra_headers": {**headers, **(payload.get("extra_headers") or {})},
            "extra_body": {**body, **(payload.get("extra_body") or {})},
        }


def _default_base_url() -> str | None:
    current = settings()
    return current.base_url if current.explicit else os.environ.get("OPENAI_BASE_URL")


def _key_for(base_url: object) -> str:
    """The key that belongs to where the calls go: neither is ever sent to the other's origin."""
    if is_maestro(str(base_url)):
        return settings().api_key or "EMPTY"
    return os.environ.get("OPENAI_API_KEY") or "EMPTY"
