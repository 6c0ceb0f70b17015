"""What a worker takes: as expected before a start, and as its engine tells it afterwards."""

from __future__ import annotations

from typing import Any

from maestro_backend.scheduler import KvGeometry, Residency, WorkerInfo, one_group

from ._account import Learned
from ._control import WorkerStatus
from ._engine import Engine, ServedModel
from ._model import LocalModel
from ._probe import Probe

_ON_DISK = (Residency.DEVICE, Residency.DISK)


class Sizes:
    """The size fields of one worker's info. What its engine has told once is kept."""

    def __init__(self, model: LocalModel, engine: Engine, learned: Learned) -> None:
        self._model = model
        self._engine = engine
        self._learned = learned
        self._told: WorkerStatus | None = None

    def expected(self, info: WorkerInfo) -> dict[str, Any]:
        """What the next start takes, as far as its checkpoint and its earlier lives tell."""
        engine, learned, told = self._engine, self._learned, self._told
        model = self._model.served
        memory = engine.memory(model)
        weights = learned.weights_bytes(model.name)
        residual = learned.residual_bytes(model.name)
        longest = engine.max_model_len(model) or model.checkpoint.max_model_len
        live = told.tiers if told else engine.tiers(model.settings)
        weights = memory.weights_bytes if weights is None else weights
        kv_bytes = (told.kv_built if told else 0) or memory.kv_bytes
        geometry = (told and told.kv_geometry) or engine.kv_geometry(model)
        return {
            "weights_bytes": weights,
            "kv_limit_bytes": kv_bytes,
            "kv_floor_bytes": told.kv_floor if told else engine.kv_floor_bytes(model),
            "kv_max_bytes": kv_bytes,
            "kv_bytes_per_token": geometry.token_bytes if geometry else 1,
            "kv_geometry": geometry,
            "elastic": told.elastic if told else engine.elastic(model.settings),
            "residual_bytes": memory.residual_bytes if residual is None else residual,
            "host_copy_bytes": told.host_copy if told else weights,
            "tiers": self._tiers(live),
            "activation_s": dict(learned.activation_s(model.name)),
            "max_model_len": longest or info.max_model_len,
        }

    async def measured(
        self, promised: WorkerInfo, probe: Probe, status: WorkerStatus | None
    ) -> dict[str, Any]:
        """The engine's own count.

        What the KV cache lacks to a whole block counts as residual: together the sizes stay what
        was promised, or the gateway would plan with bytes that are held.
        """
        self._told = status
        model = self._model.served
        blocks, block_tokens = await probe.kv_blocks()
        built = status.kv_built if status else 0
        geometry = status.kv_geometry if status else None
        geometry = geometry or self._engine.kv_geometry(model, block_tokens)
        geometry = geometry or _guessed(built or promised.kv_limit_bytes, blocks, block_tokens)
        built = built or blocks * geometry.block_bytes
        kv_bytes = status.kv_held if status and status.kv_built else built
        return {
            "weights_bytes": self._weights(model, status),
            "kv_bytes_per_token": geometry.token_bytes,
            "kv_geometry": geometry,
            "kv_limit_bytes": kv_bytes,
            "kv_floor_bytes": min(built, (status and status.kv_floor) or promised.kv_floor_bytes),
            "kv_max_bytes": built,
            "elastic": status is not None and status.elastic,
            "residual_bytes": promised.residual_bytes + max(0, promised.kv_limit_bytes - kv_bytes),
            "host_bytes": status.host_bytes if status else 0,
            "host_copy_bytes": status.host_copy if status else 0,
            "tiers": self._tiers(status.tiers if status else ()),
            "max_model_len": await probe.max_model_len() or promised.max_model_len,
        }

    def excess(self, promised: WorkerInfo, sizes: dict[str, Any]) -> int:
        """By how much `sizes` are more than was promised."""
        names = ("weights_bytes", "kv_limit_bytes", "residual_bytes")
        return sum(int(sizes[name]) - int(getattr(promised, name)) for name in names)

    def _weights(self, model: ServedModel, status: WorkerStatus | None) -> int:
        if status is None or not status.weights:
            learned = self._learned.weights_bytes(model.name)
            return learned or self._engine.memory(model).weights_bytes
        self._learned.weighed(model.name, status.weights)
        return status.weights

    def _tiers(self, live: tuple[Residency, ...]) -> tuple[Residency, ...]:
        """In the order of `Residency`: those of a live worker, the disk, and what is behind it."""
        there = {*live, *_ON_DISK}
        if self._model.can_be_remote:
            there.add(Residency.REMOTE)
        return tuple(tier for tier in Residency if tier in there)


def _guessed(kv_bytes: int, blocks: int, block_tokens: int) -> KvGeometry:
    """Of an engine that tells its blocks only, and of a model that tells too little."""
    return one_group(max(1, kv_bytes // blocks), block_tokens)
