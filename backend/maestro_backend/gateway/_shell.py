"""The thin shell around the scheduler: feeds it events, carries out its commands."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from maestro_agents.protocol import RunEvent
from maestro_backend import scheduler as core
from maestro_backend.config import Config
from maestro_backend.node import NodeHandle
from maestro_backend.predictor import CallOutcome, LiveCall, Predictor
from maestro_backend.recording import Recorder
from maestro_backend.scheduler.policies import policy
from maestro_backend.workflows import WorkflowBook

from ._attempt import Attempt, Preempted
from ._errors import rejected
from ._feed import Feed
from ._foretelling import Foretelling, Foretold
from ._learning import Learning
from ._metrics import Metrics
from ._node_link import NodeLink
from ._progress import ProgressPoll
from ._records import CallRecord, CallStatus, Records

_log = logging.getLogger("maestro.gateway")

_TICK_S = 0.25


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a call goes: the worker's socket, and the engine priority."""

    worker: str
    address: str
    priority: int


class Shell:
    """Owns the scheduler, the node and what is known of runs. Lives on one event loop."""

    def __init__(
        self,
        config: Config,
        node: NodeHandle,
        recording: Path | None = None,
        settings: core.Settings | None = None,
        preload: tuple[str, ...] | None = None,
    ) -> None:
        self.config = config
        self.preload = tuple(config.models) if preload is None else preload
        pinned = tuple(name for name, model in config.models.items() if model.pin)
        weights = {name: tenant.weight for name, tenant in config.tenants.items()}
        bounds = replace(settings or core.Settings(), pinned=pinned, tenant_weights=weights)
        self.scheduler = core.Scheduler(policy(config.policy), bounds)
        self.predictor = Predictor()
        self._foretelling = Foretelling(self.predictor, self.handle)
        deadlines = {name: slo.deadline for name, slo in config.slo.items()}
        self.book = WorkflowBook(self.predictor, deadlines)
        self.learning = Learning(config, self.predictor, self.book.outlook.journeys)
        self.records = Records()
        self.feed = Feed()
        self.metrics = Metrics(self.scheduler)
        self._link = NodeLink(self, node)
        self._progress = ProgressPoll(self)
        self._recorder = Recorder(recording, self.scheduler) if recording else None
        self._places: dict[str, asyncio.Future[Placement]] = {}
        self._attempts: dict[str, Attempt] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._zero = time.monotonic()

    def now(self) -> float:
        """Seconds since the gateway started."""
        return time.monotonic() - self._zero

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Shell]:
        """Follow the node until the block ends."""
        self._spawn(self._link.follow())
        self._spawn(self._progress.run())
        self._spawn(self._tick())
        try:
            async with self.learning.running():
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
            told = self.book.run_event(run, event, self.now())
            self.handle(*told)
            for ended in told:  # a paused run that was given up is among them
                if isinstance(ended, core.RunEnded):
                    self.predictor.end_run(ended.run)
        self.feed.publish({"type": "run", "run": run})

    def arrive(self, record: CallRecord, event: core.CallArrived, foretold: Foretold) -> None:
        """A call enters. Follow with `place`."""
        self.records.add(record)
        self._places[record.call] = asyncio.get_running_loop().create_future()
        self.publish(record)
        self.handle(event)
        self._foretelling.enter(foretold)

    def progress(self, call: str, prompt_tokens: int, soon_tokens: int, generated: int) -> None:
        """Of a running call `generated` tokens are there, and soon so many will be."""
        self.handle(core.CallProgress(call, prompt_tokens, soon_tokens))
        with self.surviving("progress"):
            self._foretelling.progress(call, generated)

    def learn(self, record: CallRecord, live: LiveCall, outcome: CallOutcome | None) -> None:
        """A call has ended; without an outcome, not well."""
        with self.surviving("what a call took"):
            if outcome is None:
                self.predictor.drop(live)
            else:
                self.learning.ended(record.call, live, outcome, self.now())

    @contextmanager
    def surviving(self, what: str) -> Iterator[None]:
        """Around learning and forecasting: a defect of theirs must not cost a call."""
        try:
            yield
        except Exception:
            _log.exception("%s could not be followed", what)

    async def place(self, record: CallRecord) -> Placement:
        """Wait until the scheduler dispatches the call.

        Raises:
            ApiError: the scheduler rejected it.
        """
        return await self._places[record.call]

    def retry(self, record: CallRecord, reason: str, *, worker_lost: bool) -> None:
        """The engine failed before the client saw a byte: the scheduler decides what now."""
        _log.warning("%s on %s failed, trying again: %s", record.call, record.worker, reason)
        self._requeue(record, reason)
        self.handle(core.CallFailed(record.call, reason, True, worker_lost))

    @contextmanager
    def attempt(self, record: CallRecord, answered: Callable[[], bool]) -> Iterator[None]:
        """Around one try of a call at its worker; `answered`: its client has seen of it.

        Raises:
            Preempted: the call is queued again; follow with `place`.
        """
        attempt = self._attempts[record.call] = Attempt(answered)
        try:
            with attempt:
                yield
        except Preempted as preempted:
            self._requeue(record, "")
            self.handle(core.CommandApplied(preempted.command))
            raise
        finally:
            self._attempts.pop(record.call, None)
            if attempt.refused is not None:
                self.handle(core.CommandFailed(attempt.refused, "the call ended by itself"))

    def _requeue(self, record: CallRecord, reason: str) -> None:
        record.status, record.error = CallStatus.QUEUED, reason
        record.dispatched = record.first_token = None
        record.output_tokens = 0
        self._places[record.call] = asyncio.get_running_loop().create_future()
        self.publish(record)

    def end(self, record: CallRecord, status: CallStatus, event: core.Event) -> None:
        """The call is over; `event` tells the scheduler how."""
        record.status, record.ended = status, self.now()
        self._foretelling.leave(record.call)
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
            case core.Abort():
                pass  # the call's own task has closed its connection already
            case core.Preempt():
                self._preempt(command)
            case _:
                self._spawn(self._link.carry_out(command))

    def _dispatch(self, command: core.Dispatch) -> None:
        record = self.records.calls[command.call]
        record.status, record.worker = CallStatus.RUNNING, command.worker
        record.dispatched, record.attempts = self.now(), record.attempts + 1
        address = self.scheduler.workers[command.worker].address
        place = self._places[command.call]
        if not place.done():
            place.set_result(Placement(command.worker, address, command.priority))
        self.publish(record)

    def _preempt(self, command: core.Preempt) -> None:
        attempt = self._attempts.get(command.call)
        if attempt is None or not attempt.preempt(command.id):
            reason = "its client has seen a first byte already, or it is about to end"
            self._spawn(self._answer(core.CommandFailed(command.id, reason)))

    async def _answer(self, event: core.Event) -> None:
        self.handle(event)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self.handle(core.Tick())
            self.predictor.sweep(self.now())

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            _log.error("a task of the gateway failed", exc_info=error)
