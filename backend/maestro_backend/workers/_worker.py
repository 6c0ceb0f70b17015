"""Supervision of one worker: start, warm-up, moves, health, restart, stop.

One task owns the process and carries out what is asked, one order after the other, so that the
death of the process is noticed in one place, whatever was being done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from maestro_agents.protocol import BackendError, MaestroError, UnsupportedError
from maestro_backend.scheduler import Residency, WorkerInfo, WorkerState

from ._account import Account, DoesNotFitError, Learned
from ._control import Control
from ._engine import Engine, ServedModel
from ._lives import Lives
from ._model import LocalModel
from ._orders import Order, Orders
from ._process import EngineProcess, group_members
from ._record import WorkerRecord
from ._residency import LiveWorker, check_kv_limit
from ._restart import Backoff
from ._sizes import Sizes
from ._standing import Standing

_LEAVING = (WorkerState.SUSPENDING, WorkerState.SUSPENDED)


class Worker:
    """One model's engine process on this node, kept alive until it is stopped.

    `model` is what is known of it before anything is fetched, `device` where it runs, `address` the
    unix socket it will listen on, `record` the file that tells a later agent of it. `cache` takes
    what is fetched, up to `cache_limit` bytes. `publish` is told of each change. A `tied` process
    dies with this one; another lives on for `lease_s` seconds, to be adopted.
    """

    def __init__(
        self,
        model: ServedModel,
        engine: Engine,
        *,
        node: str,
        device: str,
        address: Path,
        log: Path,
        cache: Path,
        record: Path,
        account: Account,
        learned: Learned,
        publish: Callable[[WorkerInfo], None],
        cache_limit: int | None = None,
        backoff: Backoff | None = None,
        tied: bool = True,
        lease_s: float = 600.0,
    ) -> None:
        self._model = LocalModel(model, engine, cache, cache_limit)
        self._sizes = Sizes(self._model, engine, learned)
        self._log = log
        self._backoff = backoff or Backoff()
        self._tied = tied
        self._change = asyncio.Lock()
        self._orders = Orders()
        self._task: asyncio.Task[None] | None = None
        info = WorkerInfo(
            worker=f"{node}/{model.name}",
            node=node,
            device=device,
            model=model.name,
            state=WorkerState.STOPPED,
            residency=self._model.rest,
            max_inflight=engine.max_num_seqs(model.settings),
        )
        info = replace(info, **self._sizes.expected(info))
        self._standing = Standing(info, account, learned, publish)
        self._lives = Lives(
            self._model,
            engine,
            self._standing,
            self._sizes,
            self._orders,
            address=address,
            log=log,
            record=record,
            lease_s=None if tied else lease_s,
        )

    @property
    def info(self) -> WorkerInfo:
        """The worker now."""
        return self._standing.info

    def pids(self) -> Sequence[int]:
        """The live processes of its group."""
        process = self._lives.process
        return () if process is None else group_members(process.pid)

    # --- what can be asked ----------------------------------------------------------------------

    async def bring(self, residency: Residency, kv_limit_bytes: int | None = None) -> None:
        """Bring its weights to `residency`; returns when they are there.

        What was asked before is done first; only `disk` and `remote` interrupt. `kv_limit_bytes` is
        the KV limit to have there, or to come back with from a suspend; without it the limit
        stays, and a start takes the most.

        Raises:
            UnsupportedError: its engine or its source lacks that tier.
            DoesNotFitError: the device or the host budget has too little left; nothing changed.
            MaestroError: it could not be done; `info` tells where the worker is.
        """
        if residency in (Residency.DISK, Residency.REMOTE):
            await self._put_away(residency)
            return

        async def work(live: LiveWorker) -> None:
            await live.bring(residency, kv_limit_bytes)

        await self._ask(Order(work, residency, kv_limit_bytes))

    async def set_kv_limit(self, limit_bytes: int) -> int:
        """Let it hold so many bytes of KV cache; returns what it holds for now.

        That is more than the limit while a shrink waits for blocks in use; `info` follows. A
        suspended worker takes the limit when it is resumed.

        Raises:
            DoesNotFitError: the device has too little left; nothing changed.
            MaestroError: it does not run, or could never have that limit; nothing changed.
        """

        async def work(live: LiveWorker) -> int:
            return await live.limit_kv(limit_bytes)

        return int(await self._ask_live(work))

    async def drop_host_copy(self) -> None:
        """Give up the copy of its weights in host memory.

        Raises:
            MaestroError: the weights are nowhere else in memory: move them to `parked` instead.
        """
        if self.info.host_bytes:
            await self._ask_live(LiveWorker.drop_copy)

    async def keep_prefix(self, call: str, seconds: float) -> int:
        """Keep the KV blocks of an ended call for so long; returns their bytes.

        Raises:
            BackendError: they are gone, or too little would be left.
        """
        return await self._control().keep_prefix(call, seconds)

    async def drop_prefix(self, call: str) -> None:
        """Keep the KV blocks of a call no longer.

        Raises:
            BackendError: the worker does not run.
        """
        await self._control().drop_prefix(call)
        if self.info.state is WorkerState.SUSPENDED:  # what it held is free now
            await self._ask_live(LiveWorker.follow)

    async def warm_prefix(
        self, call: str, messages: Sequence[Mapping[str, Any]], seconds: float
    ) -> int:
        """Compute the prefix of a coming call and keep it for so long; returns its bytes.

        Raises:
            BackendError: the worker is not ready, or too little would be left.
        """
        control = self._control()
        if self.info.state is not WorkerState.READY:
            raise BackendError(f"{self.info.model} is {self.info.state.value}, not ready")
        return await control.warm_prefix(call, messages, seconds)

    async def stop(self) -> None:
        """Stop it, whatever it is doing; returns when no process of it is left."""
        async with self._change:
            await self._end("was stopped before it was ready")

    async def leave(self) -> None:
        """Supervise it no longer. A worker that is not tied lives on, to be adopted."""
        async with self._change:
            self._lives.leaving = not self._tied
            await self._end("is left to another agent")

    async def adopt(self, record: WorkerRecord) -> bool:
        """Take over the process that an earlier agent started, as it is.

        False where it is gone, is not what would be started now, does not answer or does not fit:
        then nothing has changed, and `end_stray` ends it.
        """
        async with self._change:
            if self._task is not None or record.fingerprint != self._lives.fingerprint():
                return False
            try:
                process = EngineProcess.adopt(record)
            except (BackendError, OSError):
                return False
            try:
                with self._model.hold():
                    await self._lives.take_over(process, Path(record.address))
            except BaseException as error:
                process.forget()
                self._standing.release()
                if isinstance(error, BackendError):
                    return False
                raise
            self._task = asyncio.create_task(self._run(process), name=self._name)
            await asyncio.sleep(0)  # it has begun, and ends the process whatever comes next
            return True

    async def settled(self, then: Callable[[], None]) -> None:
        """Wait until what was asked before is done; `then` is called before anything else is.

        Raises:
            MaestroError: it can be done no more.
        """

        async def work(live: LiveWorker) -> None:
            then()

        await self._ask_live(work)

    # --- orders ---------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return f"worker {self.info.model}"

    async def _ask(self, order: Order) -> Any:
        async with self._change:
            self._orders.add(order)
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._run(), name=self._name)
        return await asyncio.shield(order.done)

    async def _ask_live(self, work: Callable[[LiveWorker], Awaitable[Any]]) -> Any:
        if self._task is None or self._task.done():
            raise BackendError(f"{self.info.model} is {self.info.state.value}: start it first")
        return await self._ask(Order(work))

    def _control(self) -> Control:
        live = self._lives.live
        if live is None or live.status is None:
            state = self.info.state.value
            raise BackendError(f"{self.info.model} is {state}, or its engine keeps no prefixes")
        return live.control

    async def _put_away(self, residency: Residency) -> None:
        if residency not in self.info.tiers:
            raise UnsupportedError(
                f"{self.info.model} cannot be brought to {residency.value!r}: only what Maestro"
                " has fetched or made is deleted from the disk"
            )
        async with self._change:
            await self._end("was stopped before it was ready")
            if residency is Residency.REMOTE:
                await self._model.forget()
                self._rest("")
        if residency is Residency.DISK and self.info.residency is Residency.REMOTE:
            await self._ask(Order(_nothing, residency))

    async def _end(self, why: str) -> None:
        """End the task and, unless we leave it to another, the process."""
        if self._task is None:
            return
        if not self._task.done() and not self._lives.leaving:
            self._standing.set(WorkerState.STOPPING, detail="")
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._task = None
        self._orders.refuse_all(BackendError(f"{self.info.model} {why}"))
        if not self._lives.leaving:
            self._rest("")

    def _rest(self, detail: str, state: WorkerState = WorkerState.STOPPED) -> None:
        """No process any more: told is what the next start will take."""
        self._standing.rest = self._model.rest
        expected = self._sizes.expected(self.info)
        self._standing.set(state, **expected, host_bytes=0, detail=detail)

    # --- one process after the other ------------------------------------------------------------

    async def _run(self, adopted: EngineProcess | None = None) -> None:
        """Carry out orders until none is left and no process lives."""
        if adopted is None:  # what was to be done on a process that has just ended
            self._orders.refuse_lifeless(BackendError(f"{self.info.model} is stopped"))
        while adopted is not None or self._orders:
            await self._run_until_rest(adopted)
            adopted = None

    async def _run_until_rest(self, adopted: EngineProcess | None) -> None:
        try:
            try:
                detail = await self._engage(adopted)
            finally:
                self._standing.release()
            self._rest(detail)
            self._orders.refuse_lifeless(BackendError(f"{self.info.model} ended: {detail}"))
        except DoesNotFitError as error:
            self._rest(str(error))
            self._orders.refuse_all(error)
        except MaestroError as error:
            self._rest(str(error), WorkerState.FAILED)
            self._orders.refuse_all(error)
        except Exception as error:
            told = f"internal error: {error!r}"
            self._rest(told, WorkerState.FAILED)
            self._orders.refuse_all(BackendError(f"{self.info.model}: {told}"))
            raise

    async def _engage(self, adopted: EngineProcess | None) -> str:
        """From the first order, or an adopted process, until it rests again: why it does."""
        if adopted is not None:
            return await self._with_checkpoint(adopted)
        order = self._orders.first
        if order.residency is Residency.DISK:
            await self._model.fetch(self._standing.doing)
            if self._model.rest is Residency.REMOTE:
                why = (
                    "its engine fetches it from the hub at the first start: bring it to the device"
                )
                self._orders.refuse(UnsupportedError(f"{self.info.model}: {why}"))
            else:
                self._orders.finish()
            return ""
        self._standing.set(WorkerState.STARTING, detail="looking for the model")
        await self._model.fetch(self._standing.doing)
        return await self._with_checkpoint(None)

    async def _with_checkpoint(self, process: EngineProcess | None) -> str:
        with self._model.hold() as checkpoint_lock:
            if process is None:
                try:
                    self._claim(self._orders.first)
                except MaestroError as error:  # that order's own mistake: the next may do
                    self._orders.refuse(error)
                    return str(error)
            return await self._keep_alive(process, checkpoint_lock)

    def _claim(self, order: Order) -> None:
        # Published before the claim: whoever planned with an estimate can plan again.
        self._standing.rest = self._model.rest
        expected = self._sizes.expected(self.info)
        self._standing.set(WorkerState.STARTING, **expected)
        if order.kv_limit_bytes is not None:
            check_kv_limit(self.info, order.kv_limit_bytes)
            kv_bytes = min(order.kv_limit_bytes, self.info.kv_max_bytes)
            self._standing.set(WorkerState.STARTING, kv_limit_bytes=kv_bytes)
        self._standing.hold(weights=True)
        if order.residency is Residency.HOST:
            self._standing.hold_copy(self.info.host_copy_bytes)

    async def _keep_alive(self, process: EngineProcess | None, checkpoint_lock: int | None) -> str:
        """Run the engine again and again; returns why it rests once it died suspended."""
        failures = 0
        while True:
            ended, ready_s = await self._lives.run(process, checkpoint_lock)
            process = None
            if self.info.state in _LEAVING:
                self._fail_first(ended.reason, but_for=(Residency.DEVICE,))
                return f"ended while it was {self.info.state.value}: {ended.reason}"
            failures = 1 if ready_s >= self._backoff.quick else failures + 1
            if ended.hopeless or failures >= self._backoff.tries:
                raise BackendError(f"{self.info.model}: {ended.reason} (log: {self._log})")
            self._fail_first(ended.reason, but_for=tuple(Residency))
            self._standing.hold_copy(0)  # a copy in host memory went with the process
            delay = self._backoff.delay(failures)
            self._standing.set(
                WorkerState.RESTARTING,
                detail=f"restarting in {delay:g} s: {ended.reason}",
                restarts=self.info.restarts + 1,
                host_bytes=0,
            )
            await asyncio.sleep(delay)

    def _fail_first(self, why: str, *, but_for: tuple[Residency, ...]) -> None:
        """The order that was being carried out; one that another start fulfils waits for it."""
        if self._orders and self._orders.first.residency not in but_for:
            self._orders.refuse(BackendError(f"{self.info.model} ended: {why}"))


async def _nothing(live: LiveWorker) -> None:
    """What is left to do where a process lives for `disk`: it is there."""
