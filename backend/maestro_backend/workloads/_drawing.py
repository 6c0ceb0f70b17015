"""Runs drawn from templates: by the mix's weights, at the arrivals' times."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
from random import Random
from statistics import median

from maestro_agents.protocol import ConfigError
from maestro_backend.simulator import SimRun, Template

from ._arrivals import Arrivals
from ._mix import Mix


def shares(templates: Sequence[Template], mix: Mix) -> dict[str, float]:
    """Source -> share of the runs, 1 in all: the mix's weights among the sources that are there.

    Sources whose median run is a single call have at most `single_call_share` together, whether the
    mix names them or not (unless there is nothing else).
    """
    lengths: dict[str, list[int]] = defaultdict(list)
    for template in templates:
        lengths[template.source].append(len(template.calls))
    weights = {source: mix.of(source).weight for source in sorted(lengths)}
    single = {source for source in weights if median(lengths[source]) <= 1}
    alone = sum(weights[source] for source in single)
    others = sum(weights.values()) - alone
    allowed = others * mix.single_call_share / (1.0 - mix.single_call_share + 1e-12)
    if others and alone > allowed:
        for source in single:
            weights[source] *= allowed / alone
    total = sum(weights.values())
    return {source: weight / total for source, weight in weights.items()}


def backlog(templates: Sequence[Template], mix: Mix, calls: int, seed: int) -> Iterator[Template]:
    """Templates in the order in which `draw` has them, until they have `calls` calls."""
    if not templates:
        raise ConfigError("there is no run to draw from: name a trace that has rows")
    if calls < 1:
        raise ConfigError(f"the number of calls must be 1 or more, got {calls}")
    return _until(calls, _endless(templates, shares(templates, mix), seed))


def draw(
    templates: Sequence[Template],
    mix: Mix,
    arrivals: Arrivals,
    rate: float,
    calls: int,
    seed: int,
    warmup_share: float = 0.2,
) -> Iterator[SimRun]:
    """Runs r000000, r000001, ... in order of time, lazily: about `calls` calls in all.

    The same arguments give the same runs; the rate changes their times alone. `rate` is runs per
    second and holds exactly over the whole: arrivals are stretched so that a seed which starts in a
    lull of its trace is no lighter load. Measured are the runs that begin in the middle, counted in
    calls: not the first `warmup_share`, nor the last. No deadline is set.
    """
    if not rate > 0.0:
        raise ConfigError(f"the rate of runs must be above 0, got {rate}")
    if not 0.0 <= warmup_share < 0.5:
        raise ConfigError(f"the share of warm-up must be 0 or more, below 0.5, got {warmup_share}")
    count = sum(1 for _ in backlog(templates, mix, calls, seed))
    return _timed(
        backlog(templates, mix, calls, seed),
        _gaps(arrivals, rate, count, seed),
        calls,
        warmup_share,
    )


def _timed(
    templates: Iterator[Template], gaps: Iterator[float], calls: int, warmup_share: float
) -> Iterator[SimRun]:
    first, last = warmup_share * calls, (1.0 - warmup_share) * calls
    at, begun = 0.0, 0
    for number, (template, gap) in enumerate(zip(templates, gaps, strict=True)):
        at += gap
        yield SimRun(f"r{number:06d}", at, template, None, first <= begun < last)
        begun += len(template.calls)


def _gaps(arrivals: Arrivals, rate: float, count: int, seed: int) -> Iterator[float]:
    """`count` gaps that add up to what the rate says. Made twice, to hold none of them."""
    total = sum(islice(arrivals.gaps(rate, seed), count))
    stretch = count / rate / total if total else 0.0
    return (gap * stretch for gap in islice(arrivals.gaps(rate, seed), count))


def _until(calls: int, templates: Iterator[Template]) -> Iterator[Template]:
    begun = 0
    for template in templates:
        if begun >= calls:
            return
        yield template
        begun += len(template.calls)


def _endless(
    templates: Sequence[Template], share: dict[str, float], seed: int
) -> Iterator[Template]:
    """A source by its share, then one of its runs that has not come since all had come."""
    dice = Random(f"templates/{seed}")
    runs: dict[str, list[Template]] = defaultdict(list)
    for template in templates:
        runs[template.source].append(template)
    sources = list(share)
    up_to = list(accumulate(share.values()))
    left: dict[str, list[Template]] = {source: [] for source in sources}
    while True:
        source = dice.choices(sources, cum_weights=up_to)[0]
        if not left[source]:
            left[source] = dice.sample(runs[source], len(runs[source]))
        yield left[source].pop()
