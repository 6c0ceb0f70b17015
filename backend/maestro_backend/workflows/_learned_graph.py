"""A graph for runs whose workflow nobody announced: stages and branches as past runs took them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from itertools import islice

from maestro_agents.protocol import END, MAX_STAGES, START, Edge, Stage, Workflow
from maestro_backend.predictor import Recent

from ._branches import NEW
from ._journey import Journey
from ._journeys import Journeys
from ._transitions import Numbers, Transitions

_MAX_GRAPHS = 1_000
_LEAST = 0.02
"""Followers less likely than this have no edge (ours)."""
_NAME = "unknown"

_Key = tuple[tuple[str, tuple[str, ...]], ...]


class LearnedGraphs:
    """Graphs by app, made anew when they change."""

    def __init__(self, journeys: Journeys) -> None:
        self._journeys = journeys
        self._graphs: Recent[str, tuple[int, _Key, Workflow]] = Recent(_MAX_GRAPHS)

    def graph(self, app: str, announced: Iterable[str] = ()) -> Workflow:
        """All stages seen in the app and those `announced`; every edge is a candidate."""
        branches = self._journeys.branches
        changes, known = branches.changes(app), self._graphs.get(app)
        if known is None or known[0] != changes:
            key = self._key(app, branches.stages(app))
            made = known[2] if known and known[1] == key else _made(key)
            known = self._graphs[app] = changes, key, made
        seen = known[2].stage_by_path
        further = [s for s in announced if s not in seen]
        return known[2] if not further else _made(self._key(app, (*further, *seen)))

    def _key(self, app: str, names: Iterable[str]) -> _Key:
        real = (name for name in dict.fromkeys(names) if name not in (START, END))
        stages = dict.fromkeys(islice(real, MAX_STAGES))
        return tuple((stage, self._followers(app, stage, stages)) for stage in (START, *stages))

    def _followers(self, app: str, stage: str, stages: Collection[str]) -> tuple[str, ...]:
        odds = self._journeys.branches.usual(app, stage, 1 if stage != START else 0)
        return tuple(
            sorted(s for s, p in odds.items() if p >= _LEAST and (s == END or s in stages))
        )


def _made(key: _Key) -> Workflow:
    edges = (Edge(source=s, target=t, candidate=True) for s, targets in key for t in targets)
    stages = tuple(Stage(path=stage) for stage, _ in key if stage != START)
    return Workflow(name=_NAME, stages=stages, edges=tuple(edges))


class LearnedTransitions(Transitions):
    """The odds of a learned graph, seen from where one run stands.

    `standing` gives the run's past at a stage, None where the run is not there now: then what
    usually follows on that visit counts. A stage that was never seen has no share: it cannot be
    prepared for. Learning happens in `Journeys`.
    """

    def __init__(
        self, journeys: Journeys, app: str, standing: Callable[[str], Journey | None]
    ) -> None:
        super().__init__()
        self._journeys, self._app, self._standing = journeys, app, standing
        self._known: dict[tuple[str, int], dict[str, float]] = {}

    def learn(self, workflow: Workflow, stage: str, visit: int, chosen: str) -> None:
        """Nothing: calls teach it, whoever tells of stages."""

    def probabilities(self, workflow: Workflow, stage: str, visit: int = 1) -> dict[str, float]:
        """P(next | stage, visit), from all that is known of the run where it stands there."""
        if (stage, visit) not in self._known:
            self._known[stage, visit] = self._odds(stage, visit)
        return self._known[stage, visit]

    def _odds(self, stage: str, visit: int) -> dict[str, float]:
        branches, past = self._journeys.branches, self._standing(stage)
        usual = branches.usual(self._app, stage, visit if stage != START else 0)
        if not usual or past is None or past.rounds.get(stage, 0) != visit:
            return usual
        odds = branches.odds(self._app, past)
        known = 1.0 - odds.pop(NEW)
        return {s: min(1.0, p / known) for s, p in odds.items()}


class LearnedWidths(Numbers):
    """The fan-outs of a learned graph: those of the app, whatever the graph is called."""

    def __init__(self, journeys: Journeys, app: str) -> None:
        super().__init__()
        self._journeys, self._app = journeys, app

    def further(self, key: tuple[str, ...]) -> tuple[float, ...]:
        """P(at least 2), P(at least 3) ... instances of (workflow, stage, following stage)."""
        return self._journeys.widths.further((self._app, *key[1:]))
