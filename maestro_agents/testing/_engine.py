"""The stub's state: its batch, its pace, its faults, and what it has seen."""

from __future__ import annotations

import asyncio
import os
from collections import Counter, deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from ._call import Body, Call
from ._errors import ApiError
from ._faults import Fault
from ._latency import Latency
from ._reply import OutputTokens, ReasoningTokens, Reply
from ._slots import Slots

_KEPT_REQUESTS = 10_000
_NEVER = 1 << 62
_YIELD_EVERY = 16


@dataclass(frozen=True, slots=True)
class Settings:
    """What a stub serves and how. The size of the KV cache is only reported."""

    models: tuple[str, ...] = ("stub",)
    latency: Latency = field(default_factory=Latency)
    output_tokens: OutputTokens = None
    reasoning_tokens: ReasoningTokens = None
    max_num_seqs: int = 256
    max_model_len: int = 32_768
    kv_blocks: int = 4096
    block_size: int = 16
    auto_tools: bool = False


@dataclass(frozen=True, slots=True)
class RecordedRequest:
    """A completion request as it arrived; header names are lower-case."""

    path: str
    headers: dict[str, str]
    body: Body


class ConnectionDropped(Exception):
    """A planned fault: the connection is to be cut now."""


class Engine:
    """Computes replies at the pace of a latency model, `max_num_seqs` at a time."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.slots = Slots(settings.max_num_seqs)
        self.faults: deque[Fault] = deque()
        self.requests: deque[RecordedRequest] = deque(maxlen=_KEPT_REQUESTS)
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.finished: Counter[str] = Counter()
        self.open = asyncio.Event()
        """While it is not set, nothing is computed."""
        self.open.set()

    def checked(self, call: Call) -> Call:
        """Refuse what does not fit the context, as vLLM does."""
        limit = self.settings.max_model_len
        wanted = call.prompt_tokens + (call.max_tokens or 1)
        if wanted <= limit:
            return call
        message = (
            f"This model's maximum context length is {limit} tokens. However, you requested "
            f"{wanted} tokens ({call.prompt_tokens} in the prompt)."
        )
        field_name = "messages" if call.chat else "prompt"
        raise ApiError(400, message, param=field_name, code="context_length_exceeded")

    def next_fault(self) -> Fault | None:
        """The fault planned for the next request. Raises it, if it is an error status."""
        fault = self.faults.popleft() if self.faults else None
        if fault is not None and fault.kind == "error":
            raise ApiError(fault.status, "planned fault", code="planned_fault")
        return fault

    async def steps(
        self, call: Call, replies: list[Reply], fault: Fault | None
    ) -> AsyncIterator[int]:
        """Yield 0, 1, 2 ... as each decode step of all choices is done."""
        loop, latency = asyncio.get_running_loop(), self.settings.latency
        length = max(1, *(len(reply.tokens) for reply in replies))
        fails_at = _NEVER if fault is None else min(fault.after_tokens, length)
        self.prompt_tokens += call.prompt_tokens
        due = loop.time() + latency.first_s(call.prompt_tokens)
        for at in range(length + 1):
            if at >= fails_at and fault is not None:
                await _fail(fault)
            if at == length:
                break
            due += latency.step_s(self.slots.running)
            await self._until(due, at)
            self.generation_tokens += sum(at < len(reply.tokens) for reply in replies)
            yield at

    async def _until(self, due: float, at: int) -> None:
        if not self.open.is_set():
            await self.open.wait()
        left = due - asyncio.get_running_loop().time()
        if left > 0:
            await asyncio.sleep(left)
        elif at % _YIELD_EVERY == 0:
            await asyncio.sleep(0)


async def _fail(fault: Fault) -> None:
    await asyncio.sleep(0.01)  # lets the event loop write out the tokens sent before
    if fault.kind == "die":
        os._exit(1)
    if fault.kind == "drop":
        raise ConnectionDropped
    await asyncio.Event().wait()
