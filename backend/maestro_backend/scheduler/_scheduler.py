"""`Scheduler.handle(event, now) -> commands`: one pure object for server, simulator and tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from . import _events as ev
from ._calls import Call
from ._commands import Abort, Command, Reject, RejectReason
from ._dispatch import Dispatcher
from ._invariants import check
from ._kept import KeptPrefixes
from ._nouns import Residency, WorkerInfo, WorkerState
from ._residency import Residencies
from ._settings import Settings
from ._shortage import Shortage
from ._verdicts import Verdicts
from ._world import Action, Move, Preemption, World
from .policies import Policy


class Scheduler:
    """The state of all runs, calls and workers. Only `handle` changes it."""

    def __init__(self, policy: Policy, settings: Settings | None = None) -> None:
        self.policy = policy
        self.settings = settings or Settings()
        self._world = world = World(self.settings)
        self.runs, self.calls = world.runs, world.calls
        self.workers, self.ledger, self.counts = world.workers, world.ledger, world.counts
        self.residencies = Residencies(world)
        self._verdicts = Verdicts(world, self.residencies)
        self._kept = KeptPrefixes(world)
        self._shortage = Shortage(world, policy)
        self._dispatcher = Dispatcher(world, policy, self.residencies, self._shortage, self._kept)
        self._handlers: dict[type, Callable[[Any, float], Iterator[Command]]] = {
            ev.RunStarted: self._run_started,
            ev.Announced: self._run_seen,
            ev.ForecastChanged: self._forecast_changed,
            ev.StageStarted: self._run_seen,
            ev.StageEnded: self._run_seen,
            ev.ToolStarted: self._run_seen,
            ev.ToolEnded: self._run_seen,
            ev.RunPaused: self._run_paused,
            ev.RunResumed: self._run_resumed,
            ev.CallArrived: self._call_arrived,
            ev.CallPredicted: self._call_predicted,
            ev.CallProgress: self._call_progress,
            ev.CallFinished: self._call_finished,
            ev.CallFailed: self._call_failed,
            ev.CallCancelled: self._call_cancelled,
            ev.RunEnded: self._run_ended,
            ev.WorkerChanged: self._worker_changed,
            ev.NodeJoined: self._node_joined,
            ev.NodeLost: self._node_lost,
            ev.MemoryMeasured: self._memory_measured,
            ev.CommandApplied: self._command_applied,
            ev.CommandFailed: self._command_failed,
            ev.Tick: self._tick,
        }

    def handle(self, event: ev.Event, now: float) -> list[Command]:
        """Take one event at time `now` (seconds, never going back); return what to do."""
        commands = list(self._handlers[type(event)](event, now))
        if not isinstance(event, ev.CallProgress):
            commands += self.residencies.plan(now)
            commands += self._reject_hopeless(now)
            commands += self._dispatcher.dispatch(now)
        return commands

    def validate(self) -> None:
        """Check every invariant.

        Raises:
            InvariantError: one is broken; the message tells which.
        """
        check(self._world)

    # --- runs -----------------------------------------------------------------------------------

    def _run_started(self, event: ev.RunStarted, now: float) -> Iterator[Command]:
        self.runs.ensure(event.run, now).start(event, now)
        yield from ()

    def _run_seen(
        self,
        event: ev.Announced | ev.StageStarted | ev.StageEnded | ev.ToolStarted | ev.ToolEnded,
        now: float,
    ) -> Iterator[Command]:
        """A sign of life; it may come after the run's end, and then starts nothing."""
        if run := self.runs.get(event.run):
            run.last_seen = now
        yield from ()

    def _forecast_changed(self, event: ev.ForecastChanged, now: float) -> Iterator[Command]:
        run = self.runs.ensure(event.run, now)
        if not run.ended:
            self.runs.believe(run, event.calls, now)
            yield from self._kept.review(run, now)

    def _run_paused(self, event: ev.RunPaused, now: float) -> Iterator[Command]:
        if run := self.runs.get(event.run):
            run.pause(now)
        yield from ()

    def _run_resumed(self, event: ev.RunResumed, now: float) -> Iterator[Command]:
        if run := self.runs.get(event.run):
            run.resume(now)
        yield from ()

    def _run_ended(self, event: ev.RunEnded, now: float) -> Iterator[Command]:
        if run := self.runs.get(event.run):
            self.runs.believe(run, (), now)
            run.ended = True
            self.runs.forget_if_over(run)
        yield from self._kept.forget(event.run)

    # --- calls ----------------------------------------------------------------------------------

    def _call_arrived(self, event: ev.CallArrived, now: float) -> Iterator[Command]:
        if event.call in self.calls.by_id:
            return
        if refusal := self._verdicts.refusal(event):
            reason, detail, retry_after_s = refusal
            yield Reject(self._world.next_id(), event.call, reason, detail, retry_after_s)
            return
        self.calls.add(event, now)
        run = self.runs.ensure(event.run, now)
        run.live_calls.add(event.call)
        run.ended = event.run == event.call  # a call without a run is one of its own

    def _call_predicted(self, event: ev.CallPredicted, now: float) -> Iterator[Command]:
        if call := self.calls.by_id.get(event.call):
            call.request = replace(
                call.request,
                length=event.length,
                service_s=event.service_s,
                kv_tokens=event.kv_tokens,
            )
            if call.worker in self.workers:
                worker = self.workers[call.worker]
                yield from self._shortage.progress(call, worker, event.kv_tokens, now)

    def _call_progress(self, event: ev.CallProgress, now: float) -> Iterator[Command]:
        call = self.calls.by_id.get(event.call)
        if call and call.worker in self.workers:
            tokens = event.computed_tokens + event.generated_tokens
            yield from self._shortage.progress(call, self.workers[call.worker], tokens, now)

    def _call_finished(self, event: ev.CallFinished, now: float) -> Iterator[Command]:
        if call := self.calls.by_id.get(event.call):
            tokens = event.prompt_tokens + event.output_tokens or call.request.kv_tokens
            worker = call.worker
            if worker is not None:
                self.ledger.release(worker, call.call)
            yield from self._kept.ended(call, tokens, now)
            self._end(call, now)

    def _call_failed(self, event: ev.CallFailed, now: float) -> Iterator[Command]:
        call = self.calls.by_id.get(event.call)
        if call is None or (call.worker is None and event.retryable):
            return
        limit = self.settings
        attempts = limit.max_attempts if event.worker_lost else limit.max_error_attempts
        if call.worker is None or not event.retryable:
            self._end(call, now)
        elif call.attempts >= attempts:
            self._end(call, now)
            detail = f"failed {call.attempts} times, last: {event.reason}"
            yield Reject(self._world.next_id(), event.call, RejectReason.RETRIES_EXHAUSTED, detail)
        else:
            if event.worker_lost:
                rest_s = limit.suspect_s * 2 ** (call.attempts - 1)
                self._dispatcher.suspect(call.worker, now + rest_s)
            self.ledger.release(call.worker, call.call)
            self.calls.requeue(call)

    def _call_cancelled(self, event: ev.CallCancelled, now: float) -> Iterator[Command]:
        if call := self.calls.by_id.get(event.call):
            worker = call.worker
            self._end(call, now)
            if worker is not None:
                yield Abort(self._world.next_id(), event.call, worker)

    def _end(self, call: Call, now: float) -> None:
        """Remove a call for good: its reservation, its place, its mark in the run."""
        if call.worker is not None:
            self.ledger.release(call.worker, call.call)
            self._world.last_used[call.worker] = now
        self.calls.remove(call)
        if run := self.runs.get(call.request.run):
            run.live_calls.discard(call.call)
            run.last_seen = now
            self.runs.forget_if_over(run)

    # --- workers and memory ---------------------------------------------------------------------

    def _node_joined(self, event: ev.NodeJoined, now: float) -> Iterator[Command]:
        self.ledger.add_node(event.info)
        for info in event.info.workers:
            self._take(info, now)
        self.residencies.preload = list(event.preload)
        self._verdicts.nodeless_since = None
        yield from ()

    def _worker_changed(self, event: ev.WorkerChanged, now: float) -> Iterator[Command]:
        self._take(event.info, now)
        yield from ()

    def _take(self, info: WorkerInfo, now: float) -> None:
        """Believe what a node reports of a worker."""
        world = self._world
        self.workers[info.worker] = info
        self._dispatcher.trust(info.worker)
        change = world.changes.get(info.worker)
        if change is not None and change.applied and info.kv_limit_bytes <= change.limit:
            del world.changes[info.worker]
        if info.state in (WorkerState.STOPPED, WorkerState.FAILED):
            world.changes.pop(info.worker, None)
            world.refused.pop(info.worker, None)
        if info.state is not WorkerState.SUSPENDED:
            self.residencies.broken.discard(info.worker)
        if info.state is WorkerState.FAILED:
            self.residencies.fail(info.model, info.detail, now)
        world.account(info.worker)

    def _node_lost(self, event: ev.NodeLost, now: float) -> Iterator[Command]:
        """Its workers take no more calls; those running there fail one by one in the shell."""
        world = self._world
        gone = [w.worker for w in self.workers.values() if w.node == event.node]
        world.moves = {i: m for i, m in world.moves.items() if m.worker not in gone}
        world.keeps = {i: keep for i, keep in world.keeps.items() if keep[0] not in gone}
        self.ledger.drop_node(event.node)
        for worker in gone:
            del self.workers[worker]
            rests = (world.rests, world.limit_rests)
            for about in (world.changes, *rests, world.refused, self.residencies.draining):
                about.pop(worker, None)
            self.residencies.broken.discard(worker)
        if not self.workers:
            self._verdicts.nodeless_since = now
        yield from ()

    def _memory_measured(self, event: ev.MemoryMeasured, now: float) -> Iterator[Command]:
        self.ledger.measured[event.device] = event.used_bytes
        yield from ()

    # --- commands under way ---------------------------------------------------------------------

    def _command_applied(self, event: ev.CommandApplied, now: float) -> Iterator[Command]:
        world = self._world
        world.keeps.pop(event.command, None)
        if move := world.moves.pop(event.command, None):
            if move.residency is Residency.DEVICE:
                world.refused.pop(move.worker, None)
            self._account(move.worker)
        elif worker := self._changing(event.command):
            self._limit_applied(worker, now)
        elif (preemption := world.preemptions.pop(event.command, None)) and (
            call := self._running(preemption)
        ):
            self.ledger.release(preemption.worker, call.call)
            self.calls.preempt(call)
        yield from ()

    def _limit_applied(self, worker: str, now: float) -> None:
        """A shrink may have to wait for blocks in use; it counts as under way until then."""
        world = self._world
        change, info = world.changes.pop(worker), self.workers[worker]
        if info.kv_limit_bytes > change.limit:
            world.changes[worker] = replace(change, applied=now)
        elif info.kv_limit_bytes < change.limit:
            self._rest_limit(worker, now)  # it gave less than was asked for
        self._account(worker)

    def _command_failed(self, event: ev.CommandFailed, now: float) -> Iterator[Command]:
        world = self._world
        world.counts[Action.FAILURE] += 1
        if move := world.moves.pop(event.command, None):
            self._move_failed(move, event.reason, now)
            self._account(move.worker)
        elif worker := self._changing(event.command):
            del world.changes[worker]
            self._rest_limit(worker, now)
            self._account(worker)
        elif keep := world.keeps.pop(event.command, None):
            worker, name = keep
            if claim := self.ledger.claims.get(worker):
                claim.kept.pop(name, None)
        elif (preemption := world.preemptions.pop(event.command, None)) and (
            call := self._running(preemption)
        ):
            call.settled = True
        yield from ()

    def _move_failed(self, move: Move, reason: str, now: float) -> None:
        info = self.workers[move.worker]
        fetched = move.residency is Residency.DISK and info.residency is Residency.REMOTE
        if move.residency is not Residency.DEVICE and not fetched:
            known = self._world.refused.get(info.worker, frozenset())
            self._world.refused[info.worker] = known | {move.residency}
            self.residencies.draining.pop(info.worker, None)
            self._rest(info.worker, now)
        if move.residency is Residency.DISK and (fetched or info.worker in self.residencies.broken):
            self.residencies.fail(info.model, reason, now)
        elif move.residency is Residency.DEVICE:
            self._bring_failed(info, move, reason, now)

    def _bring_failed(self, info: WorkerInfo, move: Move, reason: str, now: float) -> None:
        if info.state is WorkerState.SUSPENDED:
            self.residencies.broken.add(info.worker)  # to be stopped and started anew
        elif info.state is WorkerState.STOPPED and info.most_bytes != move.need:
            return  # its size is known only now: plan again
        elif info.state is not WorkerState.READY:
            self.residencies.fail(info.model, reason, now)

    def _account(self, worker: str) -> None:
        if worker in self.workers:
            self._world.account(worker)

    def _rest(self, worker: str, now: float) -> None:
        self._world.rests[worker] = now + self.settings.rest_s

    def _rest_limit(self, worker: str, now: float) -> None:
        self._world.limit_rests[worker] = now + self.settings.rest_s

    def _changing(self, command: int) -> str | None:
        """The worker whose KV limit the command changes."""
        changes = self._world.changes.items()
        return next((w for w, change in changes if change.command == command), None)

    def _running(self, preemption: Preemption) -> Call | None:
        """The call of a preemption, if it still runs in that same try."""
        call = self.calls.by_id.get(preemption.call)
        same = call and (call.worker, call.attempts) == (preemption.worker, preemption.attempt)
        return call if same else None

    def _tick(self, event: ev.Tick, now: float) -> Iterator[Command]:
        limit = now - self.settings.run_idle_s
        idle = [r for r in self.runs.by_id.values() if r.last_seen < limit and not r.live_calls]
        for run in idle:
            yield from self._kept.forget(run.run)
            self.runs.forget(run)
        self._kept.expire(now)
        for worker, change in list(self._world.changes.items()):
            if change.applied is not None and now - change.applied > self.settings.rest_s:
                del self._world.changes[worker]
                self._rest_limit(worker, now)
                self._account(worker)

    # --- planning -------------------------------------------------------------------------------

    def _reject_hopeless(self, now: float) -> Iterator[Command]:
        """Answer calls that no worker can take."""
        for model in [m for m, queue in self.calls.queues.items() if queue]:
            if verdict := self._verdicts.hopeless(model, now):
                reason, detail, retry_after_s = verdict
                for call in list(self.calls.queued(model).values()):
                    self._end(call, now)
                    yield Reject(self._world.next_id(), call.call, reason, detail, retry_after_s)
