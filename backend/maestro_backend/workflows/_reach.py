"""How likely a run reaches each stage, in which round of a loop, and when. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count

from maestro_agents.protocol import END, START, Workflow

from ._following import next_stages
from ._nouns import Expected, Habits, Past
from ._position import PERHAPS, entered

FLOOR = 0.05
"""What is less likely than this is left out (ours)."""
_ROUNDS = 4
"""Rounds of a loop that are foreseen, the one that runs now among them (ours)."""
_WIDEST = 32
"""So many instances of a fan-out are told apart at most (ours)."""

Node = tuple[str, int]
"""A stage in a round: rounds count how often a loop is gone back to, from 0 for now."""


@dataclass(slots=True)
class Reached:
    """`further` is P(2nd), P(3rd) ... instance, where a fan-out may lead to it or to the subgraph
    `inside`; `follow` are the nodes it leads to, `onward` what is believed to follow. A `start`
    may begin as soon as all is over, and `gap_s` has gone by."""

    chance: float
    further: tuple[float, ...] = ()
    inside: str = ""
    follow: list[Node] = field(default_factory=list)
    onward: list[Expected] = field(default_factory=list)
    start: bool = False
    gap_s: float = 0.0


class Reach:
    """The most likely path to each node that can be reached with at least 5%."""

    def __init__(self, workflow: Workflow, habits: Habits, past: Past) -> None:
        self._workflow, self._habits, self._past = workflow, habits, past
        self._back = back_edges(workflow)
        self._reached: dict[Node, Reached] = {}
        self._sources: dict[Node, dict[str, float]] = {}
        self._agenda: list[tuple[float, int, Node, Reached]] = []
        self._order = count()

    def of(self, starts: Iterable[Expected]) -> dict[Node, Reached]:
        """All nodes that can be reached from `starts`, the most likely first."""
        for item in starts:
            gap_s = self._habits.gap_s(item.after, item.stage)
            self._arrive(item, 0, Reached(item.probability, start=True, gap_s=gap_s))
        while self._agenda:
            _, _, node, reached = heapq.heappop(self._agenda)
            if node not in self._reached:
                self._reached[node] = reached
                self._leave(node, reached)
        return self._reached

    def _leave(self, node: Node, reached: Reached) -> None:
        stage, round_ = node
        visit = self._past.visits.get(stage, 0) + 1 + round_
        reached.onward = next_stages(self._workflow, stage, self._habits.transitions, visit=visit)
        for item in reached.onward:
            following = round_ + ((stage, item.stage) in self._back)
            reached.follow.append((item.stage, following))
            chance = reached.chance * item.probability
            self._arrive(item, following, Reached(chance, reached.further, reached.inside))

    def _arrive(self, item: Expected, round_: int, reached: Reached) -> None:
        node = item.stage, round_
        known = item.stage in self._workflow.stage_by_path
        if not known or round_ >= _ROUNDS or node in self._reached:
            return
        self._widen(item, reached)
        reached.chance = self._joined(item, node, reached.chance)
        if reached.chance >= FLOOR:
            heapq.heappush(self._agenda, (-reached.chance, next(self._order), node, reached))

    def _widen(self, item: Expected, reached: Reached) -> None:
        """A fan-out holds inside the subgraph that it led into; a new one may begin here."""
        if not (reached.inside and item.stage.startswith(f"{reached.inside}/")):
            key = (self._workflow.id, item.after, item.stage)
            told = item.certain or item.width is not None
            reached.further = () if told else self._habits.widths.further(key)
            if (beside := self._past.step_width.get(item.stage, 1) - 1) and not told:
                reached.further = _at_least(reached.further, PERHAPS, min(beside, _WIDEST))
            reached.inside = entered(item.after, item.stage) if reached.further else ""

    def _joined(self, item: Expected, node: Node, chance: float) -> float:
        """The chance of a join's target is that of its least likely source; 0 while one lacks."""
        sources = self._workflow.join_sources(item.stage)
        if item.after not in sources:
            return chance
        found = self._sources.setdefault(node, {})
        found[item.after] = max(chance, found.get(item.after, 0.0))
        lacking = (source for source in sources if source not in found)
        if node[1] == 0:
            lacking = (s for s in lacking if not self._past.arrived(s, item.stage))
        return min(found.values()) if not any(lacking) else 0.0


def _at_least(chances: tuple[float, ...], least: float, number: int) -> tuple[float, ...]:
    padded = (*chances, *(0.0,) * number)
    return tuple(max(p, least) if at < number else p for at, p in enumerate(padded))


def back_edges(workflow: Workflow) -> set[tuple[str, str]]:
    """The edges that close a loop, as a walk in depth from the workflow's start finds them."""
    found: set[tuple[str, str]] = set()
    done: set[str] = set()
    for root in (START, *workflow.stage_by_path):
        path: dict[str, list[str]] = {} if root in done else {root: _targets(workflow, root)}
        while path:
            stage = next(reversed(path))
            if not path[stage]:
                done.add(stage)
                del path[stage]
                continue
            target = path[stage].pop()
            if target in path:
                found.add((stage, target))
            elif target not in done:
                path[target] = _targets(workflow, target)
    return found


def _targets(workflow: Workflow, stage: str) -> list[str]:
    certain, candidates = workflow.successors(stage)
    return [target for target in (*candidates, *certain) if target != END]


def start_times(
    workflow: Workflow,
    reached: Mapping[Node, Reached],
    service_s: Mapping[str, float],
    gap_s: Callable[[str, str], float] = lambda source, target: 0.0,
) -> dict[Node, float]:
    """When each node could start: after its first cause, a join after its last, and a deferred
    stage after everything else. `gap_s(source, target)` goes by between two stages."""
    waits = {
        (stage, at): {s for s in workflow.join_sources(stage) if (s, at) in reached}
        for stage, at in reached
    }
    begins: dict[Node, float] = {("", 0): 0.0}
    agenda = [(found.gap_s, node, "") for node, found in reached.items() if found.start]
    held: list[tuple[float, Node, str]] = []
    heapq.heapify(agenda)
    while agenda or held:
        if not agenda:  # nothing else is left: a deferred stage, or a join that a loop holds open
            _, node, cause = held.pop()
            at = max(b + service_s.get(stage, 0.0) for (stage, _), b in begins.items())
            waits[node].clear()
        else:
            at, node, cause = heapq.heappop(agenda)
        if node in begins:
            continue
        waits[node].discard(cause)
        if waits[node] or (workflow.stage_by_path[node[0]].deferred and agenda):
            held.append((at, node, cause))
            continue
        begins[node] = at
        for following in reached[node].follow:
            if following in reached:
                ready = at + service_s.get(node[0], 0.0) + gap_s(node[0], following[0])
                heapq.heappush(agenda, (ready, following, node[0]))
    return begins
