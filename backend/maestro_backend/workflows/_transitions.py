"""What past runs taught about what follows: which candidate, and how many at once."""

from __future__ import annotations

from collections import Counter
from typing import Any

from maestro_agents.protocol import END, Workflow
from maestro_backend.predictor import Recent

from ._plain import keys_from_plain, plain_key

_PRIOR = 1.0
"""Pseudo-count of each candidate: uniform until something is learned (ours)."""
_VISITS = 8
"""The eighth visit of a stage in a run and all later ones are one (ours)."""
_MAX_STAGES = 10_000
"""Routing stages remembered, those that chose last (ours)."""
_MANY = 16
"""Numbers are told apart up to here (ours)."""

_ALL = 0


class Transitions:
    """Counts of chosen successors per (workflow, stage, how often the stage has run by now)."""

    def __init__(self) -> None:
        self._counts: Recent[tuple[str, str], Counter[tuple[int, str]]] = Recent(_MAX_STAGES)

    def learn(self, workflow: Workflow, stage: str, visit: int, chosen: str) -> None:
        """`stage`, on its `visit`-th execution in a run (from 1), led to `chosen`.

        Where no candidate is declared there is nothing to learn; what was not declared beside
        others is learned all the same, if the graph has it.
        """
        if not _routes(workflow, stage) or chosen not in {END, *workflow.stage_by_path}:
            return
        counts = self._counts.use((workflow.id, stage), Counter)
        counts[_ALL, chosen] += 1
        counts[min(visit, _VISITS), chosen] += 1

    def probabilities(self, workflow: Workflow, stage: str, visit: int = 1) -> dict[str, float]:
        """P(next | stage, visit): 1 for certain successors, smoothed counts for candidates.

        What other visits taught stands in for the uniform prior of the visit that is asked for.
        Candidates exclude one another only where routing chooses one; their sum is 1 at most.
        """
        certain, candidates = workflow.successors(stage)
        if not _routes(workflow, stage):
            return dict.fromkeys(certain, 1.0)
        counts = self._counts.get((workflow.id, stage), Counter())
        learned = (s for at, s in counts if at == _ALL and s not in certain)
        options = dict.fromkeys((*candidates, *learned))
        prior = _PRIOR
        if stage in workflow.open_ended:  # its candidates are a guess: they weigh one together
            options[END] = None
            prior /= len(options)
        at = min(visit, _VISITS)
        these = {option: counts[at, option] for option in options}
        others = {option: counts[_ALL, option] - these[option] + prior for option in options}
        weight = prior * len(options)  # as much as nothing but the prior would have
        share = weight / sum(others.values())
        total = sum(these.values()) + weight
        chances = {o: (these[o] + share * others[o]) / total for o in options}
        return {**chances, **dict.fromkeys(certain, 1.0)}


def _routes(workflow: Workflow, stage: str) -> bool:
    return bool(workflow.successors(stage).candidates) or stage in workflow.open_ended


class Numbers:
    """How many there were of something: instances of a fan-out, calls of one execution."""

    def __init__(self) -> None:
        self._counts: Recent[tuple[str, ...], Counter[int]] = Recent(_MAX_STAGES)

    def learn(self, key: tuple[str, ...], number: int) -> None:
        self._counts.use(key, Counter)[min(number, _MANY)] += 1

    def further(self, key: tuple[str, ...]) -> tuple[float, ...]:
        """P(at least 2), P(at least 3) ... as long as any were seen; never quite certain."""
        counts = self._counts.get(key)
        if not counts:
            return ()
        total = counts.total() + 1
        return tuple(
            sum(n for number, n in counts.items() if number >= least) / total
            for least in range(2, max(counts) + 1)
        )

    def state(self) -> list[list[Any]]:
        """As plain JSON."""
        return [[plain_key(key), sorted(counts.items())] for key, counts in self._counts.items()]

    def restore(self, state: list[list[Any]]) -> None:
        """What `state` gave, in the place of what is known."""
        self._counts.clear()
        for key, counts in keys_from_plain(state):
            names = tuple(str(part) for part in key)
            self._counts[names] = Counter({int(n): int(count) for n, count in counts})
