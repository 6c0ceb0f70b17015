"""The processes of one worker, one after the other: start, warm-up, health, end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from maestro_agents.protocol import BackendError, MaestroError
from maestro_backend._tied import LEASE_VARIABLE
from maestro_backend.scheduler import Residency, WorkerState

from ._account import DoesNotFitError
from ._control import Control, WorkerStatus
from ._engine import Engine, Launch
from ._fingerprint import fingerprint
from ._model import LocalModel
from ._orders import Order, Orders
from ._probe import Probe
from ._process import EngineProcess
from ._record import WorkerRecord
from ._residency import LiveWorker
from ._restart import EngineEndedError, Failure, failure, uninterrupted, while_running
from ._sizes import Sizes
from ._standing import Standing

log = logging.getLogger(__name__)

_GRACE_S = 10.0
_HEALTH_EVERY_S = 2.0
_MISSES = 3
_POLL_S = 0.25
_RENEW_S = 10.0
_STARTING_GRACE_S = 1.0  # an engine that has no calls yet has nothing to finish
_START_LIMIT_S = 1800.0


class Lives:
    """Runs `model` on `engine` and carries out `orders` while it lives.

    `process` is the one of now, `live` what can be told to it once it is ready. While `leaving` is
    set the process outlives its supervision. `lease_s` None ties it to this process.
    """

    def __init__(
        self,
        model: LocalModel,
        engine: Engine,
        standing: Standing,
        sizes: Sizes,
        orders: Orders,
        *,
        address: Path,
        log: Path,
        record: Path,
        lease_s: float | None,
    ) -> None:
        self._model = model
        self._engine = engine
        self._standing = standing
        self._sizes = sizes
        self._orders = orders
        self._address = address
        self._log = log
        self._record = record
        self._lease_s = lease_s
        self.process: EngineProcess | None = None
        self.live: LiveWorker | None = None
        self.leaving = False
        self._adopted: WorkerStatus | None = None
        self._fingerprint = ""

    async def run(
        self, adopted: EngineProcess | None, checkpoint_lock: int | None
    ) -> tuple[Failure, float]:
        """One life of the process: why it ended, and for how many seconds it had been ready."""
        process = adopted or self._start(checkpoint_lock)
        ready_at = None if adopted is None else time.monotonic()
        self.process = process
        try:
            async with (
                Probe(self._address) as probe,
                Control(self._address) as control,
                self._leasing(control),
            ):
                if adopted is None:
                    self._write_record(process)
                    await while_running(process, self._become_ready(process, probe, control))
                    ready_at = time.monotonic()
                else:
                    self.live = LiveWorker(process, control, self._standing, self._adopted)
                assert self.live is not None
                await self._attend(self.live, probe)
        except DoesNotFitError:
            raise
        except BackendError as error:
            lived = 0.0 if ready_at is None else time.monotonic() - ready_at
            return await failure(process, str(error)), lived
        finally:
            await self._let_go(process, _STARTING_GRACE_S if ready_at is None else _GRACE_S)
        raise AssertionError("attending ends with an error")

    @asynccontextmanager
    async def _leasing(self, control: Control) -> AsyncIterator[None]:
        """Renew its lease, whatever else it is told meanwhile: a long move must not end it."""

        async def renew(lease_s: float) -> None:
            while True:
                try:
                    await control.renew_lease(lease_s)
                except BackendError as error:  # it is asked again long before the lease ends
                    log.debug("%s: lease not renewed: %s", self._standing.info.model, error)
                await asyncio.sleep(min(_RENEW_S, lease_s / 4))

        renewing = None if self._lease_s is None else asyncio.create_task(renew(self._lease_s))
        try:
            yield
        finally:
            if renewing is not None:
                renewing.cancel()

    def _start(self, checkpoint_lock: int | None) -> EngineProcess:
        self._address.unlink(missing_ok=True)
        self._standing.doing(f"starting {self._engine.name}")
        launch, info = self._launch(), self._standing.info
        environment = dict(launch.environment)
        if info.elastic and info.kv_limit_bytes < info.kv_max_bytes:
            environment["MAESTRO_KV_LIMIT"] = str(info.kv_limit_bytes)
        if self._lease_s is not None:
            environment[LEASE_VARIABLE] = f"{self._lease_s:g}"
        self._fingerprint = self._fingerprint_of(launch)
        launch = replace(launch, environment=environment)
        return EngineProcess.start(launch, self._log, checkpoint_lock)

    def _launch(self) -> Launch:
        device = self._standing.info.device
        return self._engine.launch(self._model.served, (device,), self._address)

    def fingerprint(self) -> str:
        """Of what would be started now."""
        return self._fingerprint_of(self._launch())

    def _fingerprint_of(self, launch: Launch) -> str:
        return fingerprint(launch, self._model.served.settings.python)

    def _write_record(self, process: EngineProcess) -> None:
        info = self._standing.info
        record = WorkerRecord(
            model=info.model,
            pid=process.pid,
            create_time=process.create_time,
            address=str(self._address),
            fingerprint=self._fingerprint,
            log=str(self._log),
            started=process.create_time,
            device=info.device,
            most_bytes=info.most_bytes,
            host_bytes=max(info.host_copy_bytes, info.host_bytes),
        )
        try:
            record.write(self._record)
        except OSError as error:
            raise BackendError(f"cannot write {self._record}: {error.strerror}") from error

    async def _let_go(self, process: EngineProcess, grace_s: float) -> None:
        self.live = None
        if self.leaving:
            process.forget()
            return
        await uninterrupted(process.stop(grace_s))
        self.process = None
        self._address.unlink(missing_ok=True)
        self._record.unlink(missing_ok=True)

    async def _become_ready(self, process: EngineProcess, probe: Probe, control: Control) -> None:
        began = time.monotonic()
        await self._wait_until_healthy(process, probe)
        self._standing.doing("warming up")
        await probe.warm_up(self._standing.info.model)
        status = await control.status()
        if (
            not self._model.served.checkpoint.stored_bytes
        ):  # from a hub: the engine has fetched it now
            await self._model.fetch(self._standing.doing)
        promised = self._standing.info
        sizes = await self._sizes.measured(promised, probe, status)
        self.live = LiveWorker(process, control, self._standing, status)
        await self._claim_measured(control, status, sizes)
        self._write_record(process)  # now with what it has turned out to take
        seconds = time.monotonic() - began
        self._standing.learned.moved(promised.model, Residency.DISK, Residency.DEVICE, seconds)
        if self._orders.goal is Residency.DEVICE:
            self._tell_live(WorkerState.READY, process)

    async def _wait_until_healthy(self, process: EngineProcess, probe: Probe) -> None:
        deadline = time.monotonic() + _START_LIMIT_S
        while not await probe.healthy():
            if time.monotonic() > deadline:
                raise EngineEndedError("the engine did not start in time")
            output = process.output()
            words = (words for marker, words in reversed(self._engine.markers) if marker in output)
            self._standing.doing(next(words, self._standing.info.detail))
            await asyncio.sleep(_POLL_S)

    async def _claim_measured(
        self, control: Control, status: WorkerStatus | None, sizes: dict[str, Any]
    ) -> None:
        """Claim what it takes; where that is more than was promised, its KV cache makes up for it.

        Raises:
            DoesNotFitError: even the least is too much.
        """
        try:
            self._standing.hold_measured(status, sizes)
        except DoesNotFitError:
            less = sizes["kv_limit_bytes"] - self._sizes.excess(self._standing.info, sizes)
            if not sizes["elastic"] or less < sizes["kv_floor_bytes"]:
                raise
            sizes["kv_limit_bytes"] = await control.limit_kv(less)
            self._standing.hold_measured(status, sizes)

    def _tell_live(
        self, state: WorkerState, process: EngineProcess, residency: Residency = Residency.DEVICE
    ) -> None:
        self._standing.set(
            state,
            residency=residency,
            pid=process.pid,
            address=str(self._address),
            activation_s=dict(self._standing.learned.activation_s(self._standing.info.model)),
            detail="",
        )

    async def take_over(self, process: EngineProcess, address: Path) -> None:
        """Claim and tell what a live process takes, wherever its weights are.

        Raises:
            BackendError: it does not answer, or takes more than there is.
        """
        async with Probe(address) as probe, Control(address) as control:
            status = await control.status()
            if status is None:
                raise BackendError("its engine has no control API")
            expected = self._sizes.expected(self._standing.info)
            held = status.kv_held if status.kv_built else expected["kv_limit_bytes"]
            promised = replace(self._standing.info, **{**expected, "kv_limit_bytes": held})
            sizes = await self._sizes.measured(promised, probe, status)
            self._standing.hold_measured(status, {**expected, **sizes})
        self._adopted = status
        on_device = status.residency is Residency.DEVICE
        state = WorkerState.READY if on_device else WorkerState.SUSPENDED
        self._tell_live(state, process, status.residency)
        # A move of the earlier agent's may be under way: this comes after it.
        self._orders.add(Order(LiveWorker.confirm), first=True)

    async def _attend(self, live: LiveWorker, probe: Probe) -> None:
        """Return never; raise when the engine ended or stopped answering."""
        misses = 0
        while misses < _MISSES:
            if await self._order_arrives(live):
                await self._carry_out(live, self._orders.first)
                continue
            well = await while_running(live.process, self._is_well(live, probe))
            misses = 0 if well else misses + 1
        raise EngineEndedError("the engine stopped answering its health check")

    async def _order_arrives(self, live: LiveWorker) -> bool:
        """Whether there is something to do before the next look at its health."""
        if not self._orders and not live.process.ended.done():
            arrived = asyncio.ensure_future(self._orders.arrived.wait())
            soon = live.follows and live.residency is Residency.DEVICE
            limit_s = _POLL_S if soon else _HEALTH_EVERY_S
            try:
                first = asyncio.FIRST_COMPLETED
                await asyncio.wait(
                    (arrived, live.process.ended), timeout=limit_s, return_when=first
                )
            finally:
                arrived.cancel()
        if live.process.ended.done():
            raise EngineEndedError("the engine ended")
        return bool(self._orders)

    async def _carry_out(self, live: LiveWorker, order: Order) -> None:
        try:
            result = await while_running(live.process, order.work(live))
        except EngineEndedError:
            raise  # whether the order waits for a restart is seen there
        except MaestroError as error:
            self._tell_started(live)
            self._orders.refuse(error)
        else:
            self._tell_started(live)
            self._orders.finish(result)

    def _tell_started(self, live: LiveWorker) -> None:
        """What was started for another tier and did not leave the device is ready there."""
        if self._standing.info.state in (WorkerState.STARTING, WorkerState.RESTARTING):
            self._standing.hold_copy(self._standing.info.host_bytes)
            self._tell_live(WorkerState.READY, live.process)

    async def _is_well(self, live: LiveWorker, probe: Probe) -> bool:
        if not await probe.healthy():
            return False
        with suppress(BackendError):  # what does not answer this time is asked again
            if live.follows:
                await live.follow()
        return True
