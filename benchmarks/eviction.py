"""How good the choice of what leaves a device is: between least recently used and the optimum.

    make bench NAME=eviction
    make bench NAME=eviction ARGS="--json"

One device that holds some of the models, and a sequence of uses: a model that is not there when it
is used is loaded at once, and others leave for it. The cost is the seconds of all loads; calls take
no time, so nobody is busy. Each figure is the share of what could be gained: (LRU - ours) /
(LRU - optimum). The optimum knows all, and is exact: Belady's rule where all sizes and costs are
equal, else a search through the sets that the device could hold.

Forecasts name each use that comes within the horizon, in "begun" only those of runs that have begun
by then. At 10 and 30 % so many of them are wrong for good: half are missing, half name another
model (any, alike); and every time ahead is off by a lognormal factor (sigma 0.1 and 0.3). "none"
has no forecasts at all. Each figure sums up all seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from random import Random

from maestro_backend.clusters import load_cluster
from maestro_backend.scheduler._eviction import Resident, Rhythm, choose, worthwhile
from maestro_backend.simulator import Template, idle_service
from maestro_backend.workloads import draw, load_mix, prepare, read_arrivals, read_workflows

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
USES = 1500
HORIZONS = (30.0, 120.0)
"""How far the forecasts reach (seconds)."""
ERRORS = (0.0, 0.1, 0.3)
TARGET = 0.7
DEVICE_GB = 80
READ_GB_S = 12.0
"""From the disk: a cold start, or what is parked (ours)."""
WAKE_S = 2.0
ZIPF_GAP_S = 2.0
RATES = {"synthetic:mixed": (0.02, 0.1), "recorded": (0.005, 0.02, 0.1)}
"""Runs per second: a device from almost idle to always busy."""


@dataclass(frozen=True, slots=True)
class Use:
    """A model is needed at `at` seconds; nobody can know before its run has `begun` (seconds)."""

    at: float
    model: str
    begun: float


@dataclass(frozen=True, slots=True)
class Case:
    """A sequence of uses, in order of time; by model its size and the seconds of a load."""

    sizes: Mapping[str, int]
    load_s: Mapping[str, float]
    capacity: int
    uses: Sequence[Use]


Forecast = tuple[str, float] | None
"""For a use: the model that it is taken for, and the factor on the time until then. None: it is not
foreseen."""
Leave = Callable[[int, Collection[str], int], Collection[str]]
"""(which use, who is there, size that is wanted) -> who leaves."""


# --- costs ----------------------------------------------------------------------------------------


def cost(case: Case, leave: Leave) -> float:
    """Seconds of all loads, where `leave` chooses."""
    here: set[str] = set()
    total = 0.0
    for index, use in enumerate(case.uses):
        if use.model in here:
            continue
        short = sum(case.sizes[m] for m in here) + case.sizes[use.model] - case.capacity
        if short > 0:
            here -= set(leave(index, sorted(here), short))
        here.add(use.model)
        assert sum(case.sizes[m] for m in here) <= case.capacity
        total += case.load_s[use.model]
    return total


def _by(case: Case, here: Collection[str], short: int, key: Callable[[str], float]) -> list[str]:
    """The least first, until it is enough."""
    order = sorted(here, key=key)
    freed = accumulate((case.sizes[m] for m in order), initial=0)
    return [model for model, before in zip(order, freed, strict=False) if before < short]


def lru(case: Case) -> Leave:
    """The least recently used."""

    def leave(index: int, here: Collection[str], short: int) -> list[str]:
        last = {use.model: at for at, use in enumerate(case.uses[:index])}
        return _by(case, here, short, lambda model: last[model])

    return leave


def belady(case: Case) -> Leave:
    """The farthest next use."""
    uses: dict[str, list[int]] = defaultdict(list)
    for at, use in enumerate(case.uses):
        uses[use.model].append(at)

    def leave(index: int, here: Collection[str], short: int) -> list[str]:
        def nearness(model: str) -> float:
            later = bisect_right(uses[model], index)
            return -uses[model][later] if later < len(uses[model]) else float("-inf")

        return _by(case, here, short, nearness)

    return leave


def optimum(case: Case) -> float:
    """The least cost there is: dynamic programming over the sets of models on the device.

    Only sets to which nothing could be added, and none that another can follow at no more cost.
    """

    @cache
    def left(there: frozenset[str], model: str) -> list[frozenset[str]]:
        """The largest parts of `there` that fit beside the model, with it."""
        size = sum(case.sizes[m] for m in there) + case.sizes[model]
        if size <= case.capacity:
            return [there | {model}]
        fewer = {s for gone in there for s in left(there - {gone}, model)}
        return [s for s in fewer if not any(s < other for other in fewer)]

    states = {frozenset[str](): 0.0}
    for use in case.uses:
        after: dict[frozenset[str], float] = {}
        for there, spent in states.items():
            loads = use.model not in there
            for s in left(there, use.model) if loads else [there]:
                total = spent + (case.load_s[use.model] if loads else 0.0)
                after[s] = min(total, after.get(s, total))
        best = min(after, key=lambda s: (after[s], sorted(s)))
        states = {
            s: spent
            for s, spent in after.items()
            if s == best or spent < after[best] + sum(case.load_s[m] for m in s - best)
        }
    return min(states.values())


# --- the rule -------------------------------------------------------------------------------------


class Known:
    """What the scheduler would know: the past, and the forecasts within the horizon."""

    def __init__(self, case: Case, forecasts: Sequence[Forecast], horizon_s: float) -> None:
        self.case, self.horizon_s = case, horizon_s
        self._forecasts = forecasts
        self._rhythms: dict[str, Rhythm] = {}
        self._seen = 0

    def expected(self, index: int) -> dict[str, list[float]]:
        """By model, when it is expected, as seen from a use."""
        now = self.case.uses[index].at
        found: dict[str, list[float]] = defaultdict(list)
        for at in range(index + 1, len(self.case.uses)):
            use, forecast = self.case.uses[at], self._forecasts[at]
            if use.at > now + self.horizon_s:
                break
            if forecast is not None and use.begun <= now:
                found[forecast[0]].append(now + (use.at - now) * forecast[1])
        return found

    def residents(self, index: int, models: Collection[str]) -> list[Resident]:
        """As seen from a use; the models have been used before, or are expected."""
        for use in self.case.uses[self._seen : index]:
            rhythm = self._rhythms.get(use.model)
            self._rhythms[use.model] = rhythm.used(use.at) if rhythm else Rhythm(use.at)
        self._seen = index
        case, expected = self.case, self.expected(index)
        never = Rhythm(case.uses[0].at)
        return [
            Resident(m, case.sizes[m], case.load_s[m], self._rhythms.get(m, never), (*expected[m],))
            for m in models
        ]

    def leave(self, index: int, here: Collection[str], short: int) -> list[str]:
        now = self.case.uses[index].at
        chosen = choose(self.residents(index, here), short, now, self.horizon_s)
        assert chosen is not None
        return [one.worker for one in chosen]


def forecasts(case: Case, error: float, dice: Random) -> list[Forecast]:
    """One for each use, with so many of them wrong."""
    models = sorted(case.sizes)
    found: list[Forecast] = []
    for use in case.uses:
        fate, factor = dice.random(), dice.lognormvariate(0.0, error)
        other = dice.choice([m for m in models if m != use.model])
        model = other if fate < error else use.model
        found.append(None if fate < error / 2 else (model, factor))
    return found


def waiting(known: Known, prefetches: bool) -> tuple[float, int]:
    """Seconds that uses wait for loads, and the number of loads, if models also come early.

    After each use, the soonest expected model that is away comes where that is worthwhile: one at a
    time, and never in place of the model that was just used.
    """
    case, here, waited_s, loads = known.case, dict[str, float](), 0.0, 0

    def short(model: str) -> int:
        return sum(case.sizes[m] for m in here) + case.sizes[model] - case.capacity

    for index, use in enumerate(case.uses):
        now = use.at
        if use.model not in here:
            for gone in known.leave(index, here, short(use.model)) if short(use.model) > 0 else ():
                del here[gone]
            here[use.model] = now + case.load_s[use.model]
            loads += 1
        waited_s += max(0.0, here[use.model] - now)
        soonest = sorted((min(a), m) for m, a in known.expected(index).items() if m not in here)
        if not prefetches or not soonest or max(here.values()) > now:
            continue
        model = soonest[0][1]
        residents = known.residents(index, [m for m in here if m != use.model])
        leaving = choose(residents, short(model), now, known.horizon_s)
        [newcomer] = known.residents(index, [model])
        if leaving is not None and worthwhile(newcomer, leaving, now, known.horizon_s):
            for one in leaving:
                del here[one.worker]
            here[model] = now + case.load_s[model]
            loads += 1
    return waited_s, loads


# --- cases ----------------------------------------------------------------------------------------


def alike(uses: Sequence[Use], models: Collection[str], places: int) -> Case:
    """All of one size and cost."""
    return Case(dict.fromkeys(models, 1), dict.fromkeys(models, 10.0), places, uses)


def unlike(uses: Sequence[Use], models: Collection[str], dice: Random) -> Case:
    """Made-up sizes; each comes from memory or from the disk, with more or less to prefill."""
    sizes = {m: dice.choice([3, 6, 15, 16, 30, 40, 65]) for m in sorted(models)}
    load_s = {
        m: WAKE_S + size / dice.choice([25.0, 2.5]) + dice.lognormvariate(0.0, 1.0)
        for m, size in sizes.items()
    }
    return Case(sizes, load_s, DEVICE_GB, uses)


def zipf(models: int, dice: Random, phase: int = 60) -> list[Use]:
    """Some much more often than others; every 60 uses it is others."""
    ranks = list(range(models))
    weights = [1.0 / (rank + 1) for rank in ranks]
    at, uses = 0.0, []
    for index in range(USES):
        if index % phase == 0:
            dice.shuffle(ranks)
        at += dice.expovariate(1.0 / ZIPF_GAP_S)
        uses.append(Use(at, f"m{dice.choices(ranks, weights)[0]:02}", 0.0))
    return uses


def cyclic(models: int) -> list[Use]:
    """One after the other: the worst for least recently used."""
    return [Use(ZIPF_GAP_S * at, f"m{at % models:02}", 0.0) for at in range(USES)]


class Agents:
    """Runs of agent apps on the models of the paper's cluster, as if nobody had to wait."""

    def __init__(self) -> None:
        self.cluster, self.mix = load_cluster("paper"), load_mix("paper")
        self.service = idle_service(self.cluster)
        self.models = sorted(self.cluster.models)
        self.sizes = {m: round(self.cluster.models[m].weights_bytes / 1e9) for m in self.models}
        self.load_s = {m: WAKE_S + size / READ_GB_S for m, size in self.sizes.items()}

    def templates(self, source: str, *, spread: bool) -> tuple[Template, ...]:
        """`spread`: every stage has the next model, for made-up stages have no kind of role."""
        recorded = read_workflows([source]).cut(self.mix.max_calls)
        stages = sorted({(t.source, c.stage) for t in recorded.templates for c in t.calls})
        model = {s: self.models[at % len(self.models)] for at, s in enumerate(stages)}
        if spread:
            templates = tuple(
                replace(t, calls=tuple(replace(c, model=model[t.source, c.stage]) for c in t.calls))
                for t in recorded.templates
            )
            recorded = replace(recorded, templates=templates)
        return prepare(recorded, self.mix, self.cluster.models)

    def uses(self, templates: Sequence[Template], rate: float, seed: int) -> list[Use]:
        found = []
        arrivals = read_arrivals("poisson")
        for run in draw(templates, self.mix, arrivals, rate, USES, seed):
            ends: list[float] = []
            for call in run.template.calls:
                at = max((ends[before] for before in call.after), default=run.at) + call.gap_s
                found.append(Use(at, call.model, run.at))
                tokens = call.prompt_tokens, call.output_tokens, call.prefix_tokens
                ends.append(at + self.service(call.model, *tokens))
        return sorted(found, key=lambda use: use.at)[:USES]


