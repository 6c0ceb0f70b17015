"""Cluster level: which worker a call goes to, without looking at all of them."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable

from ._calls import Call, CallTable
from ._ledger import Ledger, kv_most
from ._nouns import WorkerInfo

Entry = tuple[float, float, str]
"""A worker's load, what breaks ties, and its name."""

Pace = Callable[[WorkerInfo], float]
"""By how much longer than alone the next call would take on a worker, as a share."""
Beside = Callable[[WorkerInfo], Iterable[WorkerInfo]]
"""The other workers of its device."""

_AFFINITY_SLACK = 1.5
"""A run's last worker is kept up to so many times the least in flight, and one more (ours)."""


def kv_bytes(call: Call, worker: WorkerInfo) -> int:
    """KV bytes to reserve for a call, in whole blocks where the worker tells of them; never more
    than the worker can have at most.

    Alone on the worker, any call may try.
    """
    return min(worker.kv_bytes_of(call.request.kv_tokens, call.request.choices), kv_most(worker))


class Places:
    """The open workers of one model, the least loaded first.

    Load is by how much the next call would be slowed down there; ties by name. With `affinity`, it
    is the share of places that are taken, then the KV bytes in use. A heap keeps the order; an
    entry that is not the worker's latest is void. A worker that a call did not fit on is set aside
    until some of its KV is freed; meanwhile it is asked only for smaller calls, and if no other
    will do.
    """

    def __init__(self, calls: CallTable, ledger: Ledger, affinity: bool, pace: Pace) -> None:
        self.open: dict[str, WorkerInfo] = {}
        self.free = 0
        """Free places in the windows of open workers."""
        self._calls = calls
        self._ledger = ledger
        self._pace = pace
        self.affinity = affinity
        self._free: dict[str, int] = {}
        self._latest: dict[str, Entry] = {}
        self._heap: list[Entry] = []
        self._aside: dict[str, int] = {}
        """Worker -> its free KV bytes, which were too few."""
        self._roomiest: list[tuple[int, str]] = []

    def admit(self, info: WorkerInfo) -> None:
        """The worker takes calls, or is another than before."""
        self.open[info.worker] = info
        self.refresh(info.worker)
        if len(self.open) == 2:  # alone, the other one needed no heap
            for entry in self._latest.values():
                self._rank(entry)

    def shut(self, worker: str) -> None:
        """The worker takes no calls."""
        if self.open.pop(worker, None):
            self.free -= self._free.pop(worker)
            self._latest.pop(worker, None)
            self._aside.pop(worker, None)

    def refresh(self, worker: str) -> None:
        """A call has started or ended there, or KV bytes were freed."""
        info = self.open.get(worker)
        if info is None:
            return
        running = len(self._calls.on_worker(worker))
        free = max(0, info.max_inflight - running)
        self.free += free - self._free.get(worker, 0)
        self._free[worker] = free
        self._aside.pop(worker, None)
        if not free:
            self._latest.pop(worker, None)
            return
        self._enter(info)

    def shift(self, worker: str) -> None:
        """Calls have started or ended beside it, on its device."""
        if worker in self._latest and len(self.open) > 1 and not self.affinity:
            self._enter(self.open[worker])

    def _enter(self, info: WorkerInfo) -> None:
        entry = self._latest[info.worker] = self._load(info)
        if len(self.open) > 1:
            self._rank(entry)

    def _rank(self, entry: Entry) -> None:
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 4 * len(self.open) + 64:
            latest = self._latest
            self._heap = [entry for entry in self._heap if latest.get(entry[2]) is entry]
            heapq.heapify(self._heap)

    def set_aside(self, worker: str) -> None:
        """The call that goes next does not fit on the worker."""
        self._latest.pop(worker, None)
        room = self._ledger.claims[worker].kv_free
        self._aside[worker] = room
        heapq.heappush(self._roomiest, (-room, worker))
        if len(self._roomiest) > 4 * len(self._aside) + 64:
            self._roomiest = [(-size, name) for name, size in self._aside.items()]
            heapq.heapify(self._roomiest)

    def is_aside(self, worker: str) -> bool:
        return worker in self._aside

    def roomiest(self, call: Call) -> WorkerInfo | None:
        """Of those set aside, the one with the most free KV bytes, if `call` fits there."""
        heap = self._roomiest
        while heap:
            room, worker = -heap[0][0], heap[0][1]
            if self._aside.get(worker) == room:
                info = self.open[worker]
                return info if kv_bytes(call, info) <= room else None
            heapq.heappop(heap)
        return None

    def least(self) -> WorkerInfo | None:
        """The least loaded worker with a free place, of those not set aside."""
        if len(self.open) == 1:
            [info] = self.open.values()
            return info if info.worker in self._latest else None
        first = self._first()
        return None if first is None else self.open[first[2]]

    def least_of_all(self) -> WorkerInfo | None:
        """The least loaded worker with a free place, also of those set aside."""
        mine = (info for worker, info in self.open.items() if self._free[worker])
        return min(mine, key=self._load, default=None)

    def last_of_run(self, worker: str, worth: float) -> WorkerInfo | None:
        """`worker`, the run's last, if it has a place and is not much busier than the least loaded.

        That is: a call is slowed down more by at most `worth` there, which is what is saved of its
        time alone, as a share. With `affinity`, by the calls in flight.
        """
        if worker not in self._latest:
            return None
        info, first = self.open[worker], self._first()
        if first is None:
            return info
        if not self.affinity:
            return info if self._latest[worker][0] <= first[0] + worth else None
        least = self._in_flight(first[2])
        return info if self._in_flight(worker) <= _AFFINITY_SLACK * least + 1 else None

    def _first(self) -> Entry | None:
        heap = self._heap
        while heap and self._latest.get(heap[0][2]) is not heap[0]:
            heapq.heappop(heap)
        return heap[0] if heap else None

    def _in_flight(self, worker: str) -> int:
        return len(self._calls.on_worker(worker))

    def _load(self, info: WorkerInfo) -> Entry:
        if self.affinity:
            used = self._ledger.claims[info.worker].kv_used
            return self._in_flight(info.worker) / info.max_inflight, used, info.worker
        return self._pace(info), 0, info.worker


