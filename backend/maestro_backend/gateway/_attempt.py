"""One try of a call at a worker, and how it can be taken back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self


class Preempted(Exception):
    """The scheduler took the call off its worker, by this command: it is queued again."""

    def __init__(self, command: int) -> None:
        super().__init__(command)
        self.command = command


class Attempt:
    """Wraps a try in progress. `begun` tells whether the client has got a first byte.

    `preempt` ends the try at once, which closes the request and so aborts it in the engine.
    """

    def __init__(self, begun: Callable[[], bool]) -> None:
        self._begun = begun
        self._task: asyncio.Task[object] | None = None
        self._command: int | None = None

    @property
    def refused(self) -> int | None:
        """The Preempt that came too late: the try has ended otherwise."""
        return self._command

    def preempt(self, command: int) -> bool:
        """Take the call back; False where its client has a first byte, or it is being ended."""
        if self._task is None or self._command is not None or self._begun():
            return False
        self._command = command
        self._task.cancel()
        return True

    def __enter__(self) -> Self:
        self._task = asyncio.current_task()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        task, self._task = self._task, None
        assert task is not None
        if self._command is None:
            return
        left = task.uncancel()
        if isinstance(error, asyncio.CancelledError) and not left:
            command, self._command = self._command, None
            raise Preempted(command) from error
