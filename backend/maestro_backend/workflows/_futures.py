"""How much a run still has before it after a call: distributions of tokens, by context."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from math import log2
from typing import Any

import numpy as np
import numpy.typing as npt

from maestro_backend.predictor import CallShape, Recent

from ._journey import Journey, coarse, intent, octaves
from ._mixing import Mixer, Weights, evidence
from ._plain import keys_from_plain, plain_key

PER_OCTAVE = 6
BINS = 21 * PER_OCTAVE
"""From 0 to 2^21 tokens; neighbours differ by 12 % (ours)."""
_MAX_CONTEXTS = 20_000
_MUCH = 1024.0
"""A context that has seen so many calls forgets one for each further (ours)."""
_MANY_RUNS = 256
_PRIOR = 4.0
"""How much what a more general context says weighs, in runs (ours)."""
_RATE = 0.08
"""Of the mixture's learning (ours)."""

Key = tuple[Hashable, ...]
Counts = npt.NDArray[np.float32]

_LEVELS = 16
_STAGE = 4
"""The level of (app, stage, role): more exact ones are smoothed by it."""


@dataclass(frozen=True, slots=True)
class Future:
    """Output tokens after a call on the longest way to the run's end (the call is not counted),
    median and 90th percentile; the expected number of calls on it; `runs` of the same stage that
    were learned from."""

    p50: float
    p90: float
    calls: float
    runs: int


NO_FUTURE = Future(0.0, 0.0, 0.0, 0)


@dataclass(slots=True)
class Context:
    """What was learned under one key: a histogram, its sum, distinct runs, sum of calls."""

    bins: Counts = field(default_factory=lambda: np.zeros(BINS, np.float32))
    total: float = 0.0
    runs: int = 0
    calls: float = 0.0
    last: str = ""

    def add(self, run: str, at: int, calls: int) -> None:
        if self.total >= _MUCH:
            kept = 1.0 - 1.0 / _MUCH
            self.bins *= kept
            self.total, self.calls = self.total * kept, self.calls * kept
        self.bins[at] += 1
        self.total, self.calls = self.total + 1, self.calls + calls
        if run != self.last:
            self.last, self.runs = run, min(_MANY_RUNS, self.runs + 1)


def future_keys(app: str, shape: CallShape, past: Journey) -> list[Key]:
    """The contexts of a call about to run, from general to exact."""
    stage, role = shape.stage, shape.role
    visit, tools = past.visits.get((stage, role), 0), shape.tools > 0
    asked, calls = intent(past.finish), coarse(past.calls)
    mean = octaves(past.tokens / past.calls, 3) if past.calls else -1
    return [
        ("all",),
        ("visit of any", min(visit, 3), tools),
        ("app", app),
        ("role", app, role),
        ("stage", app, stage, role),
        ("visit", app, stage, role, coarse(visit)),
        ("intent", app, stage, role, past.last, asked, tools, coarse(visit)),
        ("calls", app, stage, role, calls),
        ("model", app, stage, role, shape.model, octaves(visit)),
        ("tokens", app, stage, role, octaves(past.tokens, 3)),
        ("prompt", app, stage, octaves(shape.prompt_tokens, 3)),
        ("path", app, stage, role, past.path, coarse(past.streak)),
        ("pace", app, stage, role, calls, mean),
        ("calls prompt", app, stage, role, calls, octaves(shape.prompt_tokens)),
        ("output", app, stage, role, octaves(past.output, 3), octaves(past.calls, 1)),
        ("messages", app, stage, role, coarse(max(0, shape.messages)), octaves(past.calls, 1)),
    ]


