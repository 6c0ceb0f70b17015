"""The stub's KV cache: whole blocks under a limit that moves, and prefixes that are kept."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ._errors import RefusedError


@dataclass(slots=True)
class LiveCall:
    """A call in the stub. `longest` is its tokens at the end, `computed` those so far."""

    id: str
    longest: int
    computed: int = 0
    generated: int = 0
    running: bool = False


class KvCache:
    """Counts blocks; nothing is stored. All limits and sizes are in blocks.

    A running call is promised all that it will need, so that none waits half-way. The blocks of an
    ended call stay cached until others need the room, or for as long as they are kept. While the
    weights are `away` only running calls and kept prefixes hold some.
    """

    def __init__(self, built: int, block_tokens: int, max_model_len: int) -> None:
        self.built = self.limit = built
        self.floor = min(built, -(-max_model_len // block_tokens))
        self.live: list[LiveCall] = []
        self.away = False
        self._block_tokens = block_tokens
        self._promised = 0
        self._cached: dict[str, int] = {}
        self.cached = 0
        """What ended calls have left, kept prefixes among them."""
        self._expiry: dict[str, asyncio.TimerHandle] = {}
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def used(self) -> int:
        """What live calls have filled."""
        return sum(self.blocks(call.computed) for call in self.live)

    @property
    def pinned(self) -> int:
        """What is kept."""
        return sum(self._cached[call] for call in self._expiry)

    @property
    def held(self) -> int:
        """What may be filled now: more than the limit while a shrink waits for calls, and what
        they and kept prefixes take while the weights are away."""
        if self.away:
            return self._promised + self.pinned
        return max(self.limit, self._promised + self.pinned)

    def blocks(self, tokens: int) -> int:
        """Whole blocks of so many tokens; a call never has more than the floor."""
        return min(self.floor, -(-tokens // self._block_tokens))

    def set_limit(self, limit: int) -> None:
        """Grow at once, or shrink as calls end. Raises RefusedError outside the possible."""
        if not self.floor <= limit <= self.built:
            raise RefusedError(
                422, f"a KV limit of {limit} blocks is not within {self.floor} and {self.built}"
            )
        self.limit = limit
        self._settle()

    def leave(self, *, whole: bool) -> None:
        """The weights have left, and what nothing is held in goes with them: of a cache of one size
        the `whole` or nothing."""
        self.away = self.away or not (whole and (self._promised or self.pinned))
        self._settle()

    def back(self) -> None:
        """The weights are back, and the limit is in force again."""
        self.away = False
        self._settle()

    @contextmanager
    def registered(self, call: LiveCall) -> Iterator[None]:
        """The call is here; its blocks become cached at the exit."""
        self.live.append(call)
        try:
            yield
        finally:
            self.live.remove(call)
            if call.running:
                self._promised -= self._need(call)
                self._cache(call.id, self.blocks(call.computed))
            self._settle()

    async def admit(self, call: LiveCall) -> None:
        """Wait until the weights are there, and the limit has room for the whole call."""
        while self.away or self._is_full(call):
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn
        call.running = True
        self._promised += self._need(call)
        self._settle()

    def keep(self, call: str, seconds: float) -> int:
        """Keep an ended call's blocks; how many. Raises RefusedError."""
        if call not in self._cached:
            raise RefusedError(404, f"nothing is cached of the call {call!r}")
        kept, more = self._expiry.get(call), self._cached[call]
        if kept is None and self.limit - self.pinned - more < self.floor:
            raise RefusedError(409, "the rest would not hold one request of max_model_len")
        if kept is not None:
            kept.cancel()
        loop = asyncio.get_running_loop()
        self._expiry[call] = loop.call_later(seconds, self.drop, call)
        return more

    def drop(self, call: str) -> None:
        """Keep it no longer."""
        if (timer := self._expiry.pop(call, None)) is not None:
            timer.cancel()
            self._settle()

    def _cache(self, call: str, blocks: int) -> None:
        self.cached += blocks - self._cached.pop(call, 0)
        self._cached[call] = blocks

    def _need(self, call: LiveCall) -> int:
        return self.blocks(call.longest)

    def _is_full(self, call: LiveCall) -> bool:
        promised = self._promised
        return bool(promised) and promised + self._need(call) > self.limit - self.pinned

    def _settle(self) -> None:
        """Evict the oldest that nobody keeps, and let those who wait look again."""
        unkept = (call for call in self._cached if call not in self._expiry)
        evicted = []
        room = 0 if self.away else self.limit - self._promised
        while self.cached > room and (call := next(unkept, "")):
            evicted.append(call)
            self.cached -= self._cached[call]
        for call in evicted:
            del self._cached[call]
        waiting, self._waiting = self._waiting, []
        for turn in waiting:
            if not turn.done():
                turn.set_result(None)
