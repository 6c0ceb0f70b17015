"""One call as the predictor sees it: its shape before, its outcome after. Counts, never text."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import nan

UNKNOWN = -1
"""A count that nobody could tell."""


@dataclass(frozen=True, slots=True)
class CallShape:
    """What is known of a call before it runs.

    `prompt_bytes` counts messages and tools as JSON; `prompt_tokens` is an estimate made from it
    (`UNKNOWN`: the predictor makes its own); `n` (1 or more) is the choices that were asked for.
    `tool_choice` is "", "auto" or "required"; `output_format` is "", "json" or "schema".
    The counts of messages, characters and lines are those of the messages' text; `code_chars`
    lie inside ``` fences. `gap_s` is how long the run was silent before it: seconds since the
    last call that it waited for has ended, nan if unknown.
    """

    model: str
    workflow: str = ""
    stage: str = ""
    role: str = ""
    prompt_bytes: int = 0
    max_tokens: int | None = None
    n: int = 1
    prompt_tokens: int = UNKNOWN
    messages: int = UNKNOWN
    prompt_chars: int = UNKNOWN
    prompt_lines: int = UNKNOWN
    code_chars: int = UNKNOWN
    tools: int = UNKNOWN
    tool_choice: str = ""
    output_format: str = ""
    gap_s: float = nan


@dataclass(frozen=True, slots=True)
class CallOutcome:
    """What a call took. `output_tokens` is the sum over all choices.

    Seconds; `first_s` is None when the reply was not streamed. `finish` is the first choice's
    finish reason as OpenAI names it ("" if unknown).
    """

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    first_s: float | None = None
    total_s: float = 0.0
    finish: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """One finished call of a run: a row of a trace, a row of the store.

    `index` numbers the run's calls from 0, each after those that it waited for: its `parents`, by
    index: its past is they and their ancestors, never a sibling beside it. `task` groups
    runs that must not be split between training and validation.
    """

    source: str
    run: str
    index: int
    shape: CallShape
    outcome: CallOutcome
    parents: tuple[int, ...] = ()
    task: str = ""
    started_s: float = nan

    @property
    def length(self) -> float:
        """Output tokens of one choice: the label."""
        return self.outcome.output_tokens / max(1, self.shape.n)


@dataclass(frozen=True, slots=True)
class RunExamples:
    """The calls of one run, in order of `index`."""

    source: str
    run: str
    calls: tuple[Example, ...] = field(default=())

    @property
    def task(self) -> str:
        return self.calls[0].task if self.calls else ""

    @property
    def workflow(self) -> str:
        return self.calls[0].shape.workflow if self.calls else ""
