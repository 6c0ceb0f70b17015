"""Reading along a server-sent stream without parsing its tokens."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_EVENT_END = re.compile(rb"(\r?\n\r?\n)")
_FINISH = re.compile(rb'"finish_reason"\s*:\s*"(\w{1,32})"')
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts as the engine reports them, and the first choice's finish reason."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    finish: str = ""

    @classmethod
    def of(cls, body: object) -> Usage | None:
        """From the `usage` object of a reply; None if there is none."""
        if not isinstance(body, dict) or not isinstance(usage := body.get("usage"), dict):
            return None
        details = usage.get("prompt_tokens_details") or {}
        return cls(
            usage.get("prompt_tokens") or 0,
            usage.get("completion_tokens") or 0,
            details.get("cached_tokens") or 0,
            _finish(body),
        )


def _finish(body: dict[str, Any]) -> str:
    choices = body.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    reason = first.get("finish_reason") if isinstance(first, dict) else None
    return reason[:32] if isinstance(reason, str) else ""


class StreamReader:
    """Takes the engine's bytes, gives the client's; picks up usage on the way.

    We always ask the engine for the usage event; a client that did not ask never sees it. Bytes of
    all other events pass unchanged.
    """

    def __init__(self, *, forward_usage: bool) -> None:
        self.usage: Usage | None = None
        self.finish = ""
        self.events = 0
        self.done = False
        self.error: str | None = None
        """What the engine said went wrong inside its stream."""
        self._forward_usage = forward_usage
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        """Complete events to send on; an unfinished one waits for its end."""
        *parts, self._rest = _EVENT_END.split(self._rest + data)
        events = zip(parts[::2], parts[1::2], strict=True)
        return b"".join(e + end for e, end in events if not self.done and self._take(e))

    def _take(self, event: bytes) -> bool:
        """Whether the client gets this event."""
        if b'"usage"' in event and _NO_CHOICES.search(event):
            self.usage = Usage.of(json.loads(event.removeprefix(b"data: "))) or self.usage
            return self._forward_usage
        if event.startswith(b"data: [DONE]"):
            self.done = True
        elif event.startswith(b'data: {"error"'):
            self.error = event.removeprefix(b"data: ").decode(errors="replace")[:500]
        else:
            self.events += 1
            if not self.finish and (found := _FINISH.search(event)):
                self.finish = found[1].decode()
        return True
