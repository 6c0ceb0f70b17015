"""Predictions beside the calls: a call enters at once, what the model says of it follows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from maestro_backend.predictor import LiveCall, Prediction, Predictor, clipped, refreshed
from maestro_backend.scheduler import CallPredicted, Event, Length

_AGAIN = 1.25
"""A running call is predicted again each time it has grown by this factor (ours)."""


@dataclass(slots=True)
class Foretold:
    """The prediction of a live call, refreshed while it runs. `told(prediction)`: a better one."""

    call: str
    live: LiveCall
    prediction: Prediction
    told: Callable[[Prediction], None]
    over: bool = False
    next_at: float = 0.0


class Foretelling:
    """Asks the model for all calls that arrived in one turn of the event loop together.

    Until then a call goes by what plain tables say, so that no call waits for its prediction.
    """

    def __init__(self, predictor: Predictor, handle: Callable[[Event], None]) -> None:
        self._predictor = predictor
        self._handle = handle
        self._waiting: list[Foretold] = []
        self._live: dict[str, Foretold] = {}

    def enter(self, foretold: Foretold) -> None:
        """A call has arrived with its first prediction."""
        self._live[foretold.call] = foretold
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._flush)
        self._waiting.append(foretold)

    def leave(self, call: str) -> None:
        """The call is over."""
        if (foretold := self._live.pop(call, None)) is not None:
            foretold.over = True

    def progress(self, call: str, generated_tokens: int) -> None:
        """So many tokens of a call have come: what is it still likely to produce?"""
        foretold = self._live.get(call)
        if foretold is None or generated_tokens < max(foretold.next_at, 1):
            return
        foretold.next_at = generated_tokens * _AGAIN
        shape = foretold.live.shape
        length = refreshed(foretold.prediction.length, generated_tokens / max(1, shape.n))
        self._tell(foretold, clipped(length, shape.max_tokens))

    def _flush(self) -> None:
        waiting = [foretold for foretold in self._waiting if not foretold.over]
        self._waiting.clear()
        predictions = self._predictor.foretell([foretold.live for foretold in waiting])
        for foretold, prediction in zip(waiting, predictions, strict=True):
            if prediction != foretold.prediction:
                foretold.prediction = prediction
                foretold.told(prediction)
                self._tell(foretold, prediction.length)

    def _tell(self, foretold: Foretold, length: Length) -> None:
        made = foretold.prediction
        shape = foretold.live.shape
        # A running call's reservation follows its progress: no more is asked for in advance.
        kv_tokens = made.kv_tokens
        service_s = self._predictor.service_s(shape.model, made.prompt_tokens, length.p50)
        self._handle(CallPredicted(foretold.call, length, kv_tokens, service_s))
