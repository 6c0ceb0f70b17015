"""Trains again when it is due, and watches how the model in use does since."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from math import inf

from maestro_agents.protocol import BackendError, ConfigError

from ._drift import Alarm, Drift, Trouble
from ._trainer import TrainerProcess
from ._training import Outcome, Training
from ._versions import Version, Versions

_log = logging.getLogger("maestro.trainer")

EVERY_CALLS = 500
PAUSE_S = 600.0
"""New calls, and seconds between two trainings, that make one due (ours)."""

_REST = 9.0
"""A training is followed by so many times its own length of rest: a tenth of a core (ours)."""

_MOST_DOUBLINGS = 5


@dataclass(slots=True)
class Due:
    """Says when a training is due: after enough new calls or an alarm, and enough rest. Pure.

    A failed training is tried again: each further time in a row after twice the rest.
    """

    every_calls: int = EVERY_CALLS
    pause_s: float = PAUSE_S
    calls: int = 0
    alarm: str = ""
    failures: int = 0
    not_before: float = -inf

    def waits_s(self, now: float) -> float | None:
        """Seconds until the next training; None: not before there are more calls."""
        if not self.alarm and self.calls < self.every_calls:
            return None
        return max(0.0, self.not_before - now)

    def reason(self) -> str:
        return self.alarm or f"{self.calls} new calls"

    def ended(self, now: float, seconds: float, *, failed: bool, calls: int) -> None:
        """A training has ended that saw `calls` of the new calls and took `seconds`."""
        self.failures = self.failures + 1 if failed else 0
        rest = max(self.pause_s, _REST * seconds)
        self.not_before = now + rest * 2 ** min(_MOST_DOUBLINGS, max(0, self.failures - 1))
        if not failed:
            self.calls -= calls
            self.alarm = ""


class Retraining:
    """Keeps the model good: trains again, and goes back when the plain tables are better.

    Lives on one event loop. `use` is awaited with each version that becomes the current one (None:
    the plain tables) and loads it; if it raises, that version is rolled back. `current` is what is
    in use at the start, and `new_calls` how many calls ended since that was made.
    """

    def __init__(
        self,
        process: TrainerProcess,
        versions: Versions,
        use: Callable[[Version | None], Awaitable[None]],
        *,
        current: Version | None = None,
        new_calls: int = 0,
        due: Due | None = None,
    ) -> None:
        self.last: Training | None = None
        """How the last training of this process ended."""
        self.alarm: Alarm | None = None
        """The last alarm about the model in use."""
        self._process, self._versions, self._use = process, versions, use
        self._due = due or Due()
        self._due.calls += new_calls
        self._wake = asyncio.Event()
        self._worse: asyncio.Queue[str] = asyncio.Queue()
        self._changing = asyncio.Lock()
        self._follow(current)

    @property
    def version(self) -> str:
        """The version in use, "" for the plain tables."""
        return self._current

    @property
    def coverage(self) -> float | None:
        """Moving part of calls at or below their p90 with the model in use, None without one."""
        return self._drift.coverage if self._drift else None

    def call_ended(
        self, version: str, actual: float, point: float, p90: float, fallback: float
    ) -> None:
        """A call has ended that `version` had predicted. Output tokens of one choice: its own, the
        best guess, the 90th percentile, and the plain tables' guess."""
        self._due.calls += 1
        if self._drift is not None and version == self._current:
            self._heed(self._drift.add(actual, point, p90, fallback))
        if self._due.calls == self._due.every_calls:
            self._wake.set()

    async def run(self) -> None:
        """Train whenever it is due, first after `Due.pause_s` seconds, and roll back when need be.

        Cancel it to stop; a training under way is then killed.
        """
        self._due.not_before = max(self._due.not_before, time.monotonic() + self._due.pause_s)
        async with asyncio.TaskGroup() as both:
            both.create_task(self._keep_training())
            both.create_task(self._keep_watch())

    async def _keep_training(self) -> None:
        while True:
            wait_s = self._due.waits_s(time.monotonic())
            if wait_s == 0:
                await self._train()
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()
            self._wake.clear()

    async def _keep_watch(self) -> None:
        while True:
            reason = await self._worse.get()
            left = self._current
            try:
                now = await asyncio.to_thread(self._versions.rollback, reason, left)
            except ConfigError as error:
                _log.error("%s stays in use: %s", left, error)
            else:
                await self._change(now)

    def _heed(self, alarm: Alarm | None) -> None:
        if alarm is None:
            return
        self.alarm = alarm
        _log.warning("the model %s drifts: %s", self._current, alarm.reason)
        self._due.alarm = alarm.reason
        if alarm.trouble is Trouble.WORSE:
            self._worse.put_nowait(alarm.reason)
        self._wake.set()

    async def _train(self) -> None:
        seen, began = self._due.calls, time.monotonic()
        _log.info("training: %s", self._due.reason())
        try:
            training = await self._process.run()
        except (BackendError, OSError) as error:
            training = Training(Outcome.FAILED, str(error), self._current)
        now = time.monotonic()
        failed = training.outcome is Outcome.FAILED
        self._due.ended(now, now - began, failed=failed, calls=seen)
        self.last = training
        level = logging.WARNING if failed else logging.INFO
        _log.log(level, "training ended, %s: %s", training.outcome.value, training.detail)
        if training.outcome is Outcome.KEPT and self._drift is not None:
            self._drift.settle()
        if training.outcome in (Outcome.INSTALLED, Outcome.ROLLED_BACK):
            await self._change(await asyncio.to_thread(self._versions.current))

    async def _change(self, version: Version | None) -> None:
        """Have `version` used, or the one before it that can be."""
        async with self._changing:
            while version is not None:
                try:
                    await self._use(version)
                    break
                except Exception as error:
                    _log.exception("the model %s cannot be used", version.name)
                    version = await self._before(version, f"it cannot be used: {error!r}")
            else:
                await self._use(None)
            self._follow(version)

    async def _before(self, version: Version, reason: str) -> Version | None:
        try:
            return await asyncio.to_thread(self._versions.rollback, reason, version.name)
        except ConfigError as error:
            _log.error("%s is not used: %s", version.name, error)
            return None

    def _follow(self, version: Version | None) -> None:
        self._current = version.name if version else ""
        self.alarm = None
        coverage = version.manifest.metrics.get("p90_coverage") if version else None
        self._drift = None if version is None else Drift(*[coverage] if coverage else [])
