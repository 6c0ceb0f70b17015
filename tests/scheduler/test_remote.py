"""Round trips to nodes count in the choice of a worker."""

from __future__ import annotations

from dataclasses import replace

from scheduler.scenes import arrival, node, worker

from maestro_backend.scheduler import Dispatch, NodeJoined, Scheduler, Settings
from maestro_backend.scheduler.policies import policy


def of(name: str, rtt_s: float, window: int = 8) -> NodeJoined:
    """A node with one worker of the model."""
    info = replace(worker(window=window, kv=10**9), worker=f"{name}/m", node=name)
    return NodeJoined(replace(node(info), node=name, rtt_s=rtt_s))


def two(rtt_s: float) -> Scheduler:
    core = Scheduler(policy("fcfs"), Settings())
    core.handle(of("near", 0.0), 0.0)
    core.handle(of("far", rtt_s), 0.0)
    return core


def started(core: Scheduler, count: int, service_s: float) -> list[str]:
    found: list[str] = []
    for i in range(count):
        commands = core.handle(arrival(f"c{i}", f"r{i}", service_s=service_s), 1.0)
        found += [c.worker for c in commands if isinstance(c, Dispatch)]
        core.validate()
    return found


def test_short_calls_stay_near_and_long_ones_spread() -> None:
    """A tenth of a second is a tenth of the short call's service, as much as one call beside it."""
    assert started(two(0.1), 6, service_s=0.1) == ["near/m"] * 6
    far = started(two(0.1), 6, service_s=100.0).count("far/m")
    assert far == 3


def test_a_full_near_worker_sends_calls_away() -> None:
    core = Scheduler(policy("fcfs"), Settings())
    core.handle(of("near", 0.0, window=1), 0.0)
    core.handle(of("far", 5.0), 0.0)
    assert started(core, 3, service_s=0.1) == ["near/m", "far/m", "far/m"]
