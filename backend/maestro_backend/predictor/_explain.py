"""Why a call was predicted as it was: what the tables say, and what moved the model from there."""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan

import numpy as np

from ._estimator import Estimate, Estimator
from ._features import FEATURES
from ._matrix import Vector

MOST_REASONS = 5


@dataclass(frozen=True, slots=True)
class Reason:
    """One input of the model. It multiplied the predicted median by `factor` (its SHAP value);
    `value` is in the units of `features()`, None if it was unknown."""

    feature: str
    value: float | None
    factor: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """`usual`: output tokens of the median past call of this stage (or of what is nearest to it).
    The reasons, strongest first, lead from there to the model's median; `others` is the factor of
    all inputs that are not among them, online correction included."""

    usual: float
    reasons: tuple[Reason, ...]
    others: float


def explain(estimator: Estimator, estimate: Estimate) -> Explanation:
    """Of an estimate that this estimator's model made. About ten times as slow as estimating."""
    row = estimate.row
    model = estimator.model.boosters.models["p50"]
    shares: Vector = np.asarray(model.predict(row[None, :], num_threads=1, pred_contrib=True))[0]
    strongest = np.argsort(-np.abs(shares[:-1]))[:MOST_REASONS]
    reasons = tuple(
        Reason(
            FEATURES[at],
            None if isnan(row[at]) else round(float(row[at]), 3),
            float(2.0 ** shares[at]),
        )
        for at in map(int, strongest)
        if abs(shares[at]) > _LEAST
    )
    usual = 2.0 ** float(row[0]) - 1.0
    told = np.log2(1.0 + estimate.p50) - float(row[0])
    named = sum(np.log2(reason.factor) for reason in reasons)
    return Explanation(usual, reasons, float(2.0 ** (told - named)))


_LEAST = 0.01
"""Shares below this many octaves are no reasons (ours)."""
