"""The moves of a live worker between the tiers, and of its KV limit.

Each one claims what it will need before it begins, and gives back what it freed only when the
engine has confirmed it. A move that fails leaves the worker where the engine says it is.
"""

from __future__ import annotations

import time

from maestro_agents.protocol import BackendError, UnsupportedError
from maestro_backend.scheduler import Residency, WorkerInfo, WorkerState

from ._account import DoesNotFitError
from ._control import Control, WorkerRefusedError, WorkerStatus
from ._process import EngineProcess
from ._restart import EngineEndedError
from ._standing import Standing

_RESUME_TRIES = 3
_WORDS = {
    Residency.DEVICE: "bringing the weights to the device",
    Residency.HOST: "bringing the weights to host memory",
    Residency.PARKED: "leaving the weights to the disk",
}


class LiveWorker:
    """A worker whose engine runs. `status` is None where the engine has no control API.

    `follows` is set while its KV cache may come to hold less by itself: look again with `follow`.
    """

    def __init__(
        self,
        process: EngineProcess,
        control: Control,
        standing: Standing,
        status: WorkerStatus | None,
    ) -> None:
        self.process = process
        self.control = control
        self.status = status
        self.follows = False
        self._standing = standing
        self._failed_resumes = 0

    @property
    def residency(self) -> Residency:
        """Where its weights are, as the engine said last."""
        return Residency.DEVICE if self.status is None else self.status.residency

    async def bring(self, residency: Residency, kv_limit_bytes: int | None) -> None:
        """Move the weights, and set the KV limit where one is given.

        A suspended elastic worker holds only the KV bytes that are in use or kept in it: its limit
        is then the one that it comes back with.

        Raises:
            UnsupportedError: the engine cannot.
            DoesNotFitError: the device or the host budget has too little left; nothing changed.
            WorkerRefusedError: it failed; the worker is where its info says.
            EngineEndedError: the engine is of no more use.
        """
        info = self._standing.info
        if residency not in info.tiers:
            tiers = ", ".join(info.tiers)
            raise UnsupportedError(
                f"{info.model} cannot be brought to {residency.value!r} (its tiers: {tiers})"
            )
        if kv_limit_bytes is not None:
            check_kv_limit(info, kv_limit_bytes)
        if self.residency is not residency:
            if residency is Residency.DEVICE:
                await self._resume(kv_limit_bytes)
            else:
                await self._suspend(residency)
        if kv_limit_bytes is not None and kv_limit_bytes != self._standing.info.kv_limit_bytes:
            await self.limit_kv(kv_limit_bytes)

    async def confirm(self) -> None:
        """Ask for the residency that it tells: a move that was under way is over then."""
        await self._go(self.residency)

    async def limit_kv(self, limit_bytes: int) -> int:
        """Set the KV limit; returns what may be occupied for now. A suspended worker takes it
        when it is resumed.

        Raises:
            UnsupportedError, WorkerRefusedError: it cannot be; nothing changed.
            DoesNotFitError: the device has too little left; nothing changed.
        """
        standing = self._standing
        check_kv_limit(standing.info, limit_bytes)
        if not standing.info.elastic:
            return standing.info.kv_limit_bytes
        if self._on_device and limit_bytes > standing.info.kv_limit_bytes:
            standing.hold(weights=True, kv_bytes=limit_bytes)
        try:
            held = await self.control.limit_kv(limit_bytes)
        except WorkerRefusedError:
            standing.hold(weights=self._on_device)
            raise
        except BackendError:
            self.follows = True  # whether it grew is not known: the larger claim stays for now
            raise
        self._holds(held, limit_bytes)
        return held

    async def follow(self) -> None:
        """Give back what calls and kept prefixes have freed meanwhile."""
        status = await self._ask_status()
        self._holds(status.kv_held, status.kv_limit)

    async def drop_copy(self) -> None:
        """Give up the copy of the weights in host memory.

        Raises:
            WorkerRefusedError: they are nowhere else in memory.
        """
        if self.status is not None and self.status.host_bytes:
            await self.control.drop_host_copy()
            await self._settle_truth()

    @property
    def _on_device(self) -> bool:
        return self.residency is Residency.DEVICE

    def _holds(self, kv_bytes: int, limit_bytes: int) -> None:
        self._standing.hold(weights=self._on_device, kv_bytes=kv_bytes)
        self._standing.set(self._standing.info.state, kv_limit_bytes=kv_bytes)
        self.follows = self._may_fall(kv_bytes, limit_bytes)

    def _may_fall(self, kv_bytes: int, limit_bytes: int) -> bool:
        if self._on_device:
            return kv_bytes > limit_bytes
        return self._standing.info.elastic and kv_bytes > 0

    async def _suspend(self, residency: Residency) -> None:
        standing, info = self._standing, self._standing.info
        if residency is Residency.HOST:
            standing.hold_copy(max(info.host_bytes, info.host_copy_bytes))
        if self._on_device:
            standing.set(
                WorkerState.SUSPENDING,
                **self._identity(),
                residency=Residency.DEVICE,
                detail=_WORDS[residency],
            )
        else:
            standing.doing(_WORDS[residency])
        await self._go(residency)

    async def _resume(self, kv_limit_bytes: int | None) -> None:
        standing, info = self._standing, self._standing.info
        limit = kv_limit_bytes if info.elastic else None
        if info.elastic and limit is None:
            limit = (await self._ask_status()).kv_limit  # the last one
        kv_bytes = info.kv_max_bytes if limit is None else max(info.kv_limit_bytes, limit)
        try:
            standing.hold(weights=True, kv_bytes=kv_bytes)
        except DoesNotFitError as error:
            standing.doing(str(error))
            raise
        standing.set(WorkerState.RESUMING, kv_limit_bytes=kv_bytes, detail=_WORDS[Residency.DEVICE])
        try:
            await self._go(Residency.DEVICE, limit)
        except WorkerRefusedError:
            self._failed_resumes += 1
            raise
        self._failed_resumes = 0

    async def _go(self, residency: Residency, kv_limit_bytes: int | None = None) -> None:
        start, began = self.residency, time.monotonic()
        try:
            room = self._standing.host_room
            status = await self.control.move(residency, room, kv_limit_bytes)
        except WorkerRefusedError as error:
            last = self._failed_resumes + 1 >= _RESUME_TRIES
            if residency is Residency.DEVICE and last:
                told = f"its weights could not be brought back {_RESUME_TRIES} times: {error}"
                raise EngineEndedError(told) from error
            await self._settle_truth(str(error))
            raise
        except BackendError as error:
            raise EngineEndedError(str(error)) from error
        if start is not residency:
            seconds = time.monotonic() - began
            self._standing.learned.moved(self._standing.info.model, start, residency, seconds)
        self._settle(status)

    async def _settle_truth(self, detail: str = "") -> None:
        self._settle(await self._ask_status(), detail)

    async def _ask_status(self) -> WorkerStatus:
        try:
            status = await self.control.status()
        except BackendError as error:
            raise EngineEndedError(str(error)) from error
        if status is None:
            raise EngineEndedError("the engine no longer has a control API")
        return status

    def _settle(self, status: WorkerStatus, detail: str = "") -> None:
        self.status = status
        self.follows = self._may_fall(status.kv_held, status.kv_limit)
        try:
            self._standing.settle(status, detail)
        except DoesNotFitError as error:
            raise EngineEndedError(f"it takes more than it was promised: {error}") from error

    def _identity(self) -> dict[str, object]:
        return {"pid": self.process.pid, "address": self.control.address}


def check_kv_limit(info: WorkerInfo, limit_bytes: int) -> None:
    """Refuse a KV limit that its engine could not have.

    Raises:
        UnsupportedError: its KV cache has one size.
        BackendError: the limit is too small or too large.
    """
    if not info.elastic:
        if limit_bytes < info.kv_max_bytes:
            raise UnsupportedError(f"the KV cache of {info.model} has one size: leave its limit")
    elif not info.kv_floor_bytes <= limit_bytes <= info.kv_max_bytes:
        raise BackendError(
            f"a KV limit of {limit_bytes} bytes is not possible for {info.model}: at least"
            f" {info.kv_floor_bytes} (one request of max_model_len), at most {info.kv_max_bytes}"
            " (its kv_memory)"
        )
