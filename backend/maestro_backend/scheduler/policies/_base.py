"""A policy says which queued call goes first."""

from __future__ import annotations

import math

from maestro_backend.scheduler._calls import Call, Key
from maestro_backend.scheduler._runs import Run

MOST_PRIORITY = 2**31 - 1


class Policy:
    """An order of calls. What it answers depends on the arguments and on what its hooks were told.

    The scheduler asks for a key when a call is queued, and again when something of the call's run
    has changed: its forecast, its deadline, an ended call. Ties go by arrival.
    """

    name = ""
    max_wait_s = math.inf
    """A call that has waited so long goes before all younger ones, in order of arrival."""
    rekey_s: float | None = None
    """Keys change with time, or with what other runs teach: ask again this often (seconds)."""
    follows_runs = True
    """Whether keys depend on the run at all."""

    uses_deadlines = False

    shares = False
    """Whether tenants share each model by weight, outside the order."""

    def key(self, call: Call, run: Run | None, now: float) -> Key:
        """Sort key of a queued call at `now` (seconds): the smallest goes first."""
        raise NotImplementedError

    def turns_at(self, key: Key) -> float:
        """When a queued call of this key gets another one by itself (seconds); never, if not."""
        return math.inf

    def priority(self, call: Call, run: Run | None, now: float) -> int:
        """The engine's second-layer priority, 0 and up; vLLM's polarity: lower = sooner."""
        return 0

    def may_preempt(self, key: Key, victim: Key) -> bool:
        """Whether a call that lacks KV memory may take that of a running one, which then starts
        anew. By default none may: what is computed again costs more than the better order brings
        (measured with EDF, shortest first and their like)."""
        return False

    def arrived(self, call: Call, run: Run, now: float) -> None:
        """A call has come; its key is asked for after this."""

    def ended(self, call: Call, run: Run, now: float) -> None:
        """A call has ended well: `now - call.started` seconds on its worker."""

    def run_over(self, run: Run, now: float) -> None:
        """A run is forgotten, `run.ended` if it has come to its end."""


def milliseconds(seconds: float) -> int:
    """Seconds as an engine priority."""
    return max(0, min(int(min(seconds, MOST_PRIORITY) * 1000), MOST_PRIORITY))
