"""Judges announcements by what came of them. Pure: a journal in, figures out.

Four questions, each about what was believed *before* the fact:

coverage     was each call, but a run's first, expected before its stage began? And since the call
             of the same stage before it: one announcement does not serve two calls.
broken       of what was said to be certain, which share never came? Each time that a stage's
             certain calls grow in number, each call added is one promise.
choices      where the graph forks, how surprised was the backend, in nats (log-loss), against
             one who only knows the candidates (uniform)? Where it does not, was it sure?
lead time    how long before its call was a stage likely (P >= 0.5), certain or chosen?
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from math import log
from operator import attrgetter
from statistics import fmean, pstdev, quantiles

from maestro_agents.protocol import END, Workflow

from ._journal import Arrived, Began, Believed, Entry, Stepped

CERTAIN = 0.999
"""A call is said to be certain from this probability on (ours)."""

MAX_BROKEN = 0.01
"""Largest share of certain calls that may never come (ours)."""

LEARNING = 0.05
"""Nats that learning from some twenty runs may cost, per candidate beyond the first; besides,
two standard errors are chance (ours)."""

_FLOOR = 1e-3
"""No belief is punished for less than this probability (ours)."""

_BINS = 10


@dataclass(frozen=True, slots=True)
class ChoiceScore:
    """What followed one stage, over all its ends. Losses are in nats, mean per decision.

    `options` is the number of candidates; 1 where what follows is certain, and both losses of a
    right announcement are then 0. `error` is the standard error of the loss.
    """

    options: int
    decisions: int
    loss: float
    uniform: float
    error: float = 0.0
    sure: float = 1.0
    """Share of the decisions in which what came had been held certain."""

    @property
    def chance(self) -> float:
        """By how much the loss of a right announcement may exceed `uniform`; 0 without a choice."""
        return 0.0 if self.options == 1 else LEARNING * (self.options - 1) + 2 * self.error


@dataclass(frozen=True, slots=True)
class Score:
    """The figures of some runs of one workflow. Lead times in seconds, by stage, sorted.

    `calibration` is the mean distance between a stated probability and how often it came true,
    over ten bins (expected calibration error).
    """

    runs: int = 0
    calls: int = 0
    later_calls: int = 0
    covered: int = 0
    promises: int = 0
    broken: int = 0
    choices: Mapping[str, ChoiceScore] = field(default_factory=dict)
    calibration: float = 0.0
    lead_s: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    uncovered: tuple[str, ...] = ()
    """The stages of the calls that nobody expected."""
    never_came: tuple[str, ...] = ()
    """The stages of the broken promises."""

    @property
    def coverage(self) -> float:
        """Share of calls, other than a run's first, that were expected; 1 if there are none."""
        return self.covered / self.later_calls if self.later_calls else 1.0

    @property
    def broken_share(self) -> float:
        """Share of what was said to be certain that never came."""
        return self.broken / self.promises if self.promises else 0.0

    @property
    def sure_share(self) -> float:
        """Where the graph leaves no choice: the share in which what follows was held certain."""
        forced = [choice for choice in self.choices.values() if choice.options == 1]
        steps = sum(choice.decisions for choice in forced)
        return sum(c.sure * c.decisions for c in forced) / steps if steps else 1.0

    @property
    def loss(self) -> float:
        """Mean log-loss in nats over all decisions, certain steps among them."""
        return self._mean(attrgetter("loss"))

    @property
    def uniform(self) -> float:
        """The same for one who gives each candidate the same probability."""
        return self._mean(attrgetter("uniform"))

    def faults(self) -> tuple[str, ...]:
        """What is wrong with the announcements, in words; empty when they are right."""
        found = []
        if self.covered < self.later_calls:
            found.append(
                f"{self.later_calls - self.covered} of {self.later_calls} calls came "
                f"unannounced: {sorted({*self.uncovered})}"
            )
        if self.broken_share > MAX_BROKEN:
            found.append(
                f"{self.broken} of {self.promises} calls said to be certain never came: "
                f"{sorted({*self.never_came})}"
            )
        if self.sure_share < 1.0:
            found.append(
                f"what the graph makes certain was held certain {self.sure_share:.0%} of the time"
            )
        if self.loss > self.uniform:
            found.append(f"all in all {self.loss:.3f} nats, knowing nothing {self.uniform:.3f}")
        for stage, choice in self.choices.items():
            if choice.loss > choice.uniform + choice.chance:
                found.append(
                    f"after {stage} {choice.loss:.3f} nats, knowing nothing {choice.uniform:.3f}"
                )
        return tuple(found)

    def lead_quantiles(self, stage: str) -> tuple[float, float, float]:
        """10th percentile, median and 90th of a stage's lead times, in seconds."""
        return spread(self.lead_s[stage])

    def _mean(self, of: attrgetter[float]) -> float:
        total = sum(choice.decisions for choice in self.choices.values())
        weighted = sum(of(choice) * choice.decisions for choice in self.choices.values())
        return weighted / total if total else 0.0


