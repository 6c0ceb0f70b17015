"""The scheduler on virtual time: the same object as in the gateway, no waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import inf

from maestro_agents.protocol import MaestroError
from maestro_backend.scheduler import (
    Abort,
    Action,
    CallProgress,
    Command,
    CommandApplied,
    CommandFailed,
    Dispatch,
    DropPrefix,
    Event,
    KeepPrefix,
    NodeJoined,
    Preempt,
    Prewarm,
    Reject,
    Scheduler,
    SetKvLimit,
    SetResidency,
    Settings,
    Tick,
)
from maestro_backend.scheduler.policies import policy

from ._agenda import Agenda
from ._apps import Apps, LiveCall, Whereabouts
from ._cluster import Cluster
from ._foresight import Foresight
from ._layout import idle_service, node_infos, places
from ._nodes import Nodes, Server
from ._outcome import CallSpan, MemorySample, Outcome
from ._requests import Happening, Request, What
from ._system import System
from ._workload import SimRun

TICK_S = 1.0
"""As often as the gateway ticks."""
_GROWTH_TOKENS = 128
"""So often a call that has outgrown its reservation is asked how far it is (ours): at a usual pace
every two or three seconds, where the gateway asks five times a second."""
_MANY_CALLS = 10**9
_PREEMPTIONS = Settings().max_preemptions
_SAMPLE_TICKS = 10
_MOST_SAMPLES = 400
"""Memory is looked at so often, at most: less and less often, the longer it takes."""

Step = Callable[[float, Event, Sequence[Command]], None]


def settings_of(system: System) -> Settings:
    """What the system's rules mean for the scheduler."""
    look_ahead = {"planned": "likely", "lru": "none", "static": "none"}.get(system.weights, "all")
    return Settings(
        max_queued=_MANY_CALLS,
        look_ahead=look_ahead,  # type: ignore[arg-type]  # one of its three
        placement=system.placement,
        max_preemptions=_PREEMPTIONS if system.preempts else 0,
    )


def simulate(
    cluster: Cluster,
    system: System,
    runs: Iterable[SimRun],
    foresight: Foresight,
    *,
    horizon_s: float | None = None,
    closed: int | None = None,
    validate: bool = False,
    trace_run: str | None = None,
    on_step: Step | None = None,
) -> Outcome:
    """Play `runs`, in order of time, on `cluster` under `system`.

    It ends when every run to be measured has ended, at the latest after `horizon_s` seconds.
    `closed`: so many runs are in progress at any time, whatever their times say. `validate` checks
    the scheduler's invariants at each event; `trace_run` names the run whose calls are put in
    `Outcome.spans`; `on_step` sees each event with what the scheduler answered.

    Deterministic: the same arguments give the same outcome.
    """
    simulation = _Simulation(cluster, system, foresight, validate, trace_run, on_step)
    return simulation.run(runs, closed, horizon_s)


