"""Foresight of recorded runs: each call with the past it could see, nothing of its own end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from maestro_agents.protocol import ConfigError
from maestro_backend.evaluation import Trained
from maestro_backend.predictor import Estimate, Estimator, Example, RunExamples, app_of
from maestro_backend.predictor._replay import replay_run
from maestro_backend.predictor._tables import Keys
from maestro_backend.scheduler import ForecastCall, Length, Rest
from maestro_backend.simulator._foresight import CallForesight, Foresight
from maestro_backend.workflows import Journey
from maestro_backend.workflows._journeys import journeys_of

from ._ahead import Ahead, Prompts, ServiceS
from ._confirmed import Confirmed
from ._places import Places
from ._taught import Taught, teach

_ROWS = 8192
"""Calls that the model is asked for at once (ours)."""


@dataclass(frozen=True, slots=True)
class _Estimated:
    run: RunExamples
    keys: Sequence[Keys]
    estimates: Sequence[Estimate]


def foresee(
    runs: Sequence[RunExamples],
    *,
    trained: Trained | None,
    history: Sequence[RunExamples],
    models: Callable[[Example], str],
    service_s: ServiceS,
    say: Callable[[str], None] = lambda line: None,
) -> Foresight:
    """Of every call of `runs`, which are never learned from. `history`: what ran before them all.

    `trained`: a model, None for the one that ships. `models` names the model that serves a call,
    `service_s(model, prompt, output)` its seconds in the engine alone.

    Raises:
        ConfigError: a run is in `history` too.
    """
    _check_apart(runs, history)
    taught = teach(trained, history, say)
    seer = _Seer(taught, history, models, service_s)
    say(f"foreseeing {sum(len(run.calls) for run in runs)} calls of {len(runs)} runs")
    return {
        (one.run.source, one.run.run): tuple(seer.calls(one))
        for one in _estimated(runs, taught.estimator)
    }


def _check_apart(runs: Sequence[RunExamples], history: Sequence[RunExamples]) -> None:
    past = {(run.source, run.run) for run in history}
    for run in runs:
        if (run.source, run.run) in past:
            raise ConfigError(
                f"run {run.run!r} of source {run.source!r} is to be replayed and is past as well: "
                "split the runs by task"
            )


def _estimated(runs: Sequence[RunExamples], estimator: Estimator) -> Iterator[_Estimated]:
    """Many runs at once: a model costs little by the row, much by the time it is asked."""
    for group in _groups(runs):
        keys: list[Keys] = []
        rows: list[list[float]] = []
        for run in group:
            for seen in replay_run(run, estimator.tables):
                keys.append(seen.keys)
                rows.append(estimator.row(seen.call.shape, seen.keys, seen.history))
        found = estimator.estimates(np.array(rows, np.float32), keys) if rows else []
        start = 0
        for run in group:
            end = start + len(run.calls)
            yield _Estimated(run, keys[start:end], found[start:end])
            start = end


def _groups(runs: Sequence[RunExamples]) -> Iterator[list[RunExamples]]:
    group: list[RunExamples] = []
    calls = 0
    for run in runs:
        group.append(run)
        calls += len(run.calls)
        if calls >= _ROWS:
            yield group
            group, calls = [], 0
    yield group


class _Seer:
    def __init__(
        self,
        taught: Taught,
        history: Sequence[RunExamples],
        models: Callable[[Example], str],
        service_s: ServiceS,
    ) -> None:
        self._taught = taught
        self._places = Places(history, models, taught.estimator.tables)
        journeys = taught.journeys
        self._ahead = Ahead(journeys, self._places, service_s) if journeys else None
        self._confirmed = Confirmed(journeys, self._places, models, service_s)

    def calls(self, one: _Estimated) -> Iterator[CallForesight]:
        run, followers = one.run, _followers(one.run)
        pasts = zip(journeys_of(run), _prompts(run), strict=True)
        for index, ((before, _), prompts) in enumerate(pasts):
            call, estimate = run.calls[index], one.estimates[index]
            yield CallForesight(
                length=Length(estimate.p50, estimate.p90, estimate.p95, estimate.p99),
                median=self._places.median(one.keys[index]),
                rest=self._rest(call, estimate, before),
                ahead=self._expected(call, before, prompts),
                confirmed=self._confirmed.after(call, followers[index], prompts),
            )

    def _expected(
        self, call: Example, before: Journey, prompts: Prompts
    ) -> tuple[ForecastCall, ...]:
        return self._ahead.after(call, before, prompts) if self._ahead else ()

    def _rest(self, call: Example, estimate: Estimate, before: Journey) -> Rest:
        trees = journeys = Rest(estimate.rest_p50, estimate.rest_p90)
        if self._taught.journeys is not None:
            future = self._taught.journeys.future(call.shape.workflow, call.shape, before)
            own = estimate.p50
            journeys = Rest(own + future.p50, own + future.p90, future.calls)
        return self._taught.mix.of(app_of(call.shape.workflow), trees, journeys)


def _followers(run: RunExamples) -> list[tuple[Example, ...]]:
    found: list[list[Example]] = [[] for _ in run.calls]
    for call in run.calls:
        for parent in call.parents:
            found[parent].append(call)
    return [*map(tuple, found)]


def _prompts(run: RunExamples) -> Iterator[Prompts]:
    """Up to and with each call, along its ancestors only; where they meet the later call counts."""
    found: list[dict[tuple[str, str], int]] = []
    for call in run.calls:
        last: dict[tuple[str, str], int] = {}
        for parent in call.parents:
            for name, index in found[parent].items():
                last[name] = max(index, last.get(name, 0))
        last[call.shape.stage, call.shape.role] = call.index
        found.append(last)
        yield {name: run.calls[index].shape.prompt_tokens for name, index in last.items()}
