"""What load 1.0 means: the runs/s that `fcfs` on our node level can serve at the most."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from statistics import fmean

from maestro_agents.protocol import ConfigError
from maestro_backend.simulator import SYSTEMS, Cluster, Service, SimRun, Template, simulate

PER_DEVICE = 64
"""Runs in progress at any time, so that no engine lacks work."""
WARM_S = 1200.0
UNTIL_S = 3600.0
"""The window on the simulation's clock, seconds. Runs gather at the models that are short; until
they have, more seems to be done than can be in the long run."""
SEED = 2**31 - 1
"""Its own: no cell has these runs."""
_ENDLESS = 10**9
_SAMPLE = 2000

Backlog = Callable[[int, int], Iterator[Template]]
"""Calls, seed -> templates in the order in which runs would start."""


def saturation(
    cluster: Cluster,
    service: Service,
    backlog: Backlog,
    warm_s: float = WARM_S,
    until_s: float = UNTIL_S,
) -> float:
    """Runs/s: the work that a closed system gets done per second, in terms of the mean run's work.

    Work is what calls take alone on idle engines, so half a run counts as half. It is counted from
    `warm_s` to `until_s` on the simulation's clock.

    Raises:
        ConfigError: nothing was done at all.
    """
    busy = PER_DEVICE * sum(len(node.devices) for node in cluster.nodes)

    def work_until(horizon_s: float) -> float:
        runs = (
            SimRun(f"s{number:06d}", 0.0, template, measured=False)
            for number, template in enumerate(backlog(_ENDLESS, SEED))
        )
        found = simulate(cluster, SYSTEMS["fcfs"], runs, {}, horizon_s=horizon_s, closed=busy)
        return found.work_s

    done_s = work_until(until_s) - work_until(warm_s)
    if done_s <= 0:
        raise ConfigError(
            f"fcfs ends no call on cluster {cluster.name!r} in {until_s:.0f} s: is it too small "
            "for its models?"
        )
    return done_s / (until_s - warm_s) / _mean_work_s(service, backlog)


def _mean_work_s(service: Service, backlog: Backlog) -> float:
    return fmean(
        sum(service(c.model, c.prompt_tokens, c.output_tokens, 0) for c in template.calls)
        for template in islice(backlog(_ENDLESS, SEED), _SAMPLE)
    )
