"""The cheap structure of a prompt: counts that help to predict what answers it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_FENCE = "```"


@dataclass(frozen=True, slots=True)
class PromptCounts:
    """Of the messages' text: characters, lines, and characters inside ``` fences."""

    messages: int
    chars: int
    lines: int
    code_chars: int

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, Any]]) -> PromptCounts:
        texts = [text for message in messages for text in _texts(message.get("content"))]
        return cls(
            messages=len(messages),
            chars=sum(map(len, texts)),
            lines=sum(text.count("\n") + 1 for text in texts),
            code_chars=sum(_inside_fences(text) for text in texts if _FENCE in text),
        )


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        for part in content:
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                yield part["text"]


def _inside_fences(text: str) -> int:
    return sum(map(len, text.split(_FENCE)[1::2]))


def output_format(body: Mapping[str, Any]) -> str:
    """ "schema", "json" or "", as the request's `response_format` asks."""
    wanted = (body.get("response_format") or {}).get("type")
    return {"json_schema": "schema", "json_object": "json"}.get(str(wanted), "")


def tool_choice(body: Mapping[str, Any]) -> str:
    """ "required" where a tool must be called, "auto" where it may, else ""."""
    if not body.get("tools") or body.get("tool_choice") == "none":
        return ""
    chosen = body.get("tool_choice")
    return "required" if chosen == "required" or isinstance(chosen, dict) else "auto"
