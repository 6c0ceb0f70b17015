"""Why a worker does not fit, in words, and what would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from maestro_backend.scheduler import DeviceInfo, Residency, WorkerInfo, WorkerState
from maestro_backend.workers import Memory

_GIB = 1024**3

Freeing = Callable[[WorkerInfo], int]


def device_refusal(
    model: str,
    memory: Memory,
    *,
    device: DeviceInfo,
    room: int,
    outside: int,
    taken: Mapping[str, tuple[int, int]],
    workers: Mapping[str, WorkerInfo],
) -> str:
    """`taken` is (promised, counted) bytes of each other model; `room` what they leave."""
    held = [_held(name, *sizes) for name, sizes in taken.items()]
    if outside:
        held.append(f"other programs {_gib(outside)}")
    short = memory.total_bytes - room
    neighbours = [worker for name, worker in workers.items() if name in taken]
    advice = [
        *_enough("shrink the KV limit of", short, neighbours, _by_shrinking),
        *_enough("suspend", short, neighbours, _by_suspending),
        *_enough("stop", short, neighbours, lambda w: taken[w.model][1]),
        *_smaller_kv(memory, room, workers.get(model)),
    ]
    return (
        f"does not fit yet: {model} needs {_gib(memory.total_bytes)}"
        f" (weights {_gib(memory.weights_bytes)}, KV {_gib(memory.kv_bytes)},"
        f" residual {_gib(memory.residual_bytes)}); {device.device} has"
        f" {_gib(max(0, room))} free of {_gib(device.capacity_bytes)}"
        f" (held: {', '.join(held) or 'nothing'})."
        f" What would do: {'; or '.join([*advice, 'raise the memory of the node'])}"
    )


def host_refusal(model: str, size: int, capacity: int, others: Mapping[str, int]) -> str:
    """The same for a copy in host memory."""
    listed = ", ".join(f"{name} {_gib(taken)}" for name, taken in others.items() if taken)
    return (
        f"does not fit yet: the copy of {model} in host memory takes {_gib(size)}; the budget has"
        f" {_gib(max(0, capacity - sum(others.values())))} free of {_gib(capacity)}"
        f" (held: {listed or 'nothing'}). What would do: move {model} to parked, move another"
        " model from host to parked, or raise host_memory of the node"
    )


def _held(model: str, promised: int, counted: int) -> str:
    more = f" (measured {_gib(counted)})" if counted > promised else ""
    return f"{model} {_gib(promised)}{more}"


def _enough(verb: str, short: int, workers: list[WorkerInfo], freeing: Freeing) -> Iterator[str]:
    """`verb` and the fewest models that free `short` bytes together, if all of them do."""
    chosen: list[str] = []
    for worker in sorted(workers, key=freeing, reverse=True):
        if short <= 0 or freeing(worker) <= 0:
            break
        chosen.append(worker.model)
        short -= freeing(worker)
    if chosen and short <= 0:
        yield f"{verb} {' and '.join(chosen)}"


def _by_shrinking(worker: WorkerInfo) -> int:
    if worker.state is not WorkerState.READY or not worker.elastic:
        return 0  # a suspended one holds only what is in use
    return max(0, worker.kv_limit_bytes - worker.kv_floor_bytes)


def _by_suspending(worker: WorkerInfo) -> int:
    if worker.state is not WorkerState.READY:
        return 0
    if not {Residency.HOST, Residency.PARKED} & set(worker.tiers):
        return 0
    return worker.weights_bytes + worker.kv_limit_bytes


def _smaller_kv(memory: Memory, room: int, worker: WorkerInfo | None) -> Iterator[str]:
    largest = room - memory.weights_bytes - memory.residual_bytes
    if largest > 0 and largest >= (worker.kv_floor_bytes if worker else 0):
        yield f"a kv_memory of at most {_gib(largest)} for it"


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"
