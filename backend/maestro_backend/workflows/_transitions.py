"""Which candidate follows, learned from past runs."""

from __future__ import annotations

from collections import Counter

from maestro_agents.protocol import Workflow
from maestro_backend.predictor import Recent

_PRIOR = 1.0
"""Pseudo-count of each candidate: uniform until something is learned (ours)."""
_MAX_STAGES = 10_000
"""Routing stages remembered, those that chose last (ours)."""


class Transitions:
    """Counts of chosen successors per (workflow, stage)."""

    def __init__(self) -> None:
        self._counts: Recent[tuple[str, str], Counter[str]] = Recent(_MAX_STAGES)

    def learn(self, workflow: str, stage: str, chosen: str) -> None:
        self._counts.use((workflow, stage), Counter)[chosen] += 1

    def probabilities(self, workflow: Workflow, stage: str) -> dict[str, float]:
        """P(next | stage): 1 for certain successors, smoothed counts for candidates.

        Candidates exclude one another only where routing chooses one; their sum is 1 at most.
        """
        certain, candidates = workflow.successors(stage)
        counts = self._counts.get((workflow.id, stage), Counter())
        total = sum(counts[c] for c in candidates) + _PRIOR * len(candidates)
        chances = {c: (counts[c] + _PRIOR) / total for c in candidates}
        return {**chances, **dict.fromkeys(certain, 1.0)}
