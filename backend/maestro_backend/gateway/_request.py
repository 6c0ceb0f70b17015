"""One chat completion request: bytes and headers in, a checked record out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from maestro_agents.protocol import BODY_KEY, MAX_ANNOTATION_BYTES, Annotation, CallIdentity

from ._errors import invalid
from ._prompt import PromptCounts

_TRACE = ("traceparent", "tracestate")
MAX_BODY_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request as the gateway understands it. `bad_hints` were ignored, and are counted."""

    body: dict[str, Any]
    identity: CallIdentity
    annotation: Annotation
    prompt_bytes: int
    counts: PromptCounts
    trace: dict[str, str]
    """W3C trace headers, passed on to the engine."""
    bad_hints: tuple[str, ...] = ()

    @property
    def model(self) -> str:
        return str(self.body["model"])

    @property
    def stream(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def max_tokens(self) -> int | None:
        value = self.body.get("max_completion_tokens") or self.body.get("max_tokens")
        return value if isinstance(value, int) else None

    @property
    def choices(self) -> int:
        return self.body.get("n") or 1

    def upstream_body(self, model: str, priority: int) -> bytes:
        """What the engine gets: our key removed, its own model name, our priority."""
        body = {k: v for k, v in self.body.items() if k != BODY_KEY}
        body |= {"model": model, "priority": priority}
        if self.stream:
            options = body.get("stream_options") or {}
            body["stream_options"] = {**options, "include_usage": True}
        return json.dumps(body, ensure_ascii=False).encode()

    @property
    def wants_usage(self) -> bool:
        return bool((self.body.get("stream_options") or {}).get("include_usage"))


def parse_chat(raw: bytes, headers: Mapping[str, str]) -> ChatRequest:
    """Read a request.

    Raises:
        ApiError: 400 naming the field. Hints never raise: a bad one is left out and listed.
    """
    body = _parse_json(raw)
    for field, check, wanted in _CHECKS:
        if field in body and body[field] is not None and not check(body[field]):
            raise invalid(f"{field!r} must be {wanted}", field)
    for field in ("model", "messages"):
        if body.get(field) is None:
            raise invalid(f"{field!r} is required", field)
    for index, message in enumerate(body["messages"]):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            where = f"messages[{index}].role"
            raise invalid(f"{where!r} must be a string such as 'user'", where)
    identity, bad_headers = CallIdentity.from_headers(headers)
    annotation, bad_keys = _annotation(body.get(BODY_KEY))
    trace = {n: v for n in _TRACE if (v := headers.get(n)) is not None and v.isascii()}
    prompt_bytes, counts = _prompt_bytes(body), PromptCounts.of(body["messages"])
    bad_hints = (*bad_headers, *bad_keys)
    return ChatRequest(body, identity, annotation, prompt_bytes, counts, trace, bad_hints)


def _prompt_bytes(body: dict[str, Any]) -> int:
    """The size of what the model will read. A lone surrogate, which no UTF-8 has, is refused."""
    try:
        json.dumps(body, ensure_ascii=False).encode()
        prompt = {"messages": body["messages"], "tools": body.get("tools")}
        return len(json.dumps(prompt, ensure_ascii=False).encode())
    except UnicodeEncodeError as error:
        raise invalid(f"the body holds text that is not Unicode: {error.reason}") from error


def _parse_json(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
    except RecursionError as error:
        raise invalid("the body is nested too deeply") from error
    except ValueError as error:
        raise invalid(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise invalid("the body must be a JSON object")
    return body


def _bytes(value: Any) -> int:
    """Of compact UTF-8 JSON, as the SDK counts."""
    return len(
        json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
    )


def _annotation(value: Any) -> tuple[Annotation, tuple[str, ...]]:
    """The `maestro` key, whatever a client put there; wrong fields are left out one by one."""
    if value is None:
        return Annotation(), ()
    if not isinstance(value, dict) or _bytes(value) > MAX_ANNOTATION_BYTES:
        return Annotation(), (BODY_KEY,)
    try:
        return Annotation.model_validate(value), ()
    except ValidationError as error:
        bad = {str(e["loc"][0]) for e in error.errors() if e["loc"]}
        kept = {k: v for k, v in value.items() if k not in bad}
        return Annotation.model_validate(kept), tuple(f"{BODY_KEY}.{b}" for b in sorted(bad))


_MOST_TOKENS, _MOST_CHOICES = 10**9, 1024
"""Beyond any engine: what is more is no count (ours)."""


def _is_count(value: Any, most: int = _MOST_TOKENS) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_CHECKS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("model", lambda v: isinstance(v, str) and v != "", "a model name"),
    ("messages", lambda v: isinstance(v, list) and v != [], "a list with at least one message"),
    ("stream", lambda v: isinstance(v, bool), "true or false"),
    ("stream_options", lambda v: isinstance(v, dict), "an object"),
    ("max_tokens", _is_count, "a whole number of 1 or more, 1,000,000,000 at most"),
    ("max_completion_tokens", _is_count, "a whole number of 1 or more, 1,000,000,000 at most"),
    ("n", lambda v: _is_count(v, _MOST_CHOICES), f"a whole number from 1 to {_MOST_CHOICES}"),
    ("temperature", _is_number, "a number"),
    ("top_p", _is_number, "a number"),
    ("tools", lambda v: isinstance(v, list), "a list"),
    ("response_format", lambda v: isinstance(v, dict), "an object"),
)
