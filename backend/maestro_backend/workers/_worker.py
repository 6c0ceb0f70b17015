"""Supervision of one worker: start, warm-up, health, restart, stop."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from maestro_agents.protocol import BackendError, MaestroError
from maestro_backend.scheduler import Residency, WorkerInfo, WorkerState

from ._engine import Engine, Memory, ServedModel
from ._probe import Probe
from ._process import EngineProcess
from ._sources import Checkpoint, fetch
from ._telling import mend, telling_line

_GRACE_S = 10.0
_HEALTH_EVERY_S = 2.0
_LAST_WORDS_S = 2.0
_MISSES = 3
_POLL_S = 0.25
_STARTING_GRACE_S = 1.0  # an engine that has no calls yet has nothing to finish
_START_LIMIT_S = 1800.0
_USAGE_ERROR = 2

T = TypeVar("T")


class DoesNotFitError(BackendError):
    """The device has too little memory left for this worker; the message holds the numbers."""


Promise = Callable[[str, Memory, str], AbstractContextManager[None]]
"""(model, bytes, device): the bytes are held until the exit.

Raises DoesNotFitError where the bytes are not free.
"""


@dataclass(frozen=True, slots=True)
class Backoff:
    """Seconds before the n-th restart: `first`, doubling up to `cap`.

    After `tries` failures in a row within `quick` seconds of being ready the worker gives up.
    """

    first: float = 0.5
    cap: float = 30.0
    tries: int = 3
    quick: float = 60.0

    def delay(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row."""
        return min(self.cap, self.first * 2.0 ** (failures - 1))


