"""Starts the trainer, in a process group of its own, and hears how it went."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pydantic import TypeAdapter, ValidationError

from maestro_agents.protocol import BackendError
from maestro_backend._tied import tied_environment

from ._training import LEARNER, Training

LIMIT_S = 1800.0
MAX_CALLS = 60_000
MEMORY_BYTES = 4 * 1024**3
"""Seconds that a training may take, the newest calls that it learns from, and the trainer's address
space (ours)."""

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

_TRAINING = TypeAdapter(Training)


@dataclass(frozen=True, slots=True)
class TrainerProcess:
    """How the trainer is started. `log` holds what the last one said; `learner` is the module that
    learns; None as `memory` sets no bound. `environment` adds to ours."""

    store: Path
    models: Path
    log: Path
    learner: str = LEARNER
    limit_s: float = LIMIT_S
    max_calls: int = MAX_CALLS
    threads: int = 1
    memory: int | None = MEMORY_BYTES
    environment: Mapping[str, str] | None = None

    async def run(self) -> Training:
        """Train once; what is left of the process group is killed, also on cancellation.

        Raises:
            BackendError: it could not be started, took too long, or failed; the text says why.
        """
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("wb") as log:
                process = await self._started(log)
        except OSError as error:
            raise BackendError(f"the trainer cannot be started: {error}") from error
        try:
            async with asyncio.timeout(self.limit_s):
                out, _ = await process.communicate()
        except TimeoutError:
            raise BackendError(f"training took more than {self.limit_s:.0f} s") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        if process.returncode != 0:
            raise BackendError(f"the trainer failed: {self._last_words(process.returncode)}")
        try:
            return _TRAINING.validate_json(out)
        except ValidationError as error:
            raise BackendError(f"the trainer answered {out[:200]!r}") from error

    async def _started(self, log: IO[bytes]) -> asyncio.subprocess.Process:
        options = {
            "--store": self.store,
            "--models": self.models,
            "--learner": self.learner,
            "--calls": self.max_calls,
            "--threads": self.threads,
            **({} if self.memory is None else {"--memory": self.memory}),
        }
        threads = dict.fromkeys(_THREADS, str(self.threads))
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "maestro_backend.predictor.training",
            *(str(part) for option in options.items() for part in option),
            env={**tied_environment(), **threads, **(self.environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )

    def _last_words(self, status: int | None) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = lines[-1].removeprefix("error: ") if lines else f"it ended with {status}"
        return f"{last} (its log is {self.log})"
