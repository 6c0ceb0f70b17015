"""What happens to the scheduler: every event is data, complete in itself, one JSON line each.

Times are seconds on the clock of whoever drives the scheduler; predictions enter as data.
"""

from __future__ import annotations

from dataclasses import dataclass

from ._nouns import NodeInfo, WorkerInfo


@dataclass(frozen=True, slots=True)
class Length:
    """Predicted output tokens of one call: median and upper percentiles.

    The 95th and 99th are None where nobody predicts them.
    """

    p50: float
    p90: float
    p95: float | None = None
    p99: float | None = None


@dataclass(frozen=True, slots=True)
class ForecastCall:
    """An expected upcoming call of a run.

    `earliest_start_s` counts from the end of what the run is doing now; `service_s` is the
    predicted time in the engine when alone.
    """

    stage: str
    role: str
    model: str
    probability: float
    earliest_start_s: float
    prompt_tokens: int
    length: Length
    service_s: float


@dataclass(frozen=True, slots=True)
class Rest:
    """What a run still has before it, from its calls in progress to its end (T_rem).

    Output tokens on the longest way, those calls included: median and 90th percentile; `calls` is
    the expected number of further calls on that way.
    """

    p50: float
    p90: float
    calls: float = 0.0


@dataclass(frozen=True, slots=True)
class RunStarted:
    """A run began. `deadline_s` is seconds from now, already capped by its SLO class."""

    run: str
    workflow: str = ""
    slo: str = "standard"
    deadline_s: float | None = None
    tenant: str = "default"


@dataclass(frozen=True, slots=True)
class Announced:
    """The client said what follows `stage`: certain (or routing-confirmed) and candidates."""

    run: str
    stage: str
    certain: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ForecastChanged:
    """What the backend now believes of a run's future; replaces the forecast before."""

    run: str
    calls: tuple[ForecastCall, ...]
    rest: Rest | None = None


@dataclass(frozen=True, slots=True)
class StageStarted:
    run: str
    stage: str
    instance: int = 0


@dataclass(frozen=True, slots=True)
class StageEnded:
    run: str
    stage: str
    instance: int = 0


@dataclass(frozen=True, slots=True)
class ToolStarted:
    run: str
    stage: str
    tool: str


@dataclass(frozen=True, slots=True)
class ToolEnded:
    run: str
    stage: str
    tool: str
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RunPaused:
    """A human was asked: the deadline clock stops."""

    run: str


@dataclass(frozen=True, slots=True)
class RunResumed:
    run: str


@dataclass(frozen=True, slots=True)
class CallArrived:
    """A call to be served.

    `kv_tokens` is what to reserve (uncached prompt + predicted output quantile of all `choices`;
    bytes follow from the worker's geometry); `service_s` the predicted time in the engine when
    alone; `waits_for` the stages whose earlier calls of this run must have ended first (the
    stage's join).
    """

    call: str
    run: str
    stage: str
    model: str
    length: Length
    kv_tokens: int
    service_s: float
    role: str = ""
    instance: int = 0
    tenant: str = "default"
    prompt_tokens: int = 0
    waits_for: tuple[str, ...] = ()
    choices: int = 1


@dataclass(frozen=True, slots=True)
class CallPredicted:
    """A better prediction of a live call than the one it arrived with.

    Once it runs, what it has reserved only grows.
    """

    call: str
    length: Length
    kv_tokens: int
    service_s: float


@dataclass(frozen=True, slots=True)
class CallProgress:
    """Tokens so far; the reservation grows before it is outgrown."""

    call: str
    computed_tokens: int
    generated_tokens: int


@dataclass(frozen=True, slots=True)
class CallFinished:
    call: str
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class CallFailed:
    """The engine failed the call.

    `retryable`: no byte has reached the client yet. `worker_lost`: the worker itself is broken or
    gone; without it, the engine is well and answered this one call with an error.
    """

    call: str
    reason: str
    retryable: bool = False
    worker_lost: bool = False


@dataclass(frozen=True, slots=True)
class CallCancelled:
    """The client went away."""

    call: str


@dataclass(frozen=True, slots=True)
class RunEnded:
    run: str


@dataclass(frozen=True, slots=True)
class WorkerChanged:
    info: WorkerInfo


@dataclass(frozen=True, slots=True)
class NodeJoined:
    """A node is there. `preload` names the models to bring in at once, as memory allows."""

    info: NodeInfo
    preload: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NodeLost:
    node: str


@dataclass(frozen=True, slots=True)
class MemoryMeasured:
    """Bytes in use on a device (`node/device`, `node/host`), as measured.

    Kept and shown beside the ledger's promise. No decision uses it: the node agent refuses by what
    it measures.
    """

    device: str
    used_bytes: int


@dataclass(frozen=True, slots=True)
class CommandApplied:
    command: int


@dataclass(frozen=True, slots=True)
class CommandFailed:
    command: int
    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time went by."""


Event = (
    RunStarted
    | Announced
    | ForecastChanged
    | StageStarted
    | StageEnded
    | ToolStarted
    | ToolEnded
    | RunPaused
    | RunResumed
    | CallArrived
    | CallPredicted
    | CallProgress
    | CallFinished
    | CallFailed
    | CallCancelled
    | RunEnded
    | WorkerChanged
    | NodeJoined
    | NodeLost
    | MemoryMeasured
    | CommandApplied
    | CommandFailed
    | Tick
)
