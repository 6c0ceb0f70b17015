"""A process that ends unless it is told in time that it is still wanted."""

from __future__ import annotations

import os
import signal
import threading
import time


class Lease:
    """The watchdog of this process; it sends SIGTERM. No `seconds` yet: it waits for the first."""

    def __init__(self, seconds: float | None) -> None:
        self._ends: float | None = None
        self._renewed = threading.Event()
        if seconds is not None:
            self.renew(seconds)
        threading.Thread(target=self._watch, name="lease", daemon=True).start()

    def renew(self, seconds: float) -> None:
        """Live on for so long, counted from now."""
        self._ends = time.monotonic() + seconds
        self._renewed.set()

    def _watch(self) -> None:
        while True:
            self._renewed.clear()
            left = None if self._ends is None else self._ends - time.monotonic()
            if left is not None and left <= 0:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            self._renewed.wait(left)