class _Simulation:
    def __init__(
        self,
        cluster: Cluster,
        system: System,
        foresight: Foresight,
        validate: bool,
        trace_run: str | None,
        on_step: Step | None,
    ) -> None:
        self.outcome = Outcome()
        self.scheduler = Scheduler(policy(system.order), settings_of(system))
        self._agenda = agenda = Agenda()
        self._system = system
        self._grows = system.kv != "paged"
        self._keeps = system.future != "none"
        self._validate = validate
        self._trace_run = trace_run
        self._on_step = on_step
        made = places(cluster, system)
        self.nodes = Nodes(
            agenda, made, cluster.max_batched_tokens, self.outcome, self.tell, self._arm
        )
        self._node_infos = node_infos(cluster, made)
        self._half_trip_s = {
            name: place.node.rtt_s / 2 for name, place in made.items() if place.node.rtt_s
        }
        self.apps = Apps(
            agenda,
            system,
            foresight,
            idle_service(cluster),
            self.outcome,
            self.tell,
            self._arrived,
        )
        self._claims = self.scheduler.ledger.claims
        self._commands: dict[type, Callable[..., None]] = {
            Dispatch: self._dispatch,
            SetResidency: self.nodes.move,
            SetKvLimit: self.nodes.limit_kv,
            KeepPrefix: self._keep,
            DropPrefix: self._drop,
            Preempt: self._preempt,
            Reject: self._reject,
            Prewarm: self._unknown,
            Abort: self._unknown,
        }
        self._ticks = 0
        self._sample_ticks = _SAMPLE_TICKS
        self._samples: list[list[MemorySample]] = []

    def run(self, runs: Iterable[SimRun], closed: int | None, horizon_s: float | None) -> Outcome:
        for info in self._node_infos:
            self.tell(NodeJoined(info))
        self._agenda.at(TICK_S, self._tick)
        self.apps.play(runs, closed)
        self._agenda.play(self.apps.go_on, inf if horizon_s is None else horizon_s)
        self.outcome.simulated_s = self._agenda.now
        for call in self.apps.calls.values():
            if call.worker:
                self._release(call)
        self.outcome.kv_used_byte_s = self.nodes.kv_used_byte_s()
        self.outcome.memory = [one for samples in self._samples for one in samples]
        self.outcome.preemptions = self.scheduler.counts[Action.PREEMPTION]
        self.outcome.stalls += self.scheduler.counts[Action.DELAY]
        return self.outcome

    def tell(self, event: Event) -> None:
        """Let the scheduler handle the event, and carry out what it answers."""
        now = self._agenda.now
        commands = self.scheduler.handle(event, now)
        if self._validate:
            self.scheduler.validate()
        if self._on_step is not None:
            self._on_step(now, event, commands)
        for command in commands:
            self._commands[type(command)](command)

    def _tick(self, _: None) -> None:
        self._agenda.at(self._agenda.now + TICK_S, self._tick)
        self._ticks += 1
        if self._ticks % self._sample_ticks == 0:
            self._samples.append(self.nodes.sample(self._reserved))
            if len(self._samples) > _MOST_SAMPLES:
                del self._samples[1::2]
                self._sample_ticks *= 2
        if self._keeps:
            kept = sum(claim.kv_kept for claim in self._claims.values())
            self.outcome.kv_reserved_byte_s += kept * TICK_S
        self.tell(Tick())

    def _reserved(self, worker: str) -> int:
        claim = self._claims.get(worker)
        return claim.kv_used if claim else 0

    # --- calls ----------------------------------------------------------------------------------

    def _arrived(self, call: LiveCall) -> None:
        model = call.spec.model
        if not self.nodes.ready(model):
            self.outcome.cold_starts += 1
        self.nodes.queued(model, 1)

    def _dispatch(self, command: Dispatch) -> None:
        call = self.apps.calls[command.call]
        now = self._agenda.now
        outcome = self.outcome
        waited_s = now - call.arrived
        if not call.tries:
            outcome.queue_wait_s += waited_s
            outcome.max_wait_s = max(outcome.max_wait_s, waited_s)
        self.nodes.queued(call.spec.model, -1)
        call.tries += 1
        call.worker = command.worker
        call.dispatched = call.reserved_since = now
        call.reserved = self._claims[command.worker].reservations[call.name]
        call.place = Whereabouts.ON_THE_WAY
        if half_s := self._half_trip_s.get(command.worker):
            self._agenda.at(now + half_s, self._admit, (call, command.priority, call.tries))
        else:
            self._admit((call, command.priority, call.tries))

    def _admit(self, about: tuple[LiveCall, int, int]) -> None:
        call, priority, tried = about
        if call.tries != tried or call.place is not Whereabouts.ON_THE_WAY:
            return  # it was taken back on the way
        call.place = Whereabouts.INSIDE
        spec, run = call.spec, call.run
        server = self.nodes.servers[call.worker]
        request = Request(
            call.name,
            spec.prompt_tokens,
            spec.output_tokens,
            priority,
            self._first_mark(call),
            None if spec.prefix_of is None else (run.name, spec.prefix_of),
            spec.prefix_tokens,
            (run.name, call.index),
        )
        call.request = request
        server.engine.add(request, self._agenda.now)
        self._arm(server)
        if not server.busy:
            self.nodes.work(server, True)

    def _first_mark(self, call: LiveCall) -> int:
        """The output at which the call has used up what was reserved for it; 0: never asked."""
        if not self._grows:
            return 0
        place = self.nodes.servers[call.worker].place
        tokens = call.reserved // place.model.kv_bytes_per_token - call.spec.prompt_tokens
        return max(1, tokens) if tokens < call.spec.output_tokens else 0

    def _arm(self, server: Server) -> None:
        """Be there when the engine has something to report."""
        due = server.engine.next_at()
        if due != server.due:
            server.due = due
            if due != inf:
                self._agenda.at(max(due, self._agenda.now), self._due, (server, due))

    def _due(self, about: tuple[Server, float]) -> None:
        server, due = about
        if server.due != due:
            return  # something has changed since
        happened = server.engine.advance(self._agenda.now)
        for happening in happened:  # what ends together cannot be taken off one for another
            if happening.what is What.FINISHED:
                self.apps.calls[happening.request.call].place = Whereabouts.ON_THE_WAY_BACK
        for happening in happened:
            self._happened(server, happening)
        if server.shrinking:
            self.nodes.settle(server)
        self._arm(server)
        if server.due == inf and server.busy:
            self.nodes.work(server, False)

    def _happened(self, server: Server, happening: Happening) -> None:
        request = happening.request
        if happening.what is What.FINISHED:
            call = self.apps.calls[request.call]
            self._release(call)
            outcome = self.outcome
            outcome.recomputed_tokens += request.recomputed_tokens
            outcome.stalls += request.preemptions
            call.first_token = request.first_at
            if half_s := self._half_trip_s.get(call.worker):
                at = self._agenda.now + half_s
                self._agenda.at(at, self._finish, (call, request.cached_tokens))
            else:
                self._finish((call, request.cached_tokens))
        elif happening.what is What.MARK:
            self._grow(server, self.apps.calls[request.call], request)

    def _finish(self, about: tuple[LiveCall, int]) -> None:
        call, cached_tokens = about
        outcome, spec = self.outcome, call.spec
        outcome.calls_ended += 1
        outcome.work_s += call.alone_s
        outcome.prompt_tokens += spec.prompt_tokens
        outcome.cached_tokens += cached_tokens
        outcome.output_tokens += spec.output_tokens
        if call.run.name == self._trace_run:
            span = (call.arrived, call.dispatched, call.first_token, self._agenda.now)
            outcome.spans.append(CallSpan(call.index, spec.stage, spec.model, call.worker, *span))
        self.apps.ended(call, cached_tokens)

    def _grow(self, server: Server, call: LiveCall, request: Request) -> None:
        """The call has used up what was reserved for it."""
        generated = request.mark
        self.tell(CallProgress(call.name, call.spec.prompt_tokens, generated))
        self._release(call)
        call.reserved = self._claims[call.worker].reservations[call.name]
        if generated + _GROWTH_TOKENS < call.spec.output_tokens:
            server.engine.watch(call.name, generated + _GROWTH_TOKENS)

    def _release(self, call: LiveCall) -> None:
        """Count what was reserved for the call until now."""
        now = self._agenda.now
        self.outcome.kv_reserved_byte_s += call.reserved * (now - call.reserved_since)
        call.reserved_since = now

    def _preempt(self, command: Preempt) -> None:
        call = self.apps.calls.get(command.call)
        if call is None or call.place is Whereabouts.ON_THE_WAY_BACK:
            failed = CommandFailed(command.id, "it has ended")
            self._agenda.at(self._agenda.now, self.tell, failed)
            return
        server = self.nodes.servers[command.worker]
        self._release(call)
        if call.place is Whereabouts.INSIDE:
            outcome, request = self.outcome, call.request
            assert request is not None
            outcome.stalls += request.preemptions
            outcome.recomputed_tokens += request.recomputed_tokens
            outcome.recomputed_tokens += server.engine.remove(call.name, self._agenda.now)
            self._arm(server)
        call.place, call.worker = Whereabouts.OUTSIDE, ""
        self.nodes.queued(call.spec.model, 1)
        self._agenda.at(self._agenda.now, self.tell, CommandApplied(command.id))

    def _reject(self, command: Reject) -> None:
        """The call will never be served; its run does not end."""
        call = self.apps.calls.pop(command.call)
        self.nodes.queued(call.spec.model, -1)
        self.outcome.calls_rejected += 1
        self.apps.gave_up(call)

    def _keep(self, command: KeepPrefix) -> None:
        self.nodes.keep(command, _entry(command.call))

    def _drop(self, command: DropPrefix) -> None:
        self.nodes.drop(command, _entry(command.call))

    def _unknown(self, command: Command) -> None:
        raise MaestroError(f"the simulator cannot carry out {type(command).__name__}")


def _entry(call: str) -> tuple[str, int]:
    """The name of what a call leaves in the prefix cache."""
    run, _, index = call.rpartition("#")
    return run, int(index)
