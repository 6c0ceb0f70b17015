"""The scheduler on virtual time: the same object as in the gateway, no waiting."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from maestro_backend.scheduler import (
    CallArrived,
    CallFinished,
    Command,
    CommandApplied,
    Dispatch,
    DropPrefix,
    Event,
    ForecastCall,
    ForecastChanged,
    KeepPrefix,
    Length,
    NodeInfo,
    NodeJoined,
    Preempt,
    Reject,
    Residency,
    RunEnded,
    RunStarted,
    Scheduler,
    SetKvLimit,
    SetResidency,
    WorkerChanged,
    WorkerInfo,
    WorkerState,
)

from ._engine_model import EngineModel
from ._workload import SimCall, SimRun


def class_default(call: SimCall) -> Length:
    """A prediction that knows nothing: the same length for every call."""
    return Length(256, 512)


@dataclass(slots=True)
class CallTimes:
    """When a simulated call arrived, started and ended; seconds of virtual time."""

    arrived: float
    started: float | None = None
    ended: float | None = None
    rejected: bool = False


@dataclass(slots=True)
class Result:
    """What came out. `calls` is keyed by (run, index of the call).

    `activations_s` is how long each move to the device took, in seconds.
    """

    calls: dict[tuple[str, int], CallTimes] = field(default_factory=dict)
    activations_s: list[float] = field(default_factory=list)
    log: list[tuple[float, Event, tuple[Command, ...]]] = field(default_factory=list)

    def makespan(self, run: SimRun) -> float | None:
        """Seconds from the run's start to its last end; None if a call never ended."""
        ends = [self.calls[run.run, i].ended for i in range(len(run.calls))]
        done = [end for end in ends if end is not None]
        return max(done) - run.at if len(done) == len(ends) else None


