"""What past runs let expect after a call that has just arrived: the gateway's forecast, remembered.

The same graph, odds and walk as `workflows` uses for a run whose workflow nobody announced, with
these differences (all ours): nothing is learned of the replayed runs; odds of the first step are
rounded to two digits, and counts of visits above 8 coarsely, so that walks can be shared; start
times come from usual prompts; a stage's role and model are those of most of its past calls (the
gateway has the last ones); lengths come from the tables; at most eight calls are told.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass

from maestro_agents.protocol import END, Stage, Workflow
from maestro_backend.predictor import CallOutcome, Example, app_of
from maestro_backend.scheduler import ForecastCall
from maestro_backend.workflows import NEW, Expected, Habits, Journey, Journeys, Past, forecast
from maestro_backend.workflows._branches import branch_keys
from maestro_backend.workflows._journey import coarse
from maestro_backend.workflows._learned_graph import (
    LearnedGraphs,
    LearnedTransitions,
    LearnedWidths,
)
from maestro_backend.workflows._reach import FLOOR

from ._places import Places

ServiceS = Callable[[str, int, float], float]
"""Seconds in the engine when alone, by model, prompt tokens, output tokens."""

Prompts = Mapping[tuple[str, str], int]
"""By stage and role, prompt tokens of the last such call on the way to where a run stands."""

MOST = 8
"""Calls that are told of each forecast (ours)."""
_EXACT = 8
_NOTHING = CallOutcome(0, 0)

Odds = tuple[tuple[str, float], ...]
Visits = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class _App:
    graph: Workflow
    habits: Habits


class Ahead:
    """Forecasts from where runs stand. Its answers depend on nothing that was asked before."""

    def __init__(self, journeys: Journeys, places: Places, service_s: ServiceS) -> None:
        self._journeys, self._places, self._service_s = journeys, places, service_s
        self._graphs = LearnedGraphs(journeys)
        self._apps: dict[str, _App] = {}
        self._odds: dict[tuple[Hashable, ...], Odds] = {}
        self._walks: dict[tuple[Hashable, ...], tuple[ForecastCall, ...]] = {}

    def after(self, call: Example, before: Journey, prompts: Prompts) -> tuple[ForecastCall, ...]:
        """In order of start. `before`, `prompts`: of its ancestors, the prompts its own too."""
        app, shape = app_of(call.shape.workflow), call.shape
        past = before.copy()
        past.add(shape, _NOTHING)
        odds = self._first(app, past)
        if not odds:
            return ()
        visits = tuple(sorted((stage, _shown(count)) for stage, count in past.rounds.items()))
        key = app, shape.stage, odds, visits
        if key not in self._walks:
            self._walks[key] = self._walk(app, shape.stage, odds, visits)
        return tuple(self._sized(app, one, prompts) for one in self._walks[key])

    def _first(self, app: str, past: Journey) -> Odds:
        key = tuple(branch_keys(app, past))
        if key not in self._odds:
            self._odds[key] = tuple(self._rounded(app, past))
        return self._odds[key]

    def _rounded(self, app: str, past: Journey) -> Iterator[tuple[str, float]]:
        """The odds of the next stage; none where nothing is known of the one that runs."""
        branches = self._journeys.branches
        if branches.usual(app, past.last, past.rounds.get(past.last, 0)):
            odds = branches.odds(app, past)
            known = 1.0 - odds.pop(NEW)
            for stage, chance in odds.items():
                if stage != END and chance / known >= FLOOR:
                    yield stage, round(min(1.0, chance / known), 2)

    def _walk(self, app: str, source: str, odds: Odds, visits: Visits) -> tuple[ForecastCall, ...]:
        """Of the prompts only what loops add to them: the rest differs from run to run."""
        known = self._app(app)

        def predict(stage: Stage) -> ForecastCall | None:
            role = self._places.role(app, stage.path)
            place = self._places.of(app, stage.path, role)
            if place is None:
                return None
            service_s = self._service_s(place.model, place.prompt_tokens, place.length.p50)
            return ForecastCall(stage.path, role, place.model, 1.0, 0.0, 0, place.length, service_s)

        starts = [Expected(s, p, certain=False, after=source) for s, p in odds]
        found = forecast(known.graph, starts, known.habits, predict, Past(visits=dict(visits)))
        return _nearest(found)

    def _sized(self, app: str, one: ForecastCall, prompts: Prompts) -> ForecastCall:
        last = prompts.get((one.stage, one.role))
        if last is None:
            place = self._places.of(app, one.stage, one.role)
            tokens = one.prompt_tokens + (place.prompt_tokens if place else 0)
        else:
            grown = self._journeys.growth_tokens(app, one.stage, one.role)
            tokens = one.prompt_tokens + max(0, last + int(grown))
        service_s = self._service_s(one.model, tokens, one.length.p50)
        return ForecastCall(
            one.stage,
            one.role,
            one.model,
            one.probability,
            one.earliest_start_s,
            tokens,
            one.length,
            service_s,
        )

    def _app(self, app: str) -> _App:
        if app not in self._apps:
            journeys = self._journeys
            habits = Habits(
                transitions=LearnedTransitions(journeys, app, lambda stage: None),
                widths=LearnedWidths(journeys, app),
                gap_s=lambda source, target: journeys.gap_s(app, source, target),
                growth_tokens=lambda stage: journeys.growth_tokens(app, stage),
            )
            self._apps[app] = _App(self._graphs.graph(app), habits)
        return self._apps[app]


def _nearest(calls: tuple[ForecastCall, ...]) -> tuple[ForecastCall, ...]:
    """The most probable call of each stage, then further ones, as many as are told; by start."""
    likely = sorted(calls, key=lambda one: (-one.probability, one.earliest_start_s))
    first = {call.stage: call for call in reversed(likely)}
    likely.sort(key=lambda one: first[one.stage] is not one)
    return tuple(sorted(likely[:MOST], key=lambda one: one.earliest_start_s))


def _shown(count: int) -> int:
    """The least count that is told apart from smaller ones."""
    while count > _EXACT and coarse(count - 1) == coarse(count):
        count -= 1
    return count
