"""What must hold after every event."""

from __future__ import annotations

from maestro_agents.protocol import MaestroError

from ._calls import CallTable
from ._ledger import Ledger
from ._nouns import WorkerInfo
from ._runs import Run


class InvariantError(MaestroError):
    """The scheduler broke its own rules: a defect of ours."""


def check(
    calls: CallTable, workers: dict[str, WorkerInfo], ledger: Ledger, runs: dict[str, Run]
) -> None:
    """Raise InvariantError at the first broken invariant."""
    for broken in (
        *_places(calls, workers),
        *_reservations(calls, ledger),
        *_capacity(ledger),
        *_runs(calls, runs),
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
        if claim.kv_reserved > claim.kv_limit:
            broken.append(f"{worker} reserved {claim.kv_reserved} of {claim.kv_limit} KV bytes")
    return broken


def _capacity(ledger: Ledger) -> list[str]:
    return [
        f"device {device} is over its capacity by {-ledger.free(device)} bytes"
        for device in ledger.capacity
        if ledger.free(device) < 0
    ]


def _runs(calls: CallTable, runs: dict[str, Run]) -> list[str]:
    """Every live call belongs to a known run that counts it."""
    return [
        f"call {call.call} is missing from its run {call.request.run}"
        for call in calls.by_id.values()
        if call.call not in runs.get(call.request.run, Run("")).live_calls
    ]
