"""What past runs teach before anything is replayed: lengths, journeys, and whom to believe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from maestro_backend.evaluation import Trained, interleaved
from maestro_backend.predictor import Estimator, RunExamples, app_of, remaining
from maestro_backend.scheduler import Rest
from maestro_backend.workflows import Journeys, RestMix
from maestro_backend.workflows._journeys import journeys_of

from ._overlap import model_of, sources_of


@dataclass(frozen=True, slots=True)
class Taught:
    """`journeys` is None where no run taught any: then the trees alone say what is left."""

    estimator: Estimator
    journeys: Journeys | None
    mix: RestMix


def teach(
    trained: Trained | None, history: Sequence[RunExamples], say: Callable[[str], None]
) -> Taught:
    """All sources take turns, so that none is forgotten for having come first.

    Tables and journeys learn from every run. Corrections, calibration and the mix of trees and
    journeys learn only from runs of sources that the model was not trained on: on its own training
    runs it errs too little. Journeys are those of `history`, or without one those of the model.
    """
    estimator, mix = Estimator(model_of(trained)), RestMix()
    if not history:
        known = trained.forecaster if trained else None
        return Taught(estimator, known.journeys if known else None, mix)
    journeys, seen = Journeys(), sources_of(estimator.model)
    calls = sum(len(run.calls) for run in history)
    new = sorted({run.source for run in history} - seen)
    say(f"learning from {calls} calls of {len(history)} past runs")
    if new:
        say(f"new to the model, so its calibration follows them too: {', '.join(new)}")
    for run in interleaved(history):
        if run.source in seen:
            estimator.learn_run(run)
        else:
            _follow(run, estimator, journeys, mix)
        journeys.learn(run)
    return Taught(estimator, journeys, mix)


def _follow(run: RunExamples, estimator: Estimator, journeys: Journeys, mix: RestMix) -> None:
    """Estimate, then learn from how it came."""
    said = []
    pasts = journeys_of(run)
    for call, found, (before, _) in zip(run.calls, estimator.follow(run), pasts, strict=True):
        trees = Rest(found.rest_p50, found.rest_p90)
        future = journeys.future(run.workflow, call.shape, before)
        said.append((trees, Rest(found.p50 + future.p50, found.p50 + future.p90)))
    mix.learn(app_of(run.workflow), said, remaining(run))