class Worker:
    """One model's engine process on this node, kept alive until it is stopped.

    `model` is what is known of it before anything is fetched, `device` where it runs, `address` the
    unix socket it will listen on. `promise` reserves its memory, `publish` is told of each change.
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
        promise: Promise,
        publish: Callable[[WorkerInfo], None],
        backoff: Backoff | None = None,
    ) -> None:
        self._model = model
        self._engine = engine
        self._address = address
        self._log = log
        self._cache = cache
        self._promise = promise
        self._publish = publish
        self._backoff = backoff or Backoff()
        self._change = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._ready = _future()
        self.info = WorkerInfo(
            worker=f"{node}/{model.name}",
            node=node,
            device=device,
            model=model.name,
            state=WorkerState.STOPPED,
            residency=Residency.DISK,
            max_inflight=engine.max_num_seqs(model.settings),
            **self._sizes(),
        )

    async def start(self) -> None:
        """Start it unless it runs; returns when it takes calls.

        Raises:
            DoesNotFitError: too little memory is free; it stays stopped.
            MaestroError: it could not be started; the message says why.
        """
        async with self._change:
            if self._task is None or self._task.done():
                self._ready = _future()
                self._task = asyncio.create_task(self._run(), name=f"worker {self.info.model}")
        await asyncio.shield(self._ready)

    async def stop(self) -> None:
        """Stop it, whatever it is doing; returns when no process of it is left."""
        async with self._change:
            if self._task is None:
                return
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
            self._fail(BackendError(f"{self.info.model} was stopped before it was ready"))
            self._set(WorkerState.STOPPED, detail="")

    async def _run(self) -> None:
        try:
            self._set(WorkerState.STARTING, detail="looking for the model")
            self._model = replace(self._model, checkpoint=await self._fetch())
            # Published before the promise: whoever planned with an estimate can plan again.
            self._set(WorkerState.STARTING, **self._sizes())
            memory = self._engine.memory(self._model)
            with self._promise(self.info.model, memory, self.info.device):
                await self._keep_alive(memory)
        except DoesNotFitError as error:
            self._set(WorkerState.STOPPED, detail=str(error))
            self._fail(error)
        except MaestroError as error:
            self._set(WorkerState.FAILED, detail=str(error))
            self._fail(error)
        except Exception as error:
            self._set(WorkerState.FAILED, detail=f"internal error: {error!r}")
            self._fail(BackendError(f"{self.info.model}: internal error: {error!r}"))
            raise
        except asyncio.CancelledError:
            self._set(WorkerState.STOPPING)
            raise

    async def _fetch(self) -> Checkpoint:
        settings = self._model.settings
        if not self._engine.needs_checkpoint:
            return self._model.checkpoint
        python = str(settings.python or sys.executable)
        return await fetch(settings.source, cache=self._cache, python=python, progress=self._doing)

    def _sizes(self) -> dict[str, Any]:
        """The sizes of the worker as far as its checkpoint is known."""
        memory = self._engine.memory(self._model)
        longest = self._engine.max_model_len(self._model) or self._model.checkpoint.max_model_len
        return {
            "weights_bytes": memory.weights_bytes,
            "kv_limit_bytes": memory.kv_bytes,
            "residual_bytes": memory.residual_bytes,
            "kv_bytes_per_token": self._engine.kv_bytes_per_token(self._model) or 1,
            "max_model_len": longest or 0,
        }

    async def _keep_alive(self, memory: Memory) -> None:
        """Run the engine again and again; ends only with an error (or a cancellation)."""
        failures = 0
        while True:
            failure, ready_s = await self._run_once(memory)
            failures = 1 if ready_s >= self._backoff.quick else failures + 1
            if failure.hopeless or failures >= self._backoff.tries:
                raise BackendError(f"{self.info.model}: {failure.reason} (log: {self._log})")
            if self._ready.done():
                self._ready = _future()
            delay = self._backoff.delay(failures)
            self._set(
                WorkerState.RESTARTING,
                detail=f"restarting in {delay:g} s: {failure.reason}",
                restarts=self.info.restarts + 1,
            )
            await asyncio.sleep(delay)

    async def _run_once(self, memory: Memory) -> tuple[_Failure, float]:
        """One life of the process: why it ended, and for how many seconds it had been ready."""
        self._address.unlink(missing_ok=True)
        self._doing(f"starting {self._engine.name}")
        launch = self._engine.launch(self._model, (self.info.device,), self._address)
        process = await EngineProcess.start(launch, self._log)
        ready_at = None
        try:
            async with Probe(self._address) as probe:
                await _while_running(process, self._become_ready(process, probe, memory))
                ready_at = time.monotonic()
                await self._watch(process, probe)
        except BackendError as error:
            lived = 0.0 if ready_at is None else time.monotonic() - ready_at
            await process.exits_within(_LAST_WORDS_S)
            return _failure(process, str(error)), lived
        finally:
            await process.stop(_STARTING_GRACE_S if ready_at is None else _GRACE_S)
            self._address.unlink(missing_ok=True)
        raise AssertionError("watching ends with an error")

    async def _become_ready(self, process: EngineProcess, probe: Probe, memory: Memory) -> None:
        async with asyncio.timeout(_START_LIMIT_S):
            while not await probe.healthy():
                self._report_progress(process)
                await asyncio.sleep(_POLL_S)
        self._doing("warming up")
        await probe.warm_up(self.info.model)
        self._set(
            WorkerState.READY,
            residency=Residency.DEVICE,
            **await self._measured_sizes(probe, memory),
            pid=process.pid,
            address=str(self._address),
            detail="",
        )
        if not self._ready.done():
            self._ready.set_result(None)

    async def _measured_sizes(self, probe: Probe, memory: Memory) -> dict[str, Any]:
        """The engine's own count.

        What the KV cache lacks to a whole block counts as residual: together the sizes stay what
        was promised, or the gateway would plan with bytes that are held.
        """
        if not self._model.checkpoint.stored_bytes:  # from a hub: the engine has fetched it now
            self._model = replace(self._model, checkpoint=await self._fetch())
        model = self._model
        tokens = await probe.kv_tokens()
        per_token = self._engine.kv_bytes_per_token(model) or max(1, memory.kv_bytes // tokens)
        kv_limit = tokens * per_token
        return {
            "weights_bytes": self._engine.memory(model).weights_bytes,
            "kv_bytes_per_token": per_token,
            "kv_limit_bytes": kv_limit,
            "residual_bytes": max(0, memory.residual_bytes + memory.kv_bytes - kv_limit),
            "max_model_len": await probe.max_model_len() or self.info.max_model_len,
        }

    def _report_progress(self, process: EngineProcess) -> None:
        output = process.output()
        for marker, words in reversed(self._engine.markers):
            if marker in output:
                self._doing(words)
                return

    async def _watch(self, process: EngineProcess, probe: Probe) -> None:
        """Return never; raise when the engine ended or stopped answering."""
        misses = 0
        while misses < _MISSES:
            if await process.exits_within(_HEALTH_EVERY_S):
                raise BackendError("the engine ended")
            misses = 0 if await probe.healthy() else misses + 1
        raise BackendError("the engine stopped answering its health check")

    def _doing(self, words: str) -> None:
        self._set(self.info.state, detail=words)

    def _set(self, state: WorkerState, **changes: Any) -> None:
        if state is not WorkerState.READY:
            changes = {"residency": Residency.DISK, "pid": None, "address": "", **changes}
        info = replace(self.info, state=state, **changes)
        if info != self.info:
            self.info = info
            self._publish(info)

    def _fail(self, error: MaestroError) -> None:
        if not self._ready.done():
            self._ready.set_exception(error)


@dataclass(frozen=True, slots=True)
class _Failure:
    """`hopeless`: another try would fail in the same way."""

    reason: str
    hopeless: bool


def _failure(process: EngineProcess, reason: str) -> _Failure:
    status = process.returncode
    output = process.output()
    if status is None or (status < 0 and not mend(output)):
        told = reason if status is None else f"the engine was killed by signal {-status}"
        return _Failure(told, hopeless=False)
    told = telling_line(output) or f"{reason} with exit status {status}"
    return _Failure(told, hopeless=status == _USAGE_ERROR or bool(mend(output)))


async def _while_running(process: EngineProcess, work: Awaitable[T]) -> T:
    """The result of `work`, unless the process ends first: then it is cancelled."""
    task = asyncio.ensure_future(work)
    ended = asyncio.ensure_future(process.exited())
    try:
        await asyncio.wait((task, ended), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise BackendError("the engine ended")
        return task.result()
    except TimeoutError as error:
        raise BackendError("the engine did not start in time") from error
    finally:
        for future in (task, ended):
            future.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await future


def _future() -> asyncio.Future[None]:
    """A future whose failure may go unseen: nobody has to wait for a worker."""
    future = asyncio.get_running_loop().create_future()
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future
