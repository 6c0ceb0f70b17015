"""PLAS: program-level attained service (Agentix, first Autellix, arXiv 2502.13965).

A call enters the queue of the service that all ended calls of its program have had, in discrete
levels of powers of two; first come, first served inside; who has waited beta times its service is
promoted. Adapted: a program is a run. Left out: preemption at the end of a quantum, for our calls
run to their end in the engine; its swapping of KV.
"""

from __future__ import annotations

from maestro_backend.scheduler._calls import Call
from maestro_backend.scheduler._runs import Run

from ._levels import Levels


class Plas(Levels):
    """The run that has had the least service in all goes first, by levels."""

    name = "plas"

    def attained_s(self, call: Call, run: Run) -> float:
        return run.attained_s
