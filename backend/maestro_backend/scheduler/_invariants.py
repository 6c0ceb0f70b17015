"""What must hold after every event."""

from __future__ import annotations

from maestro_agents.protocol import MaestroError

from ._calls import CallTable
from ._ledger import Ledger
from ._nouns import WorkerInfo
from ._runs import Run
from ._world import World


class InvariantError(MaestroError):
    """The scheduler broke its own rules: a defect of ours."""


def check(world: World) -> None:
    """Raise InvariantError at the first broken invariant."""
    calls, ledger = world.calls, world.ledger
    for broken in (
        *_places(calls, world.workers),
        *_reservations(calls, ledger),
        *_capacity(ledger),
        *_runs(calls, world.runs.by_id),
        *_kept(world),
        *_under_way(world),
        *_indexes(world),
    ):
        raise InvariantError(broken)


def _places(calls: CallTable, workers: dict[str, WorkerInfo]) -> list[str]:
    """Each call is in exactly one place; no worker is over its window."""
    placed = [c for table in (calls.queues, calls.running) for q in table.values() for c in q]
    broken = []
    if sorted(placed) != sorted(calls.by_id):
        broken.append(f"calls {sorted(calls.by_id)} are not each in one place: {sorted(placed)}")
    for worker, running in calls.running.items():
        if worker in workers and len(running) > workers[worker].max_inflight:
            broken.append(f"{worker} runs {len(running)} calls, its window is smaller")
    return broken


def _reservations(calls: CallTable, ledger: Ledger) -> list[str]:
    """Every running call holds one reservation where it runs; nothing else holds any."""
    broken = []
    for worker, claim in ledger.claims.items():
        running = set(calls.on_worker(worker))
        if stray := set(claim.reservations) - running:
            broken.append(f"{worker} holds reservations of calls not running there: {stray}")
        if bare := running - set(claim.reservations):
            broken.append(f"calls run on {worker} without a reservation: {bare}")
        if claim.kv_used > claim.kv_usable:
            broken.append(f"{worker} promised {claim.kv_used} of {claim.kv_usable} KV bytes")
    return broken


def _capacity(ledger: Ledger) -> list[str]:
    """Claims count the larger of before and after: no move under way can overfill anything."""
    free = {device: ledger.free(device) for device in ledger.capacity}
    free |= {f"{node}/host": ledger.host_free(node) for node in ledger.host_capacity}
    return [
        f"{key} is over its capacity by {-size} bytes" for key, size in free.items() if size < 0
    ]


def _kept(world: World) -> list[str]:
    """Kept prefixes leave a longest request its room, and belong to runs that go on."""
    broken = []
    for worker, claim in world.ledger.claims.items():
        floor = world.workers[worker].kv_floor_bytes
        if claim.kept and claim.kv_kept > claim.kv_usable - floor:
            broken.append(f"{worker} keeps {claim.kv_kept} KV bytes; a request may need {floor}")
        for call, kept in claim.kept.items():
            if kept.run not in world.runs.by_id:
                broken.append(f"{worker} keeps {call} for {kept.run}, which is over")
    return broken


def _under_way(world: World) -> list[str]:
    """One move and one KV limit per worker at a time, and what they take is promised."""
    moving = [move.worker for move in world.moves.values()]
    broken = [f"{w} is moved twice at once" for w in set(moving) if moving.count(w) > 1]
    for worker, change in world.changes.items():
        claim = world.ledger.claims.get(worker)
        if claim is None or not claim.kv_used <= claim.kv_usable <= change.limit <= claim.kv_limit:
            broken.append(f"the ledger does not hold {worker}'s way to {change.limit} KV bytes")
    return broken


def _runs(calls: CallTable, runs: dict[str, Run]) -> list[str]:
    """Every live call belongs to a known run that counts it."""
    return [
        f"call {call.call} is missing from its run {call.request.run}"
        for call in calls.by_id.values()
        if call.call not in runs.get(call.request.run, Run("")).live_calls
    ]


def _indexes(world: World) -> list[str]:
    """What is kept up to date bit by bit is what counting anew would give."""
    calls, ledger, broken = world.calls, world.ledger, []
    for model, queue in calls.queues.items():
        if (orders := [c.order for c in queue.values()]) != sorted(orders):
            broken.append(f"the queue of {model} is not in order of arrival: {orders}")
        if calls.queued_work.get(model, 0) != sum(call.work for call in queue.values()):
            broken.append(f"the work queued for {model} is not that of its calls")
    if calls.waiting != sum(map(len, calls.queues.values())):
        broken.append(f"{calls.waiting} calls are counted as waiting")
    for worker, claim in ledger.claims.items():
        reserved, kept = sum(claim.reservations.values()), sum(k.size for k in claim.kept.values())
        if (claim.kv_reserved, claim.kv_kept) != (reserved, kept):
            broken.append(f"the KV bytes in use of {worker} are not what its calls hold")
    for device, capacity in ledger.capacity.items():
        held = sum(c.total for c in ledger.claims.values() if c.device == device)
        if ledger.free(device) != capacity - held:
            broken.append(f"the free bytes of {device} are not what its workers leave")
    return broken
