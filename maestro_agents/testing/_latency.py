"""How long the stub takes: zero by default, or paced like an engine."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf


@dataclass(frozen=True, slots=True)
class Latency:
    """A latency model. Rates are tokens per second; the defaults take no time at all.

    `batch_slowdown` stretches every decode step by that fraction per other running request.
    `overhead_s` is added once, before the first token.
    """

    prefill_tokens_s: float = inf
    decode_tokens_s: float = inf
    batch_slowdown: float = 0.0
    overhead_s: float = 0.0

    def first_s(self, prompt_tokens: int) -> float:
        """Seconds before decoding starts."""
        return self.overhead_s + prompt_tokens / self.prefill_tokens_s

    def step_s(self, running: int) -> float:
        """Seconds of one decode step beside `running - 1` other requests."""
        return (1 + self.batch_slowdown * max(0, running - 1)) / self.decode_tokens_s