def spread(values: Iterable[float]) -> tuple[float, float, float]:
    """10th percentile, median and 90th of at least one value."""
    known = sorted(values)
    if len(known) == 1:
        return known[0], known[0], known[0]
    cuts = quantiles(known, n=10, method="inclusive")
    return cuts[0], cuts[4], cuts[8]


def score(journal: Iterable[Entry], truth: Workflow) -> Score:
    """Judge all runs of a journal against `truth`: the graph as the app's author knows it.

    The truth must not come from the adapter that is judged, or it would say what counts as wrong.
    """
    by_run: dict[str, list[Entry]] = defaultdict(list)
    for entry in journal:
        by_run[entry.run].append(entry)
    arrived = [[e for e in entries if isinstance(e, Arrived)] for entries in by_run.values()]
    read = [
        _Reader(Counter(call.stage for call in calls)).read(entries)
        for entries, calls in zip(by_run.values(), arrived, strict=True)
    ]
    uncovered = [stage for run in read for stage, was in run.calls[1:] if not was]
    promises = [promise for run in read for promise in run.promises]
    steps = [step for entries in by_run.values() for step in _steps(entries, truth)]
    later = sum(max(0, len(calls) - 1) for calls in arrived)
    return Score(
        runs=len(by_run),
        calls=sum(map(len, arrived)),
        later_calls=later,
        covered=later - len(uncovered),
        promises=len(promises),
        broken=sum(not kept for _, kept in promises),
        choices=_choices(steps, truth),
        calibration=_calibration(steps, truth),
        lead_s=_leads(call for calls in arrived for call in calls),
        uncovered=tuple(uncovered),
        never_came=tuple(stage for stage, kept in promises if not kept),
    )


# --- coverage and promises ----------------------------------------------------------------------


@dataclass(slots=True)
class _Reader:
    """Reads the journal of one run: which calls were expected, which promises were kept.

    That a stage has begun says that its call follows, but that is no announcement: what counts is
    what was believed before. `due` has, per execution that has begun and not called, whether it
    was expected. A call may also come before its stage is heard to begin (`ahead`).
    """

    left: Counter[str]
    """Calls that are still to come, by stage."""
    expected: set[str] = field(default_factory=set)
    said: Counter[str] = field(default_factory=Counter)
    due: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    ahead: Counter[str] = field(default_factory=Counter)
    made: Counter[str] = field(default_factory=Counter)
    calls: list[tuple[str, bool]] = field(default_factory=list)
    promises: list[tuple[str, bool]] = field(default_factory=list)

    def read(self, entries: Iterable[Entry]) -> _Reader:
        for entry in entries:
            match entry:
                case Believed():
                    self._believed(entry)
                case Began(stage=stage):
                    self._began(stage)
                case Arrived(stage=stage):
                    self._arrived(stage)
                case Stepped(stage=stage):
                    self._stepped(stage)
        return self

    def _believed(self, entry: Believed) -> None:
        self.expected |= self._to_come(stage for stage, _ in entry.calls).keys()
        certain = self._to_come(stage for stage, chance in entry.calls if chance >= CERTAIN)
        for stage, many in certain.items():
            # What has begun and not called is among what is left, but was not promised now.
            left = self.left[stage] - len(self.due[stage])
            for number in range(self.said[stage] + 1, many + 1):
                self.promises.append((stage, number <= left))
        self.said = certain

    def _to_come(self, stages: Iterable[str]) -> Counter[str]:
        return Counter(stages) - Counter({stage: len(due) for stage, due in self.due.items()})

    def _began(self, stage: str) -> None:
        if self.ahead[stage]:
            self.ahead[stage] -= 1
        else:
            self.due[stage].append(self._use(stage))

    def _arrived(self, stage: str) -> None:
        self.left[stage] -= 1
        self.made[stage] += 1
        if self.due[stage]:
            self.calls.append((stage, self.due[stage].pop(0)))
        else:
            self.ahead[stage] += 1
            self.calls.append((stage, self._use(stage)))

    def _stepped(self, stage: str) -> None:
        """An execution that ended without a call leaves none due."""
        if self.made[stage]:
            self.made[stage] -= 1
        elif self.due[stage]:
            self.due[stage].pop()

    def _use(self, stage: str) -> bool:
        """Whether `stage` was expected since its last use: one announcement serves one call."""
        was = stage in self.expected
        self.expected.discard(stage)
        self.said[stage] = max(0, self.said[stage] - 1)
        return was


