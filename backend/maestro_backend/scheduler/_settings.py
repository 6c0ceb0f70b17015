"""Bounds of the scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ._nouns import Residency


@dataclass(frozen=True, slots=True)
class Settings:
    """Bounds of the scheduler; times in seconds. All values are ours."""

    max_queued: int = 10_000
    max_queue_s: float | None = None
    """A run of class `batch` is refused once so much predicted service is queued for its model, a
    `standard` one at twice and an `interactive` one at four times as much; None: at no time."""
    max_attempts: int = 5
    """Tries of a call whose worker was lost each time."""
    max_error_attempts: int = 2
    """Tries of a call that a healthy engine answers with an error."""
    node_wait_s: float = 60.0
    """With no node at all, calls wait so long for one."""
    patience_s: float = 15.0
    """A waiting call drains another model's worker only after this long."""
    failure_pause_s: float = 30.0
    """A model that could not be brought in is not tried again before this."""
    suspect_s: float = 0.5
    """A worker that broke a call gets no other for this long, doubled with each further try of
    the call, unless its node says more: time for the node to notice a death."""
    run_idle_s: float = 3600.0
    """A run without calls or events for this long is forgotten."""
    pinned: tuple[str, ...] = ()
    """Models whose weights never make room for others."""
    rest_s: float = 5.0
    """A worker that could not be put away, or not be given another KV limit, is not asked for the
    same again before this."""
    preempt_patience_s: float = 10.0
    """A call without KV memory takes a less urgent one's only after it has waited this long."""
    max_preemptions: int = 2
    """A call is taken off its worker at most so often."""
    keep_ahead_s: float = 120.0
    """A prefix is kept only for a call that is expected to start within this."""
    keep_grace_s: float = 60.0
    """It is kept so long beyond the earliest start of that call."""
    look_ahead: Literal["none", "likely", "all"] = "likely"
    """Which calls of a forecast count as expected. For comparisons: none, or all of them, and what
    is idle makes room for them whether it is expected or not."""
    placement: Literal["load", "affinity"] = "load"
    """Which of a model's workers a call goes to: the one where it is slowed down the least; or, for
    comparisons, the one that served its run last, unless that is much busier than another."""
    tiers: tuple[Residency, ...] = tuple(Residency)
    """The residencies that may be used."""
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    """Where calls of several tenants wait for a model, they share it by weight. All that are not
    named here are one, `default`: nobody gets more by calling himself another."""
    fair_lag_s: float = 3600.0
    """No tenant is ahead of another that waits by more service than this, in seconds by weight;
    until then the order of calls decides."""

    def sharer(self, tenant: str) -> str:
        """As whom a tenant shares."""
        return tenant if tenant in self.tenant_weights else "default"
