"""What was asked of a worker and is not done yet, in the order of asking."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from maestro_agents.protocol import MaestroError
from maestro_backend.scheduler import Residency

from ._residency import LiveWorker


def _future() -> asyncio.Future[Any]:
    """A future whose failure may go unseen: nobody has to wait for a worker."""
    future = asyncio.get_running_loop().create_future()
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future


@dataclass(frozen=True, slots=True)
class Order:
    """`work` is done on the live worker. One with a `residency` starts a process for it."""

    work: Callable[[LiveWorker], Awaitable[Any]]
    residency: Residency | None = None
    kv_limit_bytes: int | None = None
    done: asyncio.Future[Any] = field(default_factory=_future)


class Orders:
    """First asked, first done. `arrived` is set while there are some."""

    def __init__(self) -> None:
        self.arrived = asyncio.Event()
        self._waiting: deque[Order] = deque()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    @property
    def first(self) -> Order:
        """The one to be carried out now."""
        return self._waiting[0]

    @property
    def goal(self) -> Residency:
        """Where the first one wants the weights; the device where it does not say."""
        return (self._waiting and self.first.residency) or Residency.DEVICE

    def add(self, order: Order, *, first: bool = False) -> None:
        """Line it up, or put it before all others."""
        if first:
            self._waiting.appendleft(order)
        else:
            self._waiting.append(order)
        self.arrived.set()

    def finish(self, result: Any = None) -> None:
        """The first one is done."""
        done = self._pop().done
        if not done.done():
            done.set_result(result)

    def refuse(self, error: MaestroError) -> None:
        """The first one cannot be done."""
        done = self._pop().done
        if not done.done():
            done.set_exception(error)

    def refuse_all(self, error: MaestroError) -> None:
        """None of them can be done."""
        while self._waiting:
            self.refuse(error)

    def refuse_lifeless(self, error: MaestroError) -> None:
        """There is no process any more: only those that start one stay."""
        kept = [order for order in self._waiting if order.residency is not None]
        self._waiting = deque(order for order in self._waiting if order.residency is None)
        self.refuse_all(error)
        for order in kept:
            self.add(order)

    def _pop(self) -> Order:
        order = self._waiting.popleft()
        if not self._waiting:
            self.arrived.clear()
        return order
