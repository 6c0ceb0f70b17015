"""An engine that walks every step and looks at every call and block: slow, and easy to believe.

It follows the rules in the docstring of `_engine.py` with none of its sums and heaps. Blocks are
numbered, so that sharing is a matter of sets.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from itertools import count, takewhile
from math import nan

from maestro_backend.simulator._requests import Request
from maestro_backend.simulator._steps import StepCosts


@dataclass(eq=False)
class Call:
    spec: Request
    order: int
    tokens: int = 0
    """In the KV cache."""
    fill: int = 0
    generated: int = 0
    blocks: list[int] = field(default_factory=list)
    lost: int = 0
    cached: int = 0
    recomputed: int = 0
    preemptions: int = 0
    first: float = nan


@dataclass(frozen=True)
class Op:
    """At a time: `add` a request, `remove` a call, or set the limit to so many `blocks`."""

    at: float
    add: Request | None = None
    remove: str = ""
    blocks: int = 0


class NaiveEngine:
    def __init__(
        self, costs: StepCosts, blocks: int, size: int, max_num_seqs: int, max_tokens: int
    ) -> None:
        self.costs, self.blocks, self.size = costs, blocks, size
        self.ceiling = blocks
        self.max_num_seqs, self.max_tokens = max_num_seqs, max_tokens
        self.running: list[Call] = []
        self.queue: list[Call] = []
        self.left: dict[Hashable, tuple[int, ...]] = {}
        self.used: dict[int, int] = {}  # when each cached block was last used
        self.events: list[tuple[float, str, str]] = []
        self.calls: dict[str, Call] = {}
        self.numbers, self.ticks, self.orders = count(), count(1), count()

    def run(self, ops: Iterable[Op]) -> None:
        left = sorted(ops, key=lambda op: op.at)
        now = 0.0
        while left or self.running or self.queue:
            if not self.running and not self.queue:
                now = max(now, left[0].at)
            self.trim()
            due = [op for op in left if op.at <= now]
            left = left[len(due) :]
            for op in due:
                self.apply(op)
            for call in sorted(self.running, key=lambda call: call.order):
                self.report(call, now)
            self.settle()
            preempted = self.preempt(now)
            chunks = self.schedule(preempted)
            now = self.step(chunks, now)

    def apply(self, op: Op) -> None:
        if op.add is not None:
            call = Call(op.add, next(self.orders))
            self.calls[op.add.call] = call
            self.queue.append(call)
        elif op.remove:
            call = self.calls[op.remove]
            if call in self.queue:
                self.queue.remove(call)
            elif call in self.running:
                self.drop(call)
        else:
            self.blocks = op.blocks
            self.ceiling = max(self.ceiling, op.blocks)
            self.trim()

    def report(self, call: Call, now: float) -> None:
        if call.tokens < call.fill:
            return
        spec = call.spec
        if call.generated == spec.output_tokens:
            if spec.leaves is not None:
                self.left[spec.leaves] = tuple(call.blocks[: call.tokens // self.size])
                self.used |= dict.fromkeys(self.left[spec.leaves], 0)
            self.drop(call)
            self.events.append((now, "finished", spec.call))
        elif call.generated == spec.mark:
            self.events.append((now, "mark", spec.call))
            spec.mark = 0

    def drop(self, call: Call) -> None:
        self.running.remove(call)
        for block in reversed(call.blocks):
            if block in self.used:
                self.used[block] = next(self.ticks)
        call.blocks = []

    def in_use(self) -> set[int]:
        return {block for call in self.running for block in call.blocks}

    def trim(self) -> None:
        while len(self.in_use() | set(self.used)) > self.blocks:
            free = set(self.used) - self.in_use()
            if not free:
                return
            del self.used[min(free, key=self.used.__getitem__)]

    def settle(self) -> None:
        if len(self.in_use()) + self.growth() <= self.blocks:
            self.ceiling = self.blocks

    def growth(self) -> int:
        decoding = [call for call in self.running if call.tokens >= call.fill]
        return sum(call.tokens % self.size == 0 for call in decoding)

    def preempt(self, now: float) -> bool:
        preempted = False
        while len(self.in_use()) + self.growth() > self.ceiling and len(self.running) > 1:
            worst = max(call.spec.priority for call in self.running)
            victim = [call for call in self.running if call.spec.priority == worst][-1]
            victim.lost = victim.tokens
            self.left["preempted", victim.spec.call] = tuple(
                victim.blocks[: victim.tokens // self.size]
            )
            self.used |= dict.fromkeys(self.left["preempted", victim.spec.call], 0)
            victim.tokens = 0
            victim.preemptions += 1
            self.drop(victim)
            self.queue.append(victim)
            self.events.append((now, "preempted", victim.spec.call))
            preempted = True
        return preempted

    def schedule(self, preempted: bool) -> dict[Call, int]:
        """Tokens of every running call in the next step."""
        chunks = {call: 1 for call in self.running if call.tokens >= call.fill}
        for call in self.running:
            if call not in chunks:
                budget = self.max_tokens - sum(chunks.values())
                chunks[call] = min(budget, call.fill - call.tokens)
        self.queue.sort(key=lambda call: (call.spec.priority, call.order))
        while self.queue and not preempted:
            budget = self.max_tokens - sum(chunks.values())
            if budget <= 0 or len(self.running) == self.max_num_seqs:
                break
            call = self.queue[0]
            if not self.admit(call):
                break
            self.queue.pop(0)
            chunks[call] = min(budget, call.fill - call.tokens)
        return chunks

    def admit(self, call: Call) -> bool:
        spec, size = call.spec, self.size
        call.fill = spec.prompt_tokens + call.generated
        shared: list[int] = []
        if call.preemptions:
            shared = self.found(("preempted", spec.call), min(call.lost, call.fill - 1))
        if not shared:
            shared = self.found(spec.prefix, min(spec.prefix_tokens, call.fill - 1))
        own = -(-call.fill // size) - len(shared)
        needed = len(self.in_use() | set(shared)) + self.growth() + own
        if self.running and needed > self.blocks:
            return False
        self.running.append(call)
        call.tokens = len(shared) * size
        call.blocks = shared + [next(self.numbers) for _ in range(own)]
        if call.preemptions:
            call.recomputed += max(0, call.lost - call.tokens)
            call.lost = 0
        else:
            call.cached = call.tokens
        self.trim()
        return True

    def found(self, key: Hashable, tokens: int) -> list[int]:
        """Blocks of the cache that hold this beginning, as far as they are left."""
        begun = self.left.get(key, ())[: tokens // self.size]
        return list(takewhile(self.used.__contains__, begun))

    def step(self, chunks: dict[Call, int], now: float) -> float:
        if not chunks:
            return now
        decoding = [call for call in chunks if call.tokens >= call.fill]
        context = sum(call.tokens + 1 for call in decoding)
        prompts = sum(chunk for call, chunk in chunks.items() if call not in decoding)
        now += self.costs.step_s(len(decoding), context, prompts)
        for call, chunk in chunks.items():
            call.tokens += chunk
            if len(call.blocks) * self.size < call.tokens:
                call.blocks.append(next(self.numbers))
            if call.tokens >= call.fill:
                call.generated += 1
                if call.generated == 1:
                    call.first = now
        return now
