"""What switching models costs: activations, and the call time that waits for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from maestro_backend.scheduler import WorkerState

_LEAVING = (WorkerState.SUSPENDING, WorkerState.STOPPING)
_AWAY = (WorkerState.RESUMING, WorkerState.STARTING, WorkerState.RESTARTING)


@dataclass(slots=True)
class Switch:
    """One activation of a model, from `begun` until it took calls, and the calls it was for.

    `blocked_s` is what they waited for it, summed over calls, `longest_s` the longest of these
    waits; `lead_s` how long before its first call the model was announced. Times in seconds.
    """

    model: str
    begun: float
    ready: float | None = None
    blocked_s: float = 0.0
    longest_s: float = 0.0
    calls: int = 0
    lead_s: float | None = None

    @property
    def seconds(self) -> float:
        """How long the activation took."""
        return 0.0 if self.ready is None else self.ready - self.begun

    @property
    def hideable(self) -> bool:
        """Whether it was announced at least as early as it takes."""
        return self.lead_s is not None and self.lead_s >= self.seconds


@dataclass(slots=True)
class Watch:
    """Follows the workers of a gateway; `now` is the clock of its records."""

    switches: list[Switch] = field(default_factory=list)
    states: dict[str, WorkerState] = field(default_factory=dict)
    put_aside: int = 0
    failed: int = 0
    """Activations that came to nothing; they are not among the switches."""

    def worker(self, model: str, state: WorkerState, now: float) -> None:
        """A worker changed."""
        before, open_ = self.states.get(model), self._open(model)
        self.states[model] = state
        if state in _AWAY and before not in _AWAY:
            self.switches.append(Switch(model, now))
        elif open_ is not None and state is WorkerState.READY:
            open_.ready = now
        elif open_ is not None and state not in _AWAY:
            self.switches.remove(open_)
            self.failed += 1
        elif state in _LEAVING and before is WorkerState.READY:
            self.put_aside += 1

    def account(self, calls: Iterable[dict[str, Any]]) -> None:
        """Match ended calls (their records, in order of arrival) with the activations."""
        for call in sorted(calls, key=lambda c: c["arrived"]):
            dispatched = call["dispatched"]
            for switch in self.switches:
                if switch.model != call["model"] or dispatched is None or switch.ready is None:
                    continue
                blocked = min(dispatched, switch.ready) - max(call["arrived"], switch.begun)
                switch.blocked_s += max(0.0, blocked)
                switch.longest_s = max(switch.longest_s, blocked)
            self._serve(call)

    def _serve(self, call: dict[str, Any]) -> None:
        """The call belongs to the last activation before it was dispatched. When that was ready is
        heard a little later here than by the gateway, so its beginning counts."""
        if call["dispatched"] is None:
            return
        mine = [
            s
            for s in self.switches
            if s.model == call["model"] and s.ready is not None and s.begun <= call["dispatched"]
        ]
        if not mine:
            return
        switch = mine[-1]
        switch.calls += 1
        if switch.lead_s is None:
            switch.lead_s = call["lead_s"] or 0.0

    def _open(self, model: str) -> Switch | None:
        mine = [s for s in self.switches if s.model == model and s.ready is None]
        return mine[-1] if mine else None


def hidden(switches: Iterable[Switch], *, longest: bool = False) -> float | None:
    """1 - (call time blocked on activations) / (time of activations); None without any.

    Every call that waits counts, so that a stage of four calls that wait for one activation is
    four times its time; with `longest` only the one that waits longest counts. Activations that no
    call used hide nothing, and do not count.
    """
    some = [s for s in switches if s.ready is not None and s.calls]
    total = sum(s.seconds for s in some)
    blocked = sum(s.longest_s if longest else s.blocked_s for s in some)
    return round(1 - blocked / total, 4) if total else None
