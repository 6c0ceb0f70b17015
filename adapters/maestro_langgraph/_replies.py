"""What a reply of Maestro says beyond OpenAI's fields: its reasoning, and how it was served."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Final

from maestro_agents.adapter import fail_open
from maestro_agents.protocol import HEADER_PREDICTED_TOKENS, HEADER_QUEUE_MS, HEADER_WORKER

REASONING: Final = "reasoning_content"
"""Where LangChain looks in `additional_kwargs` for the text of a reasoning block."""

_FIELDS: Final = ("reasoning", "reasoning_content")
"""vLLM's name, and that of older vLLM and DeepSeek; some releases sent both."""

_SERVED: Final[dict[str, tuple[str, Callable[[str], object]]]] = {
    "worker": (HEADER_WORKER, str),
    "queue_ms": (HEADER_QUEUE_MS, int),
    "predicted_tokens": (HEADER_PREDICTED_TOKENS, int),
}

# A reply is converted right after its headers arrived, in the context that made the request.
_latest: ContextVar[dict[str, Any] | None] = ContextVar("maestro_served", default=None)


def read(said: object, name: str) -> Any:
    """A field of what the wire said: a mapping, or one of `openai`'s models."""
    return said.get(name) if isinstance(said, Mapping) else getattr(said, name, None)


def reasoning_of(said: object) -> str | None:
    """The reasoning in a message, or in the delta of a stream."""
    texts = (read(said, name) for name in _FIELDS)
    return next((text for text in texts if isinstance(text, str) and text), None)


@fail_open
def listen(client: Any) -> None:
    """Note the headers of whatever an OpenAI client receives. Idempotent."""
    # The SDK has no hook for responses, and headers of streams reach LangChain only all together.
    http = client._client
    hook = _anote if hasattr(http, "aclose") else _note
    hooks = http.event_hooks
    if hook not in hooks.get("response", ()):
        http.event_hooks = {**hooks, "response": [*hooks.get("response", ()), hook]}


def take_served() -> dict[str, Any] | None:
    """How the latest reply in this context was served; None if unknown, or taken already."""
    served = _latest.get()
    _latest.set(None)
    return served


@fail_open
def _note(response: Any) -> None:
    _latest.set(dict(_served(response.headers)))


async def _anote(response: Any) -> None:
    _note(response)


def _served(headers: Mapping[str, str]) -> Iterator[tuple[str, object]]:
    for key, (name, kind) in _SERVED.items():
        try:
            if value := headers.get(name):
                yield key, kind(value)
        except ValueError:
            continue
