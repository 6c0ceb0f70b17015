"""What past runs taught of each place, that is of (app, stage, role): its model, its calls."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from maestro_backend.predictor import CallShape, Example, RunExamples, Tables, app_of
from maestro_backend.predictor._tables import Keys, keys_of
from maestro_backend.scheduler import Length

Name = tuple[str, str, str]
"""App, stage, role."""


@dataclass(frozen=True, slots=True)
class Place:
    """`model` serves most of its calls; `prompt_tokens` is their median; `length` of such calls."""

    model: str
    prompt_tokens: int
    length: Length


class Places:
    """By name, learned once; a place that no past run had is not there."""

    def __init__(
        self, history: Sequence[RunExamples], models: Callable[[Example], str], tables: Tables
    ) -> None:
        self._tables = tables
        self._medians: dict[tuple[object, ...], Length] = {}
        roles: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        served: dict[Name, Counter[str]] = defaultdict(Counter)
        prompts: dict[Name, list[int]] = defaultdict(list)
        for run in history:
            app = app_of(run.workflow)
            for call in run.calls:
                name = app, call.shape.stage, call.shape.role
                served[name][models(call)] += 1
                prompts[name].append(call.outcome.prompt_tokens)
                roles[app, call.shape.stage][call.shape.role] += 1
        self._roles = {stage: _most(counts) for stage, counts in roles.items()}
        self._places = {
            name: Place(_most(counts), round(median(prompts[name])), self._length(name))
            for name, counts in served.items()
        }

    def of(self, app: str, stage: str, role: str) -> Place | None:
        return self._places.get((app, stage, role))

    def role(self, app: str, stage: str) -> str:
        """Who mostly acts in a stage."""
        return self._roles.get((app, stage), "")

    def median(self, keys: Keys) -> Length:
        """Median and 90th percentile of past calls of the role: no model, no context."""
        name = keys.stage, keys.kind
        if name not in self._medians:
            found = self._tables.length(keys)
            self._medians[name] = Length(found.p50, found.p90)
        return self._medians[name]

    def _length(self, name: Name) -> Length:
        app, stage, role = name
        shape = CallShape(model="", workflow=app, stage=stage, role=role)
        return self._tables.length(keys_of(shape, 0, 0))


def _most(counts: Counter[str]) -> str:
    """The most common; of equals the first by name, so that no order of runs matters."""
    return min(counts, key=lambda name: (-counts[name], name))
