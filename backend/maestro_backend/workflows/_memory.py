"""What past runs taught about each stage: its model, its role, whether it calls at all."""

from __future__ import annotations

from dataclasses import dataclass

from maestro_agents.protocol import Stage


@dataclass(slots=True)
class StageFacts:
    """Learned of one (workflow, stage). `silent` counts executions that ended without a call."""

    model: str = ""
    role: str = ""
    prompt_bytes: int = 0
    max_tokens: int | None = None
    calls: int = 0
    silent: int = 0

    @property
    def never_calls(self) -> bool:
        return self.calls == 0 and self.silent > 0


class StageMemory:
    """Facts by (workflow id, stage path)."""

    def __init__(self) -> None:
        self._facts: dict[tuple[str, str], StageFacts] = {}

    def facts(self, workflow: str, stage: str) -> StageFacts:
        return self._facts.setdefault((workflow, stage), StageFacts())

    def makes_calls(self, workflow: str, stage: Stage) -> bool:
        """Whether to expect a call: what was seen, else what the adapter said, else yes."""
        facts = self._facts.get((workflow, stage.path))
        if facts and facts.calls:
            return True
        if facts and facts.never_calls:
            return False
        return stage.calls is not False
