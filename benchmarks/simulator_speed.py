"""How fast the simulator is: calls per minute on one core, small and large clusters.

    make bench NAME=simulator_speed
    make bench NAME=simulator_speed ARGS="--calls 200000 --repeats 5"

`fcfs` without a predictor and `maestro` with predictions made ahead, on synthetic runs at 0.9 of
what the cluster can serve; and `fcfs` on 1,000 devices. Medians of the repeats, and their spread.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from statistics import median

from maestro_backend.clusters import load_cluster, scaled
from maestro_backend.foresight import foresee
from maestro_backend.simulator import Cluster, Foresight, idle_service, simulate, system
from maestro_backend.study import saturation
from maestro_backend.workloads import (
    backlog,
    draw,
    load_mix,
    prepare,
    read_arrivals,
    read_workflows,
)

LOAD = 0.9
DEVICES = 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--calls", type=int, default=50_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workflows", nargs="+", default=["synthetic:mixed"])
    options = parser.parse_args()
    small, mix = load_cluster("paper"), load_mix("paper")
    recorded = read_workflows(options.workflows).cut(mix.max_calls)
    templates = prepare(recorded, mix, small.models)
    service = idle_service(small)
    rate = saturation(small, service, lambda calls, seed: backlog(templates, mix, calls, seed))
    models = {one.key: [call.model for call in one.calls] for one in templates}
    foresight = foresee(
        recorded.runs,
        trained=None,
        history=[],
        models=lambda example: models[example.source, example.run][example.index],
        service_s=lambda model, prompt, output: service(model, prompt, output, 0),
    )

    def play(cluster: Cluster, name: str, known: Foresight) -> Callable[[], int]:
        devices = sum(len(node.devices) for node in cluster.nodes)
        times = rate * LOAD * devices / 8
        runs = draw(templates, mix, read_arrivals("poisson"), times, options.calls, 1)
        return lambda: simulate(cluster, system(name), runs, known).calls_ended

    large = scaled(small, DEVICES)
    for label, cluster, name, known in (
        ("fcfs, 8 devices", small, "fcfs", {}),
        ("maestro, 8 devices", small, "maestro", foresight),
        (f"fcfs, {DEVICES} devices", large, "fcfs", {}),
        (f"maestro, {DEVICES} devices", large, "maestro", foresight),
    ):
        _report(
            label, [_calls_per_minute(play(cluster, name, known)) for _ in range(options.repeats)]
        )
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sys.stdout.write(f"peak memory {peak_mib:.0f} MiB\n")
    return 0


def _calls_per_minute(work: Callable[[], int]) -> float:
    started = time.process_time()
    calls = work()
    return calls / (time.process_time() - started) * 60


def _report(label: str, found: list[float]) -> None:
    sys.stdout.write(
        f"{label:<24} {median(found):>10,.0f} calls/min "
        f"({min(found):,.0f} to {max(found):,.0f}), {60e6 / median(found):.0f} us a call\n"
    )
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
