"""What every wire message shares: version, limits, and the frozen base model."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints

PROTOCOL_VERSION = 1
"""Sent in every message; a receiver accepts its own version and older ones."""

MAX_ANNOTATION_BYTES = 16 * 1024
"""Largest `maestro` body key; a larger one is dropped, the call goes through."""

MAX_WORKFLOW_BYTES = 1024 * 1024
"""Largest `PUT /v1/maestro/workflows/{id}` body."""

MAX_EVENTS = 256
"""Most run events in one POST."""

MAX_CONTENT = 4096
"""Most characters of a tool's input or output in an event, where content is sent at all."""

MAX_STAGES = 1000
MAX_EDGES = 10_000

START = "__start__"
END = "__end__"
"""Pseudo-stages: where a run begins and ends. They never make a call."""

Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
"""A stage path, role, model, run or tenant: 1 to 256 characters."""


class Message(BaseModel):
    """Base of all wire messages: frozen; unknown fields are ignored (a newer peer may add some)."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)
