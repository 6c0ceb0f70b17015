"""Elastic KV: limits grow with need, and what happens to a call that cannot get its KV bytes.

In this order: the limit grows into free memory; idle workers' KV shrinks; prefixes that only wait
to be used again are evicted; the call is delayed; and, if it has waited long, the least urgent
running call of its worker goes back to the queue for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ._calls import Call
from ._commands import Command
from ._ledger import Claim, device_of, kv_most, kv_rounded, kv_step
from ._nouns import WorkerInfo, WorkerState
from ._placement import kv_bytes
from ._queues import Queues
from ._room import carry_out, find_room
from ._world import Action, World

_LOSS = 0.2
"""A call is preempted only while it has had at most such a share of its predicted service: later,
it would soon give its KV memory back by itself (ours)."""


class Shortage:
    """Finds KV bytes for calls."""

    def __init__(self, world: World, queues: Queues) -> None:
        self._world = world
        self._queues = queues

    def progress(self, call: Call, info: WorkerInfo, tokens: int, now: float) -> Iterator[Command]:
        """A running call has come so far: its reservation, and the limit around it, keep ahead."""
        ledger = self._world.ledger
        used = info.kv_bytes_of(tokens, call.request.choices)
        ledger.grow(info.worker, call.call, used)
        claim = ledger.claims.get(info.worker)
        if claim is None or call.call not in claim.reservations:
            return
        ahead = used + kv_step(info) // 2 - claim.reservations[call.call]
        if ahead > claim.kv_free:
            wanted = min(claim.kv_used + ahead, kv_most(info))
            if wanted > claim.kv_limit:
                yield from self._grow(info, claim, wanted, now)

    def relieve(
        self, call: Call, info: WorkerInfo, now: float, *, at_last: bool
    ) -> Iterator[Command]:
        """Do what can be done now for a call whose reservation does not fit the worker; `at_last`:
        also at the cost of another."""
        claim = self._world.ledger.claims[info.worker]
        need = kv_bytes(call, info)
        yield from self._let_go(claim, claim.kv_used + need - kv_most(info), now)
        if need <= claim.kv_free:
            return
        if not call.delayed:
            call.delayed = True
            self._world.counts[Action.DELAY] += 1
        if info.worker in self._world.changes:
            return  # it may fit as soon as that is done
        commands = list(self._grow(info, claim, claim.kv_used + need, now, evict=True))
        yield from commands
        if at_last and not commands:
            yield from self._preempt(call, info, need, now)

    def hopeless(self, info: WorkerInfo) -> bool:
        """Whether nothing runs on the worker, and no KV byte more is on its way to it."""
        busy = self._world.ledger.claims[info.worker].reservations
        return not busy and info.worker not in self._world.changes and not self._coming(info)

    def _coming(self, info: WorkerInfo) -> bool:
        device = device_of(info)
        return info.elastic and self._world.coming(device) > 0

    # --- limits ---------------------------------------------------------------------------------

    def _grow(
        self, info: WorkerInfo, claim: Claim, used: int, now: float, *, evict: bool = False
    ) -> Iterator[Command]:
        """Raise the limit so that `used` bytes fit, or make the room that this takes first."""
        world = self._world
        if not info.elastic or used > kv_most(info) or info.worker in world.changes:
            return
        if world.move_of(info.worker) is not None or world.limit_resting(info.worker, now):
            return
        free = world.ledger.free(claim.device)
        short = used - claim.kv_limit - free
        if short <= 0:
            yield world.set_kv_limit(info, min(kv_rounded(info, used), claim.kv_limit + free))
            return
        short -= world.coming(claim.device)
        if short > 0:
            yield from self._make_room(info, claim, short, now, evict=evict)

    def _make_room(
        self, info: WorkerInfo, claim: Claim, short: int, now: float, *, evict: bool
    ) -> Iterator[Command]:
        """Shrink neighbours; with `evict`, drop kept prefixes until that is enough."""
        world = self._world
        steps = find_room(world, info, short, now, _nobody_leaves, self._is_useless)
        kept = (
            list(self._kept_of_idle_runs(world.ledger.on_device(claim.device), claim.worker))
            if evict and steps is None
            else []
        )
        if sum(size for *_, size in kept) >= short:
            for worker, call, size in kept:
                yield self._evict(worker, call)
                short -= size if worker == info.worker else 0
                steps = find_room(world, info, short, now, _nobody_leaves) if short > 0 else []
                if steps is not None:
                    break
        for step in steps or ():
            yield carry_out(world, step)

    def _is_useless(self, info: WorkerInfo) -> bool:
        """Whether a process without weights on the device only takes memory: others serve its
        model."""
        busy = self._world.calls.on_worker(info.worker)
        return info.state is WorkerState.SUSPENDED and not busy and self._world.spare(info)

    def _let_go(self, claim: Claim, over: int, now: float) -> Iterator[Command]:
        """Drop kept prefixes of the worker itself that stand in the way at its largest limit."""
        if not 0 < over <= claim.kv_kept:
            return
        mine = list(self._kept_of_idle_runs([claim], claim.worker))
        if sum(size for *_, size in mine) < over:
            return
        for worker, call, size in mine:
            if over > 0:
                over -= size
                yield self._evict(worker, call)

    def _evict(self, worker: str, call: str) -> Command:
        self._world.counts[Action.PREFIX_EVICTION] += 1
        return self._world.drop_prefix(worker, call)

    def _kept_of_idle_runs(
        self, claims: Iterable[Claim], worker: str
    ) -> Iterator[tuple[str, str, int]]:
        """Worker, call and bytes of the kept prefixes whose bytes `worker` could have, those that
        expire first first."""
        runs = self._world.runs
        kept = [
            (kept.until, claim.worker, call, kept.size)
            for claim in claims
            for call, kept in claim.kept.items()
            if not ((run := runs.get(kept.run)) and run.live_calls)
            and (claim.worker == worker or self._world.workers[claim.worker].elastic)
        ]
        yield from ((worker, call, size) for _, worker, call, size in sorted(kept))

    # --- preemption -----------------------------------------------------------------------------

    def _preempt(self, call: Call, info: WorkerInfo, need: int, now: float) -> Iterator[Command]:
        """Take the least urgent call off the worker, if those less urgent hold enough."""
        world = self._world
        claim = world.ledger.claims[info.worker]
        if now - call.arrived < world.settings.preempt_patience_s:
            return
        if any(p.worker == info.worker for p in world.preemptions.values()):
            return
        victims = [
            v
            for v in world.calls.on_worker(info.worker).values()
            if not v.settled
            and v.preemptions < world.settings.max_preemptions
            and now - v.started <= _LOSS * v.request.service_s
            and self._queues.may_preempt(call, v, now)
        ]
        need = min(need, claim.kv_usable - claim.kv_kept)  # alone on the worker it is clipped
        held = sum(claim.reservations[v.call] for v in victims)
        if victims and claim.kv_free + held >= need:
            yield world.preempt(max(victims, key=lambda v: self._queues.rank(v, now)))


def _nobody_leaves(info: WorkerInfo) -> bool:
    return False
