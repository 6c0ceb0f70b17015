"""What a graph still has to do: its critical path in tokens, over sampled ways through it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import log

import numpy as np
import numpy.typing as npt

from maestro_agents.protocol import Workflow
from maestro_backend.scheduler import ForecastCall, Length

from ._forecast import Predict
from ._futures import Future
from ._nouns import Expected, Habits, Past
from ._reach import Node, Reach, Reached, start_times

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
    return _Sampler(workflow, habits, predict, past, reached).run(starts)


class _Sampler:
    def __init__(
        self,
        workflow: Workflow,
        habits: Habits,
        predict: Predict,
        past: Past,
        reached: Mapping[Node, Reached],
    ) -> None:
        self._workflow, self._past, self._reached = workflow, past, reached
        self._predict, self._ways = predict, WAYS
        self._random = np.random.default_rng(_SEED)
        self._fronts: dict[Node, Front] = {}
        self._certain = True

    def run(self, starts: list[Expected]) -> tuple[Future, bool]:
        reached = self._reached
        calls = {s: self._predict(self._workflow.stage_by_path[s]) for s, _ in reached}
        tokens = {s: call.length.p50 for s, call in calls.items() if call}
        everywhere = Front(np.ones(self._ways, bool), *np.zeros((2, self._ways)))
        self._lead(everywhere, starts, [(item.stage, 0) for item in starts])
        longest, most = np.zeros((2, self._ways))
        for node in start_times(self._workflow, reached, tokens):
            front = self._fronts.get(node)
            if front is None:
                continue
            end = self._pass(node, front, calls[node[0]], reached[node].further)
            later = end.there & (end.tokens >= longest)
            most = np.where(later, np.maximum(most, end.calls), most)
            longest = np.where(later, end.tokens, longest)
            self._lead(end, reached[node].onward, reached[node].follow)
        p50, p90 = np.quantile(longest, (0.5, 0.9)).tolist()
        return Future(p50, p90, float(most.mean()), 0), self._certain

    def _pass(
        self, node: Node, front: Front, call: ForecastCall | None, further: tuple[float, ...]
    ) -> Front:
        """The front behind a node: its call, or the longest of its instances, has been made."""
        sources = [
            front.sources[s] for s in self._workflow.join_sources(node[0]) if s in front.sources
        ]
        there = np.logical_and.reduce(sources) if sources else front.there
        if call is None:
            return Front(there, front.tokens, front.calls)
        copies = self._past.copies(node[0]) if node[1] == 0 else 1
        width = np.full(self._ways, min(copies, _WIDEST))
        if copies == 1 and further:
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
                self._certain = False
                draw = drawn.setdefault(item.after, self._random.random(self._ways))
                least = low.get(item.after, 0.0)
                low[item.after] = least + item.probability
                going = going & (draw >= least) & (draw < least + item.probability)
            node = next((n for n in follow if n[0] == item.stage), None)
            if node is not None and node in self._reached:
                self._arrive(node, item.after, going, front)

    def _arrive(self, node: Node, source: str, going: Mask, front: Front) -> None:
        there = self._fronts.get(node)
        if there is None:
            there = Front(np.zeros(self._ways, bool), *np.zeros((2, self._ways)))
            self._fronts[node] = there
        later = going & (front.tokens >= there.tokens)
        there.calls = np.where(later, front.calls, there.calls)
        there.tokens = np.where(later, front.tokens, there.tokens)
        there.sources[source] = there.sources.get(source, np.zeros(self._ways, bool)) | going
        there.there = there.there | going
