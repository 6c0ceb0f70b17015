"""Two models on room for one, three on room for two: announced ahead, or fetched when called.

With room for one nothing can come ahead of time: that scene shows what a switch costs.
"""

from __future__ import annotations

from typing import Any

from maestro_backend.bench import Plan, RecordedRun, Scene, bench_colocation

from ._step import HOST_MEMORY, Step, run

_RUNS = 2
_AIM = 0.8
_LEASE = "15s"


async def colocation(step: Step) -> None:
    """The app is a chain whose every stage calls another model than the one before."""
    sizes = ("medium", "medium", "small")
    await _scene(step, "three", dict(zip("abc", sizes, strict=True)), 2)
    await _scene(step, "two", dict(zip("ab", sizes[1:], strict=True)), 1)


async def _scene(step: Step, name: str, sizes: dict[str, str], room_for: int) -> None:
    models = {
        model: step.models.made_up(size, max_num_seqs=8, **_limits(step))
        for model, size in sizes.items()
    }
    stages = [model for _ in range(2) for model in models]
    model_of = {f"{number}-{model}": model for number, model in enumerate(stages)}
    runs = [RecordedRun(tuple((stage, ((256 if step.on_gpu else 64, 96),)) for stage in model_of))]
    plan = Plan(
        step.engine,
        systems=("maestro", "lru"),
        told=lambda system, result: step.figure(f"{name}_{system}", result),
        logs=step.logs,
        lease=_LEASE,
    )
    node = {"host_memory": HOST_MEMORY} if step.on_gpu else {}
    told = await bench_colocation(plan, Scene(models, model_of, runs * _RUNS, room_for, node))
    step.figure(f"{name}_budget_bytes", told["budget_bytes"])
    _judge(step, name, told["systems"])


def _limits(step: Step) -> dict[str, Any]:
    return {"kv_memory": "2GiB", "max_model_len": 2048} if step.on_gpu else {}


def _judge(step: Step, name: str, systems: dict[str, Any]) -> None:
    ours, theirs = systems["maestro"], systems["lru"]
    failed = ours["failed"] + theirs["failed"]
    step.check(f"{name}: no call fails", failed == 0, str(ours["failures"] + theirs["failures"]))
    over = ours["over_budget"] or theirs["over_budget"]
    step.check(f"{name}: never over the budget", not over, f"peak {ours['peak_bytes'] >> 20} MiB")
    hidden = ours["where_announced"]
    if step.on_gpu and name == "three":  # elsewhere moving and computing share the same cores
        told = f"{hidden} of it, {ours['announced']} of {ours['activations']} announced in time"
        step.check(f"{name}: announced activations are hidden", (hidden or 0) >= _AIM, told)
    step.figure(f"{name}_hidden", {s: r["where_announced"] for s, r in systems.items()})
    step.figure(f"{name}_run_s", {s: r["run_s_median"] for s, r in systems.items()})


if __name__ == "__main__":
    run(colocation)
