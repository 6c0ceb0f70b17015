"""The thin shell around the scheduler: feeds it events, carries out its commands."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from maestro_agents.protocol import BackendError, RunEvent
from maestro_backend import scheduler as core
from maestro_backend.config import Config
from maestro_backend.node import NodeHandle, NodeLostError
from maestro_backend.predictor import Predictor
from maestro_backend.recording import Recorder
from maestro_backend.scheduler.policies import policy
from maestro_backend.workflows import WorkflowBook

from ._errors import rejected
from ._feed import Feed
from ._metrics import Metrics
from ._records import CallRecord, CallStatus, Records

_log = logging.getLogger("maestro.gateway")

_TICK_S = 0.25
_REJOIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a call goes: the worker's socket, and the engine priority."""

    worker: str
    address: str
    priority: int


class Shell:
    """Owns the scheduler, the node and what is known of runs. Lives on one event loop."""

    def __init__(self, config: Config, node: NodeHandle, recording: Path | None = None) -> None:
        self.config = config
        pinned = tuple(name for name, model in config.models.items() if model.pin)
        self.scheduler = core.Scheduler(policy(config.policy), core.Settings(pinned=pinned))
        self.predictor = Predictor()
        deadlines = {name: slo.deadline for name, slo in config.slo.items()}
        self.book = WorkflowBook(self.predictor, deadlines)
        self.records = Records()
        self.feed = Feed()
        self.metrics = Metrics(self.scheduler)
        self._node = node
        self._recorder = Recorder(recording, self.scheduler) if recording else None
        self._places: dict[str, asyncio.Future[Placement]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._zero = time.monotonic()

    def now(self) -> float:
        """Seconds since the gateway started."""
        return time.monotonic() - self._zero

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Shell]:
        """Follow the node until the block ends."""
        self._spawn(self._follow_node())
        self._spawn(self._tick())
        try:
            yield self
        finally:
            self.feed.close()
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._recorder:
                self._recorder.close()

    # --- events in ------------------------------------------------------------------------------

    def handle(self, *events: core.Event) -> None:
        """Feed the scheduler and carry out what it answers."""
        for event in events:
            now = self.now()
            commands = self.scheduler.handle(event, now)
            if self._recorder:
                self._recorder.record(now, event, commands)
            for command in commands:
                try:
                    self._execute(command)
                except Exception:  # a defect of ours must not take the other commands with it
                    _log.exception("could not carry out %s", command)

    def run_events(self, run: str, events: Iterable[RunEvent]) -> None:
        """Run events as posted by a client."""
        for event in events:
            self.handle(*self.book.run_event(run, event, self.now()))
        self.feed.publish({"type": "run", "run": run})

    def arrive(self, record: CallRecord, event: core.CallArrived) -> None:
        """A call enters. Follow with `place`."""
        self.records.add(record)
        self._places[record.call] = asyncio.get_running_loop().create_future()
        self.publish(record)
        self.handle(event)

    async def place(self, record: CallRecord) -> Placement:
        """Wait until the scheduler dispatches the call.

        Raises:
            ApiError: the scheduler rejected it.
        """
        return await self._places[record.call]

    def retry(self, record: CallRecord, reason: str, *, worker_lost: bool) -> None:
        """The engine failed before the client saw a byte: the scheduler decides what now."""
        _log.warning("%s on %s failed, trying again: %s", record.call, record.worker, reason)
        record.status, record.error = CallStatus.QUEUED, reason
        record.dispatched = record.first_token = None
        self._places[record.call] = asyncio.get_running_loop().create_future()
        self.publish(record)
        self.handle(core.CallFailed(record.call, reason, True, worker_lost))

    def end(self, record: CallRecord, status: CallStatus, event: core.Event) -> None:
        """The call is over; `event` tells the scheduler how."""
        record.status, record.ended = status, self.now()
        place = self._places.pop(record.call, None)
        if place is not None and not place.cancel() and not place.cancelled():
            place.exception()  # seen: nobody waits for it any more
        self.handle(event)
        self.metrics.call_ended(record)
        self.publish(record)

    def publish(self, record: CallRecord) -> None:
        self.feed.publish({"type": "call", **asdict(record)})

    # --- commands out ---------------------------------------------------------------------------

    def _execute(self, command: core.Command) -> None:
        match command:
            case core.Dispatch():
                self._dispatch(command)
            case core.Reject(call=call):
                place = self._places.get(call)
                if place is not None and not place.done():
                    place.set_exception(rejected(command))
            case core.SetResidency():
                self._spawn(self._set_residency(command))
            case core.Abort():
                pass  # the call's own task has closed its connection already
            case _:
                self._spawn(self._refuse(command))

    def _dispatch(self, command: core.Dispatch) -> None:
        record = self.records.calls[command.call]
        record.status, record.worker = CallStatus.RUNNING, command.worker
        record.dispatched, record.attempts = self.now(), record.attempts + 1
        address = self.scheduler.workers[command.worker].address
        place = self._places[command.call]
        if not place.done():
            place.set_result(Placement(command.worker, address, command.priority))
        self.publish(record)

    async def _set_residency(self, command: core.SetResidency) -> None:
        try:
            await self._node.set_residency(command.model, command.residency)
            await self._refresh(command.model)
        except NodeLostError:
            return  # NodeLost clears the move: the model itself did not fail
        except BackendError as error:
            with suppress(BackendError):
                await self._refresh(command.model)
            self.handle(core.CommandFailed(command.id, str(error)))
        else:
            self.handle(core.CommandApplied(command.id))

    async def _refresh(self, model: str) -> None:
        """Read the worker's state now: its change may still be on the way."""
        for worker in (await self._node.info()).workers:
            if worker.model == model:
                self._worker_changed(worker)

    async def _refuse(self, command: core.Command) -> None:
        self.handle(core.CommandFailed(command.id, f"{type(command).__name__} is not supported"))

    # --- the node -------------------------------------------------------------------------------

    async def _follow_node(self) -> None:
        """Join the node, follow its changes; after a loss, join again."""
        while True:
            try:
                info = await self._node.join()
            except Exception as error:  # whatever it is, the next try may work
                _log.error("no node: %s", error)
                await asyncio.sleep(_REJOIN_S)
                continue
            self.handle(core.NodeJoined(info, tuple(self.config.models)))
            self._warn_of_misfits(info)
            try:
                async for worker in self._node.changes():
                    self._worker_changed(worker)
            except Exception as error:
                _log.warning("lost node %s, joining again: %s", info.node, error)
            self.handle(core.NodeLost(info.node))

    def _warn_of_misfits(self, node: core.NodeInfo) -> None:
        """Say at once which models can never run here, and why."""
        room = max((d.capacity_bytes for d in node.devices), default=0)
        for worker in node.workers:
            need = worker.weights_bytes + worker.kv_limit_bytes + worker.residual_bytes
            if need > room:
                _log.error(
                    "%s cannot run here: it needs %.1f GiB (weights %.1f, KV cache %.1f), "
                    "a device has %.1f: give it less kv_memory, or the node more memory",
                    worker.model,
                    *(
                        size / 2**30
                        for size in (need, worker.weights_bytes, worker.kv_limit_bytes, room)
                    ),
                )

    def _worker_changed(self, info: core.WorkerInfo) -> None:
        if self.scheduler.workers.get(info.worker) == info:
            return
        self.handle(core.WorkerChanged(info))
        self.feed.publish({"type": "worker", **asdict(info)})

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self.handle(core.Tick())

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            _log.error("a task of the gateway failed", exc_info=error)
