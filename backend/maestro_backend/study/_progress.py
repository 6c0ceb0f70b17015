"""How far a study is, on stderr."""

from __future__ import annotations

import time
from typing import TextIO

_WIDTH = 30


class Progress:
    """A bar on a terminal; elsewhere one line for each tenth that is done."""

    def __init__(self, total: int, stream: TextIO) -> None:
        self._total = total
        self._stream = stream
        self._done = 0
        self._tenths = 0
        self._started = time.monotonic()
        self._live = stream.isatty()

    def step(self) -> None:
        """One more is done."""
        self._done += 1
        if self._live:
            filled = "#" * (self._done * _WIDTH // self._total)
            self._write(f"\r[{filled:.<{_WIDTH}}] {self._line()} ")
            if self._done == self._total:
                self._write("\n")
        elif (tenths := self._done * 10 // self._total) > self._tenths:
            self._tenths = tenths
            self._write(f"maestro: {self._line()}\n")

    def _line(self) -> str:
        passed_s = time.monotonic() - self._started
        left_s = passed_s / self._done * (self._total - self._done)
        return f"{self._done} of {self._total} simulations, {_time(left_s)} left"

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
