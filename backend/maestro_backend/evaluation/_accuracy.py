"""How right predictions of calls were: errors, order, coverage, and the KV memory they save."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from statistics import fmean
from typing import Any

import numpy as np

from ._futures import FEW_CALLS, futures_summary
from ._kendall import kendall_tau
from ._predictions import RESERVABLE, Predicted, Vector

BASELINES = (
    "global_median",
    "role_median",
    "role_model_median",
    "no_agent_semantics",
    "two_phase",
    "max_tokens",
    "oracle",
)
"""What the length model is held against; docs/prediction.md says what each is."""

_BRANCH = ("top1_accuracy", "log_loss", "uniform_log_loss", "last_seen_log_loss")


def report(predicted: Predicted, *, online: bool) -> dict[str, Any]:
    """All figures of `maestro evaluate` but the time a prediction takes, ready for JSON.

    Macro: the mean over sources with at least 80 calls; micro: over calls. What is not said to be
    macro is micro. None: unknown.
    """
    parts = predicted.by_source()
    sources = {name: figures(part) for name, part in parts.items()}
    everything = figures(predicted)
    found = {
        "n": len(predicted),
        "mae": _both(predicted, lambda part: mae(part.point, part.actual)),
        "median_ape": everything["median_ape"],
        "kendall_tau": everything["kendall_tau"],
        "kendall_tau_macro": _both(predicted, _tau)["macro"],
        "coverage": everything["coverage"],
        "kv": everything["kv"],
        "baselines": {name: _baseline(predicted, name) for name in BASELINES},
        "by_source": sources,
        "branch": _branch(predicted),
        "t_rem": _t_rem(predicted),
        "online": online,
    }
    told: dict[str, Any] = plain(found)
    return told


def figures(part: Predicted) -> dict[str, Any]:
    """Of one source, or of all calls alike. nan: unknown."""
    return {
        "n": len(part),
        "mae": mae(part.point, part.actual),
        "median_ape": _median_ape(part),
        "kendall_tau": _tau(part),
        "coverage": {
            level: _mean(part.actual <= getattr(part, level)) for level in ("p90", "p95", "p99")
        },
        "kv": kv_figures(part),
    }


def mae(predicted: Vector, actual: Vector) -> float:
    """Mean absolute error in output tokens."""
    return _mean(np.abs(predicted - actual))


def kv_figures(part: Predicted) -> dict[str, float]:
    """Output tokens reserved by p99, against 4096 for every call; prompts are not counted.

    `bytetime` weighs each call by how long it holds them: by its actual output.
    """
    reserved = np.minimum(part.p99, RESERVABLE)
    held = float(part.actual.sum())
    by_time = float((reserved * part.actual).sum()) / (RESERVABLE * held) if held else np.nan
    return {
        "p99_output_saving": 1.0 - _mean(reserved) / RESERVABLE,
        "p99_under_reservation": _mean(part.actual > reserved),
        "p99_output_saving_bytetime": 1.0 - by_time,
    }


def macro(predicted: Predicted, figure: Callable[[Predicted], float]) -> float:
    """The mean over the sources with at least 80 calls."""
    parts = predicted.by_source().values()
    found = [figure(part) for part in parts if len(part) >= FEW_CALLS]
    return fmean(found) if found else np.nan


def _both(predicted: Predicted, figure: Callable[[Predicted], float]) -> dict[str, float]:
    return {"macro": macro(predicted, figure), "micro": figure(predicted)}


def _baseline(predicted: Predicted, name: str) -> dict[str, float]:
    """MAE of a baseline; the oracle knows each length."""
    if name == "oracle":
        return _both(predicted, lambda part: mae(part.actual, part.actual))
    if name not in predicted.baselines:
        return {"macro": np.nan, "micro": np.nan}
    return _both(predicted, lambda part: mae(part.baselines[name], part.actual))


def _branch(predicted: Predicted) -> dict[str, float]:
    found = futures_summary(predicted.foreseen)["branch"]["micro"]
    return {name: found.get(name, np.nan) for name in _BRANCH}


def _t_rem(part: Predicted) -> dict[str, float]:
    actual = part.rest.tolist()
    paper = len(part) > 0 and bool(np.isfinite(part.paper_rest).all())
    return {
        "mae_tokens": mae(part.rest_p50, part.rest),
        "kendall_tau": _order(part.rest_p50, part.rest),
        "p90_coverage": _mean(part.rest <= part.rest_p90),
        "paper_mae_tokens": mae(part.paper_rest, part.rest),
        "paper_kendall_tau": kendall_tau(part.paper_rest.tolist(), actual) if paper else np.nan,
    }


def _tau(part: Predicted) -> float:
    return _order(part.point, part.actual)


def _order(predicted: Vector, actual: Vector) -> float:
    return kendall_tau(predicted.tolist(), actual.tolist()) if len(actual) > 1 else np.nan


def _median_ape(part: Predicted) -> float:
    """The median of |predicted - actual| / actual; no actual counts as less than one token."""
    if not len(part):
        return np.nan
    return float(np.median(np.abs(part.point - part.actual) / np.maximum(part.actual, 1.0)))


def _mean(values: np.typing.NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else np.nan


def plain(value: Any) -> Any:
    """As JSON can hold it: None for nan and infinity."""
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    if isinstance(value, float):
        return float(value) if isfinite(value) else None
    return value
