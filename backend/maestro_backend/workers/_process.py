"""One engine process with everything it spawned: a process group and a log file."""

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

_MAX_LOG_BYTES = 16 * 1024**2
_TAIL_BYTES = 64 * 1024
_POLL_S = 0.05
_SWEEPS = 40


class EngineProcess:
    """A running engine; `pid` is also its process group."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path, log_start: int) -> None:
        self._process = process
        self._log = log
        self._log_start = log_start

    @classmethod
    async def start(cls, launch: Launch, log: Path) -> Self:
        """Start the command in a group of its own; its output is appended to `log`.

        Raises:
            BackendError: the command cannot be run.
        """
        _make_room(log)
        with log.open("ab") as output:
            start = output.tell()
            try:
                process = await asyncio.create_subprocess_exec(
                    *launch.command,
                    env={**tied_environment(), **launch.environment},
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            except OSError as error:
                raise BackendError(f"cannot run {launch.command[0]}: {error.strerror}") from error
        return cls(process, log, start)

    @property
    def pid(self) -> int:
        """Process id of the server, and id of the group."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit status of the server, None while it runs."""
        return self._process.returncode

    async def exits_within(self, seconds: float) -> bool:
        """Wait at most `seconds` for the server's end; True when it ended."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), seconds)
        return self.returncode is not None

    async def exited(self) -> None:
        """Wait for the server's end."""
        await self._process.wait()

    def output(self) -> str:
        """The end of what it has written since this start."""
        with self._log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - _TAIL_BYTES))
            return log.read().decode(errors="replace")

    async def stop(self, grace_s: float) -> None:
        """End the whole group; returns when all are gone.

        SIGTERM, then SIGKILL after `grace_s` seconds, to the server: what it spawned is tied to it.
        Python's resource tracker then frees their shared memory, for which it gets a moment.
        """
        if self.returncode is None:
            self._process.terminate()
            if not await self.exits_within(grace_s):
                self._process.kill()
                await self.exited()
        for _ in range(_SWEEPS):
            if not _has_members(self.pid):
                return
            await asyncio.sleep(_POLL_S)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        while _has_members(self.pid):
            await asyncio.sleep(_POLL_S)


def _has_members(group: int) -> bool:
    """Whether a process of `group` still holds memory (a zombie holds none)."""
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def _make_room(log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists() and log.stat().st_size > _MAX_LOG_BYTES:
        log.replace(log.with_name(f"{log.name}.1"))
