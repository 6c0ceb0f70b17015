"""Was the rest of each run foreseen? Recorded runs replayed, each with the past it could see.

Beside our forecast go the baselines, learned from the same runs: for remaining tokens the paper's
conditional median, for branches a uniform guess and what followed the stage last.
"""

from __future__ import annotations

from bisect import insort
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log
from statistics import fmean
from typing import Any

from maestro_backend.predictor import CallShape, RunExamples, app_of
from maestro_backend.workflows import NEW, Journey, Journeys, Step, steps

from ._kendall import kendall_tau

EPSILON = 0.05
"""What the last-seen baseline leaves for everything else (ours)."""

FEW_CALLS = 80
"""Sources with fewer calls are left out of the macro means (ours)."""

_ENOUGH = 3
"""The paper's baseline needs so many values of a key (ours)."""

Key = tuple[Hashable, ...]


@dataclass(frozen=True, slots=True)
class BranchLoss:
    """One decision. Losses are in nats, the mean over the distinct stages that came."""

    ours: float
    uniform: float
    last_seen: float
    right: bool
    last_right: bool


@dataclass(frozen=True, slots=True)
class Foreseen:
    """One call: what was believed of its run's rest when it arrived, and what came.

    Output tokens on the longest way to the run's end, the call itself included; `paper` is the
    baseline's. `branch` is the decision after the call, None where there is none.
    """

    source: str
    run: str
    index: int
    actual: float
    p50: float
    p90: float
    paper: float
    branch: BranchLoss | None


class ConditionalMedians:
    """The paper's T_future: the median of past runs given application, stage, role, invocation
    index and whether tools are offered; less exact keys where there are fewer than 3 values.

    The paper names the conditions; the order of back-off and the bound 8 are ours.
    """

    def __init__(self) -> None:
        self._values: dict[Key, list[float]] = defaultdict(list)

    def median(self, shape: CallShape, past: Journey) -> float:
        for key in _paper_keys(shape, past):
            values = self._values.get(key, ())
            if len(values) >= _ENOUGH:
                half = len(values) // 2
                return values[half] if len(values) % 2 else fmean(values[half - 1 : half + 1])
        return 0.0

    def learn(self, shape: CallShape, past: Journey, tokens: float) -> None:
        for key in _paper_keys(shape, past):
            insort(self._values[key], tokens)


def _paper_keys(shape: CallShape, past: Journey) -> tuple[Key, ...]:
    app, stage, role = app_of(shape.workflow), shape.stage, shape.role
    visit, tools = min(8, past.visits.get((stage, role), 0)), shape.tools > 0
    exact = app, stage, role, visit, tools
    return exact, exact[:4], exact[:3], ("role", app, role), ("app", app), ()


class LastSeen:
    """What followed each (app, stage) last: in the run itself, else in the run learned last."""

    def __init__(self) -> None:
        self._last: dict[Key, str] = {}

    def guess(self, app: str, past: Journey) -> str | None:
        return past.followed.get(past.last) or self._last.get((app, past.last))

    def learn(self, app: str, step: Step) -> None:
        if step.chosen:
            self._last[app, step.call.shape.stage] = step.chosen[0]


