"""The door to weights on a GPU: our sleep backend by name, and the weights of one vLLM worker.

Imports nothing of vLLM or torch until it is used. Not yet run on a GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import inspect
from collections.abc import Callable, Iterator
from typing import Any

BACKEND = "maestro"
"""The name of our backend in vLLM's registry (`ModelConfig.sleep_mode_backend`)."""

WEIGHTS, KV = "weights", "kv_cache"
"""vLLM's tags of what a model's load allocates, and of its KV cache."""

_WRITERS = (
    "load_model",
    "reload_weights",
    "update_weights",
    "finish_weight_update",
    "elastic_ep_execute",
)
"""Methods of vLLM's GPU worker that write into the weights."""


def register_sleep_backend() -> bool:
    """Add our backend to vLLM's registry; False where this vLLM has none. Cheap to repeat."""
    try:
        from vllm.device_allocator.sleep_mode_backend import SleepModeBackendFactory
    except ImportError:
        return False
    with contextlib.suppress(ValueError):  # registered before, by this process
        SleepModeBackendFactory.register_backend(BACKEND, f"{__package__}._cumem", "SleepBackend")
    return True


def missing_internals() -> str:
    """What our backend uses of vLLM's allocator and this vLLM does not have; "" where all is.

    Checked on the code that is loaded, so it tells of any version.
    """
    from vllm.device_allocator import cumem

    from ._transfers import cuda_runtime

    if not cumem.cumem_available:
        return "vLLM was built without its sleep allocator"
    for wrong, text in _differences(cumem, cuda_runtime):
        if wrong:
            return text
    return ""


def _differences(cumem: Any, cuda_runtime: Callable[[], Any]) -> Iterator[tuple[bool, str]]:
    for name in ("create_and_map", "unmap_and_release"):
        takes = list(inspect.signature(getattr(cumem, name, lambda: None)).parameters)
        yield takes != ["allocation_handle"], f"{name} takes {takes}, not [allocation_handle]"
    data = getattr(cumem, "AllocationData", None)
    fields = {f.name for f in dataclasses.fields(data)} if data else set()
    yield not {"handle", "tag", "is_asleep"} <= fields, f"AllocationData has {sorted(fields)}"
    allocator = cumem.CuMemAllocator.get_instance()
    pointers = getattr(allocator, "pointer_to_data", None)
    yield not isinstance(pointers, dict), "CuMemAllocator has no pointer_to_data"
    try:
        cuda_runtime()
    except OSError as error:
        yield True, str(error)


