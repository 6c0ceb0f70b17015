"""One engine: continuous batching with chunked prefill and paged KV, by the rules of vLLM v1.

All changes happen between steps, and steps are never walked one by one: while the same calls
decode, any number of steps is one sum (`StepCosts`). Between two steps, in this order:

1. Calls that were taken off leave, calls with all their output end, marks are noted.
2. If the next step's decoding needs more blocks than there are, even without the cache, the call
   with the largest priority number goes back to the queue, of equals the last admitted, and its
   full blocks join the cache: what is left of them it finds when it is admitted again. A call that
   is alone is never preempted: it goes on over the limit.
3. The next step takes one token of every decoding call, then the rest of a started prompt,
   then calls from the queue by (priority, arrival), up to `max_batched_tokens`. A call is
   admitted with a seat and blocks for its whole prompt (vLLM's `scheduler_reserve_full_isl`,
   on by default; vLLM checks them, here they are taken), and with any blocks if it is alone.
   Nobody is admitted where one was preempted.

A call that arrives during a step and finds a seat, room and no one before it has them from then
on. A prompt is found in the cache once the call that left it has ended, not while it runs; the
blocks of a preempted call are lost, not cached.
"""

from __future__ import annotations

from collections.abc import Hashable
from heapq import heappop, heappush
from math import inf

from ._batch import Batch
from ._requests import Happening, Request, What
from ._steps import StepCosts


