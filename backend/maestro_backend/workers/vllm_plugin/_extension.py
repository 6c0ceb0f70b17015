"""Methods that vLLM adds to its worker class (`--worker-extension-cls`), where weights and KV are.

They are reached by `collective_rpc("maestro_...")`, one call at a time, between model steps.
"""

from __future__ import annotations

import logging
from typing import Any

from . import _kv_memory

log = logging.getLogger("vllm.maestro")


class WorkerExtension:
    """Mixed into vLLM's worker: `self.model_runner` is vLLM's."""

    model_runner: Any
    device: Any

    def maestro_memory(self) -> dict[str, Any]:
        """Bytes by kind: `device_bytes` of the weights as measured, `host_bytes` of their copy now,
        `host_copy_bytes` of a copy if there were one, `kv_resident_bytes` of the KV cache."""
        weights = self._maestro_weights
        return {
            "on_device": weights.on_device,
            "tiers": weights.tiers,
            "device_bytes": weights.device_bytes,
            "host_bytes": weights.host_bytes,
            "host_copy_bytes": weights.host_copy_bytes,
            "kv_resident_bytes": _kv_memory.resident_bytes(self.model_runner.kv_caches),
        }

    def maestro_kv_shape(self) -> dict[str, Any]:
        """Bytes of the whole KV cache, and what of it can be given back: single `blocks`, the
        `whole` while the weights are away, or nothing ("")."""
        caches = self.model_runner.kv_caches
        whole = "whole" if self._maestro_weights.takes_kv_along else ""
        return {
            "total_bytes": _kv_memory.total_bytes(caches),
            "releasable": "blocks" if _kv_memory.is_releasable(caches) else whole,
        }

    def maestro_release_blocks(self, blocks: list[int]) -> None:
        """Give the memory of these blocks back."""
        _kv_memory.release(self.model_runner.kv_caches, blocks)

    def maestro_release_kv(self) -> int:
        """Give the memory of the whole KV cache back, until the weights come back; the bytes."""
        return int(self._maestro_weights.release_kv())

    def maestro_suspend(self, tier: str, host_budget_bytes: int | None) -> dict[str, Any]:
        """Take the weights off the device, keeping a copy in host memory (`host`) or none.

        `error` tells why a copy cannot be had; the weights stay where they are then.
        """
        weights = self._maestro_weights
        if tier == "host":
            try:
                weights.keep_copy(host_budget_bytes)
            except MemoryError as error:
                return {"error": str(error)}
        try:
            freed = weights.suspend()
            if tier == "parked":
                weights.drop_copy()
        except RuntimeError as error:  # on a GPU: everything is back where it was
            return {"error": str(error)}
        if tier == "parked":
            try:
                weights.forget_pages()
            except OSError as error:  # a page cache that stays costs nobody the move
                log.debug("the checkpoint stays in the page cache: %s", error)
        return {"freed_bytes": freed}

    def maestro_resume(self) -> dict[str, Any]:
        """Bring the weights back; `error` tells why not, and they are off as before."""
        try:
            self._maestro_weights.resume()
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        return {}

    def maestro_checksum(self) -> dict[str, Any]:
        """Of the weights on the device; `error` tells why there is none."""
        try:
            return {"checksum": self._maestro_weights.checksum()}
        except RuntimeError as error:
            return {"error": str(error), "status": 409}

    def maestro_drop_copy(self) -> None:
        """Give up the copy in host memory."""
        self._maestro_weights.drop_copy()

    @property
    def _maestro_weights(self) -> Any:
        kept = getattr(self, "_maestro_weights_kept", None)
        if kept is None:
            kept = self._maestro_weights_kept = self._maestro_make_weights()
        return kept

    def _maestro_make_weights(self) -> Any:
        if self.device.type == "cpu":
            from ._weights import CpuWeights

            return CpuWeights(self.model_runner)
        from ._sleep import GpuWeights

        return GpuWeights(self)
