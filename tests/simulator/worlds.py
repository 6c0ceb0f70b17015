"""Small clusters and runs for simulator tests. An engine step takes 0.1 s, whatever is in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from maestro_backend.scheduler import Command, Dispatch, Event, ForecastCall, Length, Rest
from maestro_backend.simulator import (
    CallForesight,
    Cluster,
    DeviceProfile,
    ModelGeometry,
    Outcome,
    SimCall,
    SimDevice,
    SimNode,
    SimRun,
    System,
    Template,
    simulate,
)

STEP_S = 0.1
MIB = 2**20
WEIGHTS = 100 * MIB
KV_TOKEN = 2**10

PROFILE = DeviceProfile(
    name="toy",
    capacity_bytes=400 * MIB,
    bandwidth=1e30,
    flops=1e30,
    memory_share=1.0,
    compute_share=1.0,
    step_s=STEP_S,
    to_device=WEIGHTS / 2.0,
    to_host=WEIGHTS / 0.5,
    allreduce_s=0.0,
    residual_bytes=MIB,
    start_s=30.0,
    wake_s=1.0,
    limit_s=0.05,
)
"""From host memory weights come in 1 + 2 s, and go there in 1 + 0.5 s."""

FCFS = System("fcfs", "for tests", order="fcfs", lengths="none", future="none")
TRUE = System("true", "for tests", lengths="true", future="true")


def model(name: str) -> ModelGeometry:
    return ModelGeometry(name, 1, WEIGHTS, 1, 1, KV_TOKEN // 4, max_model_len=32_768)


def cluster(
    *models: str,
    capacity: int = 400 * MIB,
    host: int = 10**12,
    seqs: int = 4,
    devices: int = 1,
    rtt_s: float = 0.0,
) -> Cluster:
    """Devices that may each hold all the models; the first one is there at the start."""
    names = models or ("m",)
    profile = DeviceProfile(
        **{f: getattr(PROFILE, f) for f in PROFILE.__slots__ if f != "capacity_bytes"},
        capacity_bytes=capacity,
    )
    where = tuple(SimDevice(f"d{i}", profile, names, names[0]) for i in range(devices))
    nodes = (SimNode("n", where, host, WEIGHTS / 10.0, rtt_s=rtt_s),)
    kv_bytes = {name: 64 * MIB for name in names}
    return Cluster("toy", nodes, {name: model(name) for name in names}, kv_bytes, seqs, 100_000)


def chain(name: str, at: float, *outputs: int, models: Sequence[str] = ("m",)) -> SimRun:
    """Calls one after the other, the models in turn."""
    calls = tuple(
        SimCall(f"s{i}", models[i % len(models)], 100, tokens, after=(i - 1,) if i else ())
        for i, tokens in enumerate(outputs)
    )
    return run(name, at, *calls)


def run(name: str, at: float, *calls: SimCall, deadline_s: float | None = None) -> SimRun:
    return SimRun(name, at, Template("test", name, calls), deadline_s)


def guesses(runs: Iterable[SimRun]) -> Mapping[tuple[str, str], tuple[CallForesight, ...]]:
    """Foresight of somebody who has learned little: class default lengths, a common guess of what
    comes after any call. Apps name the stages that follow."""
    found = {}
    for one in runs:
        template = one.template
        usual = _expected(template.calls[0], 0.6)
        found[template.key] = tuple(
            CallForesight(
                _LENGTH,
                _LENGTH,
                Rest(1000.0, 2000.0, 2.0),
                (usual,),
                tuple(_expected(template.calls[f], 1.0) for f in template.followers[index]),
            )
            for index in range(len(template.calls))
        )
    return found


_LENGTH = Length(256, 512)


def _expected(call: SimCall, probability: float) -> ForecastCall:
    return ForecastCall(call.stage, "", call.model, probability, 2.0, 100, _LENGTH, 25.6)


@dataclass
class Story:
    """What happened, event by event."""

    outcome: Outcome = field(default_factory=Outcome)
    log: list[tuple[float, Event, tuple[Command, ...]]] = field(default_factory=list)

    def first(self, kind: type, call: str) -> float:
        """When an event of that kind came for the call, or a Dispatch was commanded."""
        for at, event, commands in self.log:
            told = commands if kind is Dispatch else (event,)
            if any(type(one) is kind and getattr(one, "call", "") == call for one in told):
                return at
        raise AssertionError(f"no {kind.__name__} of {call}")

    def makespan(self, of: SimRun) -> float:
        [found] = [one for one in self.outcome.runs if one.run is of]
        return found.finish - of.at


def play(
    where: Cluster,
    runs: Sequence[SimRun],
    system: System = FCFS,
    *,
    validate: bool = True,
    closed: int | None = None,
) -> Story:
    story = Story()
    story.outcome = simulate(
        where,
        system,
        sorted(runs, key=lambda one: one.at),
        guesses(runs),
        validate=validate,
        closed=closed,
        on_step=lambda at, event, commands: story.log.append((at, event, tuple(commands))),
    )
    return story
