"""What one call says about itself and the future: the `maestro` body key."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Annotated, Any

from pydantic import Field

from ._base import PROTOCOL_VERSION, Message, Name


class Slo(Message):
    """The service level a run asks for; `deadline_s` (seconds) is never tighter than its class."""

    class_: Name = Field(default="standard", alias="class")
    deadline_s: Annotated[float, Field(gt=0, le=7 * 86_400)] | None = None


class Successor(Message):
    """A stage that may come next. `width` is the number of parallel instances, where known."""

    stage: Name
    certain: bool = False
    probability: Annotated[float, Field(ge=0, le=1)] | None = None
    width: Annotated[int, Field(ge=1, le=100_000)] | None = None


class Barrier(Message):
    """The superstep that the calling stage is part of: all `width` instances must end first."""

    step: Annotated[int, Field(ge=0)]
    width: Annotated[int, Field(ge=1)]


class Announcement(Message):
    """What follows the calling stage. `open_ended`: any stage may, the list is not exhaustive."""

    successors: tuple[Successor, ...] = Field(default=(), max_length=1000)
    open_ended: bool = False
    barrier: Barrier | None = None


class Annotation(Message):
    """The `maestro` key of a chat completion body. Every field is optional."""

    version: int = PROTOCOL_VERSION
    role: Name | None = None
    announcement: Announcement | None = None
    slo: Slo | None = None
    tenant: Name | None = None

    @cached_property
    def wire(self) -> tuple[dict[str, Any], int]:
        """As JSON goes into a body, not to be changed; and its size in bytes."""
        text = self.model_dump_json(by_alias=True, exclude_none=True)
        return json.loads(text), len(text.encode())
