"""The load of the scheduler benchmark: workers that are all taken, and more calls than places.

No engine: a dispatched call is over after a drawn time, and orders to workers are carried out a
moment later. Each call that ends is followed by another of the same model, of the same run where it
has one left, so that the queues keep their lengths. All sizes and times are ours.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from maestro_agents.protocol import BackendError
from maestro_backend.scheduler import (
    CallArrived,
    CallFinished,
    CallPredicted,
    CallProgress,
    Command,
    CommandApplied,
    CommandFailed,
    DeviceInfo,
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
    Residency,
    RunEnded,
    RunStarted,
    SetKvLimit,
    Tick,
    WorkerChanged,
    WorkerInfo,
    WorkerState,
    one_group,
)

WINDOW = 8
"""Places of a worker."""
FILL_S = 30.0
"""The queues have been filled in so many simulated seconds."""

_GIB = 2**30
_TOKEN_BYTES = 2**17
"""KV bytes of a token: 32 layers with 8 heads of 128, in 16 bits, keys and values."""
_WEIGHTS = (6 * _GIB, 15 * _GIB, 28 * _GIB)
_ON_A_DEVICE = 3
_DEVICES = 8
_LONGEST = 2**13

_WIDTH, _CALLS = 4, 12
"""Calls of a run at any time, and in all: three fan-outs."""
_SLO = (("interactive", 20.0), ("standard", 120.0), ("batch", None))
_TENANTS = 16
_SERVICE_S = 20.0
_PREDICTED_S, _LIMIT_S = 0.02, 0.05
"""From the arrival of a call to its prediction, and from an order to a worker to its report."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much there is of everything; `calls` are those in the queues."""

    calls: int
    workers: int
    models: int


@dataclass(slots=True)
class _Run:
    name: str
    number: int
    models: list[str]
    left: int
    issued: int = 0
    live: int = 0


@dataclass(frozen=True, slots=True)
class _Call:
    arrived: CallArrived
    run: _Run
    service_s: float


Tell = Callable[[Event, float], list[Command]]