class Futures:
    """Remaining tokens and calls by context.

    Each context is smoothed by a more general one as by four runs of it (calls of one run are
    no independent evidence); all are mixed by what they were worth so far (`Mixer`). The median
    given a key is the paper's T_future; keys, smoothing and mixture are ours.
    """

    def __init__(self) -> None:
        self._contexts: Recent[Key, Context] = Recent(_MAX_CONTEXTS)
        self._mixer = Mixer(_LEVELS, _RATE)

    def future(self, app: str, shape: CallShape, past: Journey) -> Future:
        """What comes after the call; `NO_FUTURE` before any run was learned."""
        keys = future_keys(app, shape, past)
        found = [self._contexts.get(key) for key in keys]
        if found[0] is None:
            return NO_FUTURE
        rows, classes = _rows(found)
        weights = self._mixer.weights(classes)
        p50, p90 = _quantiles(weights @ rows, (0.5, 0.9))
        calls = float(weights @ np.array(_means(found)))
        stage = found[_STAGE]
        return Future(p50, p90, calls, stage.runs if stage else 0)

    def learn(
        self, app: str, run: str, shape: CallShape, past: Journey, tokens: float, calls: int
    ) -> None:
        """A run has ended: after this call came so many output tokens and calls on its longest
        way to the end."""
        keys = future_keys(app, shape, past)
        at = min(BINS - 1, int(log2(1.0 + max(0.0, tokens)) * PER_OCTAVE))
        found = [self._contexts.get(key) for key in keys]
        rows, classes = _rows(found)
        self._mixer.learn(classes, self._mixer.weights(classes), rows[:, at])
        for key in keys:
            self._contexts.use(key, Context).add(run, at, calls)

    def state(self) -> dict[str, Any]:
        """As plain JSON: names and counts, bins that are empty left out."""
        return {
            "contexts": [[plain_key(k), _sparse(c)] for k, c in self._contexts.items()],
            "mixer": self._mixer.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """What `state` gave, in the place of what is known."""
        self._contexts.clear()
        for key, (filled, runs, calls) in keys_from_plain(state["contexts"]):
            context = Context(runs=runs, calls=calls)
            for at, count in filled:
                if 0 <= at < BINS:
                    context.bins[at] = count
            context.total = float(context.bins.sum())
            self._contexts[key] = context
        self._mixer.restore(state["mixer"])


def _sparse(context: Context) -> list[Any]:
    filled = np.flatnonzero(context.bins)
    counts = [[int(at), round(float(context.bins[at]), 4)] for at in filled]
    return [counts, context.runs, round(context.calls, 4)]


_UNIFORM = np.full(BINS, 1.0 / BINS)


def _rows(found: Sequence[Context | None]) -> tuple[Weights, list[int]]:
    """A smoothed distribution over the bins from each context, and the evidence that each has."""
    rows = np.empty((len(found), BINS))
    classes = []
    for level, context in enumerate(found):
        base = rows[min(level - 1, _STAGE)] if level else _UNIFORM
        if context is None:
            rows[level] = base
            classes.append(0)
            continue
        weight = 1.0 / (context.runs + _PRIOR)
        np.multiply(context.bins, weight * context.runs / context.total, out=rows[level])
        rows[level] += (weight * _PRIOR) * base
        classes.append(evidence(context.runs))
    return rows, classes


def _means(found: Sequence[Context | None]) -> list[float]:
    """Mean calls from each context, smoothed as the rows are."""
    means: list[float] = []
    for level, context in enumerate(found):
        base = means[min(level - 1, _STAGE)] if level else 0.0
        if context is None:
            means.append(base)
            continue
        own = context.calls / context.total
        prior = _PRIOR if level else 0.0
        means.append((own * context.runs + prior * base) / (context.runs + prior))
    return means


def _quantiles(chances: Weights, levels: tuple[float, ...]) -> tuple[float, ...]:
    """In tokens; the first bin holds what ends here, the others are spread evenly in log."""
    sums = np.cumsum(chances)
    found = []
    for wanted in np.multiply(levels, sums[-1]):
        at = min(int(np.searchsorted(sums, wanted)), BINS - 1)
        inside = 1.0 - (sums[at] - wanted) / max(float(chances[at]), 1e-12)
        place = (at + min(1.0, max(0.0, inside))) / PER_OCTAVE
        found.append(2.0**place - 1.0 if at else 0.0)
    return tuple(float(tokens) for tokens in found)