def cases(data: Path, seeds: Collection[int]) -> Iterator[tuple[str, list[Case]]]:
    """By name, one case for each seed."""
    for models, places in ((8, 3), (12, 4)):
        names = [f"m{at:02}" for at in range(models)]
        drawn = [zipf(models, Random(f"zipf/{seed}")) for seed in seeds]
        yield f"zipf, {places} of {models}", [alike(uses, names, places) for uses in drawn]
        sized = [unlike(u, names, Random(f"{s}")) for u, s in zip(drawn, seeds, strict=True)]
        yield f"zipf, {models} sized", sized
    names = [f"m{at:02}" for at in range(10)]
    yield "cyclic, 4 of 10", [alike(cyclic(10), names, 4)]
    yield "cyclic, 10 sized", [unlike(cyclic(10), names, Random(f"{seed}")) for seed in seeds]
    agents = Agents()
    for source, rates in RATES.items():
        if source == "recorded" and not data.is_dir():
            sys.stderr.write(f"skipped: there are no recorded runs at {data}\n")
            continue
        path = str(data) if source == "recorded" else source
        templates = agents.templates(path, spread=source != "recorded")
        for rate in rates:
            drawn = [agents.uses(templates, rate, seed) for seed in seeds]
            name = f"{source.partition(':')[0]} {rate}/s"
            yield f"{name}, 3 of 7", [alike(uses, agents.models, 3) for uses in drawn]
            yield f"{name}, sized", [Case(agents.sizes, agents.load_s, 80, u) for u in drawn]


