"""What follows a call: odds over stages and END, mixed from exact and general contexts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np

from maestro_agents.protocol import END, START
from maestro_backend.predictor import Recent

from ._journey import Journey, coarse, intent, octaves
from ._mixing import Mixer, Weights, evidence
from ._plain import keys_from_plain, plain_key

NEW = "__new__"
"""A stage that the app was never seen in."""

_MAX_CONTEXTS = 20_000
_MAX_APPS = 1_000
_MAX_STAGES = 64
"""Remembered: contexts, apps, stages of one app, those used last (ours)."""
_MUCH = 512
"""A context that has seen so much forgets half of it: habits change (ours)."""
_PRIOR = 0.5
"""How much what a more general context says weighs, in decisions (ours)."""
_RATE = 0.2
"""Of the mixture's learning (ours)."""

Key = tuple[Hashable, ...]
Counts = Counter[str]

_RELATIVES = ("again", "as before", "back", "other", END, NEW)
_GENERAL = 3
_LEVELS = 18


def branch_keys(app: str, past: Journey) -> list[Key]:
    """The contexts of a decision after the last call of `past`: three that hold across apps, then
    those of the app from general to exact."""
    stage, previous, asked = past.last, past.previous, intent(past.finish)
    followed = past.followed.get(stage, "")
    habit = _relative(followed, past) if followed else ""
    visit, length = coarse(past.rounds.get(stage, 0)), octaves(past.output)
    return [
        ("habit", habit),
        ("streak", habit, asked, min(past.streak, 4), previous == stage),
        ("intent", habit, asked, bool(previous)),
        ("app", app),
        ("role", app, past.role),
        ("stage", app, stage),
        ("asked", app, stage, asked),
        ("visit", app, stage, visit),
        ("from", app, stage, previous, asked),
        ("from visit", app, stage, previous, visit),
        ("calls", app, stage, coarse(past.calls)),
        ("path", app, past.path, min(past.streak, 8)),
        ("followed", app, stage, followed, asked),
        ("from two", app, stage, previous, past.earlier, asked),
        ("stage role", app, stage, past.role, asked),
        ("length", app, stage, asked, length),
        ("visit length", app, stage, visit, length),
        ("tokens", app, stage, octaves(past.tokens)),
    ]


def _relative(stage: str, past: Journey) -> str:
    """A stage by what it is to the last one: so much holds for every app."""
    if stage in (END, NEW):
        return stage
    if stage == past.followed.get(past.last):
        return "as before"
    return "again" if stage == past.last else "back" if stage == past.previous else "other"


