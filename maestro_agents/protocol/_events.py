"""Run events: transitions that no request carries (`POST /v1/maestro/runs/{run}/events`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from ._annotation import Slo, Successor
from ._base import MAX_CONTENT, MAX_EVENTS, PROTOCOL_VERSION, Message, Name

Content = Annotated[str, StringConstraints(max_length=MAX_CONTENT)]
Instance = Annotated[int, Field(ge=0, lt=10**9)]


class _Event(Message):
    at: Annotated[float, Field(ge=0)] = 0.0
    """Unix time at the client, seconds; 0 when unknown."""


class RunStarted(_Event):
    """A run began. Sent before its first call, but may arrive after it."""

    type: Literal["run_started"] = "run_started"
    workflow: Name | None = None
    conversation: Name | None = None
    slo: Slo | None = None
    tenant: Name | None = None


class StageStarted(_Event):
    """An instance of a stage began; `step` is the superstep in bulk-synchronous frameworks.

    `attempt` counts from 0 how often the framework has tried this task anew after an error.
    """

    type: Literal["stage_started"] = "stage_started"
    stage: Name
    instance: Instance = 0
    step: Instance | None = None
    attempt: Instance = 0


class StageEnded(_Event):
    """An instance of a stage ended. `next` is what routing chose, None when it chose nothing."""

    type: Literal["stage_ended"] = "stage_ended"
    stage: Name
    instance: Instance = 0
    failed: bool = False
    next: tuple[Successor, ...] | None = None


class ToolsRequested(_Event):
    """A completion of a stage asked for tools: its prompt comes back, longer, after they ran."""

    type: Literal["tools_requested"] = "tools_requested"
    stage: Name
    instance: Instance = 0
    tools: tuple[Name, ...] = Field(max_length=128)


class ToolStarted(_Event):
    """A tool began inside a stage: its next call comes when the tool is done.

    `input` is content: it is there only where the client has turned sending content on.
    """

    type: Literal["tool_started"] = "tool_started"
    stage: Name
    tool: Name
    input: Content | None = None


class ToolEnded(_Event):
    """A tool ended after `duration_s` seconds. `output` is content, like a tool's `input`."""

    type: Literal["tool_ended"] = "tool_ended"
    stage: Name
    tool: Name
    duration_s: Annotated[float, Field(ge=0)] = 0.0
    output: Content | None = None


class RunPaused(_Event):
    """A human was asked: the deadline clock stops."""

    type: Literal["run_paused"] = "run_paused"


class RunResumed(_Event):
    """The human answered: the deadline clock goes on."""

    type: Literal["run_resumed"] = "run_resumed"


class RunEnded(_Event):
    """The run is over; nothing more will be called."""

    type: Literal["run_ended"] = "run_ended"
    failed: bool = False


RunEvent = Annotated[
    RunStarted
    | StageStarted
    | StageEnded
    | ToolsRequested
    | ToolStarted
    | ToolEnded
    | RunPaused
    | RunResumed
    | RunEnded,
    Field(discriminator="type"),
]


class RunEvents(Message):
    """One POST of events, in the order they happened."""

    version: int = PROTOCOL_VERSION
    events: tuple[RunEvent, ...] = Field(max_length=MAX_EVENTS)
