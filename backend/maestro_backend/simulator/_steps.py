"""What a step of an engine costs, and sums over steps in closed form. Times in seconds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, sqrt

from ._hardware import DeviceProfile, ModelGeometry


@dataclass(frozen=True, slots=True)
class StepCosts:
    """A step in which `d` calls decode over `C` tokens of context in all (each call's new token
    included) beside `p` prompt tokens takes

        fixed_s + max(weights_s + context_s * C, token_s * (d + p)).

    A roofline: a step reads all weights and the decoding calls' KV cache, and multiplies every
    token with the parameters it passes through. The attention FLOPs of prompts are left out
    (under 10% for dense models from 7B below 8,000 tokens), and so is reading the KV cache of a
    prompt's earlier chunks.
    """

    fixed_s: float
    weights_s: float
    context_s: float
    """Per token of context."""
    token_s: float
    """Per token of the step."""
    chunk_tokens: int = 8192
    """The engine's `max_batched_tokens`: prompts longer than that take several steps."""

    def step_s(self, decoding: int, context: int, prompt_tokens: int) -> float:
        memory = self.weights_s + self.context_s * context
        compute = self.token_s * (decoding + prompt_tokens)
        return self.fixed_s + (memory if memory > compute else compute)

    def decode_s(self, decoding: int, context: int, steps: int) -> float:
        """`steps` steps of `decoding` calls that hold `context` tokens before the first of them."""
        bound = self._compute_bound(decoding, context)
        total = 0.0
        if bound:
            bound = min(bound, steps)
            total = bound * (self.fixed_s + self.token_s * decoding)
            context += bound * decoding
            steps -= bound
        return (
            total
            + steps * (self.fixed_s + self.weights_s + self.context_s * context)
            + self.context_s * (decoding * steps * (steps + 1) // 2)
        )

    def steps_by(self, decoding: int, context: int, seconds: float) -> int:
        """The fewest steps that take at least so long."""
        bound = self._compute_bound(decoding, context)
        even = self.fixed_s + self.token_s * decoding
        if bound and seconds <= bound * even:
            steps = ceil(seconds / even)
        else:
            # The steps grow evenly: a quadratic equation in their number.
            start = context + bound * decoding
            half = self.context_s * decoding / 2
            middle = self.fixed_s + self.weights_s + self.context_s * start + half
            left = seconds - bound * even
            steps = bound + ceil(2 * left / (middle + sqrt(middle * middle + 4 * half * left)))
        while self.decode_s(decoding, context, steps) < seconds:
            steps += 1
        while steps > 1 and self.decode_s(decoding, context, steps - 1) >= seconds:
            steps -= 1
        return steps

    def service_s(self, prompt_tokens: int, output_tokens: int, cached: int = 0) -> float:
        """A call alone in the engine. The last chunk of its prompt yields the first token."""
        fresh = max(1, prompt_tokens - cached)
        chunks = (fresh - 1) // self.chunk_tokens
        return (
            chunks * self.step_s(0, 0, self.chunk_tokens)
            + self.step_s(0, 0, fresh - chunks * self.chunk_tokens)
            + self.decode_s(1, prompt_tokens, output_tokens - 1)
        )

    def shared(self, ways: int) -> StepCosts:
        """As long as so many engines take turns on the device."""
        return replace(
            self,
            weights_s=self.weights_s * ways,
            context_s=self.context_s * ways,
            token_s=self.token_s * ways,
        )

    def _compute_bound(self, decoding: int, context: int) -> int:
        """How many steps come before reading the context takes longer than computing."""
        spare = self.token_s * decoding - self.weights_s - self.context_s * (context + decoding)
        if spare <= 0:
            return 0
        if self.context_s == 0:
            return 1 << 62
        return ceil(spare / (self.context_s * decoding))


def step_costs(profile: DeviceProfile, model: ModelGeometry, chunk_tokens: int = 8192) -> StepCosts:
    """Of one model on one device, or spread over `tensor_parallel` of them."""
    devices = model.tensor_parallel
    bandwidth = profile.bandwidth * profile.memory_share * devices
    flops = profile.flops * profile.compute_share * devices
    between = model.layers * profile.allreduce_s if devices > 1 else 0.0
    return StepCosts(
        fixed_s=profile.step_s + between,
        weights_s=model.weights_bytes / bandwidth,
        context_s=model.kv_bytes_per_token / bandwidth,
        token_s=2 * model.parameters / flops,
        chunk_tokens=chunk_tokens,
    )