# --- the table ------------------------------------------------------------------------------------


def density(played: Sequence[Case]) -> float:
    """Uses within the shorter horizon."""
    span_s = sum(case.uses[-1].at - case.uses[0].at for case in played)
    return sum(len(case.uses) for case in played) * HORIZONS[0] / span_s


def recovered(played: Sequence[Case], bounds: Sequence[tuple[float, float]], how: str) -> float:
    """Share of what could be gained. `how`: none, or horizon/error, or begun/error (30 s)."""
    gained = possible = 0.0
    for seed, (case, (most, least)) in enumerate(zip(played, bounds, strict=True)):
        if how == "none":
            known = Known(case, [None] * len(case.uses), 0.0)
        else:
            reach, _, error = how.partition("/")
            foreseen = forecasts(case, float(error), Random(f"{how}/{seed}"))
            if reach != "begun":
                case = replace(case, uses=[replace(use, begun=0.0) for use in case.uses])
            known = Known(case, foreseen, HORIZONS[0] if reach == "begun" else float(reach))
        gained += most - cost(case, known.leave)
        possible += most - least
    return gained / possible


def early(played: Sequence[Case], error: float) -> dict[str, float]:
    """Waiting and loads with models that come early, each as a share of those without."""
    sums: dict[bool, list[float]] = {False: [0.0, 0.0], True: [0.0, 0.0]}
    for prefetches, total in sums.items():
        for seed, case in enumerate(played):
            foreseen = forecasts(case, error, Random(f"early/{seed}"))
            waited_s, loads = waiting(Known(case, foreseen, HORIZONS[0]), prefetches)
            total[0] += waited_s
            total[1] += loads
    return {"waiting": sums[True][0] / sums[False][0], "loads": sums[True][1] / sums[False][1]}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of recorded runs")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    options = parser.parse_args()
    reaches = (*(f"{horizon:.0f}" for horizon in HORIZONS), "begun")
    columns = ["none", *(f"{reach}/{error}" for reach in reaches for error in ERRORS)]
    rows: dict[str, dict[str, float]] = {}
    ahead: dict[str, dict[str, float]] = {}
    if not options.json:
        print(f"{'uses in 30 s':>40}" + "".join(f"{name:>10}" for name in columns))
    for name, played in cases(options.data, range(options.seeds)):
        bounds = [(cost(case, lru(case)), optimum(case)) for case in played]
        rows[name] = {how: round(recovered(played, bounds, how), 3) for how in columns}
        for error in ERRORS if "sized" in name else ():
            ahead[f"{name}/{error}"] = {k: round(v, 3) for k, v in early(played, error).items()}
        if not options.json:
            print(f"{name:28}{density(played):12.0f}", end="")
            print("".join(f"{share:10.2f}" for share in rows[name].values()))
    if options.json:
        print(json.dumps({"recovered": rows, "early": ahead}, indent=2))
        return 0
    for how in columns[1:]:
        missed = [name for name, row in rows.items() if row[how] < TARGET]
        reach = len(rows) - len(missed)
        print(f"{how}: {reach} of {len(rows)} reach {TARGET:.0%}; not:", ", ".join(missed) or "-")
    print("\nwaiting and loads if models also come early (30 s, begun); without: 1")
    for name, shares in ahead.items():
        print(f"{name:36}" + "".join(f"{share:10.2f}" for share in shares.values()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
