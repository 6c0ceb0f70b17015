"""A call as an engine sees it, and what an engine reports of it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum
from math import nan
from typing import NamedTuple

from ._prefixes import Entry


@dataclass(slots=True, eq=False)
class Request:
    """One call for an engine. `mark`: report when it has so many output tokens; 0: never.

    Its prompt begins as the cache entry `prefix` as far as `prefix_tokens`; at its end it leaves
    the entry `leaves`. What is below `leaves` is the engine's to set.
    """

    call: str
    prompt_tokens: int
    output_tokens: int
    priority: int = 0
    """Lower is sooner."""
    mark: int = 0
    prefix: Hashable | None = None
    prefix_tokens: int = 0
    leaves: Hashable | None = None
    cached_tokens: int = 0
    """Of its prompt, when it was first admitted."""
    first_at: float = nan
    """When its first token was there."""
    preemptions: int = 0
    recomputed_tokens: int = 0
    """Tokens that left the KV cache by preemption and were computed again."""
    order: int = 0
    """Of arrival."""
    generated: int = 0
    """Output tokens at its last preemption."""
    lost: int = 0
    """Tokens in the KV cache at its last preemption."""
    fill: int = 0
    """Tokens to be in the KV cache before it decodes."""
    done: int = 0
    """Those that are already, while it does not."""
    decoding: bool = False
    base: int = 0
    """The engine's steps less its tokens in the KV cache, constant while it decodes."""
    due: int = -1
    """The step after which something of it is to be reported."""
    shared: int = 0
    """Blocks that are its entry's."""
    entry: Entry | None = None


class What(Enum):
    FINISHED = "finished"
    MARK = "mark"
    PREEMPTED = "preempted"


class Happening(NamedTuple):
    at: float
    what: What
    request: Request
