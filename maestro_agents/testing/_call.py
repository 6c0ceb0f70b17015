"""One request body, checked and reduced to what the stub acts on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ._errors import ApiError

Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Call:
    """A checked request. `prompts` has one text per completion prompt, one in all for a chat."""

    body: Body
    model: str
    prompts: tuple[str, ...]
    user: str
    chat: bool
    max_tokens: int | None
    n: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    priority: int
    include_reasoning: bool = True
    tool: Body | None = None
    """The function to call, where one is forced."""

    @property
    def prompt_tokens(self) -> int:
        """About four bytes a token."""
        return sum(max(1, len(p.encode(errors="replace")) // 4) for p in self.prompts)


def parse_chat(body: Body, models: tuple[str, ...], auto_tools: bool) -> Call:
    """Read a chat completion body.

    Raises:
        ApiError: 400 naming the field, 404 for an unknown model.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _bad("messages", "expected a list of at least one message")
    texts = [_message_text(message, i) for i, message in enumerate(messages)]
    users = [t for m, t in zip(messages, texts, strict=True) if m["role"] == "user"]
    tools = _tools(body)
    offered = json.dumps(tools) if tools else ""
    prompt = "\n".join(
        [f"{m['role']}: {t}" for m, t in zip(messages, texts, strict=True)] + [offered]
    )
    user = users[-1] if users else texts[-1]
    fresh = messages[-1]["role"] == "user"
    tool = _forced(body, tools, user) or (_chosen(tools, user) if auto_tools and fresh else None)
    return _call(body, models, (prompt,), user, chat=True, tool=tool)


def parse_completion(body: Body, models: tuple[str, ...]) -> Call:
    """Read a text completion body; raises as `parse_chat`."""
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        prompts: tuple[str, ...] = (prompt,)
    elif isinstance(prompt, list) and prompt and all(isinstance(p, str) for p in prompt):
        prompts = tuple(prompt)
    elif isinstance(prompt, list) and prompt and all(isinstance(p, int) for p in prompt):
        prompts = (" ".join(f"{token:03d}" for token in prompt),)
    else:
        raise _bad("prompt", "expected a string, a list of strings or a list of token ids")
    return _call(body, models, prompts, prompts[-1], chat=False, tool=None)


def _call(
    body: Body,
    models: tuple[str, ...],
    prompts: tuple[str, ...],
    user: str,
    *,
    chat: bool,
    tool: Body | None,
) -> Call:
    model = body.get("model", models[0])
    if model not in models:
        message = f"The model `{model}` does not exist."
        raise ApiError(404, message, param="model", code="model_not_found")
    stop = body.get("stop") or ()
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise _bad("stream_options", "expected an object")
    limit = "max_completion_tokens" if body.get("max_completion_tokens") else "max_tokens"
    return Call(
        body=body,
        model=model,
        prompts=prompts,
        user=user,
        chat=chat,
        max_tokens=_whole(body, limit, low=1),
        n=_whole(body, "n", low=1) or 1,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stream=bool(body.get("stream")),
        include_usage=bool(options.get("include_usage")),
        priority=_whole(body, "priority") or 0,
        include_reasoning=body.get("include_reasoning") is not False,
        tool=tool,
    )


def _whole(body: Body, name: str, low: int | None = None) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise _bad(name, "expected a whole number")
    if low is not None and value < low:
        raise _bad(name, f"expected at least {low}")
    return value


def _message_text(message: Any, at: int) -> str:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise _bad(f"messages[{at}].role", "expected a string")
    content = message.get("content")
    if isinstance(content, list):
        parts = [p.get("text", "") if isinstance(p, dict) else str(p) for p in content]
        return "".join(str(part) for part in parts)
    if content is not None and not isinstance(content, str):
        raise _bad(f"messages[{at}].content", "expected a string or a list of parts")
    called = json.dumps(message["tool_calls"]) if message.get("tool_calls") else ""
    return (content or "") + called


def _tools(body: Body) -> list[Body]:
    tools = body.get("tools") or []
    if not isinstance(tools, list):
        raise _bad("tools", "expected a list")
    for at, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _bad(f"tools[{at}].function.name", "expected a string")
    return [tool["function"] for tool in tools]


def _forced(body: Body, tools: list[Body], user: str) -> Body | None:
    choice = body.get("tool_choice")
    if choice in (None, "auto", "none"):
        return None
    if not tools:
        raise _bad("tool_choice", "it needs `tools`")
    if choice == "required":
        return _chosen(tools, user)
    name = choice.get("function", {}).get("name") if isinstance(choice, dict) else None
    for tool in tools:
        if tool["name"] == name:
            return tool
    raise _bad("tool_choice", f"no tool is named {name!r}")


def _chosen(tools: list[Body], user: str) -> Body | None:
    """The tool that the user names, else the first."""
    named = [tool for tool in tools if tool["name"] in user]
    return next(iter(named or tools), None)


def _bad(field: str, message: str) -> ApiError:
    return ApiError(400, f"{field}: {message}", param=field)
