"""How long things take in the simulator. The seed of the engine model: no batching effects yet."""

from __future__ import annotations

from dataclasses import dataclass

from maestro_backend.scheduler import Residency


@dataclass(frozen=True, slots=True)
class EngineModel:
    """Rates of one engine in tokens per second; the rest in seconds.

    `activation_s` is from disk to ready, `from_host_s` and `from_parked_s` from there to ready,
    `suspend_s` the way back and `kv_limit_s` a change of the KV limit. Defaults are SmolLM2-135M in
    float32 on two CPU cores (docs/architecture.md).
    """

    prefill_tokens_s: float = 400.0
    decode_tokens_s: float = 14.0
    activation_s: float = 60.0
    from_host_s: float = 1.0
    from_parked_s: float = 1.5
    suspend_s: float = 0.5
    kv_limit_s: float = 0.05

    def service_s(self, prompt_tokens: int, output_tokens: float) -> float:
        """Seconds in the engine, alone on it."""
        return prompt_tokens / self.prefill_tokens_s + output_tokens / self.decode_tokens_s

    def move_s(self, start: Residency, end: Residency) -> float:
        """Seconds from one residency to another. Stopping and giving up a copy take none."""
        from_disk = start in (Residency.DISK, Residency.REMOTE)
        if end is Residency.DEVICE:
            near = {Residency.HOST: self.from_host_s, Residency.PARKED: self.from_parked_s}
            return near.get(start, self.activation_s)
        if end in (Residency.HOST, Residency.PARKED) and start is not Residency.HOST:
            return self.suspend_s + (self.activation_s if from_disk else 0.0)
        return 0.0
