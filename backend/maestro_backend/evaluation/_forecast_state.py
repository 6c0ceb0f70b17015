"""What a `Forecaster` learned, as plain JSON: our journeys, and the baselines beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maestro_backend.workflows import Journeys

from ._futures import ConditionalMedians, Forecaster, LastSeen

_EXACT = 5
"""Parts of the paper's most exact key; all less exact ones are read from it."""


def forecast_state(forecaster: Forecaster) -> tuple[dict[str, Any], dict[str, Any]]:
    """The journeys, and the baselines."""
    medians = {
        "future": _values(forecaster._paper),
        "length": _values(forecaster._lengths),
        "last": [[*key, stage] for key, stage in forecaster._last._last.items()],
    }
    return forecaster.journeys.state(), medians


def restored(journeys: dict[str, Any], medians: Mapping[str, Any]) -> Forecaster:
    """What `forecast_state` was given.

    Raises:
        ValueError: the journeys are of another version (a broken file: any LookupError,
            TypeError, ValueError, AttributeError).
    """
    known = Journeys()
    if not known.restore(journeys):
        raise ValueError("of another version")
    forecaster = Forecaster(known)
    _fill(forecaster._paper, medians["future"])
    _fill(forecaster._lengths, medians["length"])
    _see(forecaster._last, medians["last"])
    return forecaster


def copied(forecaster: Forecaster) -> Forecaster:
    """To learn from what is judged, without changing what was trained."""
    return restored(*forecast_state(forecaster))


def _values(medians: ConditionalMedians) -> list[list[Any]]:
    return [[[*key], values] for key, values in medians._values.items() if len(key) == _EXACT]


def _fill(medians: ConditionalMedians, found: list[list[Any]]) -> None:
    """Each value stands under its exact key and under all that this one implies."""
    for (app, stage, role, visit, tools), values in found:
        exact = str(app), str(stage), str(role), int(visit), bool(tools)
        for key in (exact, exact[:4], exact[:3], ("role", app, role), ("app", app), ()):
            medians._values[key].extend(map(float, values))
    for values in medians._values.values():
        values.sort()


def _see(last: LastSeen, found: list[list[str]]) -> None:
    for app, stage, following in found:
        last._last[app, stage] = following