class Forecaster:
    """Our model and the baselines, side by side, learning from the same runs."""

    def __init__(self, journeys: Journeys | None = None) -> None:
        self.journeys = journeys or Journeys()
        self._paper, self._lengths = ConditionalMedians(), ConditionalMedians()
        self._last = LastSeen()

    def learn(self, run: RunExamples) -> None:
        """A run has ended."""
        app = app_of(run.workflow)
        for step in steps(run):
            shape = step.call.shape
            self._paper.learn(shape, step.before, step.tokens)
            self._lengths.learn(shape, step.before, step.call.length)
            self._last.learn(app, step)
        self.journeys.learn(run)

    def judge(
        self, run: RunExamples, t_current: Mapping[tuple[str, int], float] | None = None
    ) -> Iterator[Foreseen]:
        """Each call of a run; nothing is learned. `t_current`: predicted output tokens of a call
        by (run, index), for ours and the paper's alike; without, the median of such calls."""
        for step in steps(run):
            call = step.call
            current = (t_current or {}).get((call.run, call.index))
            if current is None:
                current = self._lengths.median(call.shape, step.before)
            future = self.journeys.future(run.workflow, call.shape, step.before)
            yield Foreseen(
                source=call.source,
                run=call.run,
                index=call.index,
                actual=call.length + step.tokens,
                p50=current + future.p50,
                p90=current + future.p90,
                paper=current + self._paper.median(call.shape, step.before),
                branch=self._branch(app_of(run.workflow), step) if step.chosen else None,
            )

    def _branch(self, app: str, step: Step) -> BranchLoss:
        odds = self.journeys.branches.odds(app, step.after)
        guess = self._last.guess(app, step.after)
        options = ({*odds} - {NEW}) | {*step.chosen}
        # A stage that was never seen counts as known to the baselines, not to us.
        told = 1.0 / len(options) if guess is None else EPSILON / max(1, len(options) - 1)
        last = {option: 1.0 - EPSILON if option == guess else told for option in options}
        return BranchLoss(
            ours=fmean(-log(odds.get(stage, odds[NEW])) for stage in step.chosen),
            uniform=log(len(options)),
            last_seen=fmean(-log(last[stage]) for stage in step.chosen),
            right=max(odds, key=lambda stage: odds[stage]) in step.chosen,
            last_right=guess in step.chosen,
        )


def foresee(
    earlier: Iterable[RunExamples],
    judged: Iterable[RunExamples],
    *,
    online: bool = False,
    t_current: Mapping[tuple[str, int], float] | None = None,
) -> Iterator[Foreseen]:
    """Learn from `earlier` runs, then judge each call of others; `online`: each is learned at its
    own end, before the next."""
    forecaster = Forecaster()
    for run in earlier:
        forecaster.learn(run)
    for run in judged:
        yield from forecaster.judge(run, t_current)
        if online:
            forecaster.learn(run)


def futures_summary(calls: Iterable[Foreseen]) -> dict[str, Any]:
    """Figures of `branch` and `t_rem`: by source, as macro mean over sources with at least 80
    calls (of those with decisions, for branches), and over all calls (micro)."""
    sources: dict[str, list[Foreseen]] = defaultdict(list)
    for call in calls:
        sources[call.source].append(call)
    everything = [call for found in sources.values() for call in found]
    large = [found for found in sources.values() if len(found) >= FEW_CALLS]
    summary: dict[str, Any] = {}
    for name, figures in (("branch", _branch_figures), ("t_rem", _rest_figures)):
        summary[name] = {
            "macro": _mean([figures(found) for found in large]),
            "micro": figures(everything),
            "sources": {source: figures(found) for source, found in sorted(sources.items())},
        }
    return summary


def _branch_figures(calls: Sequence[Foreseen]) -> dict[str, float]:
    found = [call.branch for call in calls if call.branch is not None]
    if not found:
        return {}
    return {
        "decisions": len(found),
        "top1_accuracy": fmean(loss.right for loss in found),
        "log_loss": fmean(loss.ours for loss in found),
        "uniform_log_loss": fmean(loss.uniform for loss in found),
        "last_seen_log_loss": fmean(loss.last_seen for loss in found),
        "last_seen_top1_accuracy": fmean(loss.last_right for loss in found),
    }


def _rest_figures(calls: Sequence[Foreseen]) -> dict[str, float]:
    if not calls:
        return {}
    actual = [call.actual for call in calls]
    return {
        "calls": len(calls),
        "mae_tokens": fmean(abs(call.p50 - call.actual) for call in calls),
        "paper_mae_tokens": fmean(abs(call.paper - call.actual) for call in calls),
        "kendall_tau": kendall_tau([call.p50 for call in calls], actual),
        "paper_kendall_tau": kendall_tau([call.paper for call in calls], actual),
        "p90_coverage": fmean(call.p90 >= call.actual for call in calls),
    }


def _mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    known = [row for row in rows if row]
    return {name: fmean(row[name] for row in known) for name in known[0]} if known else {}
