"""Where a run stands in its graph: what runs, what is to come at once, what has begun."""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass, field, replace

from maestro_agents.protocol import END, MAX_STAGES
from maestro_backend.predictor import Recent

from ._nouns import Expected

_MAX_PENDING = 256
"""Stages that a run may wait for: enough for a wide fork, few enough to forecast (ours)."""
_AGAIN = 0.9
"""How likely a call that asked for tools is followed by one of the same stage (ours)."""

PERHAPS = 0.5
"""A task beside one that was fanned out is of the same stage with this probability (ours)."""

Following = Callable[[str], list[Expected]]


@dataclass(slots=True)
class Fan:
    """A fan-out into one stage or subgraph: of each stage inside, `width` executions are due.

    Not for `sure` where nobody said so: it is how many tasks run beside the first one.
    """

    width: int
    sure: bool = True
    begun: Recent[str, int] = field(default_factory=lambda: Recent(MAX_STAGES))


@dataclass(slots=True)
class Position:
    """Told either by events, which come in order, or by calls, where no event says more.

    `visits` counts the executions of each stage, `order` numbers all of them; `whole`: the run
    has been followed from its start.
    """

    whole: bool = True
    order: int = 0
    executing: Recent[str, int] = field(default_factory=lambda: Recent(MAX_STAGES))
    pending: Recent[str, Expected] = field(default_factory=lambda: Recent(_MAX_PENDING))
    begun: Recent[str, int] = field(default_factory=lambda: Recent(MAX_STAGES))
    visits: Recent[str, int] = field(default_factory=lambda: Recent(MAX_STAGES))
    causes: Recent[str, str] = field(default_factory=lambda: Recent(MAX_STAGES))
    fans: Recent[str, Fan] = field(default_factory=lambda: Recent(MAX_STAGES))
    again: Recent[str, None] = field(default_factory=lambda: Recent(MAX_STAGES))
    """Stages whose last call asked for tools: their prompts come back."""

    # --- what happens ---------------------------------------------------------------------------

    def begin(self, stage: str, beside: int = 1) -> Expected | None:
        """An execution of `stage` has started, one of so many tasks that run side by side.

        Returns what was expected of it, if anything.
        """
        self.order += 1
        self.begun[stage] = self.order
        self.visits[stage] = self.visits.get(stage, 0) + 1
        self.again.pop(stage, None)
        item = self.pending.get(stage)
        if item is not None and beside > 1 and not item.certain and not self._due(stage):
            self.fans[entered(item.after, stage)] = Fan(beside, sure=False)
            self.pending[stage] = replace(item, probability=PERHAPS)
        if fan := self._fan(stage):
            more(fan.begun, stage)
        if item is not None:
            self.causes[stage] = item.after
            if not self._due(stage):
                del self.pending[stage]
        return item

    def enter(self, stage: str) -> None:
        more(self.executing, stage)

    def exit(self, stage: str) -> None:
        less(self.executing, stage)

    def stop(self) -> None:
        """A human is asked: what runs is given up, and starts anew when the run goes on."""
        for stage in self.executing:
            self.pending[stage] = Expected(stage, 1.0)
        self.executing.clear()

    def expect_after(self, stage: str, expected: list[Expected]) -> None:
        """`stage` has ended: wait for these, unless they began since it did.

        What was a candidate beside `stage`, and has not begun by now, was not chosen.
        """
        if stage not in self.executing:  # what it calls inside cannot come any more
            for inside in [s for s in self.pending if s.startswith(f"{stage}/")]:
                del self.pending[inside]
        cause = self.causes.pop(stage, None)
        for rival in list(self.pending.values()):
            if rival.after == cause and not (rival.certain or rival.stage == stage):
                del self.pending[rival.stage]
        for item in self._to_come(stage, expected):
            self.pending[item.stage] = item
            self._open_fan(stage, item)

    # --- what follows from it -------------------------------------------------------------------

    def starts(
        self, running: Iterable[str], following: Following, ahead: Callable[[str], int]
    ) -> list[Expected]:
        """The stages that may start next: pending ones, and successors of those that run.

        A candidate that has called already, `ahead` of its events, was chosen.
        """
        starts = dict(self.pending)
        starts |= {s: Expected(s, _AGAIN, certain=False) for s in self.again if s not in starts}
        for stage in running:
            found = self._to_come(stage, following(stage))
            chosen = {e.stage for e in found if not e.certain and ahead(e.stage)}
            for item in found:
                if chosen and not item.certain and item.stage not in chosen:
                    continue
                if item.stage in chosen:
                    item = Expected(item.stage, 1.0, False, item.after, item.width)
                known = starts.get(item.stage)
                if known is None or known.probability < item.probability:
                    starts[item.stage] = item
        return list(starts.values())

    def in_round(self, stage: str, following: Iterable[str]) -> bool:
        """Whether `stage` has run and nothing of what follows it has begun since."""
        began = self.begun.get(stage)
        return began is not None and all(self.begun.get(s, 0) <= began for s in following)

    def arrived(self, source: str, target: str) -> bool:
        """Whether a join's source has begun since the join's target last did."""
        return not self.whole or self.begun.get(source, 0) > self.begun.get(target, 0)

    def copies(self, stage: str) -> int:
        """How many executions of a stage to expect where one is expected."""
        fan = self._fan(stage)
        return max(1, self._due(stage)) if fan and fan.sure else 1

    def _due(self, stage: str) -> int:
        """Executions that the fan-out around `stage` still owes; 0 without one."""
        fan = self._fan(stage)
        return max(0, fan.width - fan.begun.get(stage, 0)) if fan else 0

    def _fan(self, stage: str) -> Fan | None:
        path = stage
        while path:
            if path in self.fans:
                return self.fans[path]
            path = path.rpartition("/")[0]
        return None

    def _open_fan(self, source: str, item: Expected) -> None:
        where = entered(source, item.stage)
        if item.width is not None and item.width > 1:
            self.fans[where] = Fan(item.width)
        else:
            self.fans.pop(where, None)

    def _to_come(self, stage: str, following: list[Expected]) -> list[Expected]:
        since = self.begun.get(stage, 0)
        return [e for e in following if e.stage != END and self.begun.get(e.stage, 0) <= since]


def entered(source: str, target: str) -> str:
    """What is entered on the way from `source` to `target`: a subgraph's path, else `target`."""
    around, parts = source.split("/")[:-1], target.split("/")
    shared = 0
    while shared < min(len(around), len(parts) - 1) and around[shared] == parts[shared]:
        shared += 1
    return "/".join(parts[: shared + 1])


def more(counts: MutableMapping[str, int], key: str) -> None:
    counts[key] = counts.get(key, 0) + 1


def less(counts: MutableMapping[str, int], key: str) -> None:
    """Down to nothing, never below: a count that is zero takes no room."""
    left = counts.pop(key, 0) - 1
    if left > 0:
        counts[key] = left
