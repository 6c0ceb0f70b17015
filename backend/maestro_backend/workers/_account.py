"""What a worker asks of its node: the account of bytes, and what earlier lives taught."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from maestro_agents.protocol import BackendError
from maestro_backend.scheduler import Residency

from ._engine import Memory


class DoesNotFitError(BackendError):
    """The device or the host budget has too little left; the message holds the numbers."""


class Account(Protocol):
    """The node's ledger as a worker sees it; it holds one claim per model. All sizes in bytes."""

    def hold(self, model: str, device: str, memory: Memory) -> None:
        """Set what `model` holds of `device`: replaces its earlier claim, whatever its size.

        Raises:
            DoesNotFitError: it does not fit; nothing has changed.
        """

    def hold_host(self, model: str, size: int) -> None:
        """Set what `model` holds of the host budget.

        Raises:
            DoesNotFitError: it does not fit; nothing has changed.
        """

    def release(self, model: str) -> None:
        """Give back all that `model` holds, of its device and of the host; may be repeated."""

    def host_room(self, model: str) -> int:
        """The most host bytes that `model` could hold now, what it holds already among them."""


class Learned(Protocol):
    """What earlier lives of the workers taught; the node keeps it across its own restarts."""

    def activation_s(self, model: str) -> Mapping[Residency, float]:
        """Seconds to bring `model` to the device from each residency that was tried."""

    def moved(self, model: str, start: Residency, end: Residency, seconds: float) -> None:
        """A move of `model` from `start` to `end` took so long."""

    def weights_bytes(self, model: str) -> int | None:
        """What its weights take, as measured; beats the engine's estimate. None: unknown."""

    def residual_bytes(self, model: str) -> int | None:
        """All it takes beside weights and KV cache, measured, with headroom. None: unknown."""

    def weighed(self, model: str, weights_bytes: int) -> None:
        """Its weights take so much, by the engine's own count."""