class GpuWeights:
    """The weights of one vLLM GPU worker: on the device, in a pinned copy, or only on the disk.

    The model must be paused around `suspend` .. `resume`. vLLM's own `Worker.sleep` is not used:
    it fails when a neighbour takes memory in the same moment, and its caller drops the KV cache.
    """

    def __init__(self, worker: Any) -> None:
        config = worker.vllm_config
        register_sleep_backend()
        if config.model_config.sleep_mode_backend == "cumem":
            config.model_config.sleep_mode_backend = BACKEND  # vLLM resolves it at first use
        self._worker = worker
        # A property since 0.27 or so; a method of that other name in 0.26.
        made = getattr(worker, "_get_sleep_mode_backend", None)
        self._backend = made() if made else worker.sleep_mode_backend
        self._parked = False
        self._kv_away = False
        self._buffers: dict[str, Any] = {}
        # Adapters and moved experts are written into the weights' memory without any call of ours.
        self._changing = bool(config.lora_config or config.parallel_config.enable_eplb)
        if self.tiers != ("device",):
            _drop_copy_after_writes(worker, self._backend)
        gc.collect()
        gc.freeze()  # every move collects garbage: what is here by now need not be looked at again

    @property
    def tiers(self) -> tuple[str, ...]:
        """Where the weights of this worker can be while its process lives."""
        if not (getattr(self._backend, "keeps_kv", False) and self.device_bytes):
            return ("device",)
        if self._worker.get_draft_model():
            return ("device", "host")
        return ("device", "host", "parked")

    @property
    def on_device(self) -> bool:
        return not self._backend.weights_away

    @property
    def device_bytes(self) -> int:
        """What the weights take on the device, or took, in this process."""
        return int(self._backend.device_bytes)

    @property
    def host_bytes(self) -> int:
        """What the host copy holds now."""
        return int(self._backend.host_bytes)

    @property
    def host_copy_bytes(self) -> int:
        """What a host copy takes."""
        return int(self._backend.host_copy_bytes)

    def keep_copy(self, budget_bytes: int | None) -> None:
        """Copy the weights into pinned host memory, unless they are there.

        Raises:
            MemoryError: over the budget, or there is no memory; nothing was changed.
        """
        if self._parked:
            raise MemoryError("parked weights cannot be read into host memory: resume them first")
        self._backend.set_host_budget(budget_bytes)
        self._backend.keep_host_copy()

    def drop_copy(self) -> None:
        """Give the host memory back; suspended weights are parked from then on."""
        if not self.on_device and not self._parked:
            self._park()
        self._backend.drop_host_copy()

    def suspend(self) -> int:
        """Take the weights off the device; the bytes freed.

        They are parked unless `keep_copy` came first.

        Raises:
            RuntimeError: this vLLM's weights cannot leave the device alone.
        """
        if self.tiers == ("device",):
            raise RuntimeError(
                "the weights of this worker cannot leave the device: it needs vLLM's sleep mode"
                " (--enable-sleep-mode) and a version whose allocator is known (docs/gpu.md)"
            )
        if not self.on_device:
            return 0
        if not self.host_bytes:
            self._park()
        try:
            return int(self._backend.suspend(2 if self._parked else 1))
        except BaseException:
            if not self._backend.weights_away:  # nothing has left
                self._buffers, self._parked = {}, False
            else:
                self.resume()
            raise

    def checksum(self) -> str:
        """Of all parameters and buffers as they are on the device: the same bytes, the same text.

        Ours: for each tensor the sum of its bytes, each times its place, in 64 bits.

        Raises:
            RuntimeError: the weights are not on the device.
        """
        if not self.on_device:
            raise RuntimeError("the weights are not on the device")
        from ._checksum import checksum

        try:
            return checksum(self._worker.get_model())
        finally:
            self._backend.trim()

    @property
    def takes_kv_along(self) -> bool:
        """Whether the KV cache can leave the device after the weights."""
        return self.tiers != ("device",)

    def release_kv(self) -> int:
        """Take the KV cache off the device until `resume`; the bytes freed. It comes back empty."""
        if self.on_device:
            return 0
        freed = int(self._backend.suspend(1, (KV,)))
        self._kv_away = self._kv_away or freed > 0
        return freed

    def resume(self) -> None:
        """Bring the weights back, and a released KV cache; on a failure all is off as before."""
        if not self.on_device:
            self._backend.resume()
        try:
            if self._kv_away:
                self._renew_kv()
            if self._parked:
                self._reload()
        except BaseException:
            self._backend.suspend(
                2 if self._parked else 1, (WEIGHTS, KV) if self._kv_away else (WEIGHTS,)
            )
            raise
        if self._changing:
            self._backend.drop_host_copy()
        self._buffers, self._parked, self._kv_away = {}, False, False

    def _renew_kv(self) -> None:
        """What vLLM keeps beside the cache in the same memory, where it does (0.26)."""
        renew = getattr(self._worker.model_runner, "post_kv_cache_wake_up", None)
        if renew is not None:
            renew()

    def forget_pages(self) -> None:
        """Nothing: the checkpoint's page cache is no memory that anybody else is kept from."""

    def _reload(self) -> None:
        """Buffers first, then weights from the checkpoint: in the order that vLLM documents."""
        try:
            for name, buffer in self._worker.get_model().named_buffers():
                if name in self._buffers:
                    buffer.data.copy_(self._buffers[name])
            self._worker.reload_weights()
        except BaseException:
            self._abandon_reload()
            raise
        self._backend.trim()

    def _abandon_reload(self) -> None:
        """Take vLLM out of a reload that broke off: its layers get their own tensors back."""
        config = self._worker.vllm_config
        with contextlib.suppress(Exception):  # what it makes of half the weights is let go of next
            from vllm.config import set_current_vllm_config
            from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

            with set_current_vllm_config(config):
                finalize_layerwise_reload(self._worker.get_model(), config.model_config)

    def _park(self) -> None:
        """Keep what no checkpoint has: tensors that are not parameters, as vLLM's level 2 does."""
        if self._worker.get_draft_model():
            raise RuntimeError("vLLM cannot reload a draft model: the tier is host, not parked")
        buffers = self._worker.get_model().named_buffers()
        self._buffers = {name: self._saved(buffer) for name, buffer in buffers}
        self._parked = True

    def _saved(self, buffer: Any) -> Any:
        storage = buffer.untyped_storage()
        copied = None
        if not self.on_device and storage.nbytes():
            copied = self._backend.copied(storage.data_ptr(), storage.nbytes())
        if copied is None:
            return buffer.cpu().clone()
        import torch

        flat = torch.frombuffer(bytearray(copied), dtype=buffer.dtype)
        return flat.as_strided(buffer.size(), buffer.stride(), buffer.storage_offset())


def _drop_copy_after_writes(worker: Any, backend: Any) -> None:
    """The copy is stale once a method of vLLM's has written new weights."""

    def drop() -> None:
        if not backend.weights_away:  # a write that could not be: the copy is all there is
            backend.drop_host_copy()

    for name in _WRITERS:
        if hasattr(worker, name):
            setattr(worker, name, _then(getattr(worker, name), drop))


def _then(method: Callable[..., Any], after: Callable[[], None]) -> Callable[..., Any]:
    @functools.wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        finally:
            after()

    return called