class Load:
    """Plays the outside of a scheduler that is reached through `tell`, on simulated seconds."""

    def __init__(self, size: Size, seed: int, tell: Tell) -> None:
        self.now = 0.0
        self.size = size
        self.models = [f"model-{n}" for n in range(min(size.models, size.workers))]
        """No more than there are workers: each has a worker that is ready."""
        self._random = Random(seed)
        self._tell_scheduler = tell
        self._agenda: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._put = 0
        self._workers: dict[str, WorkerInfo] = {}
        self._calls: dict[str, _Call] = {}
        self._tries: dict[str, int] = {}
        """How often each live call was dispatched."""
        self._runs = 0
        self._newest: _Run | None = None

    def fill(self) -> None:
        """Let the nodes join, take all places, fill the queues; then time begins to count."""
        for node in self._nodes():
            self._tell(NodeJoined(node))
        places = WINDOW * self.size.workers
        count = len(self.models)
        models = [self.models[n % count] for n in range(places)]
        waiting = [self.models[n % count] for n in range(self.size.calls)]
        self._random.shuffle(models)
        self._random.shuffle(waiting)
        models += waiting
        for n, model in enumerate(models):
            self._play(FILL_S * n / len(models))
            self._arrive(self._run_for_one_more(self._random.randrange(_CALLS - _WIDTH + 1)), model)
        self._play(FILL_S)
        self._at(FILL_S + 1, self._tick)

    def step(self) -> None:
        """The next thing happens."""
        self.now, _, action, about = heapq.heappop(self._agenda)
        action(*about)

    def _play(self, until: float) -> None:
        while self._agenda and self._agenda[0][0] <= until:
            self.step()
        self.now = until

    def _at(self, time: float, action: Callable[..., None], *about: Any) -> None:
        self._put += 1
        heapq.heappush(self._agenda, (time, self._put, action, about))

    def _tick(self) -> None:
        self._at(self.now + 1, self._tick)
        self._tell(Tick())

    # --- nodes ----------------------------------------------------------------------------------

    def _nodes(self) -> list[NodeInfo]:
        """Devices of 80 GiB, eight to a node, three workers of different models on each."""
        for n in range(self.size.workers):
            info = _worker(n, n % len(self.models))
            self._workers[info.worker] = info
        by_node: dict[str, list[WorkerInfo]] = {}
        for info in self._workers.values():
            by_node.setdefault(info.node, []).append(info)
        devices = tuple(DeviceInfo(f"gpu-{n}", 80 * _GIB) for n in range(_DEVICES))
        return [
            NodeInfo(node, devices, tuple(infos), 1024 * _GIB) for node, infos in by_node.items()
        ]

    # --- what happens to calls ------------------------------------------------------------------

    def _run_for_one_more(self, left: int) -> _Run:
        """The newest run, until it has its first calls, then another; `left`: calls after these."""
        run = self._newest
        if run is None or run.issued >= _WIDTH:
            number = self._runs
            self._runs += 1
            models = [self._random.choice(self.models) for _ in range(_CALLS // _WIDTH)]
            run = self._newest = _Run(f"run-{number}", number, models, left + _WIDTH)
            slo, deadline_s = _SLO[number % len(_SLO)]
            tenant = f"tenant-{number % _TENANTS}"
            self._tell(RunStarted(run.name, "bench", slo, deadline_s, tenant))
            self._forecast(run)
        return run

    def _arrive(self, run: _Run, model: str) -> None:
        """A call of the run comes; in every third run, the last of a fan-out joins the others."""
        random = self._random
        service_s = random.lognormvariate(0, 0.6) * _SERVICE_S / 1.2
        prompt_tokens = min(int(random.lognormvariate(7.2, 0.6)), _LONGEST // 2)
        p50 = service_s * 30 * random.uniform(0.7, 1.4)
        fan_out, place = divmod(run.issued, _WIDTH)
        joins = run.number % 3 == 0 and place == _WIDTH - 1
        event = CallArrived(
            f"{run.name}-{run.issued}",
            run.name,
            f"join-{fan_out}" if joins else f"stage-{fan_out}",
            model,
            Length(p50, p50 * 1.8),
            min(prompt_tokens + int(p50 * 1.8), _LONGEST),
            p50 / 30,
            tenant=f"tenant-{run.number % _TENANTS}",
            prompt_tokens=prompt_tokens,
            waits_for=(f"stage-{fan_out}",) if joins else (),
        )
        run.issued += 1
        run.left -= 1
        run.live += 1
        self._calls[event.call] = _Call(event, run, service_s)
        self._tries[event.call] = 0
        if run.number % 2:
            self._at(self.now + _PREDICTED_S, self._predict, event.call)
        self._tell(event)

    def _predict(self, name: str) -> None:
        if call := self._calls.get(name):
            old, service_s = call.arrived, call.service_s
            p50 = (old.length.p50 + service_s * 30) / 2
            kv_tokens = min(old.prompt_tokens + int(p50 * 1.8), _LONGEST)
            self._tell(CallPredicted(name, Length(p50, p50 * 1.8), kv_tokens, p50 / 30))

    def _progress(self, name: str, tried: int, share: float) -> None:
        if self._tries.get(name) == tried:
            call = self._calls[name]
            tokens = min(int(call.service_s * 30 * share), _LONGEST // 2)
            self._tell(CallProgress(name, call.arrived.prompt_tokens, tokens))

    def _finish(self, name: str, tried: int) -> None:
        """A call is over; another of its model takes its place in the queue."""
        if self._tries.get(name) != tried:
            return  # it was taken off its worker meanwhile
        call = self._calls.pop(name)
        del self._tries[name]
        run, model = call.run, call.arrived.model
        run.live -= 1
        tokens = min(int(call.service_s * 30), _LONGEST // 2)
        self._tell(CallFinished(name, call.arrived.prompt_tokens, tokens))
        self._forecast(run)
        if run.left:
            self._arrive(run, model)
            return
        if not run.live:
            self._tell(RunEnded(run.name))
        self._arrive(self._run_for_one_more(_CALLS - _WIDTH), model)

    def _forecast(self, run: _Run) -> None:
        coming = tuple(
            ForecastCall(
                f"stage-{_CALLS // _WIDTH - n}",
                "worker",
                run.models[-n],
                1.0 if n % 2 else 0.4,
                _SERVICE_S * (run.left / _WIDTH - n + 1),
                1500,
                Length(600, 1000),
                _SERVICE_S,
            )
            for n in range(-(-run.left // _WIDTH), 0, -1)
        )
        self._tell(ForecastChanged(run.name, coming))

    # --- commands -------------------------------------------------------------------------------

    def _tell(self, event: Event) -> None:
        for command in self._tell_scheduler(event, self.now):
            match command:
                case Dispatch():
                    self._dispatch(command)
                case SetKvLimit():
                    self._at(self.now + _LIMIT_S, self._set_limit, command)
                case KeepPrefix() | DropPrefix():
                    self._at(self.now + _LIMIT_S, self._tell, CommandApplied(command.id))
                case Preempt():
                    self._at(self.now + _LIMIT_S, self._preempt, command)
                case _:
                    raise BackendError(f"the benchmark's load does not call for {command}")

    def _dispatch(self, command: Dispatch) -> None:
        """What begins while the queues are filled is somewhere in its midst when time begins."""
        name = command.call
        call = self._calls[name]
        self._tries[name] = tried = self._tries[name] + 1
        begun, service_s = max(self.now, FILL_S), call.service_s
        if self.now < FILL_S:
            service_s *= self._random.random()
        for share in (0.4, 0.8):
            self._at(begun + service_s * share, self._progress, name, tried, share)
        self._at(begun + service_s, self._finish, name, tried)

    def _set_limit(self, command: SetKvLimit) -> None:
        info = replace(self._workers[command.worker], kv_limit_bytes=command.limit_bytes)
        self._workers[command.worker] = info
        self._tell(WorkerChanged(info))
        self._tell(CommandApplied(command.id))

    def _preempt(self, command: Preempt) -> None:
        if command.call in self._tries:
            self._tries[command.call] += 1
            self._tell(CommandApplied(command.id))
        else:
            self._tell(CommandFailed(command.id, "it has ended"))


def _worker(number: int, model: int) -> WorkerInfo:
    """A worker with half of the KV memory that it can have."""
    device = number // _ON_A_DEVICE
    weights = _WEIGHTS[model % len(_WEIGHTS)]
    return WorkerInfo(
        f"node-{device // _DEVICES}/worker-{number}",
        f"node-{device // _DEVICES}",
        f"gpu-{device % _DEVICES}",
        f"model-{model}",
        WorkerState.READY,
        Residency.DEVICE,
        weights,
        kv_limit_bytes=4 * _GIB,
        kv_floor_bytes=_LONGEST * _TOKEN_BYTES,
        kv_max_bytes=8 * _GIB,
        kv_bytes_per_token=_TOKEN_BYTES,
        kv_geometry=one_group(16 * _TOKEN_BYTES, 16),
        elastic=True,
        residual_bytes=_GIB,
        host_copy_bytes=weights,
        tiers=(Residency.DEVICE, Residency.HOST, Residency.PARKED, Residency.DISK),
        activation_s={Residency.HOST: 2.0, Residency.PARKED: 8.0, Residency.DISK: 60.0},
        max_inflight=WINDOW,
        max_model_len=_LONGEST,
    )
