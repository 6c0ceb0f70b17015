"""What the simulator runs: workflow runs as DAGs of calls with true lengths."""

from __future__ import annotations

from dataclasses import dataclass

from maestro_agents.protocol import ConfigError


@dataclass(frozen=True, slots=True)
class SimCall:
    """One call of a run. It arrives `gap_s` seconds after the last call in `after` has ended.

    A tool or code fills the gap; where `human`, a person does, and the run's deadline stands still.
    The prompt begins with what call `prefix_of` of the same run had as prompt and answer, as far as
    `prefix_tokens`: a KV cache may hold that. None: it begins like no earlier call.
    """

    stage: str
    model: str
    prompt_tokens: int
    output_tokens: int
    role: str = ""
    after: tuple[int, ...] = ()
    """Indices of earlier calls in the run."""
    gap_s: float = 0.0
    human: bool = False
    prefix_of: int | None = None
    prefix_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Template:
    """A recorded run, to be started as often as a workload wants it: its calls are shared.

    `source` is the trace it came from, `workflow` the app, `name` the run within the source.
    """

    source: str
    name: str
    calls: tuple[SimCall, ...]
    workflow: str = ""
    slo: str = "standard"
    tenant: str = "default"
    followers: tuple[tuple[int, ...], ...] = ()
    """By call, those that wait for it. Made here."""

    def __post_init__(self) -> None:
        followers: list[list[int]] = [[] for _ in self.calls]
        for index, call in enumerate(self.calls):
            for before in call.after:
                if not 0 <= before < index:
                    raise ConfigError(
                        f"run {self.name!r}, call {index}: `after` must name earlier calls, "
                        f"got {call.after}"
                    )
                followers[before].append(index)
            if call.prefix_of is not None and not 0 <= call.prefix_of < index:
                raise ConfigError(
                    f"run {self.name!r}, call {index}: `prefix_of` must name an earlier call, "
                    f"got {call.prefix_of}"
                )
        object.__setattr__(self, "followers", tuple(map(tuple, followers)))

    @property
    def key(self) -> tuple[str, str]:
        return self.source, self.name


@dataclass(frozen=True, slots=True)
class SimRun:
    """A template that starts at `at` seconds. `deadline_s` is seconds from there, None for none.

    What is not `measured` only brings the cluster to its steady state.
    """

    run: str
    at: float
    template: Template
    deadline_s: float | None = None
    measured: bool = True
