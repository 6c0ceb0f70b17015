"""Learned rates per model: bytes per prompt token, and engine speed."""

from __future__ import annotations

from dataclasses import dataclass

_WEIGHT = 0.2
"""Share of the newest sample in each average (ours)."""


@dataclass(slots=True)
class Rates:
    """Averages of one model. Defaults hold until the first call ends (ours)."""

    bytes_per_token: float = 4.0
    prefill_tokens_s: float = 400.0
    decode_tokens_s: float = 20.0

    def prompt_tokens(self, prompt_bytes: int) -> int:
        return max(1, round(prompt_bytes / self.bytes_per_token))

    def service_s(self, prompt_tokens: float, output_tokens: float) -> float:
        """Predicted seconds in the engine."""
        return prompt_tokens / self.prefill_tokens_s + output_tokens / self.decode_tokens_s

    def learn_prompt(self, prompt_bytes: int, prompt_tokens: int) -> None:
        if prompt_tokens > 0:
            self.bytes_per_token = _mix(self.bytes_per_token, prompt_bytes / prompt_tokens)

    def learn_speed(
        self, uncached_tokens: int, first_s: float, output: float, decode_s: float
    ) -> None:
        """`first_s`: dispatch to first token; `decode_s`: first token to end; seconds.

        `output` counts the tokens of one choice: choices are decoded side by side.
        """
        if uncached_tokens > 0 and first_s > 0:
            self.prefill_tokens_s = _mix(self.prefill_tokens_s, uncached_tokens / first_s)
        if output > 1 and decode_s > 0:
            self.decode_tokens_s = _mix(self.decode_tokens_s, (output - 1) / decode_s)


def _mix(old: float, new: float) -> float:
    return (1 - _WEIGHT) * old + _WEIGHT * new
