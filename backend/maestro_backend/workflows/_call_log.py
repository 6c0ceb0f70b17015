"""The calls of one live run as they came and went: who waited for whom, what to learn of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import isnan

from maestro_backend.predictor import CallOutcome, CallShape, Example, Recent, RunExamples
from maestro_backend.scheduler import Length, Rest

from ._futures import NO_FUTURE, Future
from ._journey import Journey

_MAX_CALLS = 500
"""Calls of a run that are learned from; of longer runs only the branches are (ours)."""
_MAX_OPEN = 256
"""Calls in progress, and ended ones that the next will have waited for, the last ones (ours)."""

_NOTHING = CallOutcome(0, 0)


@dataclass(slots=True)
class Logged:
    """One call. `after` is the run's past with the call itself, without an outcome while it runs;
    `led_to` are the stages that were seen to follow."""

    stage: str
    instance: int
    index: int
    shape: CallShape
    before: Journey
    after: Journey
    arrived: int
    current: Length
    call: str = ""
    """The caller's unique name of it, if it gave one."""
    future: Future = NO_FUTURE
    taught: int = 0
    """Runs of the same stage that `future` was learned from when the call arrived."""
    ended: int = 0
    ended_s: float = 0.0
    led_to: set[str] = field(default_factory=set)


@dataclass(slots=True)
class CallLog:
    """Follows one run call by call.

    The wire does not say what a call waited for. Here it is every call that had ended before it
    arrived, and calls side by side are not each other's past: its parents are the ended calls
    that lie before no other ended one.
    """

    past: Journey = field(default_factory=Journey)
    open: Recent[int, Logged] = field(default_factory=lambda: Recent(_MAX_OPEN))
    ended: Recent[int, Logged] = field(default_factory=lambda: Recent(_MAX_OPEN))
    """Those that lie before no other ended call: what the next call will have waited for."""
    prompts: Recent[str, int] = field(default_factory=lambda: Recent(_MAX_OPEN))
    """Tokens of each stage's last prompt."""
    heard_s: float = 0.0
    calls: int = 0
    _order: int = 0
    _parents: dict[int, tuple[int, ...]] = field(default_factory=dict)
    _shapes: dict[int, CallShape] = field(default_factory=dict)
    _outcomes: dict[int, CallOutcome] = field(default_factory=dict)
    _said: dict[int, tuple[Rest, Rest]] = field(default_factory=dict)

    def arrive(
        self,
        stage: str,
        instance: int,
        shape: CallShape,
        current: Length,
        now: float,
        call: str = "",
    ) -> Logged:
        """A call has arrived; `shape` says the stage under which it is learned."""
        self.heard_s, self._order = now, self._order + 1
        if isnan(shape.gap_s) and self.ended and not self.open:
            ended_s = max(call.ended_s for call in self.ended.values())
            shape = replace(shape, gap_s=max(0.0, now - ended_s))
        after = self.past.copy()
        after.add(shape, _NOTHING)
        before, arrived = self.past.copy(), self._order
        logged = Logged(stage, instance, self.calls, shape, before, after, arrived, current, call)
        self.calls += 1
        if logged.index < _MAX_CALLS:
            self._parents[logged.index] = tuple(self.ended)
            self._shapes[logged.index] = shape
        self.open[logged.index] = logged
        return logged

    def find(self, stage: str, instance: int, call: str = "") -> Logged | None:
        """The open call that is called `call`; without such a name the oldest of its stage and
        instance. A call that came with a name is found by no other."""
        name = stage, instance
        for logged in self.open.values():
            exact = call and logged.call
            if logged.call == call if exact else (logged.stage, logged.instance) == name:
                return logged
        return None

    def strike(self) -> None:
        """What runs is given up: its calls are as if they never were."""
        self.open.clear()

    def end(self, call: Logged, outcome: CallOutcome | None, now: float) -> None:
        """An open call is over; without an outcome it is as if it never was."""
        self.heard_s, self._order = now, self._order + 1
        del self.open[call.index]
        if outcome is None:
            return
        call.ended, call.ended_s = self._order, now
        call.after = call.before.copy()
        call.after.add(call.shape, outcome)
        self.past.add(call.shape, outcome)
        self.prompts[call.shape.stage] = outcome.prompt_tokens
        if call.index < _MAX_CALLS:
            self._outcomes[call.index] = outcome
        for index, other in list(self.ended.items()):
            if other.ended < call.arrived:
                del self.ended[index]
        self.ended[call.index] = call

    def say(self, call: Logged, trees: Rest, journeys: Rest) -> None:
        """What was predicted of the rest of the run at a call, both ways."""
        if call.index < _MAX_CALLS:
            self._said[call.index] = trees, journeys

    def said(self, actual: Sequence[float]) -> tuple[list[tuple[Rest, Rest]], list[float]]:
        """What was said of the calls in `examples`, and what came (`actual`, one per example)."""
        came = dict(zip(sorted(self._outcomes), actual, strict=True))
        known = [index for index in came if index in self._said]
        return [self._said[index] for index in known], [came[index] for index in known]

    def at(self, stage: str) -> Journey | None:
        """The run's past up to and with the last call of the stage, if that is where it stands."""
        for calls in (self.open, self.ended):
            for call in reversed(calls.values()):
                if call.shape.stage == stage:
                    return call.after
        return None

    def front(self) -> list[Logged]:
        """Where the run stands: its calls in progress, else those that ended last."""
        return list(self.open.values()) or list(self.leaves())

    def leaves(self) -> Iterator[Logged]:
        """The ended calls at the run's front that nothing was seen to follow."""
        return (call for call in self.ended.values() if not call.led_to)

    def examples(self, run: str, workflow: str) -> RunExamples:
        """The run as recorded runs are: calls that ended, at most 500, numbered anew."""
        kept = {index: at for at, index in enumerate(sorted(self._outcomes))}
        calls = tuple(
            Example(
                source=workflow,
                run=run,
                index=at,
                shape=self._shapes[index],
                outcome=self._outcomes[index],
                parents=tuple(kept[p] for p in self._parents[index] if p in kept),
            )
            for index, at in kept.items()
        )
        return RunExamples(workflow, run, calls)

    @property
    def whole(self) -> bool:
        """Whether all calls of the run are kept."""
        return self.calls <= _MAX_CALLS
