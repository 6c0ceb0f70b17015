"""What finished runs taught of runs to come: learned per app, persisted as plain JSON."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from maestro_agents.protocol import END, START
from maestro_backend.predictor import CallShape, Example, RunExamples, app_of

from ._branches import Branches
from ._futures import Future, Futures
from ._journey import Journey
from ._medians import Key, Medians
from ._transitions import Numbers

VERSION = 1
"""Of the state: another one is not restored."""


@dataclass(frozen=True, slots=True)
class Step:
    """One call of a finished run: what lay before it, what lay behind it, what it led to.

    `before` are its finished ancestors, `after` the same and itself. `chosen` are the distinct
    stages of its children; (END,) for the run's last call; empty where a branch just ends.
    `tokens` and `calls` are what came after it on the longest way to the end, in output tokens.
    """

    call: Example
    before: Journey
    after: Journey
    chosen: tuple[str, ...]
    widths: Counter[str]
    tokens: float
    calls: int


class Journeys:
    """All that is learned: branches, fan-outs, gaps, growth and remaining work."""

    def __init__(self) -> None:
        self.branches = Branches()
        self.futures = Futures()
        self.widths = Numbers()
        self.gaps = Medians()
        self.growth = Medians()

    def learn(self, run: RunExamples) -> None:
        """A run has ended."""
        app, found = app_of(run.workflow), list(steps(run))
        if found:
            self.branches.learn(app, Journey(last=START), found[0].call.shape.stage)
        for step in found:
            for chosen in step.chosen:
                self.branches.learn(app, step.after, chosen)
        self.learn_rest(run, found)

    def learn_rest(self, run: RunExamples, found: Sequence[Step]) -> None:
        """Everything but the branches, which a run in progress teaches as it takes them."""
        app = app_of(run.workflow)
        for step in found:
            shape, stage = step.call.shape, step.call.shape.stage
            self.futures.learn(app, run.run, shape, step.before, step.tokens, step.calls)
            for following, width in step.widths.items():
                self.widths.learn((app, stage, following), width)
        self._learn_amounts(app, run)

    def future(self, workflow: str, shape: CallShape, past: Journey) -> Future:
        """What comes after a call that is about to run."""
        return self.futures.future(app_of(workflow), shape, past)

    def odds(self, workflow: str, past: Journey) -> dict[str, float]:
        """P(next stage) after the last call of `past`; END and NEW among them."""
        return self.branches.odds(app_of(workflow), past)

    def gap_s(self, workflow: str, source: str, target: str) -> float:
        """Seconds between the end of a call and the start of the next: tools, code, people."""
        return self.gaps.median(_gap_keys(app_of(workflow), source, target))

    def growth_tokens(self, workflow: str, stage: str, role: str = "") -> float:
        """By how much a prompt of the stage is longer than its last one in the run."""
        return self.growth.median(_growth_keys(app_of(workflow), stage, role))

    def _learn_amounts(self, app: str, run: RunExamples) -> None:
        for call in run.calls:
            stage, role = call.shape.stage, call.shape.role
            parents = [run.calls[parent] for parent in call.parents]
            if parents and isfinite(call.shape.gap_s):
                for source in {parent.shape.stage for parent in parents}:
                    self.gaps.learn(_gap_keys(app, source, stage), call.shape.gap_s)
            for parent in _last_of(run, call):
                grown = call.outcome.prompt_tokens - parent.outcome.prompt_tokens
                self.growth.learn(_growth_keys(app, stage, role), grown)

    def state(self) -> dict[str, Any]:
        """Plain JSON: names of apps, stages, roles and models, and numbers. No text."""
        return {
            "version": VERSION,
            "branches": self.branches.state(),
            "futures": self.futures.state(),
            "widths": self.widths.state(),
            "gaps": self.gaps.state(),
            "growth": self.growth.state(),
        }

    def restore(self, state: dict[str, Any]) -> bool:
        """Take what `state` gave; False, and nothing changes, if it is of another version."""
        if state.get("version") != VERSION:
            return False
        for part in ("branches", "futures", "widths", "gaps", "growth"):
            getattr(self, part).restore(state[part])
        return True


def steps(run: RunExamples) -> Iterator[Step]:
    """The calls of a finished run, in order of arrival."""
    children: dict[int, list[int]] = defaultdict(list)
    for call in run.calls:
        for parent in call.parents:
            children[parent].append(call.index)
    rest = _longest(run, children)
    last = len(run.calls) - 1
    for call, (before, after) in zip(run.calls, journeys_of(run), strict=True):
        widths = Counter(run.calls[child].shape.stage for child in children[call.index])
        chosen = tuple(sorted(widths)) or ((END,) if call.index == last else ())
        yield Step(call, before, after, chosen, widths, *rest[call.index])


def journeys_of(run: RunExamples) -> Iterator[tuple[Journey, Journey]]:
    """What lay before each call (its ancestors, no sibling), and the same with the call itself.

    Only calls before it are read: what comes later changes nothing.
    """
    ends: list[Journey] = []
    for call in run.calls:
        before = ends[call.parents[0]] if len(call.parents) == 1 else _joined(run, call)
        after = before.copy()
        after.add(call.shape, call.outcome)
        ends.append(after)
        yield before, after


def _joined(run: RunExamples, call: Example) -> Journey:
    """The past of a call that waited for several others, or for none."""
    past: set[int] = set()
    agenda = list(call.parents)
    while agenda:
        at = agenda.pop()
        if at not in past:
            past.add(at)
            agenda.extend(run.calls[at].parents)
    journey = Journey()
    for at in sorted(past):
        journey.add(run.calls[at].shape, run.calls[at].outcome)
    return journey


def _longest(run: RunExamples, children: dict[int, list[int]]) -> list[tuple[float, int]]:
    """After each call: output tokens on the longest way to the end, and the calls on it."""
    rest = [(0.0, 0)] * len(run.calls)
    for at in reversed(range(len(run.calls))):
        ways = (
            (rest[child][0] + run.calls[child].length, rest[child][1] + 1) for child in children[at]
        )
        rest[at] = max(ways, default=(0.0, 0))
    return rest


def _last_of(run: RunExamples, call: Example) -> Iterator[Example]:
    """The last call of the same stage and role among the ancestors, on the first way back."""
    at: tuple[int, ...] = call.parents
    kind = call.shape.stage, call.shape.role
    for _ in range(_FAR):
        if not at:
            return
        ancestor = run.calls[at[0]]
        if (ancestor.shape.stage, ancestor.shape.role) == kind:
            yield ancestor
            return
        at = ancestor.parents


_FAR = 16
"""Calls that are gone back for one of the same stage (ours)."""


def _gap_keys(app: str, source: str, target: str) -> tuple[Key, ...]:
    return ("edge", app, source, target), ("into", app, target), ("app", app)


def _growth_keys(app: str, stage: str, role: str) -> tuple[Key, ...]:
    return ("role", app, stage, role), ("stage", app, stage), ("app", app)
