"""What past runs taught about each stage: its model, its role, whether it calls at all."""

from __future__ import annotations

from dataclasses import dataclass

from maestro_agents.protocol import Stage
from maestro_backend.predictor import Recent

_MAX_STAGES = 10_000
"""Stages remembered, those that were learned of last (ours)."""


@dataclass(slots=True)
class StageFacts:
    """Learned of one (workflow, stage). `silent` counts executions that ended without a call.

    `several`: one execution was seen to make more than one call.
    """

    model: str = ""
    role: str = ""
    prompt_bytes: int = 0
    max_tokens: int | None = None
    calls: int = 0
    silent: int = 0
    several: bool = False


class StageMemory:
    """Facts by (workflow id, stage path)."""

    def __init__(self) -> None:
        self._facts: Recent[tuple[str, str], StageFacts] = Recent(_MAX_STAGES)

    def facts(self, workflow: str, stage: str) -> StageFacts:
        """To learn of the stage: remembered from now on."""
        return self._facts.use((workflow, stage), StageFacts)

    def known(self, workflow: str, stage: str) -> StageFacts:
        """To read: empty facts of a stage that nothing is known of."""
        return self._facts.get((workflow, stage)) or StageFacts()

    def calls_chance(self, workflow: str, stage: Stage) -> float:
        """How likely an execution calls: as was seen, else as the adapter said, else surely.

        0 only where no call was ever seen: a node's result may be cached, a run may resume
        behind it.
        """
        facts = self.known(workflow, stage.path)
        if not facts.calls:
            return float(stage.calls is not False and not facts.silent)
        return 1.0 if not facts.silent else (facts.calls + 1) / (facts.calls + facts.silent + 2)
