"""The JSON and the server-sent events of an OpenAI-compatible server."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from ._call import Call
from ._reply import Reply

DONE = b"data: [DONE]\n\n"


class Wire:
    """The wire form of one call's replies."""

    def __init__(self, call: Call, replies: Sequence[Reply], *, reasons: bool = False) -> None:
        self._call = call
        self._reasons = reasons
        self._replies = replies
        self._tool_ids = [f"call_{uuid4().hex[:24]}" for _ in replies]
        kind = "chat.completion" if call.chat else "text_completion"
        head = {
            "id": f"{'chatcmpl' if call.chat else 'cmpl'}-{uuid4().hex}",
            "object": kind + (".chunk" if call.stream and call.chat else ""),
            "created": int(time.time()),
            "model": call.model,
        }
        self._head = json.dumps(head)[:-1]

    def usage(self) -> dict[str, Any]:
        made = sum(len(reply.tokens) for reply in self._replies)
        usage: dict[str, Any] = {
            "prompt_tokens": self._call.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self._call.prompt_tokens + made,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        if self._reasons and self._call.chat:
            thought = sum(reply.reasoning for reply in self._replies)
            usage["completion_tokens_details"] = {"reasoning_tokens": thought}
        return usage

    def whole(self) -> bytes:
        """The body of a reply that is not streamed."""
        choices = [self._choice(i, reply) for i, reply in enumerate(self._replies)]
        tail = {"choices": choices, "usage": self.usage()}
        return f"{self._head}, {json.dumps(tail, ensure_ascii=False)[1:]}".encode()

    def opening(self) -> bytes:
        """The first event of every choice: the role, and the name of a tool called at once."""
        if not self._call.chat:
            return b""
        return b"".join(self._chunk(i, self._first_delta(i)) for i in range(len(self._replies)))

    def step(self, at: int) -> bytes:
        """One decode step: the token number `at` of every choice that has one, and its end."""
        events = []
        for i, reply in enumerate(self._replies):
            if at < len(reply.tokens):
                events += [self._chunk(i, delta) for delta in self._deltas(i, reply, at)]
            if at + 1 == max(1, len(reply.tokens)):
                events.append(self._chunk(i, "{}" if self._call.chat else '""', reply.finish))
        return b"".join(events)

    def closing(self) -> bytes:
        """The usage, where asked for, and the end mark."""
        if not self._call.include_usage:
            return DONE
        tail = json.dumps({"choices": [], "usage": self.usage()})
        return f"data: {self._head}, {tail[1:]}\n\n".encode() + DONE

    def _choice(self, index: int, reply: Reply) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index}
        if not self._call.chat:
            choice["text"] = reply.text
        else:
            choice["message"] = self._message(index, reply)
        return {**choice, "logprobs": None, "finish_reason": reply.finish}

    def _message(self, index: int, reply: Reply) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": reply.text}
        if reply.tool is not None:
            called = [self._tool_call(index, reply.tool, reply.text)]
            message = {"role": "assistant", "content": None, "tool_calls": called}
        if self._reasons:
            message["reasoning"] = self._shown(reply.thought) or None
            message["content"] = message["content"] or None
        return message

    def _shown(self, thought: str) -> str:
        return thought if self._call.include_reasoning else ""

    def _tool_call(self, index: int, name: str, arguments: str) -> dict[str, Any]:
        function = {"name": name, "arguments": arguments}
        return {"id": self._tool_ids[index], "type": "function", "function": function}

    def _first_delta(self, index: int) -> str:
        reply = self._replies[index]
        if reply.tool is None or reply.reasoning:
            return json.dumps({"role": "assistant", "content": ""})
        called = self._begun_tool(index, reply.tool)
        return json.dumps({"role": "assistant", "content": None, "tool_calls": called})

    def _begun_tool(self, index: int, tool: str) -> list[dict[str, Any]]:
        return [{"index": 0, **self._tool_call(index, tool, "")}]

    def _deltas(self, index: int, reply: Reply, at: int) -> list[str]:
        text = json.dumps(reply.tokens[at], ensure_ascii=False)
        if not self._call.chat:
            return [text]
        if at < reply.reasoning:
            return [f'{{"reasoning": {text}}}'] if self._call.include_reasoning else []
        if reply.tool is None:
            return [f'{{"content": {text}}}']
        delta = f'{{"tool_calls": [{{"index": 0, "function": {{"arguments": {text}}}}}]}}'
        if at > reply.reasoning or at == 0:
            return [delta]
        return [json.dumps({"tool_calls": self._begun_tool(index, reply.tool)}), delta]

    def _chunk(self, index: int, delta: str, finish: str | None = None) -> bytes:
        key = "delta" if self._call.chat else "text"
        reason = f'"{finish}"' if finish else "null"
        choice = f'{{"index": {index}, "{key}": {delta}, "finish_reason": {reason}}}'
        return f'data: {self._head}, "choices": [{choice}]}}\n\n'.encode()
