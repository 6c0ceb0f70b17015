"""What the stub answers: tokens, and why they ended."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ._call import Body, Call
from ._errors import ApiError
from ._schema import Filler
from ._text import Material, json_tokens

OutputTokens = int | Callable[[Body], int] | None
"""Length of plain text in tokens: fixed, computed from the body, or None for the prompt's hash."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One choice. `tool` names the function whose arguments the tokens spell."""

    tokens: tuple[str, ...]
    finish: str
    tool: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.tokens)


def compose(call: Call, output_tokens: OutputTokens) -> list[Reply]:
    """All choices of a call, `n` per prompt; the same body gives the same replies."""
    return [
        _limited(_reply(call, Material(prompt, call.user, _salt(call, i)), output_tokens), call)
        for prompt in call.prompts
        for i in range(call.n)
    ]


def _salt(call: Call, choice: int) -> str:
    return f"{call.body.get('seed')}:{choice}"


def _reply(call: Call, material: Material, output_tokens: OutputTokens) -> Reply:
    if call.tool is not None:
        schema = call.tool.get("parameters") or {"type": "object"}
        return Reply(_spelled(schema, material), "tool_calls", call.tool["name"])
    if (schema := _wanted_schema(call.body)) is not None:
        return Reply(_spelled(schema, material), "stop")
    length = output_tokens(call.body) if callable(output_tokens) else output_tokens
    count = 12 + material.seed % 52 if length is None else length
    return Reply(tuple(material.sentence_tokens(min(count, call.max_tokens or count))), "stop")


def _spelled(schema: dict[str, Any], material: Material) -> tuple[str, ...]:
    value = Filler(schema, material).fill()
    return tuple(json_tokens(json.dumps(value, ensure_ascii=False)))


def _wanted_schema(body: Body) -> dict[str, Any] | None:
    wanted = body.get("response_format")
    if not isinstance(wanted, dict) or wanted.get("type") == "text":
        return None
    if wanted.get("type") == "json_object":
        return {"type": "object", "properties": {"answer": {"type": "string"}}}
    schema = (wanted.get("json_schema") or {}).get("schema")
    if wanted.get("type") != "json_schema" or not isinstance(schema, dict):
        field = "response_format.json_schema.schema"
        raise ApiError(400, f"{field}: expected a JSON Schema", param=field)
    return schema


def _limited(reply: Reply, call: Call) -> Reply:
    reply = _stopped(reply, call.stop) if reply.tool is None and call.stop else reply
    if call.max_tokens is None or len(reply.tokens) < call.max_tokens:
        return reply
    return replace(reply, tokens=reply.tokens[: call.max_tokens], finish="length")


def _stopped(reply: Reply, stop: tuple[str, ...]) -> Reply:
    cuts = [at for s in stop if s and (at := reply.text.find(s)) >= 0]
    if not cuts:
        return reply
    left, kept = min(cuts), []
    for token in reply.tokens:
        kept.append(token[:left])
        left -= len(kept[-1])
    return replace(reply, tokens=tuple(t for t in kept if t))