class PlaceTable:
    """The places of every model. What has changed is taken over by `settle`."""

    def __init__(
        self, calls: CallTable, ledger: Ledger, affinity: bool, pace: Pace, beside: Beside
    ) -> None:
        self._calls = calls
        self._ledger = ledger
        self._affinity = affinity
        self._pace = pace
        self._beside = beside
        self._places: dict[str, Places] = {}
        self._suspects: dict[str, float] = {}
        self._moved: dict[str, str] = {}
        """Worker -> its model, of those that may take calls now, or no more."""

    def of(self, model: str) -> Places:
        places = self._places.get(model)
        if places is None:
            places = Places(self._calls, self._ledger, self._affinity, self._pace)
            self._places[model] = places
        return places

    def refresh(self, info: WorkerInfo) -> None:
        """A call has started or ended on the worker, or KV bytes were freed."""
        self.of(info.model).refresh(info.worker)
        for other in self._beside(info):
            self.of(other.model).shift(other.worker)

    def moved(self, info: WorkerInfo) -> None:
        """Whether the worker takes calls may have changed."""
        self._moved[info.worker] = info.model

    def suspect(self, info: WorkerInfo, until: float) -> None:
        """The worker broke a call: it gets no other until then."""
        self._suspects[info.worker] = until
        self.moved(info)

    def trust(self, worker: str) -> None:
        """Its node has spoken of it."""
        self._suspects.pop(worker, None)

    def settle(
        self,
        workers: dict[str, WorkerInfo],
        takes_calls: Callable[[WorkerInfo], bool],
        now: float,
    ) -> Iterable[str]:
        """Bring the open workers and their loads up to date; the models that this concerns."""
        if self._suspects:
            for worker in [w for w, until in self._suspects.items() if until <= now]:
                del self._suspects[worker]
                if info := workers.get(worker):
                    self.moved(info)
        freed = self._ledger.freed
        if not freed and not self._moved:
            return ()
        models = self._take_moved(workers, takes_calls) if self._moved else set()
        while freed:
            if info := workers.get(freed.pop()):
                self.refresh(info)
                models.add(info.model)
        return models

    def _take_moved(
        self, workers: dict[str, WorkerInfo], takes_calls: Callable[[WorkerInfo], bool]
    ) -> set[str]:
        models = set(self._moved.values())
        for worker, model in self._moved.items():
            info = workers.get(worker)
            if info is None or info.model != model or worker in self._suspects:
                self.of(model).shut(worker)
            elif takes_calls(info):
                self.of(model).admit(info)
            else:
                self.of(model).shut(worker)
        self._moved.clear()
        return models
