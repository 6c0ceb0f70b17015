"""Arrivals of many clients whose rates and burstiness are known by ten-minute window.

The data and the idea that a few bursty clients make the load are ServeGen's (Xiang et al., 2025).
The generator is ours: each client is a renewal process in its own operational time, of which a
window passes as much as its rate says, with gamma gaps of the window's coefficient of variation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import heapify, heapreplace
from math import isfinite
from random import Random
from typing import Any

from maestro_agents.protocol import ConfigError

CLIENT_COLUMNS = ("model", "client", "window_s", "rate_rps", "cv")
WINDOW_S = 600.0
_CV = (0.05, 20.0)


@dataclass(frozen=True, slots=True)
class ClientRates:
    """`clients`: window -> (rate, cv) of each. Rates are scaled alike; windows keep their length
    and come round again after the last of `windows`."""

    name: str
    clients: tuple[dict[int, tuple[float, float]], ...]
    windows: int

    @classmethod
    def of(cls, name: str, rows: Iterable[tuple[Any, ...]]) -> ClientRates:
        """Of rows (model, client, start of the window in seconds, rate per second, cv)."""
        clients: dict[tuple[str, int], dict[int, tuple[float, float]]] = defaultdict(dict)
        for model, client, start_s, rate, cv in rows:
            if rate > 0.0 and isfinite(rate):
                spread = min(_CV[1], max(_CV[0], cv)) if isfinite(cv) else 1.0
                clients[model, client][int(start_s // WINDOW_S)] = (rate, spread)
        if not clients:
            raise ConfigError(f"{name} has no window with a rate above 0: name another trace")
        windows = 1 + max(max(of_client) for of_client in clients.values())
        return cls(name, tuple(clients[key] for key in sorted(clients)), windows)

    def gaps(self, rate: float, seed: int) -> Iterator[float]:
        dice = Random(f"arrivals/{seed}")
        mean = sum(r for c in self.clients for r, _ in c.values()) / self.windows
        start = dice.randrange(self.windows) * WINDOW_S
        streams = [self._times(client, start, rate / mean, dice) for client in self.clients]
        upcoming = [(next(stream), at) for at, stream in enumerate(streams)]
        heapify(upcoming)
        last = start
        while True:
            now, at = upcoming[0]
            yield now - last
            last = now
            heapreplace(upcoming, (next(streams[at]), at))

    def _times(
        self, client: dict[int, tuple[float, float]], start: float, scale: float, dice: Random
    ) -> Iterator[float]:
        """One client's arrivals. The first gap is one that a random moment falls into: the longer
        ones more often, and anywhere inside."""
        now, window = start, int(start // WINDOW_S)
        round_s = self.windows * WINDOW_S
        in_a_round = sum(rate for rate, _ in client.values()) * WINDOW_S * scale
        _, cv = client.get(window % self.windows) or next(iter(client.values()))
        left = dice.random() * dice.gammavariate(1.0 + 1.0 / cv**2, cv**2)
        while True:
            rounds = int(left // in_a_round)
            left -= rounds * in_a_round
            now, window = now + rounds * round_s, window + rounds * self.windows
            rate, cv = client.get(window % self.windows, (0.0, 1.0))
            while (passes := ((window + 1) * WINDOW_S - now) * rate * scale) <= left:
                left -= passes
                window += 1
                now = window * WINDOW_S
                rate, cv = client.get(window % self.windows, (0.0, 1.0))
            now += left / (rate * scale)
            yield now
            shape = 1.0 / cv**2
            left = dice.gammavariate(shape, 1.0 / shape)
