"""Events in any order, also senseless ones, and commands that fail: the books balance, and when
the storm is over every call is answered."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from maestro_backend.scheduler import (
    Abort,
    CallArrived,
    CallCancelled,
    CallFailed,
    CallFinished,
    CallProgress,
    Command,
    CommandApplied,
    CommandFailed,
    DeviceInfo,
    Dispatch,
    Event,
    ForecastCall,
    ForecastChanged,
    KeepPrefix,
    KvGeometry,
    KvGroup,
    Length,
    NodeInfo,
    NodeJoined,
    NodeLost,
    Preempt,
    Reject,
    Residency,
    RunEnded,
    Scheduler,
    SetKvLimit,
    SetResidency,
    Tick,
    WorkerChanged,
    WorkerInfo,
    WorkerState,
)
from maestro_backend.scheduler.policies import POLICIES, policy

MODELS = ("a", "b", "c", "d")
WEIGHTS, FLOOR, MOST, RESIDUAL = 10_000, 1_000, 4_000, 100
WHOLE = WEIGHTS + MOST + RESIDUAL
DEVICE, HOST, PARKED, DISK = list(Residency)[:4]
TIERS = ((DEVICE, DISK), (DEVICE, PARKED, DISK), (DEVICE, HOST, PARKED, DISK), (DEVICE, HOST, DISK))
ON_THE_WAY = {
    (WorkerState.STOPPED, DEVICE): WorkerState.STARTING,
    (WorkerState.SUSPENDED, DEVICE): WorkerState.RESUMING,
    (WorkerState.READY, HOST): WorkerState.SUSPENDING,
    (WorkerState.READY, PARKED): WorkerState.SUSPENDING,
    (WorkerState.READY, DISK): WorkerState.STOPPING,
    (WorkerState.SUSPENDED, DISK): WorkerState.STOPPING,
}


GEOMETRIES = (
    None,
    KvGeometry(64, (KvGroup(64, FLOOR // 64),)),
    KvGeometry(48, (KvGroup(16, 10), KvGroup(16, 3), KvGroup(1000, 1))),
)


def stopped(
    model: str, tiers: tuple[Residency, ...], elastic: bool, geometry: KvGeometry | None
) -> WorkerInfo:
    return WorkerInfo(
        f"n/{model}",
        "n",
        "cpu",
        model,
        WorkerState.STOPPED,
        DISK,
        weights_bytes=WEIGHTS,
        kv_limit_bytes=MOST,
        kv_floor_bytes=FLOOR,
        kv_max_bytes=MOST,
        kv_geometry=geometry,
        elastic=elastic,
        residual_bytes=RESIDUAL,
        host_copy_bytes=WEIGHTS,
        tiers=tiers,
        max_inflight=3,
    )


class AnyOrder(RuleBasedStateMachine):
    """A mirror keeps the truth of each call, and of what the node has done."""

    @initialize(
        name=st.sampled_from(sorted(POLICIES)),
        fitting=st.integers(WHOLE, 3 * WHOLE),
        host=st.sampled_from((0, WEIGHTS, 2 * WEIGHTS)),
        tiers=st.tuples(*[st.sampled_from(TIERS)] * len(MODELS)),
        elastic=st.tuples(*[st.booleans()] * len(MODELS)),
        geometries=st.tuples(*[st.sampled_from(GEOMETRIES)] * len(MODELS)),
    )
    def begin(
        self,
        name: str,
        fitting: int,
        host: int,
        tiers: tuple[tuple[Residency, ...], ...],
        elastic: tuple[bool, ...],
        geometries: tuple[KvGeometry | None, ...],
    ) -> None:
        self.core = Scheduler(policy(name))
        self.now = 0.0
        self.calls = 0
        self.queued: set[str] = set()
        self.running: dict[str, str] = {}
        self.ended: set[str] = set()
        self.requests: dict[str, CallArrived] = {}
        self.tries: Counter[str] = Counter()
        self.pending: dict[int, Command] = {}
        self.preempted: dict[int, int] = {}
        """The try that each Preempt is about."""
        self.sizes = {"devices": (DeviceInfo("cpu", fitting),), "host_capacity_bytes": host}
        self.infos = {
            f"n/{m}": stopped(m, *parts)
            for m, *parts in zip(MODELS, tiers, elastic, geometries, strict=True)
        }
        self.alive = True
        self.feed(NodeJoined(self.node(), preload=MODELS))

    def node(self) -> NodeInfo:
        return NodeInfo("n", workers=tuple(self.infos.values()), **self.sizes)  # type: ignore[arg-type]

    def feed(self, event: Event) -> None:
        self.now += 1.0
        for command in self.core.handle(event, self.now):
            self.obey(command)

    def obey(self, command: Command) -> None:
        match command:
            case Dispatch(call=call, worker=where):
                assert call in self.queued, f"{call} was not waiting"
                assert not self.sources_of(call), f"{call} started before its join"
                assert self.infos[where].state is WorkerState.READY
                self.queued.remove(call)
                self.running[call] = where
                self.tries[call] += 1
            case Reject(call=call):
                assert call not in self.ended, f"{call} had ended"
                self.queued.discard(call)
                self.running.pop(call, None)
                self.ended.add(call)
            case Abort(call=call):
                assert call in self.ended
            case Preempt(call=call, worker=where):
                assert self.running[call] == where
                self.pending[command.id] = command
                self.preempted[command.id] = self.tries[call]
            case SetKvLimit(worker=worker, limit_bytes=limit):
                assert FLOOR <= limit <= MOST and self.infos[worker].elastic
                self.pending[command.id] = command
            case SetResidency(model=model):
                assert command.residency in self.infos[f"n/{model}"].tiers
                self.pending[command.id] = command
            case KeepPrefix():
                self.pending[command.id] = command

    def sources_of(self, call: str) -> list[str]:
        """Live calls of the stages that `call` joins which came before it, in its run."""
        mine = self.requests[call]
        return [
            other
            for other, request in self.requests.items()
            if request.run == mine.run
            and request.stage in mine.waits_for
            and int(other[1:]) < int(call[1:])
            and other not in self.ended
        ]

    # --- calls ----------------------------------------------------------------------------------

    @rule(
        model=st.sampled_from(MODELS),
        run=st.integers(0, 3),
        join=st.booleans(),
        kv=st.sampled_from((100, 600, 1500, 9000)),
    )
    def arrive(self, model: str, run: int, join: bool, kv: int) -> None:
        call = f"c{self.calls}"
        self.calls += 1
        self.queued.add(call)
        waits = ("s0",) if join else ()
        stage = "s1" if join else "s0"
        event = CallArrived(call, f"r{run}", stage, model, Length(5, 9), kv, 1.0, waits_for=waits)
        self.requests[call] = event
        self.feed(event)

    @rule(data=st.data(), tokens=st.sampled_from((0, 200, 900)))
    def finish(self, data: st.DataObject, tokens: int) -> None:
        if self.running:
            call = data.draw(st.sampled_from(sorted(self.running)))
            self.end(call, CallFinished(call, tokens, tokens))

    def end(self, call: str, event: Event) -> None:
        self.queued.discard(call)
        self.running.pop(call, None)
        self.ended.add(call)
        self.feed(event)

    @rule(data=st.data(), retryable=st.booleans(), worker_lost=st.booleans())
    def fail(self, data: st.DataObject, retryable: bool, worker_lost: bool) -> None:
        if self.running:
            call = data.draw(st.sampled_from(sorted(self.running)))
            del self.running[call]
            (self.queued if retryable else self.ended).add(call)
            self.feed(CallFailed(call, "broken", retryable, worker_lost))

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if live := sorted(self.queued | set(self.running)):
            call = data.draw(st.sampled_from(live))
            self.end(call, CallCancelled(call))

    @rule(data=st.data(), tokens=st.integers(0, 4500))
    def progress(self, data: st.DataObject, tokens: int) -> None:
        if self.running:
            call = data.draw(st.sampled_from(sorted(self.running)))
            self.feed(CallProgress(call, 100, tokens))

    # --- what the node does ---------------------------------------------------------------------

    def change(self, worker: str, **changes: Any) -> None:
        self.infos[worker] = replace(self.infos[worker], **changes)
        self.feed(WorkerChanged(self.infos[worker]))

    @rule(data=st.data(), works=st.booleans(), late=st.booleans())
    @precondition(lambda self: self.pending)
    def answer(self, data: st.DataObject, works: bool, late: bool) -> None:
        self.settle(data.draw(st.sampled_from(sorted(self.pending))), works, late)

    def settle(self, number: int, works: bool, late: bool = False) -> None:
        """Answer one command; `late`: a shrink is taken over, and has to wait for blocks."""
        command = self.pending.pop(number)
        match command:
            case SetResidency():
                works = self.move(command, works)
            case SetKvLimit(worker=worker, limit_bytes=limit):
                info = self.infos[worker]
                works = works and info.state is not WorkerState.STOPPED
                if works and not (late and limit < info.kv_limit_bytes):
                    self.change(worker, kv_limit_bytes=limit)
            case Preempt(call=call, worker=where):
                same = self.preempted[number] == self.tries[call]
                works = works and same and self.running.get(call) == where
                if works:
                    del self.running[call]
                    self.queued.add(call)
        self.feed(CommandApplied(number) if works else CommandFailed(number, "could not"))

    def move(self, command: SetResidency, works: bool) -> bool:
        worker = f"n/{command.model}"
        info, to = self.infos[worker], command.residency
        if info.state is WorkerState.FAILED and to is not DEVICE:
            works = False
        if not works:
            gone = info.state in (WorkerState.STARTING, WorkerState.STOPPING)
            back = {WorkerState.RESUMING: WorkerState.SUSPENDED}.get(info.state, WorkerState.READY)
            if gone:
                self.stop(worker)
            elif info.state in (WorkerState.RESUMING, WorkerState.SUSPENDING):
                self.change(worker, state=back, **self.cache_of_one_size(worker, back))
            return False
        limit = command.kv_limit_bytes
        changes: dict[str, Any] = {} if limit is None else {"kv_limit_bytes": limit}
        if to is DISK:
            self.stop(worker)
        elif to is DEVICE:
            changes |= self.cache_of_one_size(worker, WorkerState.READY)
            self.change(worker, state=WorkerState.READY, residency=to, **changes)
        else:
            host = WEIGHTS if to is HOST else 0
            changes |= {"residency": to, "host_bytes": host}
            changes |= self.cache_of_one_size(worker, WorkerState.SUSPENDED)
            self.change(worker, state=WorkerState.SUSPENDED, **changes)
        return True

    def cache_of_one_size(self, worker: str, state: WorkerState) -> dict[str, Any]:
        """It leaves with the weights, as a whole, unless a call has KV in it."""
        if self.infos[worker].elastic:
            return {}
        leaves = state is WorkerState.SUSPENDED and worker not in self.running.values()
        return {"kv_limit_bytes": 0 if leaves else MOST}

    def stop(self, worker: str, state: WorkerState = WorkerState.STOPPED) -> None:
        self.change(worker, state=state, residency=DISK, kv_limit_bytes=MOST, host_bytes=0)

    @rule(data=st.data())
    def on_the_way(self, data: st.DataObject) -> None:
        moves = [c for c in self.pending.values() if isinstance(c, SetResidency)]
        if moves:
            move = data.draw(st.sampled_from(moves))
            worker = f"n/{move.model}"
            state = ON_THE_WAY.get((self.infos[worker].state, move.residency))
            if state is not None:
                self.change(worker, state=state, **self.cache_of_one_size(worker, state))

    @rule(model=st.sampled_from(MODELS), state=st.sampled_from(("restarting", "failed")))
    def break_worker(self, model: str, state: str) -> None:
        worker = f"n/{model}"
        if self.alive and self.infos[worker].state is WorkerState.READY:
            if state == "failed":
                self.stop(worker, WorkerState.FAILED)
            else:
                self.change(worker, state=WorkerState.RESTARTING)

    @rule(model=st.sampled_from(MODELS))
    def die_aside(self, model: str) -> None:
        """A process whose weights are aside dies; it is not started again by itself."""
        worker = f"n/{model}"
        if self.alive and self.infos[worker].state is WorkerState.SUSPENDED:
            self.stop(worker)

    @rule(model=st.sampled_from(MODELS))
    def recover(self, model: str) -> None:
        if self.alive and self.infos[f"n/{model}"].state is WorkerState.RESTARTING:
            self.change(f"n/{model}", state=WorkerState.READY)

    @rule()
    def lose_or_regain_node(self) -> None:
        """Moves under way are given up; the workers are found again as they are."""
        if self.alive:
            self.pending = {i: c for i, c in self.pending.items() if isinstance(c, Preempt)}
            self.alive = False
            self.feed(NodeLost("n"))
            return
        self.alive = True
        ends = {
            WorkerState.STARTING: (WorkerState.STOPPED, DISK),
            WorkerState.STOPPING: (WorkerState.STOPPED, DISK),
            WorkerState.RESUMING: (WorkerState.SUSPENDED, None),
            WorkerState.SUSPENDING: (WorkerState.READY, None),
        }
        for worker, info in self.infos.items():
            state, residency = ends.get(info.state, (info.state, None))
            gone = self.cache_of_one_size(worker, state)
            gone |= {"kv_limit_bytes": MOST, "host_bytes": 0} if residency else {}
            new = replace(info, state=state, residency=residency or info.residency, **gone)
            self.infos[worker] = new
        self.feed(NodeJoined(self.node()))

    # --- runs and time --------------------------------------------------------------------------

    @rule(
        run=st.integers(0, 3),
        model=st.sampled_from(MODELS),
        p=st.sampled_from((0.2, 0.9)),
        start=st.sampled_from((0.0, 5.0, 500.0)),
    )
    def forecast(self, run: int, model: str, p: float, start: float) -> None:
        call = ForecastCall("s1", "", model, p, start, 10, Length(5, 9), 2.0)
        self.feed(ForecastChanged(f"r{run}", (call,)))

    @rule(run=st.integers(0, 3))
    def end_run(self, run: int) -> None:
        self.feed(RunEnded(f"r{run}"))

    @rule()
    def tick(self) -> None:
        self.now += 20.0
        self.feed(Tick())

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "core"):
            return
        self.core.validate()
        assert set(self.core.calls.by_id) == self.queued | set(self.running)
        placed = {c: w for w, calls in self.core.calls.running.items() for c in calls}
        assert placed == self.running

    def teardown(self) -> None:
        """From here on all works: whoever waits is answered."""
        if not hasattr(self, "core"):
            return
        if not self.alive:
            self.lose_or_regain_node()
        for _ in range(40 * (1 + self.calls)):
            if not self.queued and not self.running:
                break
            for model in MODELS:
                self.recover(model)
            for number in sorted(self.pending):
                if number in self.pending:
                    self.settle(number, works=True)
            for call in sorted(self.running):
                if call in self.running:
                    self.end(call, CallFinished(call, 10, 5))
            self.books_balance()
            self.tick()
        waiting = {c: self.requests[c].model for c in self.queued | set(self.running)}
        assert not waiting, f"never answered: {waiting}, workers {self.core.workers}"


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
