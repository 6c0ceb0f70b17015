"""What a graph still has to do: its critical path in tokens, over sampled ways through it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import log

import numpy as np
import numpy.typing as npt

from maestro_agents.protocol import Workflow
from maestro_backend.scheduler import ForecastCall, Length

from ._forecast import Predict
from ._futures import Future
from ._nouns import Expected, Habits, Past
from ._reach import Node, Reach, Reached

WAYS = 64
"""Ways through the graph that are sampled (ours)."""
_SEED = 2606
_Z90 = 1.2815515594
"""90th percentile of the standard normal distribution."""
_WIDEST = 16

Mask = npt.NDArray[np.bool_]
Amounts = npt.NDArray[np.float64]


@dataclass(slots=True)
class Front:
    """What leads to a node, over all ways: whether, after how many tokens, after how many calls;
    `sources` by the stage that led there."""

    there: Mask
    tokens: Amounts
    calls: Amounts
    sources: dict[str, Mask] = field(default_factory=dict)

    def meet(self, going: Mask, tokens: Amounts, calls: Amounts) -> None:
        """On the ways of `going` another path ends here too: keep the longer of the two."""
        longer = going & (tokens > self.tokens)
        tied = going & (tokens == self.tokens)
        most = np.where(tied, np.maximum(calls, self.calls), self.calls)
        self.calls = np.where(longer, calls, most)
        self.tokens = np.where(longer, tokens, self.tokens)
        self.there = self.there | going


def certain(
    workflow: Workflow,
    starts: Iterable[Expected],
    habits: Habits,
    past: Past,
    reached: Mapping[Node, Reached],
) -> bool:
    """Whether no choice lies ahead: no candidate that has not called yet, no open-ended stage, no
    stage that was seen to make several calls."""
    if not all(item.certain or past.ahead(item.stage) for item in starts):
        return False
    if not all(item.certain for found in reached.values() for item in found.onward):
        return False
    stages = {stage for stage, _ in reached}
    if stages & set(workflow.open_ended):
        return False
    return not any(habits.calls.further((workflow.id, s)) for s in stages | {*past.running})


def critical_path(
    workflow: Workflow,
    starts: Iterable[Expected],
    habits: Habits,
    predict: Predict,
    past: Past | None = None,
    reached: Mapping[Node, Reached] | None = None,
) -> tuple[Future, bool]:
    """Output tokens and calls on the longest way from `starts` to the end; whether all of it is
    certain.

    Monte Carlo over the unrolled graph (four rounds of a loop): a branch is drawn by its odds, a
    fan-out lasts as long as its longest instance, a join waits for its slowest source. Lengths
    are log-normal through the predicted median and 90th percentile. Always the same seed: the
    same question has the same answer. `reached`: from the same starts, if known already.
    """
    past, starts = past or Past(), list(starts)
    reached = Reach(workflow, habits, past).of(starts) if reached is None else reached
    future = _Sampler(workflow, predict, past, reached).run(starts)
    return future, certain(workflow, starts, habits, past, reached)


class _Sampler:
    def __init__(
        self,
        workflow: Workflow,
        predict: Predict,
        past: Past,
        reached: Mapping[Node, Reached],
    ) -> None:
        self._workflow, self._past, self._reached = workflow, past, reached
        self._predict, self._ways = predict, WAYS
        self._random = np.random.default_rng(_SEED)
        self._fronts: dict[Node, Front] = {}

    def run(self, starts: list[Expected]) -> Future:
        reached = self._reached
        calls = {s: self._predict(self._workflow.stage_by_path[s]) for s, _ in reached}
        everywhere, longest = self._nowhere(), self._nowhere()
        everywhere.there |= True
        self._lead(everywhere, starts, [(item.stage, 0) for item in starts])
        for node in _in_order(reached):
            front = self._fronts.get(node)
            if front is None:
                continue
            end = self._pass(node, front, calls[node[0]], reached[node].further)
            longest.meet(end.there, end.tokens, end.calls)
            self._lead(end, reached[node].onward, reached[node].follow)
        p50, p90 = np.quantile(longest.tokens, (0.5, 0.9)).tolist()
        return Future(p50, p90, float(longest.calls.mean()), 0)

    def _nowhere(self) -> Front:
        return Front(np.zeros(self._ways, bool), *np.zeros((2, self._ways)))

    def _pass(
        self, node: Node, front: Front, call: ForecastCall | None, further: tuple[float, ...]
    ) -> Front:
        """The front behind a node: its call, or the longest of its instances, has been made."""
        sources = [
            front.sources[s] for s in self._workflow.join_sources(node[0]) if s in front.sources
        ]
        there = np.logical_and.reduce(sources) if sources else front.there
        copies, made_before = 1, 0
        if node[1] == 0:
            copies, made_before = self._past.copies(node[0]), self._past.ahead(node[0])
        copies -= made_before  # those calls run already, or have ended
        if call is None or copies <= 0:
            return Front(there, front.tokens, front.calls)
        width = np.full(self._ways, min(copies, _WIDEST))
        if copies == 1 and further and not made_before:
            drawn = self._random.random(self._ways)
            width += sum((drawn < chance).astype(int) for chance in further[: _WIDEST - 1])
        made = self._random.random(self._ways) < call.probability
        tokens = np.where(made, self._lengths(call.length, width), 0.0)
        return Front(there, front.tokens + tokens, front.calls + made)

    def _lengths(self, length: Length, width: npt.NDArray[np.int_]) -> Amounts:
        """Output tokens of the longest of so many calls side by side."""
        spread = log(max(length.p90, length.p50, 1e-9) / max(length.p50, 1e-9)) / _Z90
        if not spread or not length.p50:
            return np.full(self._ways, length.p50)
        drawn = self._random.standard_normal((int(width.max()), self._ways))
        drawn[np.arange(len(drawn))[:, None] >= width] = -np.inf
        longest: Amounts = length.p50 * np.exp(spread * drawn.max(axis=0))
        return longest

    def _lead(self, front: Front, items: list[Expected], follow: list[Node]) -> None:
        """Draw where each way goes on; rivals after the same stage exclude one another."""
        drawn: dict[str, Amounts] = {}
        low: dict[str, float] = {}
        for item in items:
            going = front.there
            if not item.certain:
                draw = drawn.setdefault(item.after, self._random.random(self._ways))
                least = low.get(item.after, 0.0)
                low[item.after] = least + item.probability
                going = going & (draw >= least) & (draw < least + item.probability)
            node = next((n for n in follow if n[0] == item.stage), None)
            if node is not None and node in self._reached:
                self._arrive(node, item.after, going, front)

    def _arrive(self, node: Node, source: str, going: Mask, front: Front) -> None:
        there = self._fronts.setdefault(node, self._nowhere())
        there.meet(going, front.tokens, front.calls)
        there.sources[source] = there.sources.get(source, np.zeros(self._ways, bool)) | going


def _in_order(reached: Mapping[Node, Reached]) -> Iterator[Node]:
    """Each node behind all that lead to it.

    Only a graph that learned an undeclared way back has a circle within one round; there the
    more likely node comes first.
    """
    done: dict[Node, None] = {}
    for root in reached:
        path = {} if root in done else {root: list(reached[root].follow)}
        while path:
            node = next(reversed(path))
            if not path[node]:
                done[node] = None
                del path[node]
                continue
            following = path[node].pop()
            if following in reached and following not in done and following not in path:
                path[following] = list(reached[following].follow)
    return reversed(done)