class Engine(Batch):
    """One worker's engine, in virtual time.

    The event loop calls `advance(now)` whenever `now` reaches `next_at()`, and reads `next_at`
    again after every call. The engine may have decided already what happens at the end of the
    step that is under way; what it counts is as of the last boundary that it has looked at.
    """

    __slots__ = (
        "_alone",
        "_arrivals",
        "_closed",
        "_leaving",
        "_queue",
        "_queued",
        "_retry",
        "max_num_seqs",
    )

    def __init__(
        self,
        costs: StepCosts,
        blocks: int,
        block_tokens: int,
        max_num_seqs: int,
        max_batched_tokens: int,
    ) -> None:
        if max_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_batched_tokens ({max_batched_tokens}) must be at least max_num_seqs "
                f"({max_num_seqs}): every running call decodes in every step"
            )
        super().__init__(costs, blocks, block_tokens, max_batched_tokens)
        self._alone = costs
        self.max_num_seqs = max_num_seqs
        self._queue: list[tuple[int, int, Request]] = []
        self._queued: dict[str, Request] = {}
        self._leaving: list[Request] = []
        self._arrivals = 0
        self._closed = False  # to the queue, for a call was preempted
        self._retry = False  # to admit after the next step, whatever happens in it

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._queued)

    @property
    def blocks_in_use(self) -> int:
        """By running calls and pinned entries."""
        return self._own + self._prefixes.held

    @property
    def cached_blocks(self) -> int:
        """That can be had at once."""
        return self._prefixes.total - self._prefixes.held

    @property
    def pending_blocks(self) -> int:
        """How many a shrink still waits for."""
        return 0 if self.settled() else max(0, self.blocks_in_use - self.blocks)

    def settled(self) -> bool:
        return self._ceiling == self.blocks

    def cached_tokens(self, key: Hashable) -> int:
        """How much of a cache entry is there."""
        return self._prefixes.depth(key) * self._size

    def next_at(self) -> float:
        """When to call `advance`; infinite when idle. At times it has nothing to report then."""
        return self._end

    def add(self, request: Request, now: float) -> None:
        if request.prompt_tokens < 1 or request.output_tokens < 1:
            raise ValueError(f"call {request.call}: a prompt and an output have tokens")
        self._arrivals += 1
        request.order = self._arrivals
        if (
            len(self._running) < self.max_num_seqs
            and (not self._queued or request.priority < self._head().priority)
            and self._open(now)
        ):
            if not self._join(request):
                self._wait(request)
            self._plan()
        else:
            self._wait(request)

    def advance(self, now: float) -> list[Happening]:
        """What has happened up to and including `now`, in order."""
        happened: list[Happening] = []
        while self._end <= now:
            self._stop(happened)
        return happened

    def watch(self, call: str, mark: int) -> None:
        """Set a new mark, beyond what the call has; one that it has is reported at `next_at`."""
        request = self._queued.get(call) or self._running[call]
        request.mark = mark
        if not request.decoding and request not in self._prompts:
            return
        last = self._last_step()
        end = request.base + request.prompt_tokens + request.output_tokens - 1
        due = request.base + request.prompt_tokens + mark - 1
        request.due = min(end, due if due > self._step else last) if mark else end
        self._push_end(request)
        first = self._step + (1 if self._prompt_tokens else 0)
        if first <= request.due < last:
            self._steps = request.due - first
            self._plan_end()

    def remove(self, call: str, now: float) -> int:
        """Take a call off after the step that is under way; tokens computed in vain."""
        request = self._queued.pop(call, None)
        if request is not None:
            if self._queued and self._open(now):
                self._serve()
                self._plan()
            return request.generated
        request = self._running[call]
        if not self._open(now):
            request.due = -1
            self._leaving.append(request)
            return self._computed(request, self._last_step())
        lost = self._computed(request, self._step)
        self._drop(request)
        self._fill_step()
        self._serve()
        self._plan()
        return lost

    def set_blocks(self, blocks: int, now: float) -> None:
        """Move the KV limit. A lower one takes cached entries, pinned ones last, then comes into
        force as calls end; running ones may grow up to the old limit until then."""
        opened = self._open(now)
        if not opened and self._steps > 1 and not self._prompt_tokens:
            self._run(self._steps - 1)  # up to the step under way, so that the counts are of now
            self._trim()
        self.blocks = blocks
        self._ceiling = max(blocks, self._ceiling)
        self._trim()
        if opened:
            self._settle()
            self._serve()
            self._plan()

    def share(self, ways: int, now: float) -> None:
        """From the next step on, so many engines compute on the device at once."""
        costs = self._alone if ways == 1 else self._alone.shared(ways)
        if costs == self._costs:
            return
        opened = self._open(now)
        self._costs = costs
        if opened:
            self._plan()

    def clear_cache(self) -> None:
        """The weights are gone: so are cached entries and pins."""
        self._prefixes.clear()

    def pin(self, key: Hashable, until: float) -> None:
        """Do not evict this entry before then, nor if it comes later. A pin gives way only to a
        shrink, and to running calls that would otherwise be over the limit."""
        self._prefixes.pin(key, until)

    def unpin(self, key: Hashable) -> None:
        self._prefixes.unpin(key)

    # Steps

    def _open(self, now: float) -> bool:
        """Go to the first step boundary from `now` on, unless it is the end of the plan."""
        if now > self._end:
            raise ValueError(f"advance the engine to {now} first: it stops at {self._end}")
        if now <= self._at:
            return True
        if not self._running:
            self._at = now
        elif self._prompt_tokens and now <= self._first_end:
            if not self._steps:
                return False
            self._run_prompts()
        else:
            if now == self._end:
                return False
            if self._prompt_tokens:
                self._run_prompts()
                self._trim()
            steps = self._costs.steps_by(self._decoding, self._context, now - self._at)
            if steps >= self._steps:
                return False
            self._run(steps)
        self._closed = self._retry = False
        self._trim()
        self._fill_step()
        return True

    def _stop(self, happened: list[Happening]) -> None:
        """Go to the end of the plan and make the next."""
        if self._prompt_tokens:
            self._run_prompts()
        if self._steps:
            self._run(self._steps)
        self._at = self._end
        self._trim()
        if self._leaving:
            for request in self._leaving:
                self._drop(request)
            self._leaving.clear()
        self._collect(happened)
        self._settle()
        self._closed = self._retry = False
        self._preempt(happened)
        self._fill_step()
        if self._queued:
            self._serve()
        self._plan()

    def _plan(self) -> None:
        """How many steps until something is to be done between two of them."""
        ends = self._ends
        while ends and ends[0][2].due != ends[0][0]:
            heappop(ends)
        pinned = self._queued and self._prefixes.next_expiry() is not None
        if self._prompt_tokens:
            if self._partial is not None or self._retry or pinned:
                steps = 0
            else:
                steps = self._after_prompts(ends[0][0] - self._step - 1)
        elif self._decoding:
            steps = 1 if self._retry else self._within_blocks(ends[0][0] - self._step)
            if pinned:
                steps = self._until_expiry(steps)
        else:
            self._steps = 0
            self._end = inf
            return
        self._steps = steps
        self._plan_end()

    def _until_expiry(self, steps: int) -> int:
        """A pin's end may make room for the queue."""
        expiry = self._prefixes.next_expiry()
        if expiry is None:
            return steps
        left = max(0.0, expiry - self._at)
        return min(steps, max(1, self._costs.steps_by(self._decoding, self._context, left)))

    # Between two steps

    def _preempt(self, happened: list[Happening]) -> None:
        while (
            self._own + self._growth() + self._prefixes.held > self._ceiling
            and len(self._running) > 1
        ):
            victim = next(reversed(self._running.values()))
            for request in reversed(self._running.values()):
                if request.priority > victim.priority:
                    victim = request
            victim.lost = victim.done
            if victim.decoding:
                victim.lost = self._step - victim.base
                victim.generated = victim.lost - victim.prompt_tokens + 1
            victim.preemptions += 1
            if full := victim.lost // self._size:
                self._prefixes.leave(_lost(victim), full, victim.entry)
            self._drop(victim)
            self._wait(victim)
            self._closed = True
            happened.append(Happening(self._at, What.PREEMPTED, victim))

    def _serve(self) -> None:
        """Admit from the queue while there is room."""
        while self._queued:
            request = self._head()
            if not self._join(request):
                return
            heappop(self._queue)
            del self._queued[request.call]

    def _join(self, request: Request) -> bool:
        """Admit a call if there is a seat, room in the next step and blocks."""
        running = self._running
        if len(running) >= self.max_num_seqs:
            return False
        if (self._closed and running) or self._room <= 0:
            self._retry = True
            return False
        size = self._size
        prefixes = self._prefixes
        fill = request.prompt_tokens + request.generated
        entry, shared = None, 0
        if request.preemptions:
            entry = prefixes.take(_lost(request), min(request.lost, fill - 1) // size)
        if entry is None and request.prefix is not None:
            entry = prefixes.take(request.prefix, min(request.prefix_tokens, fill - 1) // size)
        if entry is not None:
            shared = entry.depth
        own = -(-fill // size) - shared
        if running and self._own + self._growth() + own + prefixes.held > self.blocks:
            if entry is not None:
                prefixes.release(entry, used=False)
            return False
        if request.preemptions:
            request.recomputed_tokens += max(0, request.lost - shared * size)
            request.lost = 0
        else:
            request.cached_tokens = shared * size
        request.fill = fill
        request.done = shared * size
        request.entry = entry
        request.shared = shared
        running[request.call] = request
        self._own += own
        self._trim()
        self._cut_chunk(request)
        return True

    def _settle(self) -> None:
        """See whether a lower limit is reached."""
        if self._ceiling != self.blocks:
            self._trim()
            if self._own + self._growth() + self._prefixes.held <= self.blocks:
                self._ceiling = self.blocks

    def _wait(self, request: Request) -> None:
        heappush(self._queue, (request.priority, request.order, request))
        self._queued[request.call] = request

    def _head(self) -> Request:
        queue = self._queue
        while self._queued.get(queue[0][2].call) is not queue[0][2]:
            heappop(queue)
        return queue[0][2]


def _lost(request: Request) -> Hashable:
    """What a preempted call leaves in the cache, under this key."""
    return "preempted", request.call
