"""What the app's routing says when a call has ended: the next stages are certain, no more is."""

from __future__ import annotations

from collections.abc import Callable

from maestro_backend.predictor import CLASS_DEFAULT, Example, app_of
from maestro_backend.scheduler import ForecastCall
from maestro_backend.workflows import Journeys

from ._ahead import Prompts, ServiceS
from ._places import Places


class Confirmed:
    """True stages, roles and models; lengths, prompts and gaps as past runs let expect them."""

    def __init__(
        self,
        journeys: Journeys | None,
        places: Places,
        models: Callable[[Example], str],
        service_s: ServiceS,
    ) -> None:
        self._journeys = journeys or Journeys()
        self._places, self._models, self._service_s = places, models, service_s

    def after(
        self, call: Example, followers: tuple[Example, ...], prompts: Prompts
    ) -> tuple[ForecastCall, ...]:
        """Of the calls that wait for this one, by start. `prompts`: up to and with this one."""
        found = [self._told(call, follower, prompts) for follower in followers]
        return tuple(sorted(found, key=lambda one: one.earliest_start_s))

    def _told(self, call: Example, follower: Example, prompts: Prompts) -> ForecastCall:
        stage, role, model = follower.shape.stage, follower.shape.role, self._models(follower)
        app = app_of(call.shape.workflow)
        place = self._places.of(app, stage, role)
        if place is None:
            gap_s, length = 0.0, CLASS_DEFAULT
            tokens = call.outcome.prompt_tokens + int(call.length)
        else:
            gap_s, length = self._journeys.gap_s(app, call.shape.stage, stage), place.length
            last = prompts.get((stage, role))
            grown = self._journeys.growth_tokens(app, stage, role)
            tokens = place.prompt_tokens if last is None else max(0, last + int(grown))
        service_s = self._service_s(model, tokens, length.p50)
        return ForecastCall(stage, role, model, 1.0, gap_s, tokens, length, service_s)