class Branches:
    """Counts of what followed, by context; app by app, and across them.

    Each context is smoothed by the next more general one, and all are mixed by what they were
    worth so far (`Mixer`). END and a stage never seen (`NEW`) have their share always.
    """

    def __init__(self) -> None:
        self._counts: Recent[Key, Counts] = Recent(_MAX_CONTEXTS)
        self._stages: Recent[str, Recent[str, None]] = Recent(_MAX_APPS)
        self._mixer = Mixer(_LEVELS, _RATE)
        self._changes: Recent[str, int] = Recent(_MAX_APPS)

    def stages(self, app: str) -> tuple[str, ...]:
        """The stages that were seen in the app, at most 64."""
        return tuple(self._stages.get(app, ()))

    def changes(self, app: str) -> int:
        """How often something was learned of the app: while this stays, its graph does."""
        return self._changes.get(app, 0)

    def odds(self, app: str, past: Journey) -> dict[str, float]:
        """P(next stage) after the last call of `past`, with END and NEW; they sum to 1."""
        options = self._options(app, past)
        rows, classes = self._rows(branch_keys(app, past), options, past)
        mixed = self._mixer.weights(classes) @ rows
        return dict(zip(options, mixed.tolist(), strict=True))

    def usual(self, app: str, stage: str, visit: int) -> dict[str, float]:
        """P(next stage) after the `visit`-th call of a stage, whatever else holds; quick.

        Empty where nothing is known of the stage. Never-seen stages have no share.
        """
        counts = self._counts.get(("stage", app, stage))
        if not counts:
            return {}
        total = counts.total() - counts[NEW]
        these = self._counts.get(("visit", app, stage, coarse(visit)), Counter())
        weight = these.total() - these[NEW] + _PRIOR
        return {
            option: (these[option] + _PRIOR * count / total) / weight
            for option, count in counts.items()
            if option != NEW
        }

    def learn(self, app: str, past: Journey, chosen: str) -> None:
        """After the last call of `past` came a call of stage `chosen`, or the run's END."""
        options = self._options(app, past)
        keys = branch_keys(app, past)
        rows, classes = self._rows(keys, options, past)
        came = chosen if chosen in options else NEW
        chances = rows[:, options.index(came)]
        self._mixer.learn(classes, self._mixer.weights(classes), chances)
        for key in keys[:_GENERAL]:
            self._count(key, (_relative(came, past),))
        for key in keys[_GENERAL:]:
            self._count(key, {chosen, came})
        self._changes[app] = self._changes.get(app, 0) + 1
        self.meet(app, past.last)
        if chosen != END:
            self.meet(app, chosen)

    def meet(self, app: str, stage: str) -> None:
        """The stage was seen in the app."""
        if stage and stage not in (START, END):
            self._stages.use(app, lambda: Recent(_MAX_STAGES)).use(stage, lambda: None)

    def _options(self, app: str, past: Journey) -> list[str]:
        known = self._stages.get(app, ())
        own = () if past.last in known or past.last in ("", START, END) else (past.last,)
        return [*known, *own, END, NEW]

    def _count(self, key: Key, chosen: Iterable[str]) -> None:
        counts = self._counts.use(key, Counter)
        counts.update(chosen)
        if counts.total() > _MUCH:
            for name in list(counts):
                counts[name] //= 2
            self._counts[key] = +counts

    def _rows(
        self, keys: Sequence[Key], options: list[str], past: Journey
    ) -> tuple[Weights, list[int]]:
        """A distribution over `options` from each context, and the evidence that each has."""
        relatives = [_relative(option, past) for option in options]
        rows: list[list[float]] = []
        classes: list[int] = []
        for level, key in enumerate(keys):
            counts = self._counts.get(key)
            seen = counts.total() if counts else 0
            classes.append(evidence(seen))
            if level < _GENERAL:
                rows.append(_shared(counts or Counter(), relatives))
                continue
            base = rows[min(level, _GENERAL + 3) - 1]
            if counts is None:
                rows.append(base)
                continue
            weight = 1.0 / (seen + _PRIOR)
            rows.append(
                [
                    (counts[option] + _PRIOR * share) * weight
                    for option, share in zip(options, base, strict=True)
                ]
            )
        return np.array(rows), classes

    def state(self) -> dict[str, Any]:
        """As plain JSON: names and counts."""
        return {
            "stages": [[app, list(stages)] for app, stages in self._stages.items()],
            "counts": [[plain_key(key), dict(counts)] for key, counts in self._counts.items()],
            "mixer": self._mixer.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """What `state` gave, in the place of what is known."""
        self._counts.clear()
        self._stages.clear()
        self._changes.clear()
        for app, stages in state["stages"]:
            for stage in stages:
                self.meet(app, stage)
        for key, counts in keys_from_plain(state["counts"]):
            self._counts[key] = Counter(counts)
        self._mixer.restore(state["mixer"])


def _shared(counts: Counts, relatives: list[str]) -> list[float]:
    """What holds for every app, over the options of one: alike ones share."""
    alike = Counter(relatives)
    shares = [(counts[name] + 1.0) / alike[name] for name in relatives]
    total = sum(shares)
    return [share / total for share in shares]
