"""How long things take in the simulator. The seed of the engine model: no batching effects yet."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineModel:
    """Rates of one engine in tokens per second; `activation_s` from disk to ready, in seconds.

    Defaults are SmolLM2-135M in float32 on two CPU cores (docs/architecture.md).
    """

    prefill_tokens_s: float = 400.0
    decode_tokens_s: float = 14.0
    activation_s: float = 60.0

    def service_s(self, prompt_tokens: int, output_tokens: float) -> float:
        """Seconds in the engine, alone on it."""
        return prompt_tokens / self.prefill_tokens_s + output_tokens / self.decode_tokens_s
