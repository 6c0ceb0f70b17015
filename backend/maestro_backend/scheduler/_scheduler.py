"""`Scheduler.handle(event, now) -> commands`: one pure object for server, simulator and tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from . import _events as ev
from ._calls import Call
from ._commands import Abort, Command, Reject, RejectReason
from ._dispatch import Dispatcher
from ._invariants import check
from ._kept import KeptPrefixes
from ._nouns import Residency, WorkerInfo, WorkerState
from ._queues import Queues
from ._residency import Residencies
from ._runs import Run
from ._settings import Settings
from ._shortage import Shortage
from ._verdicts import Verdicts
from ._world import Action, Move, Preemption, World
from .policies import Policy

_REVIEW_S = 1.0
"""What depends on time alone (patience, rests, pauses) is looked at this often, or at each Tick."""

_NO_COMMANDS: list[Command] = []


class Scheduler:
    """The state of all runs, calls and workers. Only `handle` changes it."""

    def __init__(self, policy: Policy, settings: Settings | None = None) -> None:
        self.policy = policy
        self.settings = settings or Settings()
        self._world = world = World(self.settings)
        self.runs, self.calls = world.runs, world.calls
        self.workers, self.ledger, self.counts = world.workers, world.ledger, world.counts
        self.residencies = Residencies(world)
        self._kept = KeptPrefixes(world)
        self._queues = Queues(world, policy)
        self._verdicts = Verdicts(world, self.residencies, self._queues)
        self._shortage = Shortage(world, self._queues)
        self._dispatcher = Dispatcher(world, policy, self._queues, self._shortage, self._kept)
        self._reviewed = -_REVIEW_S
        self._standing: set[str] = set()
        """Models whose calls were waiting after some event, and have been since."""
        self._queued: set[str] = set()
        self._handlers: dict[type, Callable[[Any, float], Iterable[Command]]] = {
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
        if isinstance(event, ev.CallProgress):
            return commands
        world, calls = self._world, self.calls
        if calls.emptied:
            self._note_emptied()
        if world.changed or now - self._reviewed >= _REVIEW_S:
            commands += self._review(now)
        else:
            if world.touched and self.residencies.unmet:
                commands += self.residencies.plan_on(world.touched, now)
            commands += self._dispatcher.dispatch(now)
        world.touched.clear()
        if calls.emptied:
            self._note_emptied()
        while self._queued:
            if calls.queued(model := self._queued.pop()):
                self._standing.add(model)
        return commands

    def validate(self) -> None:
        """Check every invariant.

        Raises:
            InvariantError: one is broken; the message tells which.
        """
        check(self._world)

    # --- planning -------------------------------------------------------------------------------

    def _review(self, now: float) -> Iterator[Command]:
        """Look at everything anew."""
        changed = self.residencies.failures.forgive(now) or self._world.changed
        self._reviewed, self._world.changed = now, False
        self._queues.rekey_all(now)
        self._world.settle_places(now)
        self._world.look_far()
        yield from self.residencies.plan(now) if changed else self.residencies.replan(now)
        yield from self._reject_hopeless(now)
        yield from self._dispatcher.dispatch(now, everything=True)

    def _reject_hopeless(self, now: float) -> Iterator[Command]:
        """Answer calls that no worker can take."""
        for model in [m for m, queue in self.calls.queues.items() if queue]:
            if verdict := self._verdicts.hopeless(model, now):
                reason, detail, retry_after_s = verdict
                for call in list(self.calls.queued(model).values()):
                    self._end(call, now)
                    yield Reject(self._world.next_id(), call.call, reason, detail, retry_after_s)

    def _note_emptied(self) -> None:
        """Where the last waiting call of a model has gone, its idle workers may make room, and
        what it waited for is free for others."""
        for model in [model for model in self.calls.emptied if model in self._standing]:
            self._standing.discard(model)
            if self.residencies.unmet or self._world.short:
                self._world.touch(model)
            if model in self.residencies.unmet:
                self._world.changed = True
        self.calls.emptied.clear()

    # --- runs -----------------------------------------------------------------------------------

    def _run_started(self, event: ev.RunStarted, now: float) -> Iterable[Command]:
        run = self.runs.ensure(event.run, now)
        run.start(event, now)
        self._rekey(run, now)
        return _NO_COMMANDS

    def _run_seen(
        self,
        event: ev.Announced | ev.StageStarted | ev.StageEnded | ev.ToolStarted | ev.ToolEnded,
        now: float,
    ) -> Iterable[Command]:
        """A sign of life; it may come after the run's end, and then starts nothing."""
        if run := self.runs.get(event.run):
            run.last_seen = now
        return _NO_COMMANDS

    def _forecast_changed(self, event: ev.ForecastChanged, now: float) -> Iterable[Command]:
        run = self.runs.ensure(event.run, now)
        if run.ended:
            return _NO_COMMANDS
        if event.rest is not None:
            run.rest = event.rest
        self._believe(run, event.calls, now)
        return self._kept.review(run, now) if run.last_ended else _NO_COMMANDS

    def _believe(self, run: Run, forecast: tuple[ev.ForecastCall, ...], now: float) -> None:
        """Replace a run's forecast, and note who should be brought in, or may leave, for it."""
        before, residencies = run.models, self.residencies
        self.runs.believe(run, forecast, now)
        for model in run.models:
            if residencies.sooner(model):
                self._world.changed = True
        for model in before if residencies.unmet else ():
            if self.runs.expected_at(model) is None:
                self._world.touch(model)
        self._rekey(run, now)

    def _rekey(self, run: Run, now: float) -> None:
        if run.live_calls:
            for model in self._queues.rekey_run(run, now):
                self._dispatcher.stir(model)

    def _run_paused(self, event: ev.RunPaused, now: float) -> Iterable[Command]:
        if run := self.runs.get(event.run):
            run.pause(now)
        return _NO_COMMANDS

    def _run_resumed(self, event: ev.RunResumed, now: float) -> Iterable[Command]:
        if run := self.runs.get(event.run):
            run.resume(now)
            self._rekey(run, now)
        return _NO_COMMANDS

    def _run_ended(self, event: ev.RunEnded, now: float) -> Iterable[Command]:
        if run := self.runs.get(event.run):
            self._believe(run, (), now)
            run.ended = True
            self._forget_if_over(run, now)
        return self._kept.forget(event.run, run)

    def _forget_if_over(self, run: Run, now: float) -> None:
        if run.ended and not run.live_calls:
            self._forget(run, now)

    def _forget(self, run: Run, now: float) -> None:
        self.runs.forget(run)
        self.policy.run_over(run, now)

    # --- calls ----------------------------------------------------------------------------------

    def _call_arrived(self, event: ev.CallArrived, now: float) -> Iterable[Command]:
        if event.call in self.calls.by_id:
            return _NO_COMMANDS
        if refusal := self._verdicts.refusal(event, now):
            return [Reject(self._world.next_id(), event.call, *refusal)]
        run, model = self.runs.ensure(event.run, now), event.model
        run.ended = event.run == event.call  # a call without a run is one of its own
        call = self.calls.add(event, now)
        run.live_calls.add(event.call)
        self._world.saw(call, now)
        self.policy.arrived(call, run, now)
        self._enqueue(call, run, now)
        if len(self.calls.queued(model)) == 1 and not self._world.served(model):
            self._world.changed = True
        return _NO_COMMANDS

    def _enqueue(self, call: Call, run: Run | None, now: float) -> None:
        self._queued.add(call.request.model)
        if self._queues.add(call, run, now):
            self._dispatcher.stir(call.request.model)

    def _call_predicted(self, event: ev.CallPredicted, now: float) -> Iterable[Command]:
        call = self.calls.by_id.get(event.call)
        if call is None:
            return _NO_COMMANDS
        request = replace(
            call.request,
            length=event.length,
            service_s=event.service_s,
            kv_tokens=event.kv_tokens,
        )
        self.calls.predict(call, request)
        if call.worker in self.workers:
            self.ledger.freed.add(call.worker)
            return self._shortage.progress(call, self.workers[call.worker], event.kv_tokens, now)
        self._queues.rekey(call, self.runs.get(request.run), now)
        self._world.short.pop(request.model, None)
        self._dispatcher.stir(request.model)
        return _NO_COMMANDS

    def _call_progress(self, event: ev.CallProgress, now: float) -> Iterable[Command]:
        call = self.calls.by_id.get(event.call)
        if call is None or call.worker not in self.workers:
            return _NO_COMMANDS
        tokens = event.computed_tokens + event.generated_tokens
        return self._shortage.progress(call, self.workers[call.worker], tokens, now)

    def _call_finished(self, event: ev.CallFinished, now: float) -> Iterable[Command]:
        call = self.calls.by_id.get(event.call)
        if call is None:
            return _NO_COMMANDS
        tokens = event.prompt_tokens + event.output_tokens or call.request.kv_tokens
        run = self.runs.get(call.request.run)
        if call.worker is not None:
            self.ledger.release(call.worker, call.call)
            self._verdicts.served(call, now)
            if run is not None:
                run.attained_s += now - call.started
                run.waited_s += call.started - call.arrived
                self.policy.ended(call, run, now)
            self._world.learn(call, now)
        commands = self._kept.ended(call, run, tokens, now)
        self._end(call, now)
        if run is not None:
            self._rekey(run, now)
        return commands

    def _call_failed(self, event: ev.CallFailed, now: float) -> Iterable[Command]:
        call = self.calls.by_id.get(event.call)
        if call is None or (call.worker is None and event.retryable):
            return _NO_COMMANDS
        limit = self.settings
        attempts = limit.max_attempts if event.worker_lost else limit.max_error_attempts
        if call.worker is None or not event.retryable:
            self._end(call, now)
        elif call.attempts >= attempts:
            self._end(call, now)
            detail = f"failed {call.attempts} times, last: {event.reason}"
            reason = RejectReason.RETRIES_EXHAUSTED
            return [Reject(self._world.next_id(), event.call, reason, detail)]
        else:
            if event.worker_lost and (info := self.workers.get(call.worker)):
                rest_s = limit.suspect_s * 2 ** (call.attempts - 1)
                self._world.places.suspect(info, now + rest_s)
            self._take_off(call, now, self.calls.requeue)
        return _NO_COMMANDS

    def _take_off(self, call: Call, now: float, requeue: Callable[[Call], None]) -> None:
        """A running call goes back to the queue."""
        assert call.worker is not None
        worker = call.worker
        self.ledger.release(worker, call.call)
        self._queues.left(call, 0.0)
        requeue(call)
        self._world.call_left(worker)
        self._enqueue(call, self.runs.get(call.request.run), now)

    def _call_cancelled(self, event: ev.CallCancelled, now: float) -> Iterable[Command]:
        call = self.calls.by_id.get(event.call)
        if call is None:
            return _NO_COMMANDS
        worker = call.worker
        self._end(call, now)
        return [] if worker is None else [Abort(self._world.next_id(), event.call, worker)]

    def _end(self, call: Call, now: float) -> None:
        """Remove a call for good: its reservation, its place, its mark in the run."""
        worker = call.worker
        self._queues.left(call, now - call.started)
        self.calls.remove(call)
        if worker is not None:
            self.ledger.release(worker, call.call)
            self._world.last_used[worker] = now
            self._world.call_left(worker)
        else:
            self._queues.drop(call)
            self._dispatcher.stir(call.request.model)
        if run := self.runs.get(call.request.run):
            run.live_calls.discard(call.call)
            run.last_seen = now
            for model in self._queues.open_joins(run, now):
                self._dispatcher.stir(model)
            self._forget_if_over(run, now)

    # --- workers and memory ---------------------------------------------------------------------

    def _node_joined(self, event: ev.NodeJoined, now: float) -> Iterable[Command]:
        self.ledger.add_node(event.info)
        if event.info.rtt_s > 0.0:
            self._world.rtt_s[event.info.node] = event.info.rtt_s
        for info in event.info.workers:
            self._take(info, now)
        self.residencies.preload = list(event.preload)
        self._verdicts.nodeless_since = None
        self._world.changed = True
        return _NO_COMMANDS

    def _worker_changed(self, event: ev.WorkerChanged, now: float) -> Iterable[Command]:
        self._take(event.info, now)
        return _NO_COMMANDS

    def _take(self, info: WorkerInfo, now: float) -> None:
        """Believe what a node reports of a worker."""
        world = self._world
        world.put(info, now)
        world.places.trust(info.worker)
        change = world.changes.get(info.worker)
        if change is not None and change.applied and info.kv_limit_bytes <= change.limit:
            del world.changes[info.worker]
        if info.state in (WorkerState.STOPPED, WorkerState.FAILED):
            world.changes.pop(info.worker, None)
            world.refused.pop(info.worker, None)
        if info.state is not WorkerState.SUSPENDED:
            self.residencies.broken.discard(info.worker)
        if info.state is WorkerState.FAILED:
            self.residencies.failures.add(info.worker, info.detail, now)
        world.account(info.worker)

    def _node_lost(self, event: ev.NodeLost, now: float) -> Iterable[Command]:
        """Its workers take no more calls; those running there fail one by one in the shell."""
        self.residencies.broken -= {w.worker for w in self._world.of_node(event.node)}
        self._world.lose(event.node)
        self._world.changed = True
        if not self.workers:
            self._verdicts.nodeless_since = now
        return _NO_COMMANDS

    def _memory_measured(self, event: ev.MemoryMeasured, now: float) -> Iterable[Command]:
        self.ledger.measured[event.device] = event.used_bytes
        return _NO_COMMANDS

    # --- commands under way ---------------------------------------------------------------------

    def _command_applied(self, event: ev.CommandApplied, now: float) -> Iterable[Command]:
        world = self._world
        if world.keeps.pop(event.command, None):
            return _NO_COMMANDS
        if move := world.end_move(event.command):
            if move.residency is Residency.DEVICE:
                world.refused.pop(move.worker, None)
            self._account(move.worker)
        elif worker := world.changing(event.command):
            self._limit_applied(worker, now)
        elif (preemption := world.preemptions.pop(event.command, None)) and (
            call := self._running(preemption)
        ):
            self._take_off(call, now, self.calls.preempt)
        else:
            return _NO_COMMANDS
        world.changed = True
        return _NO_COMMANDS

    def _limit_applied(self, worker: str, now: float) -> None:
        """A shrink may have to wait for blocks in use; it counts as under way until then."""
        world = self._world
        change, info = world.changes.pop(worker), self.workers[worker]
        if info.kv_limit_bytes > change.limit:
            world.changes[worker] = replace(change, applied=now)
        elif info.kv_limit_bytes < change.limit:
            self._rest_limit(worker, now)  # it gave less than was asked for
        self._account(worker)

    def _command_failed(self, event: ev.CommandFailed, now: float) -> Iterable[Command]:
        world = self._world
        world.counts[Action.FAILURE] += 1
        world.changed = True
        if move := world.end_move(event.command):
            self._move_failed(move, event.reason, now)
            self._account(move.worker)
        elif worker := world.changing(event.command):
            del world.changes[worker]
            self._rest_limit(worker, now)
            self._account(worker)
        elif keep := world.keeps.pop(event.command, None):
            self.ledger.forget(*keep)
        elif (preemption := world.preemptions.pop(event.command, None)) and (
            call := self._running(preemption)
        ):
            call.settled = True
        return _NO_COMMANDS

    def _move_failed(self, move: Move, reason: str, now: float) -> None:
        info = self.workers[move.worker]
        fetched = move.residency is Residency.DISK and info.residency is Residency.REMOTE
        if move.residency is not Residency.DEVICE and not fetched:
            known = self._world.refused.get(info.worker, frozenset())
            self._world.refused[info.worker] = known | {move.residency}
            self._world.undrain(info.worker)
            self._rest(info.worker, now)
        if move.residency is Residency.DISK and (fetched or info.worker in self.residencies.broken):
            self.residencies.failures.add(info.worker, reason, now)
        elif move.residency is Residency.DEVICE:
            self._bring_failed(info, move, reason, now)

    def _bring_failed(self, info: WorkerInfo, move: Move, reason: str, now: float) -> None:
        if info.state is WorkerState.SUSPENDED:
            self.residencies.broken.add(info.worker)  # to be stopped and started anew
        elif info.state is WorkerState.STOPPED and info.most_bytes != move.need:
            return  # its size is known only now: plan again
        elif info.state is not WorkerState.READY:
            self.residencies.failures.add(info.worker, reason, now)

    def _account(self, worker: str) -> None:
        if worker in self.workers:
            self._world.account(worker)

    def _rest(self, worker: str, now: float) -> None:
        self._world.rests[worker] = now + self.settings.rest_s

    def _rest_limit(self, worker: str, now: float) -> None:
        self._world.limit_rests[worker] = now + self.settings.rest_s

    def _running(self, preemption: Preemption) -> Call | None:
        """The call of a preemption, if it still runs in that same try."""
        call = self.calls.by_id.get(preemption.call)
        same = call and (call.worker, call.attempts) == (preemption.worker, preemption.attempt)
        return call if same else None

    def _tick(self, event: ev.Tick, now: float) -> Iterator[Command]:
        self._reviewed = now - _REVIEW_S
        yield from self._forget_idle_runs(now)
        self._kept.expire(now)
        for worker, change in list(self._world.changes.items()):
            if change.applied is not None and now - change.applied > self.settings.rest_s:
                del self._world.changes[worker]
                self._rest_limit(worker, now)
                self._account(worker)

    def _forget_idle_runs(self, now: float) -> Iterator[Command]:
        for run in self.runs.silent_since(now - self.settings.run_idle_s, now):
            yield from self._kept.forget(run.run, run)
            self._forget(run, now)
