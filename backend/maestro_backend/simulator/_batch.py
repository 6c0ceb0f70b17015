"""The calls that run in an engine: their blocks, the next step, and the plan from there."""

from __future__ import annotations

from heapq import heappop, heappush
from math import inf

from ._prefixes import Prefixes
from ._requests import Happening, Request, What
from ._steps import StepCosts


class Batch:
    """While the same calls decode, any number of steps is one sum: `_run`. Blocks are whole blocks
    of each call, and exact at every step."""

    __slots__ = (
        "_at",
        "_ceiling",
        "_chunk",
        "_context",
        "_costs",
        "_crossings",
        "_decoding",
        "_end",
        "_ends",
        "_first_end",
        "_own",
        "_partial",
        "_prefixes",
        "_prompt_tokens",
        "_prompts",
        "_room",
        "_running",
        "_size",
        "_step",
        "_steps",
        "blocks",
        "max_batched_tokens",
        "used_block_s",
    )

    def __init__(
        self, costs: StepCosts, blocks: int, block_tokens: int, max_batched_tokens: int
    ) -> None:
        self.blocks = blocks
        """The KV limit."""
        self.max_batched_tokens = max_batched_tokens
        self.used_block_s = 0.0
        """Blocks in use by running calls and pins, summed over time until the last stop."""
        self._costs = costs
        self._size = block_tokens
        self._prefixes = Prefixes()
        self._ceiling = blocks  # over `blocks` while a lower limit is not yet reached
        self._own = 0  # blocks of running calls that are not their entries'
        self._running: dict[str, Request] = {}  # in order of admission
        # The decoding calls: how many, tokens in their KV cache, and by number of a step (modulo
        # the block size, over two rounds) how many need a new block in it.
        self._decoding = 0
        self._context = 0
        self._crossings = [0] * (2 * block_tokens)
        self._ends: list[tuple[int, int, Request]] = []  # by step, then arrival
        # The next step, of which nothing has run by `_at`.
        self._at = -inf
        self._step = 0
        self._prompts: list[Request] = []  # whose last chunk is in it
        self._partial: Request | None = None  # the one with a `_chunk` that is not its last
        self._chunk = 0
        self._prompt_tokens = 0
        self._room = max_batched_tokens
        # The plan: that step until `_first_end` if it has prompts, then `_steps` of decoding.
        self._first_end = inf
        self._steps = 0
        self._end = inf

    def _run_prompts(self) -> None:
        """The step with prompts: those of `_prompts` now decode."""
        size = self._size
        crossings = self._crossings
        self.used_block_s += (self._own + self._prefixes.held) * (self._first_end - self._at)
        at = self._at = self._first_end
        self._own += self._growth()
        self._step += 1
        self._context += self._decoding
        for request in self._prompts:
            slot = request.base % size
            crossings[slot] += 1
            crossings[slot + size] += 1
            self._context += request.fill
            request.decoding = True
            if not request.generated:
                request.first_at = at
        self._decoding += len(self._prompts)
        self._prompts.clear()
        if self._partial is not None:
            self._partial.done += self._chunk
        self._prompt_tokens = 0

    def _run(self, steps: int) -> None:
        """Steps without prompts."""
        decoding = self._decoding
        before = self._own + self._prefixes.held
        rounds, rest = divmod(steps, self._size)
        first = self._step % self._size
        grown = rounds * decoding + sum(self._crossings[first : first + rest])
        seconds = self._costs.decode_s(decoding, self._context, steps)
        self.used_block_s += (before + grown / 2) * seconds
        self._own += grown
        self._at += seconds
        self._step += steps
        self._steps -= steps
        self._context += steps * decoding

    def _plan_end(self) -> None:
        at = self._at
        decoding = self._decoding
        context = self._context
        if self._prompt_tokens:
            context += decoding
            at += self._costs.step_s(decoding, context, self._prompt_tokens)
            self._first_end = at
            if self._steps:
                for request in self._prompts:
                    context += request.fill
                decoding += len(self._prompts)
        if self._steps:
            at += self._costs.decode_s(decoding, context, self._steps)
        self._end = at

    def _after_prompts(self, steps: int) -> int:
        """`steps` after the one with prompts if blocks surely suffice for them, else none."""
        rounds = (steps + 1) // self._size + 1
        most = (self._decoding + len(self._prompts)) * rounds
        tight = self._own + self._prefixes.held + most > self._ceiling
        return 0 if tight and len(self._running) > 1 else steps

    def _within_blocks(self, steps: int) -> int:
        size, decoding = self._size, self._decoding
        left = self._ceiling - self._own - self._prefixes.held
        if decoding * (steps // size + 1) <= left or len(self._running) == 1:
            return steps
        rounds, left = divmod(left, decoding)
        fitting = rounds * size
        first = self._step % size
        for crossing in self._crossings[first : first + size]:
            left -= crossing
            if left < 0:
                break
            fitting += 1
        return max(1, min(steps, fitting))

    def _growth(self) -> int:
        """Blocks that the next step's decoding needs."""
        return self._crossings[self._step % self._size]

    def _last_step(self) -> int:
        """The number of steps by the end of the plan."""
        return self._step + self._steps + (1 if self._prompt_tokens else 0)

    def _fill_step(self) -> None:
        """What of the next step's tokens decoding calls and started prompts take."""
        prompt_tokens = 0
        for request in self._prompts:
            prompt_tokens += request.fill - request.done
        self._prompt_tokens = prompt_tokens
        self._room = self.max_batched_tokens - self._decoding - prompt_tokens
        if self._partial is not None:
            self._cut_chunk(self._partial)

    def _cut_chunk(self, request: Request) -> None:
        fresh = request.fill - request.done
        chunk = min(fresh, self._room)
        self._room -= chunk
        self._prompt_tokens += chunk
        if chunk < fresh:
            self._partial = request
            self._chunk = chunk
            return
        self._partial = None
        self._prompts.append(request)
        request.base = self._step + 1 - request.fill
        target = request.output_tokens
        if request.generated < request.mark < target:
            target = request.mark
        request.due = request.base + request.prompt_tokens + target - 1
        self._push_end(request)

    def _collect(self, happened: list[Happening]) -> None:
        """Calls that have ended and marks that are reached."""
        ends = self._ends
        step = self._step
        while ends and ends[0][0] <= step:
            due, _, request = heappop(ends)
            if request.due != due:
                continue
            last = request.base + request.prompt_tokens + request.output_tokens - 1
            if last <= step:
                self._finish(request)
                happened.append(Happening(self._at, What.FINISHED, request))
            else:
                request.due = last
                self._push_end(request)
                happened.append(Happening(self._at, What.MARK, request))

    def _finish(self, request: Request) -> None:
        if request.leaves is not None:
            full = (self._step - request.base) // self._size
            self._prefixes.leave(request.leaves, full, request.entry)
        self._drop(request)

    def _drop(self, request: Request) -> None:
        """Take a running call and its blocks off."""
        size = self._size
        if request.decoding:
            tokens = self._step - request.base
            slot = request.base % size
            self._crossings[slot] -= 1
            self._crossings[slot + size] -= 1
            self._decoding -= 1
            self._context -= tokens
            request.decoding = False
        else:
            tokens = request.fill
            if request is self._partial:
                self._partial = None
            else:
                self._prompts.remove(request)
        self._own -= -(-tokens // size) - request.shared
        if request.entry is not None:
            self._prefixes.release(request.entry)
            request.entry = None
        request.due = -1
        del self._running[request.call]

    def _trim(self) -> None:
        """Cached entries, oldest first, give what the running calls have grown by."""
        prefixes = self._prefixes
        if prefixes.next_expiry() is not None:
            prefixes.expire(self._at)
        over = self._own + prefixes.total - self.blocks
        if over > 0 and prefixes.total:
            over -= prefixes.evict(over)
            if over > 0 and prefixes.next_expiry() is not None:
                prefixes.drop_pins()
                prefixes.evict(over)

    def _computed(self, request: Request, step: int) -> int:
        """Tokens of a running call that were computed here, prompt and output, by then."""
        cached = request.shared * self._size
        if request.decoding or (request in self._prompts and step > self._step):
            return step - request.base - cached + 1
        done = request.done
        if request is self._partial and step > self._step:
            done += self._chunk
        return done - cached + request.generated

    def _push_end(self, request: Request) -> None:
        heappush(self._ends, (request.due, request.order, request))
