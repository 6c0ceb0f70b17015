"""One engine process with everything it spawned: a process group and a log file.

It is started without `subprocess`, whose objects end their process when they are forgotten: a
leased engine has to outlive us. One that an earlier agent started is followed in the same way.
"""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

from maestro_agents.protocol import BackendError
from maestro_backend._tied import tied_environment

from ._engine import Launch
from ._record import WorkerRecord, is_same_process

_MAX_LOG_BYTES = 16 * 1024**2
_TAIL_BYTES = 64 * 1024
_POLL_S = 0.05
_STRAY_GRACE_S = 5.0
_SWEEPS = 40


class EngineProcess:
    """A running engine; `pid` is also its process group. `ended` is done when the server is gone.

    Make one inside an event loop, and `forget` it when it is to live on.
    """

    def __init__(self, pid: int, create_time: float, log: Path, log_start: int) -> None:
        self.pid = pid
        self.create_time = create_time
        self.returncode: int | None = None
        """Exit status of the server; None while it runs, and where it is not our child."""
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._log = log
        self._log_start = log_start
        self._handle = _open_handle(pid)
        self._polling: asyncio.Task[None] | None = None
        if self._handle is None:
            self._polling = asyncio.create_task(self._poll())
        else:
            asyncio.get_running_loop().add_reader(self._handle, self._has_ended)

    @classmethod
    def start(cls, launch: Launch, log: Path, inherited: int | None = None) -> Self:
        """Start the command in a group of its own; its output is appended to `log`.

        It gets the file descriptor `inherited`, with whatever lock is on it.

        Raises:
            BackendError: the command cannot be run.
        """
        _make_room(log)
        with log.open("ab") as output, open(os.devnull, "rb") as nothing:
            start = output.tell()
            if inherited is not None:
                os.set_inheritable(inherited, True)
            try:
                pid = os.posix_spawnp(
                    launch.command[0],
                    launch.command,
                    {**tied_environment(), **launch.environment},
                    file_actions=[
                        (os.POSIX_SPAWN_DUP2, nothing.fileno(), 0),
                        (os.POSIX_SPAWN_DUP2, output.fileno(), 1),
                        (os.POSIX_SPAWN_DUP2, output.fileno(), 2),
                    ],
                    setsid=True,
                    setsigdef=(signal.SIGPIPE,),
                )
            except OSError as error:
                raise BackendError(f"cannot run {launch.command[0]}: {error.strerror}") from error
            finally:
                if inherited is not None:
                    os.set_inheritable(inherited, False)
        return cls(pid, psutil.Process(pid).create_time(), log, start)

    @classmethod
    def adopt(cls, record: WorkerRecord) -> Self:
        """Follow the process of `record`.

        Raises:
            BackendError: it is gone.
        """
        log = Path(record.log)
        written = log.stat().st_size if log.exists() else 0
        process = cls(record.pid, record.create_time, log, written)
        if not record.lives():  # looked at after the handle was opened, so that both are the same
            process.forget()
            raise BackendError(f"the process {record.pid} of {record.model} is gone")
        return process

    async def exits_within(self, seconds: float) -> bool:
        """Wait at most `seconds` for the server's end; True when it ended."""
        await asyncio.wait((self.ended,), timeout=seconds)
        return self.ended.done()

    def output(self) -> str:
        """The end of what it has written since this start."""
        if not self._log.exists():
            return ""
        with self._log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - _TAIL_BYTES))
            return log.read().decode(errors="replace")

    async def stop(self, grace_s: float) -> None:
        """End the whole group; returns when all are gone.

        SIGTERM, then SIGKILL after `grace_s` seconds, to the server: what it spawned is tied to it.
        Python's resource tracker then frees their shared memory, for which it gets a moment.
        """
        if not self.ended.done():
            self._send(signal.SIGTERM)
            if not await self.exits_within(grace_s):
                self._send(signal.SIGKILL)
                await self.ended
        for _ in range(_SWEEPS):
            if not group_members(self.pid):
                return
            await asyncio.sleep(_POLL_S)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        while group_members(self.pid):
            await asyncio.sleep(_POLL_S)

    def forget(self) -> None:
        """Follow it no longer; it lives on."""
        if self._polling is not None:
            self._polling.cancel()
        if self._handle is not None:
            asyncio.get_running_loop().remove_reader(self._handle)
            os.close(self._handle)
            self._handle = None

    def _send(self, signum: int) -> None:
        with suppress(ProcessLookupError):
            if self._handle is not None:
                signal.pidfd_send_signal(self._handle, signum)
            elif is_same_process(self.pid, self.create_time):
                os.kill(self.pid, signum)

    def _has_ended(self) -> None:
        self.forget()
        with suppress(ChildProcessError):  # an adopted one was somebody else's child
            _, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status)
        if not self.ended.done():
            self.ended.set_result(None)

    async def _poll(self) -> None:
        """Where the system has no handles for processes."""
        while is_same_process(self.pid, self.create_time):
            await asyncio.sleep(_POLL_S)
        self._polling = None
        self._has_ended()


async def end_stray(record: WorkerRecord) -> None:
    """End what is left of a worker that nobody wants; returns when it is gone.

    Only the very process of the record is ended, with its group: a pid may be given again.
    """
    try:
        process = EngineProcess.adopt(record)
    except (BackendError, OSError):
        return
    try:
        await process.stop(_STRAY_GRACE_S)
    finally:
        process.forget()


def group_members(group: int) -> list[int]:
    """The processes of `group` that still hold memory (a zombie holds none)."""
    members = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process.pid)
    return members


def _open_handle(pid: int) -> int | None:
    """A handle that turns readable when the process ends; None where there are no such."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def _make_room(log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists() and log.stat().st_size > _MAX_LOG_BYTES:
        log.replace(log.with_name(f"{log.name}.1"))
