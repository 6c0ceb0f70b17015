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

ReasoningTokens = int | Callable[[Body], int] | None
"""Length of what a chat reply thinks first: fixed or computed; None for a model without it."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One choice. The first `reasoning` tokens are reasoning. `tool` names the function whose
    arguments the other tokens spell."""

    tokens: tuple[str, ...]
    finish: str
    tool: str | None = None
    reasoning: int = 0

    @property
    def text(self) -> str:
        return "".join(self.tokens[self.reasoning :])

    @property
    def thought(self) -> str:
        return "".join(self.tokens[: self.reasoning])


def compose(
    call: Call, output_tokens: OutputTokens, reasoning_tokens: ReasoningTokens
) -> list[Reply]:
    """All choices of a call, `n` per prompt; the same body gives the same replies."""
    return [
        _choice(call, prompt, f"{call.body.get('seed')}:{i}", output_tokens, reasoning_tokens)
        for prompt in call.prompts
        for i in range(call.n)
    ]


def _choice(
    call: Call,
    prompt: str,
    salt: str,
    output_tokens: OutputTokens,
    reasoning_tokens: ReasoningTokens,
) -> Reply:
    reply = _reply(call, Material(prompt, call.user, salt), output_tokens)
    if reply.tool is None and call.stop:
        reply = _stopped(reply, call.stop)
    wanted = reasoning_tokens(call.body) if callable(reasoning_tokens) else reasoning_tokens
    if call.chat and wanted:
        thought = Material(prompt, "", f"{salt}:reasoning").sentence_tokens(wanted)
        reply = replace(reply, tokens=(*thought, *reply.tokens), reasoning=wanted)
    return _limited(reply, call.max_tokens)


def _reply(call: Call, material: Material, output_tokens: OutputTokens) -> Reply:
    if call.tool is not None:
        schema = call.tool.get("parameters") or {"type": "object"}
        return Reply(_spelled(schema, material), "tool_calls", call.tool["name"])
    if (schema := _wanted_schema(call.body, material)) is not None:
        return Reply(_spelled(schema, material), "stop")
    length = output_tokens(call.body) if callable(output_tokens) else output_tokens
    count = 12 + material.seed % 52 if length is None else length
    return Reply(tuple(material.sentence_tokens(min(count, call.max_tokens or count))), "stop")


def _spelled(schema: dict[str, Any], material: Material) -> tuple[str, ...]:
    value = Filler(schema, material).fill()
    return tuple(json_tokens(json.dumps(value, ensure_ascii=False)))


def _wanted_schema(body: Body, material: Material) -> dict[str, Any] | None:
    wanted = body.get("response_format")
    if not isinstance(wanted, dict) or wanted.get("type") == "text":
        return None
    if wanted.get("type") == "json_object":
        keys = material.take_names() or ["answer"]
        return {"type": "object", "properties": {key: {"type": "string"} for key in keys}}
    schema = (wanted.get("json_schema") or {}).get("schema")
    if wanted.get("type") != "json_schema" or not isinstance(schema, dict):
        field = "response_format.json_schema.schema"
        raise ApiError(400, f"{field}: expected a JSON Schema", param=field)
    return schema


def _limited(reply: Reply, max_tokens: int | None) -> Reply:
    if max_tokens is None or len(reply.tokens) < max_tokens:
        return reply
    return Reply(
        reply.tokens[:max_tokens],
        "length",
        reply.tool if reply.reasoning < max_tokens else None,
        min(reply.reasoning, max_tokens),
    )


def _stopped(reply: Reply, stop: tuple[str, ...]) -> Reply:
    cuts = [at for s in stop if s and (at := reply.text.find(s)) >= 0]
    if not cuts:
        return reply
    left, kept = min(cuts), []
    for token in reply.tokens:
        kept.append(token[:left])
        left -= len(kept[-1])
    return replace(reply, tokens=tuple(t for t in kept if t))
