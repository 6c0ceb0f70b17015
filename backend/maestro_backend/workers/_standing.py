"""What a worker tells of itself, and what it holds in its node's account: kept the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from maestro_backend.scheduler import Residency, WorkerInfo, WorkerState

from ._account import Account, DoesNotFitError, Learned
from ._control import WorkerStatus
from ._engine import Memory

_LIVE = (
    WorkerState.READY,
    WorkerState.SUSPENDING,
    WorkerState.SUSPENDED,
    WorkerState.RESUMING,
)


class Standing:
    """One worker in its node's books. `publish` is told of each change of `info`.

    `rest` is where its weights are while it has no process: `disk`, or `remote`.
    """

    def __init__(
        self,
        info: WorkerInfo,
        account: Account,
        learned: Learned,
        publish: Callable[[WorkerInfo], None],
    ) -> None:
        self.info = info
        self.rest = info.residency
        self.learned = learned
        self._account = account
        self._publish = publish

    def set(self, state: WorkerState, **changes: Any) -> None:
        """Change `info`; a state without weights in memory tells of no process."""
        if state not in _LIVE:
            changes = {"residency": self.rest, "pid": None, "address": "", **changes}
        info = replace(self.info, state=state, **changes)
        if info != self.info:
            self.info = info
            self._publish(info)

    def doing(self, words: str) -> None:
        """Tell in words what it is doing."""
        self.set(self.info.state, detail=words)

    @property
    def host_room(self) -> int:
        """The most that a copy of its weights may take of the host budget."""
        return self._account.host_room(self.info.model)

    def hold(self, *, weights: bool, kv_bytes: int | None = None) -> None:
        """Claim its residual, its KV cache (or `kv_bytes`), and its weights where they count.

        Raises:
            DoesNotFitError: the claim stays as it was.
        """
        info = self.info
        kv_bytes = info.kv_limit_bytes if kv_bytes is None else kv_bytes
        memory = Memory(info.weights_bytes if weights else 0, kv_bytes, info.residual_bytes)
        self._account.hold(info.model, info.device, memory)

    def hold_copy(self, size: int) -> None:
        """Claim `size` bytes of the host budget.

        Raises:
            DoesNotFitError: the claim stays as it was.
        """
        self._account.hold_host(self.info.model, size)

    def hold_measured(self, status: WorkerStatus | None, sizes: dict[str, Any]) -> None:
        """Claim what a start has turned out to take.

        Raises:
            DoesNotFitError: it is too much.
        """
        promised = self.info
        self.info = replace(promised, **sizes)  # published with the state that follows
        try:
            self.hold(weights=status is None or status.residency is Residency.DEVICE)
            if status is not None and status.host_bytes:
                self.hold_copy(status.host_bytes)
        except DoesNotFitError:
            self.info = promised
            raise

    def settle(self, status: WorkerStatus, detail: str = "") -> None:
        """Claim and tell what the worker says it takes, where it says it is.

        Raises:
            DoesNotFitError: it takes more than it was promised.
        """
        on_device = status.residency is Residency.DEVICE
        kv_bytes = status.kv_held if status.kv_built else self.info.kv_limit_bytes
        self.hold(weights=on_device, kv_bytes=kv_bytes)
        self.hold_copy(status.host_bytes)
        self.set(
            WorkerState.READY if on_device else WorkerState.SUSPENDED,
            residency=status.residency,
            weights_bytes=self._weighed(status),
            kv_limit_bytes=kv_bytes,
            host_bytes=status.host_bytes,
            activation_s=dict(self.learned.activation_s(self.info.model)),
            detail=detail,
        )

    def _weighed(self, status: WorkerStatus) -> int:
        """What its weights take: an engine may know it only once they have left the device."""
        if status.residency is Residency.DEVICE or not status.weights:
            return self.info.weights_bytes
        self.learned.weighed(self.info.model, status.weights)
        return status.weights

    def release(self) -> None:
        """Give everything back."""
        self._account.release(self.info.model)
