"""Engines: how a model is put on a command line, and how much memory that takes.

`vllm-cpu` and `stub` are run in tests. `vllm` (GPU) is written from vLLM's documentation and
source and has not yet been run on a GPU.
"""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from maestro_agents.protocol import ConfigError, UnsupportedError
from maestro_backend.config import ModelConfig
from maestro_backend.scheduler import KvGeometry, Residency, one_group

from ._kv_geometry import kv_geometry
from ._sources import Checkpoint
from .vllm_plugin import kvcached_environment, kvcached_refusal

GiB = 1024**3
MiB = 1024**2

_CPU_MAX_MODEL_LEN = 4096
_STUB_MAX_MODEL_LEN = 32_768
_STUB_BYTES_PER_TOKEN = 1024
_STUB_BLOCK_SIZE = 16
_VLLM_BLOCK_SIZE = 128
"""Until the engine tells: no block that vLLM chooses for a model of one kind of layer is larger."""
_STEP_TOKENS = 8192
"""Until it tells: no step that vLLM chooses by itself is larger. It schedules one ahead."""

_TIERS = (Residency.DEVICE, Residency.HOST, Residency.PARKED)

_SETTINGS_OF = {
    "dtype": "dtype",
    "kv_cache_memory_bytes": "kv_memory",
    "max_model_len": "max_model_len",
    "max_num_seqs": "max_num_seqs",
    "model": "source",
    "reasoning_parser": "reasoning_parser",
    "served_model_name": "served_names",
    "tensor_parallel_size": "tensor_parallel",
    "tool_call_parser": "tool_call_parser",
}
_OURS = (
    "api_key",
    "enable_sleep_mode",
    "host",
    "port",
    "scheduling_policy",
    "uds",
    "worker_extension_cls",
)
_EXTENSION = "maestro_backend.workers.vllm_plugin._extension.WorkerExtension"


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A configured model together with its checkpoint on this host."""

    name: str
    settings: ModelConfig
    checkpoint: Checkpoint


@dataclass(frozen=True, slots=True)
class Memory:
    """What one worker takes of each of its devices, in bytes."""

    weights_bytes: int
    kv_bytes: int
    residual_bytes: int

    @property
    def total_bytes(self) -> int:
        """Everything that has to be free before a start."""
        return self.weights_bytes + self.kv_bytes + self.residual_bytes


@dataclass(frozen=True, slots=True)
class Launch:
    """A command and what it adds to the environment."""

    command: tuple[str, ...]
    environment: Mapping[str, str]


class Engine(Protocol):
    """A kind of OpenAI server that a worker can run.

    `markers` are (text in its log, what it is then doing in words), in order of appearance.
    `needs_checkpoint` is False where `source` is not even looked at.
    """

    name: str
    needs_checkpoint: bool
    markers: Sequence[tuple[str, str]]

    def refusal(self, settings: ModelConfig, devices: Sequence[str]) -> str:
        """Why it cannot run on `devices`, or "" where it can."""

    def memory(self, model: ServedModel) -> Memory:
        """What the worker will take, as promised to the ledger before the start.

        Of a checkpoint that is not here yet only the weights are missing: they count 0.
        """

    def kv_geometry(self, model: ServedModel, block_tokens: int | None = None) -> KvGeometry | None:
        """What requests will hold of the KV cache of each device; None while that is unknown.

        `block_tokens` is the engine's block size, where it has told it.
        """

    def max_model_len(self, model: ServedModel) -> int | None:
        """Longest context in tokens; None where the engine takes it from the checkpoint."""

    def kv_floor_bytes(self, model: ServedModel) -> int:
        """The KV cache of one request of `max_model_len`, as far as it is known."""

    def tiers(self, settings: ModelConfig) -> tuple[Residency, ...]:
        """Where the weights of a live worker can be, as far as is known before it tells."""

    def elastic(self, settings: ModelConfig) -> bool:
        """Whether its KV limit will move, as far as is known before it tells."""

    def max_num_seqs(self, settings: ModelConfig) -> int:
        """Most calls that run at once."""

    def launch(self, model: ServedModel, devices: Sequence[str], address: Path) -> Launch:
        """The server of `model` on `devices`, listening on the unix socket `address`."""


class _Vllm(ABC):
    """What both builds of vLLM share."""

    name: str
    extra: str
    needs_checkpoint = True
    markers: Sequence[tuple[str, str]] = (
        ("non-default args", "reading the configuration"),
        ("Initializing a V1 LLM engine", "starting the engine core"),
        ("Starting to load model", "loading weights"),
        ("Loading weights took", "preparing the KV cache"),
        ("init engine (profile", "opening the server"),
    )
    default_kv_bytes: int
    default_max_num_seqs: int
    residual_bytes: int

    def refusal(self, settings: ModelConfig, devices: Sequence[str]) -> str:
        if settings.python is not None:
            return "" if settings.python.is_file() else f"there is no interpreter {settings.python}"
        if _is_installed(self.name):
            return ""
        return f"{self.name} is not installed: pip install 'maestro-mas[{self.extra}]'"

    def memory(self, model: ServedModel) -> Memory:
        settings = model.settings
        weights = model.checkpoint.weights_bytes(self.dtype(model))
        return Memory(
            weights_bytes=weights // settings.tensor_parallel,
            kv_bytes=settings.kv_memory or self.default_kv_bytes,
            residual_bytes=self.residual_bytes,
        )

    def kv_geometry(self, model: ServedModel, block_tokens: int | None = None) -> KvGeometry | None:
        """From the checkpoint; None too where a draft model would take KV bytes of its own."""
        given = {_option(key): value for key, value in model.settings.engine_args.items()}
        if "speculative_config" in given:
            return None
        try:
            return kv_geometry(
                model.checkpoint.geometry,
                dtype=self.dtype(model),
                block_tokens=block_tokens or int(given.get("block_size") or _VLLM_BLOCK_SIZE),
                in_flight_tokens=2 * int(given.get("max_num_batched_tokens") or _STEP_TOKENS),
                max_model_len=self.max_model_len(model) or model.checkpoint.max_model_len,
                kv_dtype=str(given.get("kv_cache_dtype", "auto")),
                tensor_parallel=model.settings.tensor_parallel,
                hybrid=not given.get("disable_hybrid_kv_cache_manager"),
            )
        except UnsupportedError:
            return None

    def max_num_seqs(self, settings: ModelConfig) -> int:
        return settings.max_num_seqs or self.default_max_num_seqs

    def kv_floor_bytes(self, model: ServedModel) -> int:
        """With one block more, which vLLM sets apart."""
        geometry = self.kv_geometry(model)
        if geometry is None:
            return 0
        longest = self.max_model_len(model) or model.checkpoint.max_model_len or 0
        floor = (geometry.blocks(longest) + 1) * geometry.block_bytes
        return min(floor, self.memory(model).kv_bytes)

    def tiers(self, settings: ModelConfig) -> tuple[Residency, ...]:
        return _TIERS

    @abstractmethod
    def elastic(self, settings: ModelConfig) -> bool:
        """Whether its KV limit will move, as far as is known before it tells."""

    @abstractmethod
    def dtype(self, model: ServedModel) -> str:
        """What the weights are served in."""

    def max_model_len(self, model: ServedModel) -> int | None:
        return model.settings.max_model_len

    def arguments(self, model: ServedModel) -> dict[str, Any]:
        settings = model.settings
        return {
            "model": model.checkpoint.path,
            "served_model_name": [model.name, *settings.served_names],
            "tensor_parallel_size": settings.tensor_parallel,
            "dtype": self.dtype(model),
            "max_model_len": self.max_model_len(model),
            "max_num_seqs": self.max_num_seqs(settings),
            "kv_cache_memory_bytes": self.memory(model).kv_bytes,
            "scheduling_policy": "priority",
            "enable_auto_tool_choice": True if settings.tool_call_parser else None,
            "tool_call_parser": settings.tool_call_parser,
            "reasoning_parser": settings.reasoning_parser,
            "disable_uvicorn_access_log": True,
            "worker_extension_cls": _EXTENSION,
        }

    def environment(self, model: ServedModel, devices: Sequence[str]) -> dict[str, str]:
        hub = {} if not model.checkpoint.local else {"HF_HUB_OFFLINE": "1"}
        return {"MAESTRO_WORKER": model.name, **hub}

    def launch(self, model: ServedModel, devices: Sequence[str], address: Path) -> Launch:
        python = str(model.settings.python or sys.executable)
        arguments = {"uds": address, **self.arguments(model), **model.settings.engine_args}
        return Launch(
            (python, "-m", "maestro_backend.workers.vllm_server", *flags(arguments)),
            self.environment(model, devices),
        )


class VllmCpu(_Vllm):
    """vLLM built for CPUs. Its KV cache defaults to 1 GiB, a context to at most 4,096 tokens."""

    name = "vllm-cpu"
    extra = "cpu"
    default_kv_bytes = GiB
    default_max_num_seqs = 16
    residual_bytes = 2 * GiB  # three Python processes with torch, measured: 1.3 to 1.9 GiB

    def refusal(self, settings: ModelConfig, devices: Sequence[str]) -> str:
        if any(device != "cpu" for device in devices):
            return "vllm-cpu runs on the device cpu"
        return super().refusal(settings, devices)

    def elastic(self, settings: ModelConfig) -> bool:
        return True

    def dtype(self, model: ServedModel) -> str:
        """Float32: as fast as bfloat16 on most CPUs, and text does not depend on the batch."""
        return "float32" if model.settings.dtype == "auto" else model.settings.dtype

    def max_model_len(self, model: ServedModel) -> int:
        longest = model.checkpoint.max_model_len or _CPU_MAX_MODEL_LEN
        return model.settings.max_model_len or min(longest, _CPU_MAX_MODEL_LEN)

    def arguments(self, model: ServedModel) -> dict[str, Any]:
        # Small models fill free whitespace in a grammar for ever; so does JSON become compact.
        compact = {"backend": "xgrammar", "disable_any_whitespace": True}
        return {
            **super().arguments(model),
            "enforce_eager": True,
            "structured_outputs_config": compact,
        }


class VllmGpu(_Vllm):
    """vLLM on CUDA devices. Not yet run on a GPU. Its KV cache defaults to 4 GiB."""

    name = "vllm"
    extra = "vllm"
    default_kv_bytes = 4 * GiB
    default_max_num_seqs = 64
    residual_bytes = 3 * GiB  # CUDA context, graphs, activations: a guess until measured

    def refusal(self, settings: ModelConfig, devices: Sequence[str]) -> str:
        if any(not device.startswith("cuda:") for device in devices):
            return "vllm needs a GPU; use vllm-cpu or stub on a CPU"
        return super().refusal(settings, devices)

    def dtype(self, model: ServedModel) -> str:
        if model.settings.dtype != "auto":
            return model.settings.dtype
        stored = model.checkpoint.stored_dtype
        return "bfloat16" if stored == "float32" else stored

    def elastic(self, settings: ModelConfig) -> bool:
        """With kvcached beside a vLLM it supports; of another environment nothing is known."""
        return settings.elastic_kv and settings.python is None and not _kvcached_refusal(settings)

    def arguments(self, model: ServedModel) -> dict[str, Any]:
        return {
            **super().arguments(model),
            "enable_sleep_mode": True,
            # Beside a KV cache of a given size, vLLM asks it for one thing only: to refuse a start
            # while less than this share of the GPU is free. That is the ledger's to say.
            "gpu_memory_utilization": 0.01,
        }

    def environment(self, model: ServedModel, devices: Sequence[str]) -> dict[str, str]:
        visible = ",".join(device.removeprefix("cuda:") for device in devices)
        return {
            **super().environment(model, devices),
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # the driver's numbers, not CUDA's fastest first
            "CUDA_VISIBLE_DEVICES": visible,
        }

    def launch(self, model: ServedModel, devices: Sequence[str], address: Path) -> Launch:
        launch = super().launch(model, devices, address)
        if not self.elastic(model.settings):
            return launch
        kvcached = kvcached_environment(model.name, str(address), vllm=_version("vllm"))
        return Launch(launch.command, {**launch.environment, **kvcached})


class Stub:
    """The test double of `maestro_agents.testing`; `source` is not looked at.

    With `weights_bytes` among its `engine_args` it really takes so much memory.
    """

    name = "stub"
    needs_checkpoint = False
    markers: Sequence[tuple[str, str]] = ()

    def refusal(self, settings: ModelConfig, devices: Sequence[str]) -> str:
        return ""

    def memory(self, model: ServedModel) -> Memory:
        weights = int(model.settings.engine_args.get("weights_bytes", 0))
        return Memory(weights, model.settings.kv_memory or 64 * MiB, 64 * MiB)

    def kv_geometry(self, model: ServedModel, block_tokens: int | None = None) -> KvGeometry:
        given = model.settings.engine_args
        block_tokens = block_tokens or int(given.get("block_size", _STUB_BLOCK_SIZE))
        per_token = int(given.get("kv_bytes_per_token", _STUB_BYTES_PER_TOKEN))
        return one_group(block_tokens * per_token, block_tokens)

    def max_model_len(self, model: ServedModel) -> int:
        return model.settings.max_model_len or _STUB_MAX_MODEL_LEN

    def kv_floor_bytes(self, model: ServedModel) -> int:
        floor = self.kv_geometry(model).bytes_of(self.max_model_len(model))
        return min(floor, self.memory(model).kv_bytes)

    def tiers(self, settings: ModelConfig) -> tuple[Residency, ...]:
        return _TIERS if settings.engine_args.get("control", True) else (Residency.DEVICE,)

    def elastic(self, settings: ModelConfig) -> bool:
        return bool(settings.engine_args.get("elastic", True)) and len(self.tiers(settings)) > 1

    def max_num_seqs(self, settings: ModelConfig) -> int:
        return settings.max_num_seqs or 64

    def launch(self, model: ServedModel, devices: Sequence[str], address: Path) -> Launch:
        settings = model.settings
        tokens = self.memory(model).kv_bytes // _STUB_BYTES_PER_TOKEN
        arguments = {
            "uds": address,
            "max_num_seqs": self.max_num_seqs(settings),
            "max_model_len": self.max_model_len(model),
            "kv_blocks": tokens // _STUB_BLOCK_SIZE,
            "block_size": _STUB_BLOCK_SIZE,
            **settings.engine_args,
        }
        names = [
            word for name in (model.name, *settings.served_names) for word in ("--model", name)
        ]
        stub = (sys.executable, "-m", "maestro_agents.testing", *names, *flags(arguments))
        tied = (sys.executable, "-m", "maestro_backend._tied", *stub)
        return Launch(tied, {"MAESTRO_WORKER": model.name})


ENGINES: Mapping[str, Engine] = {e.name: e for e in (VllmGpu(), VllmCpu(), Stub())}


def choose_engine(name: str, settings: ModelConfig, devices: Sequence[str]) -> Engine:
    """The engine of a model on a node's `devices`; `auto` is vLLM's build for them.

    Raises:
        ConfigError: it cannot run here, or `engine_args` meddles; the message names the fix.
    """
    chosen = settings.engine
    if chosen == "auto":
        chosen = "vllm" if devices[0].startswith("cuda:") else "vllm-cpu"
    engine = ENGINES[chosen]
    refusal = engine.refusal(settings, devices) or _meddling(settings.engine_args)
    if settings.tensor_parallel > 1 and chosen != "stub":
        refusal = "tensor_parallel > 1 is not supported yet: a worker has one device; leave it out"
    if refusal:
        raise ConfigError(f"models.{name}: {refusal}")
    return engine


def flags(arguments: Mapping[str, Any]) -> list[str]:
    """Command-line flags: True is `--x`, False is `--no-x`, None is left out, a dict is JSON."""
    words: list[str] = []
    for key, value in arguments.items():
        name = key.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, (list, tuple)):
            words += [f"--{name}", *map(str, value)]
        else:
            words += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


def _meddling(engine_args: Mapping[str, Any]) -> str:
    for key in engine_args:
        name = _option(key)
        if name in _SETTINGS_OF:
            return f"engine_args.{key}: set {_SETTINGS_OF[name]} of the model instead"
        if name in _OURS:
            return f"engine_args.{key}: Maestro sets this itself"
    return ""


def _kvcached_refusal(settings: ModelConfig) -> str:
    given = {_option(name) for name in settings.engine_args}
    return kvcached_refusal(
        _version("vllm") or None,
        _version("kvcached") or None,
        kv_events="kv_events_config" in given,
        speculative="speculative_config" in given,
    )


def _option(key: str) -> str:
    """A key of `engine_args` as vLLM's option is called in Python."""
    return key.lstrip("-").replace("-", "_")


def _is_installed(distribution: str) -> bool:
    return bool(_version(distribution))


def _version(distribution: str) -> str:
    """Of an installed distribution; "" where it is not."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
