"""The call that the current context is about to make, and what its request says about it."""

from __future__ import annotations

import json
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

from ._log import warn_once
from .protocol import BODY_KEY, MAX_ANNOTATION_BYTES, Annotation, CallIdentity


@dataclass(frozen=True, slots=True)
class CallContext:
    """Who is calling, and what follows."""

    identity: CallIdentity
    annotation: Annotation


class Extras(NamedTuple):
    """What an annotated request has more than a plain one."""

    headers: dict[str, str]
    body: dict[str, Any]


current_call: ContextVar[CallContext | None] = ContextVar("maestro_current_call", default=None)
"""Set by an adapter just before a model call, None everywhere else."""


def render(call: CallContext) -> Extras:
    """The headers and body keys of `call`; an over-size annotation is left out, logged once."""
    headers = call.identity.headers()
    annotation = call.annotation.model_dump(mode="json", by_alias=True, exclude_none=True)
    size = len(json.dumps(annotation, ensure_ascii=False).encode())
    if size > MAX_ANNOTATION_BYTES:
        warn_once(
            "annotation-size",
            "annotation of stage %s dropped: %d bytes, at most %d are sent",
            call.identity.stage,
            size,
            MAX_ANNOTATION_BYTES,
        )
        return Extras(headers, {})
    return Extras(headers, {BODY_KEY: annotation})
