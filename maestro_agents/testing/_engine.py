"""The stub's state: its batch, its pace, its faults, and what it has seen."""

from __future__ import annotations

import asyncio
import os
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from ._call import Body, Call
from ._errors import ApiError
from ._faults import Fault
from ._kv import KvCache, LiveCall
from ._latency import Latency
from ._reply import OutputTokens, ReasoningTokens, Reply
from ._slots import Slots
from ._weights import Weights

_KEPT_REQUESTS = 10_000
_NEVER = 1 << 62
_YIELD_EVERY = 16


@dataclass(frozen=True, slots=True)
class Settings:
    """What a stub serves and how.

    `suspend_s` and `resume_s` are how long its weights take from the device and back to it; the
    first `fail_resume` ways back fail.
    """

    models: tuple[str, ...] = ("stub",)
    latency: Latency = field(default_factory=Latency)
    output_tokens: OutputTokens = None
    reasoning_tokens: ReasoningTokens = None
    max_num_seqs: int = 256
    max_model_len: int = 32_768
    kv_blocks: int = 4096
    block_size: int = 16
    kv_bytes_per_token: int = 1024
    kv_limit_bytes: int | None = None
    elastic: bool = True
    weights_bytes: int = 0
    suspend_s: float = 0.0
    resume_s: float = 0.0
    fail_resume: int = 0
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
        """While it is not set, nothing is computed and no weights move."""
        self.open.set()
        self.resident = asyncio.Event()
        """While it is not set, the weights are not on the device: nothing is computed either."""
        self.resident.set()
        self.moving = False
        """Whether the weights are on their way."""
        self.weights = Weights(settings.weights_bytes)
        self.kv = KvCache(settings.kv_blocks, settings.block_size, settings.max_model_len)
        if settings.kv_limit_bytes is not None:
            block_bytes = settings.block_size * settings.kv_bytes_per_token
            self.kv.set_limit(settings.kv_limit_bytes // block_bytes)

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

    @asynccontextmanager
    async def computing(
        self, call: Call, replies: list[Reply], name: str, fault: Fault | None
    ) -> AsyncIterator[AsyncIterator[int]]:
        """The decode steps of a call that is known as `name`, once it has a slot and blocks."""
        longest = call.prompt_tokens + sum(len(reply.tokens) for reply in replies)
        live = LiveCall(name, longest)
        with self.kv.registered(live):
            async with self.slots.taken(call.priority):
                await self.kv.admit(live)
                yield self._steps(call, replies, fault, live)

    async def _steps(
        self, call: Call, replies: list[Reply], fault: Fault | None, live: LiveCall
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
            due += await self._frozen()
            await self._until(due, at)
            due += await self._frozen()
            made = sum(at < len(reply.tokens) for reply in replies)
            self.generation_tokens += made
            live.generated += made
            live.computed = call.prompt_tokens + live.generated
            yield at

    async def _frozen(self) -> float:
        """Wait while nothing is computed; returns for how long."""
        if self.open.is_set() and self.resident.is_set():
            return 0.0
        loop = asyncio.get_running_loop()
        began = loop.time()
        await self.open.wait()
        await self.resident.wait()
        return loop.time() - began

    async def _until(self, due: float, at: int) -> None:
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
