"""The model of one worker, and its checkpoint on the local disk."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from maestro_backend.scheduler import Residency

from ._engine import Engine, ServedModel
from ._sources import Checkpoint, fetch, forget, hold


class LocalModel:
    """`served` is what is known of the model now. `cache` takes what is fetched, up to `limit`."""

    def __init__(self, served: ServedModel, engine: Engine, cache: Path, limit: int | None) -> None:
        self.served = served
        self._needs_checkpoint = engine.needs_checkpoint
        self._cache = cache
        self._limit = limit

    @property
    def rest(self) -> Residency:
        """Where the weights are while there is no process."""
        elsewhere = ":" in self.served.settings.source and not self.served.checkpoint.stored_bytes
        return Residency.REMOTE if self._needs_checkpoint and elsewhere else Residency.DISK

    @property
    def can_be_remote(self) -> bool:
        """Whether it is not here, or may be deleted here."""
        return self.served.checkpoint.cached or self.rest is Residency.REMOTE

    async def fetch(self, progress: Callable[[str], None]) -> None:
        """Bring the checkpoint to the disk, where the engine looks at it at all.

        Raises:
            MaestroError: there is no such model, or it cannot be brought here.
        """
        settings = self.served.settings
        if not self._needs_checkpoint:
            return
        checkpoint = await fetch(
            settings.source,
            cache=self._cache,
            python=str(settings.python or sys.executable),
            progress=progress,
            limit_bytes=self._limit,
        )
        self.served = replace(self.served, checkpoint=checkpoint)

    def hold(self) -> AbstractContextManager[int | None]:
        """Keep the checkpoint from being deleted; see `hold` of the sources."""
        return hold(self.served.checkpoint)

    async def forget(self) -> None:
        """Delete the checkpoint from the cache.

        Raises:
            UnsupportedError: Maestro has not put it there.
            BackendError: it is in use.
        """
        source = self.served.settings.source
        await asyncio.to_thread(forget, source, self._cache)
        self.served = replace(self.served, checkpoint=Checkpoint(source))
