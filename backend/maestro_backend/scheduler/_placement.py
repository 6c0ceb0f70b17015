"""Cluster level: which worker a call goes to."""

from __future__ import annotations

from collections.abc import Iterable

from ._calls import Call, CallTable
from ._ledger import kv_most
from ._nouns import WorkerInfo, WorkerState


def open_workers(
    workers: Iterable[WorkerInfo], model: str, calls: CallTable, closed: set[str]
) -> list[WorkerInfo]:
    """Ready workers of `model` with a free place in their in-flight window."""
    return [
        w
        for w in workers
        if w.model == model
        and w.state is WorkerState.READY
        and w.worker not in closed
        and len(calls.on_worker(w.worker)) < w.max_inflight
    ]


def best_worker(call: Call, candidates: list[WorkerInfo], calls: CallTable) -> WorkerInfo:
    """The worker with the least predicted work in flight per place; ties by name."""

    def load(worker: WorkerInfo) -> tuple[float, str]:
        work = sum(c.request.service_s for c in calls.on_worker(worker.worker).values())
        return ((work + call.request.service_s) / worker.max_inflight, worker.worker)

    return min(candidates, key=load)


def kv_bytes(call: Call, worker: WorkerInfo) -> int:
    """KV bytes to reserve for a call, in whole blocks where the worker tells of them; never more
    than the worker can have at most.

    Alone on the worker, any call may try.
    """
    return min(worker.kv_bytes_of(call.request.kv_tokens, call.request.choices), kv_most(worker))
