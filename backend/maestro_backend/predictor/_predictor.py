"""The predictor: what a call will take, from role medians and learned rates."""

from __future__ import annotations

from dataclasses import dataclass

from maestro_backend.scheduler import Length

from ._lengths import RoleMedians
from ._rates import Rates


@dataclass(frozen=True, slots=True)
class CallShape:
    """What is known of a call before it runs.

    `prompt_bytes` counts the messages as JSON; `n` (1 or more) is the choices that were asked for.
    """

    model: str
    workflow: str = ""
    stage: str = ""
    role: str = ""
    prompt_bytes: int = 0
    max_tokens: int | None = None
    n: int = 1


@dataclass(frozen=True, slots=True)
class CallOutcome:
    """What a call took. `output_tokens` is the sum over all choices.

    Seconds; `first_s` is None when the reply was not streamed.
    """

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    first_s: float | None = None
    total_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Prediction:
    """Tokens and seconds. `length` is that of one choice.

    `kv_tokens` = prompt + 90th percentile of the output, for each choice: they share the prompt.
    """

    prompt_tokens: int
    length: Length
    kv_tokens: int
    service_s: float


class Predictor:
    """Predicts calls, learns from how they ended. Counts only, never text."""

    def __init__(self) -> None:
        self._lengths = RoleMedians()
        self._rates: dict[str, Rates] = {}

    def predict(self, shape: CallShape) -> Prediction:
        rates = self._rates.get(shape.model) or Rates()
        length = self._lengths.predict(shape.workflow, shape.stage, shape.role, shape.max_tokens)
        prompt_tokens = rates.prompt_tokens(shape.prompt_bytes)
        return Prediction(
            prompt_tokens=prompt_tokens,
            length=length,
            kv_tokens=prompt_tokens + int(shape.n * length.p90),
            service_s=rates.service_s(prompt_tokens, length.p50),
        )

    def learn(self, shape: CallShape, outcome: CallOutcome) -> None:
        rates = self._rates.setdefault(shape.model, Rates())
        per_choice = outcome.output_tokens / max(1, shape.n)
        rates.learn_prompt(shape.prompt_bytes, outcome.prompt_tokens)
        if outcome.first_s is not None:
            uncached = outcome.prompt_tokens - outcome.cached_tokens
            decode_s = outcome.total_s - outcome.first_s
            rates.learn_speed(uncached, outcome.first_s, per_choice, decode_s)
        if outcome.output_tokens > 0:
            self._lengths.learn(shape.workflow, shape.stage, shape.role, per_choice)