# --- choices ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Step:
    stage: str
    chosen: tuple[str, ...]
    believed: Mapping[str, float]


def _steps(entries: list[Entry], truth: Workflow) -> Iterator[_Step]:
    """What followed each end of a stage, as routing said, else as the next calls showed."""
    for at, entry in enumerate(entries):
        if not isinstance(entry, Stepped) or entry.stage not in truth.stage_by_path:
            continue
        certain, candidates = truth.successors(entry.stage)
        options = candidates or certain
        if entry.chosen is not None:
            chosen = tuple(t for t in entry.chosen if t in options)
        else:
            seen = tuple(_seen_next(entries[at + 1 :], options))
            chosen = seen if candidates else certain
        yield _Step(entry.stage, chosen or (END,), _shares(entry.believed, certain, candidates))


def _seen_next(later: list[Entry], options: tuple[str, ...]) -> Iterator[str]:
    calls = (entry.stage for entry in later if isinstance(entry, Arrived))
    yield from [stage for stage in calls if stage in options][:1]


def _shares(
    believed: Mapping[str, float], certain: tuple[str, ...], candidates: tuple[str, ...]
) -> Mapping[str, float]:
    """Beliefs made comparable: whoever says that everything may follow has less for what does.

    Certain stages follow side by side, all others exclude one another; END has what they leave.
    """
    others = sum(chance for stage, chance in believed.items() if stage not in certain)
    scale = max(1.0, others) if candidates else 1.0 + others
    shares = {stage: chance / scale for stage, chance in believed.items()}
    shares.setdefault(END, max(0.0, 1.0 - others))
    return shares


def _choices(steps: list[_Step], truth: Workflow) -> dict[str, ChoiceScore]:
    by_stage = groupby(sorted(steps, key=attrgetter("stage")), key=attrgetter("stage"))
    return {stage: _choice_score(list(found), truth) for stage, found in by_stage}


def _choice_score(steps: list[_Step], truth: Workflow) -> ChoiceScore:
    options = max(1, len(truth.successors(steps[0].stage).candidates))
    losses = [fmean(_loss(step.believed, target) for target in step.chosen) for step in steps]
    error = pstdev(losses) / len(losses) ** 0.5
    sure = fmean(
        all(step.believed.get(target, 0.0) >= CERTAIN for target in step.chosen) for step in steps
    )
    return ChoiceScore(options, len(steps), fmean(losses), log(options), error, sure)


def _loss(believed: Mapping[str, float], target: str) -> float:
    return -log(min(1.0, max(_FLOOR, believed.get(target, 0.0))))


def _calibration(steps: list[_Step], truth: Workflow) -> float:
    bins: dict[int, list[tuple[float, bool]]] = defaultdict(list)
    for step in steps:
        for target in truth.successors(step.stage).candidates:
            chance = min(1.0, step.believed.get(target, 0.0))
            bins[min(_BINS - 1, int(chance * _BINS))].append((chance, target in step.chosen))
    total = sum(map(len, bins.values()))
    gaps = (
        len(found) * abs(fmean(c for c, _ in found) - fmean(h for _, h in found))
        for found in bins.values()
    )
    return sum(gaps) / total if total else 0.0


# --- lead times ---------------------------------------------------------------------------------


def _leads(calls: Iterable[Arrived]) -> dict[str, tuple[float, ...]]:
    leads: dict[str, list[float]] = defaultdict(list)
    for call in calls:
        if call.lead_s is not None:
            leads[call.stage].append(call.lead_s)
    return {stage: tuple(sorted(found)) for stage, found in sorted(leads.items())}
