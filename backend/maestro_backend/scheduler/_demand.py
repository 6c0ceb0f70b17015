"""What the node level is asked for: models that should be on a device."""

from __future__ import annotations

from dataclasses import dataclass

from ._calls import Call


@dataclass(frozen=True, slots=True)
class Demand:
    """A model that should be on a device.

    `oldest` is the oldest call that waits for it; `expected_at` when a run will likely call it.
    With neither it is a preload, for which nothing else makes room. A `replica` is a further worker
    of a model that has some already.
    """

    model: str
    oldest: Call | None = None
    expected_at: float | None = None
    replica: bool = False

    def waited_s(self, now: float) -> float:
        """How long its oldest call has waited; 0 where none does."""
        return 0.0 if self.oldest is None else now - self.oldest.arrived


def urgency(call: Call) -> tuple[bool, int]:
    """A call that was begun, and whose worker is suspended, goes before those in the queue."""
    return call.worker is None, call.order
