"""What the simulator runs: workflow runs as DAGs of calls with true lengths."""

from __future__ import annotations

from dataclasses import dataclass

from maestro_agents.protocol import ConfigError


@dataclass(frozen=True, slots=True)
class SimCall:
    """One call of a run. It arrives `gap_s` seconds after the last call in `after` has ended."""

    stage: str
    model: str
    prompt_tokens: int
    output_tokens: int
    role: str = ""
    after: tuple[int, ...] = ()
    """Indices of earlier calls in the run."""
    gap_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SimRun:
    """One run, starting at `at` seconds. `deadline_s` is seconds from its start."""

    run: str
    at: float
    calls: tuple[SimCall, ...]
    workflow: str = ""
    slo: str = "standard"
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        for index, call in enumerate(self.calls):
            if any(not 0 <= before < index for before in call.after):
                raise ConfigError(
                    f"run {self.run!r}, call {index}: `after` must name earlier calls, "
                    f"got {call.after}"
                )

    def followers(self, index: int) -> list[int]:
        return [i for i, call in enumerate(self.calls) if index in call.after]
