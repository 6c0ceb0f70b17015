"""The identity of a call, carried in headers that any OpenAI-compatible server ignores."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Final
from urllib.parse import quote, unquote

from pydantic import Field

from ._base import Message, Name

HEADER_RUN: Final = "x-maestro-run"
HEADER_WORKFLOW: Final = "x-maestro-workflow"
HEADER_STAGE: Final = "x-maestro-stage"
HEADER_INSTANCE: Final = "x-maestro-instance"
HEADER_CONVERSATION: Final = "x-maestro-conversation"
HEADER_WORKER: Final = "x-maestro-worker"
HEADER_QUEUE_MS: Final = "x-maestro-queue-ms"
HEADER_PREDICTED_TOKENS: Final = "x-maestro-predicted-tokens"
BODY_KEY: Final = "maestro"

_SAFE = "/@:._-~"
_MAX = 256

_quoted = lru_cache(1024)(partial(quote, safe=_SAFE))


class CallIdentity(Message):
    """Which call of which run this is; every field may be missing.

    `instance` counts the calls of one stage within a run from 0 (loops and fan-outs make several);
    an SDK retry repeats it.
    """

    run: Name | None = None
    workflow: Name | None = None
    stage: Name | None = None
    instance: int = Field(default=0, ge=0, lt=10**9)
    conversation: Name | None = None

    def headers(self) -> dict[str, str]:
        """As request headers; characters outside a small safe set are percent-encoded."""
        named = {
            HEADER_RUN: self.run,
            HEADER_WORKFLOW: self.workflow,
            HEADER_STAGE: self.stage,
            HEADER_INSTANCE: str(self.instance) if self.stage else None,
            HEADER_CONVERSATION: self.conversation,
        }
        return {key: _quoted(value) for key, value in named.items() if value}

    @classmethod
    def from_headers(cls, headers: Mapping[str, str]) -> tuple[CallIdentity, tuple[str, ...]]:
        """Read headers (lower-case keys). Returns the identity and the names of unusable headers.

        A bad hint never fails a request: an empty or over-long value counts as missing.
        """
        bad: list[str] = []

        def read(name: str) -> str | None:
            if (raw := headers.get(name)) is None:
                return None
            value = unquote(raw)
            if 0 < len(value) <= _MAX:
                return value
            bad.append(name)
            return None

        instance = read(HEADER_INSTANCE) or "0"
        if not (instance.isascii() and instance.isdigit() and len(instance) <= 9):
            bad.append(HEADER_INSTANCE)
            instance = "0"
        identity = cls(
            run=read(HEADER_RUN),
            workflow=read(HEADER_WORKFLOW),
            stage=read(HEADER_STAGE),
            instance=int(instance),
            conversation=read(HEADER_CONVERSATION),
        )
        return identity, tuple(bad)
