"""What comes out of a simulation."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import nan

from maestro_backend.scheduler import Residency

from ._workload import SimRun


@dataclass(slots=True)
class RunOutcome:
    """One run that was measured. `finish`: seconds on the simulation's clock, nan if it did not."""

    run: SimRun
    finish: float = nan


@dataclass(frozen=True, slots=True)
class CallSpan:
    """One call of the run that was asked for; seconds on the simulation's clock."""

    index: int
    stage: str
    model: str
    worker: str
    arrived: float
    dispatched: float
    first_token: float
    ended: float


@dataclass(frozen=True, slots=True)
class MemorySample:
    """What a device held at a time: bytes."""

    at: float
    device: str
    weights_bytes: int
    kv_limit_bytes: int
    kv_reserved_bytes: int
    kv_used_bytes: int


@dataclass(slots=True)
class Outcome:
    """The measured runs in order of arrival, and totals over the whole simulation.

    Seconds and bytes. `work_s`: what the ended calls take alone on idle engines. `stalls`: times
    that a call waited for KV memory, in our queue or taken off in the engine. `cold_starts`: calls
    that arrived when no worker of their model was ready. `activation_s`: moves of weights to a
    device, of models of which no worker was ready; `exposed_s`: the part of them during which calls
    were waiting for those (before that, for room: that is in their queue wait). `lead_s`: sum over
    `lead_calls` of the time from when a stage was certain or held P >= 0.5 to its call's arrival.
    """

    runs: list[RunOutcome] = field(default_factory=list)
    simulated_s: float = 0.0
    calls_arrived: int = 0
    calls_ended: int = 0
    calls_rejected: int = 0
    work_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    kv_reserved_byte_s: float = 0.0
    """For calls, and for prefixes that are kept."""
    kv_used_byte_s: float = 0.0
    stalls: int = 0
    recomputed_tokens: int = 0
    preemptions: int = 0
    cold_starts: int = 0
    activations: Counter[Residency] = field(default_factory=Counter)
    """By the tier that the weights came from; also those of further workers of a model."""
    activation_s: float = 0.0
    exposed_s: float = 0.0
    lead_s: float = 0.0
    lead_calls: int = 0
    max_wait_s: float = 0.0
    queue_wait_s: float = 0.0
    memory: list[MemorySample] = field(default_factory=list)
    spans: list[CallSpan] = field(default_factory=list)
