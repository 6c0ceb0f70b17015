"""What the scheduler wants done. The shell answers SetX commands with CommandApplied or -Failed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ._nouns import Residency


class RejectReason(StrEnum):
    """Why a call cannot be served."""

    UNKNOWN_MODEL = "unknown_model"
    MODEL_TOO_LARGE = "model_too_large"
    MODEL_FAILED = "model_failed"
    QUEUE_FULL = "queue_full"
    RETRIES_EXHAUSTED = "retries_exhausted"
    NO_NODE = "no_node"


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Send the call to the worker now. `priority`: engine polarity, lower = sooner."""

    id: int
    call: str
    worker: str
    priority: int


@dataclass(frozen=True, slots=True)
class SetResidency:
    """Bring a model's weights to a tier on a node.

    `kv_limit_bytes` is the KV limit to have there; None: the one that it had last (at a start: the
    most). `worker` says which worker is meant, where the node has several of the model.
    """

    id: int
    node: str
    model: str
    residency: Residency
    kv_limit_bytes: int | None = None
    worker: str = ""


@dataclass(frozen=True, slots=True)
class SetKvLimit:
    """Let a worker hold so many bytes of KV cache."""

    id: int
    worker: str
    limit_bytes: int


@dataclass(frozen=True, slots=True)
class KeepPrefix:
    """Hold the KV blocks of a call that ended on a worker for so many seconds."""

    id: int
    worker: str
    call: str
    seconds: float


@dataclass(frozen=True, slots=True)
class DropPrefix:
    """Let go of the KV blocks that were kept for a call."""

    id: int
    worker: str
    call: str


@dataclass(frozen=True, slots=True)
class Prewarm:
    """Compute the known prefix of a coming stage."""

    id: int
    worker: str
    run: str
    stage: str


@dataclass(frozen=True, slots=True)
class Preempt:
    """Take a running call off its worker; it goes back to the queue."""

    id: int
    call: str
    worker: str


@dataclass(frozen=True, slots=True)
class Abort:
    """Stop a running call for good: its client is gone."""

    id: int
    call: str
    worker: str


@dataclass(frozen=True, slots=True)
class Reject:
    """Answer the call with an error. `retry_after_s` when trying again may help."""

    id: int
    call: str
    reason: RejectReason
    detail: str
    retry_after_s: float | None = None


Command = (
    Dispatch
    | SetResidency
    | SetKvLimit
    | KeepPrefix
    | DropPrefix
    | Prewarm
    | Preempt
    | Abort
    | Reject
)
