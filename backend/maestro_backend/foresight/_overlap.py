"""Whether a model may have seen in training what is now to be foreseen."""

from __future__ import annotations

from collections.abc import Iterable

from maestro_backend.evaluation import Trained
from maestro_backend.predictor import Model, RunExamples, base_model


def overlap(runs: Iterable[RunExamples], trained: Trained | None = None) -> tuple[str, ...]:
    """Sources of `runs` that the model (None: the one that ships) was trained on, sorted.

    A model records the names of its sources, not its runs: which of these runs it saw is not known,
    so predictions for them may be better than for new ones.
    """
    seen = sources_of(model_of(trained))
    return tuple(sorted({run.source for run in runs} & seen))


def model_of(trained: Trained | None) -> Model:
    return base_model() if trained is None else trained.model


def sources_of(model: Model) -> frozenset[str]:
    """That the model was trained on."""
    return frozenset(map(str, model.about.get("sources", ())))
