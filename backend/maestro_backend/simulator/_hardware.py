"""Devices and models as the simulator sees them. Sizes in bytes, rates per second."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """One kind of device, with what an engine reaches of its data sheet.

    docs/simulator-profiles.md has the source of every figure. `capacity_bytes`: what engines may
    use of its memory. `memory_share` and `compute_share`: the parts of `bandwidth` (bytes/s) and
    `flops` (dense 16-bit, per second) that decode and prefill reach. `step_s`: what every engine
    step costs besides. `to_device`, `to_host`: bytes/s between host and device. `allreduce_s`: per
    layer and step, for tensor parallelism over more than one device. `residual_bytes`: of each
    engine's process.
    """

    name: str
    capacity_bytes: int
    bandwidth: float
    flops: float
    memory_share: float
    compute_share: float
    step_s: float
    to_device: float
    to_host: float
    allreduce_s: float
    residual_bytes: int
    start_s: float
    """From no process to an engine that could load weights."""
    wake_s: float
    """What a resume costs besides moving bytes."""
    limit_s: float
    """A change of the KV limit."""


@dataclass(frozen=True, slots=True)
class ModelGeometry:
    """One model as it is served. `parameters` are those that a token passes through;
    `weights_bytes` all that is loaded, over all `tensor_parallel` devices."""

    name: str
    parameters: int
    weights_bytes: int
    layers: int
    kv_heads: int
    head_dim: int
    kv_dtype_bytes: int = 2
    max_model_len: int = 32_768
    block_tokens: int = 16
    tensor_parallel: int = 1

    @property
    def kv_bytes_per_token(self) -> int:
        """Over all its devices: keys and values of every layer."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.kv_dtype_bytes

    @property
    def block_bytes(self) -> int:
        """KV of one block of tokens."""
        return self.block_tokens * self.kv_bytes_per_token

    @property
    def longest_request_bytes(self) -> int:
        """KV of one request of `max_model_len` tokens, in whole blocks."""
        return -(-self.max_model_len // self.block_tokens) * self.block_bytes
