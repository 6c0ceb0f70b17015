"""Shortest job first, call by call: what length-predicting servers do.

Source: SSJF (arXiv 2404.08509) and "learning to rank" (arXiv 2408.15792). Adapted: the service
time is the one predicted with the call, prompt included. Left out: their bounds on starvation.
"""

from __future__ import annotations

from maestro_backend.scheduler._calls import Call, Key
from maestro_backend.scheduler._runs import Run

from ._base import Policy, milliseconds


class Sjf(Policy):
    """The call with the shortest predicted service goes first, whatever its run."""

    name = "sjf"
    follows_runs = False

    def key(self, call: Call, run: Run | None, now: float) -> Key:
        return (call.request.service_s,)

    def priority(self, call: Call, run: Run | None, now: float) -> int:
        return milliseconds(call.request.service_s)