class Simulator:
    """Runs `runs` through `scheduler` on one node.

    The scheduler sees predicted lengths (`predict`), never true ones, and of the future only the
    direct followers of calls that have arrived, not even those without `announce`. `validate`
    checks invariants at each event.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        node: NodeInfo,
        runs: Iterable[SimRun],
        engines: dict[str, EngineModel],
        *,
        predict: Callable[[SimCall], Length] = class_default,
        validate: bool = False,
        announce: bool = True,
    ) -> None:
        self.scheduler = scheduler
        self.runs = {run.run: run for run in runs}
        self.engines = engines
        self.predict = predict
        self.result = Result()
        self.validate = validate
        self.announce = announce
        self.now = 0.0
        self._sequence = 0
        self._agenda: list[tuple[float, int, Event | Callable[[], Event | None]]] = []
        self._tries: dict[str, int] = {}
        self._workers = {w.model: w for w in node.workers}
        self._schedule(0.0, NodeJoined(node))
        for run in self.runs.values():
            self._schedule(run.at, RunStarted(run.run, run.workflow, run.slo, run.deadline_s))

    def run(self) -> Result:
        """Go on until nothing is left to happen."""
        while self._agenda:
            self.now, _, entry = heapq.heappop(self._agenda)
            event = entry() if callable(entry) else entry
            if event is None:
                continue
            commands = self.scheduler.handle(event, self.now)
            self.result.log.append((self.now, event, tuple(commands)))
            if self.validate:
                self.scheduler.validate()
            self._follow(event)
            for command in commands:
                self._execute(command)
        return self.result

    def _schedule(self, at: float, event: Event | Callable[[], Event | None]) -> None:
        self._sequence += 1
        heapq.heappush(self._agenda, (at, self._sequence, event))

    def _follow(self, event: Event) -> None:
        """What the app does after an event."""
        if isinstance(event, RunStarted):
            run = self.runs[event.run]
            for index, call in enumerate(run.calls):
                if not call.after:
                    self._arrive(run, index, run.at + call.gap_s)
        elif isinstance(event, CallArrived):
            run, index = self._find(event.call)
            self.result.calls[run.run, index] = CallTimes(self.now)
            if self.announce:
                self._schedule(self.now, ForecastChanged(run.run, self._forecast(run, index)))
        elif isinstance(event, CallFinished):
            run, index = self._find(event.call)
            self.result.calls[run.run, index].ended = self.now
            self._release_followers(run, index)

    def _release_followers(self, run: SimRun, index: int) -> None:
        for follower in run.followers(index):
            call = run.calls[follower]
            if all(self._ended(run, before) for before in call.after):
                self._arrive(run, follower, self.now + call.gap_s)
        if all(self._ended(run, i) for i in range(len(run.calls))):
            self._schedule(self.now, RunEnded(run.run))

    def _ended(self, run: SimRun, index: int) -> bool:
        times = self.result.calls.get((run.run, index))
        return times is not None and times.ended is not None

    def _arrive(self, run: SimRun, index: int, at: float) -> None:
        call, length = run.calls[index], self.predict(run.calls[index])
        event = CallArrived(
            call=f"{run.run}#{index}",
            run=run.run,
            stage=call.stage,
            model=call.model,
            role=call.role,
            prompt_tokens=call.prompt_tokens,
            length=length,
            kv_tokens=call.prompt_tokens + int(length.p90),
            service_s=self.engines[call.model].service_s(call.prompt_tokens, length.p50),
            waits_for=tuple({run.calls[before].stage: None for before in call.after}),
        )
        self._schedule(at, event)

    def _forecast(self, run: SimRun, index: int) -> tuple[ForecastCall, ...]:
        """The announced future: the direct followers of the call, with certain routing."""
        return tuple(self._forecast_call(run.calls[i]) for i in run.followers(index))

    def _forecast_call(self, call: SimCall) -> ForecastCall:
        length = self.predict(call)
        return ForecastCall(
            stage=call.stage,
            role=call.role,
            model=call.model,
            probability=1.0,
            earliest_start_s=call.gap_s,
            prompt_tokens=call.prompt_tokens,
            length=length,
            service_s=self.engines[call.model].service_s(call.prompt_tokens, length.p50),
        )

    def _find(self, call: str) -> tuple[SimRun, int]:
        run, _, index = call.rpartition("#")
        return self.runs[run], int(index)

    def _execute(self, command: Command) -> None:
        match command:
            case Dispatch(call=call):
                self._serve(call)
            case Reject(call=call):
                run, index = self._find(call)
                self.result.calls[run.run, index].rejected = True
            case SetResidency():
                self._move(command)
            case SetKvLimit():
                self._limit_kv(command)
            case Preempt(call=call):
                self._tries[call] += 1
                self._schedule(self.now, CommandApplied(command.id))
            case KeepPrefix() | DropPrefix():
                self._schedule(self.now, CommandApplied(command.id))

    def _serve(self, call: str) -> None:
        """It ends when its service is over, unless it is taken off its worker before."""
        run, index = self._find(call)
        self.result.calls[run.run, index].started = self.now
        spec = run.calls[index]
        service_s = self.engines[spec.model].service_s(spec.prompt_tokens, spec.output_tokens)
        finished = CallFinished(call, spec.prompt_tokens, spec.output_tokens)
        mine = self._tries[call] = self._tries.get(call, 0) + 1
        self._schedule(
            self.now + service_s, lambda: finished if self._tries[call] == mine else None
        )

    def _move(self, command: SetResidency) -> None:
        start = self._workers[command.model]
        took_s = self.engines[command.model].move_s(start.residency, command.residency)
        state, on_the_way = _states(start, command.residency)
        changes: dict[str, Any] = {}
        if command.kv_limit_bytes is not None:
            changes["kv_limit_bytes"] = command.kv_limit_bytes
        self._change(command.model, self.now, state=on_the_way)
        if command.residency is Residency.DEVICE:
            self.result.activations_s.append(took_s)
        elif command.residency is Residency.HOST:
            changes["host_bytes"] = start.host_copy_bytes
        else:
            changes["host_bytes"] = 0
        at = self.now + took_s
        self._change(command.model, at, state=state, residency=command.residency, **changes)
        self._schedule(at, CommandApplied(command.id))

    def _limit_kv(self, command: SetKvLimit) -> None:
        model = command.worker.rpartition("/")[2]
        at = self.now + self.engines[model].kv_limit_s
        self._change(model, at, kv_limit_bytes=command.limit_bytes)
        self._schedule(at, CommandApplied(command.id))

    def _change(self, model: str, at: float, **changes: Any) -> None:
        """The worker reports a change when its time has come."""

        def change() -> Event:
            self._workers[model] = replace(self._workers[model], **changes)
            return WorkerChanged(self._workers[model])

        self._schedule(at, change)


def _states(info: WorkerInfo, end: Residency) -> tuple[WorkerState, WorkerState]:
    """A worker's state after a move, and on the way there."""
    alive = info.state in (WorkerState.READY, WorkerState.SUSPENDED)
    match end:
        case Residency.DEVICE:
            return WorkerState.READY, WorkerState.RESUMING if alive else WorkerState.STARTING
        case Residency.HOST | Residency.PARKED:
            on_the_way = WorkerState.SUSPENDING if alive else WorkerState.STARTING
            if info.state is WorkerState.SUSPENDED:
                on_the_way = WorkerState.SUSPENDED
            return WorkerState.SUSPENDED, on_the_way
        case _:
            return WorkerState.STOPPED, WorkerState.STOPPING
