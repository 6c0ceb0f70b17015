"""`NodeHandle`: how the gateway talks to a node, wherever it is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from maestro_agents.protocol import BackendError
from maestro_backend.scheduler import DeviceMeasured, NodeInfo, Residency, WorkerInfo


class NodeLostError(BackendError):
    """The node agent is gone: what was asked of it may or may not have happened."""


class NodeHandle(Protocol):
    """The client side of one node agent.

    All methods but `close` raise BackendError where it could not be done (the message says why),
    and NodeLostError where the agent is gone. Sizes are bytes.
    """

    async def join(self) -> NodeInfo:
        """Make sure that the node is there, and describe it. An agent that died is started again,
        where the handle owns it.

        Raises:
            BackendError: it is not there, and could not be started.
        """

    async def info(self) -> NodeInfo:
        """The node's devices and workers as they are now."""

    def changes(self) -> AsyncIterator[WorkerInfo | DeviceMeasured]:
        """Every worker's state and each device's measured use now, then each change as it happens.

        Raises:
            NodeLostError: the agent is gone.
        """

    async def set_residency(
        self, model: str, residency: Residency, kv_limit_bytes: int | None = None
    ) -> None:
        """Bring `model` to `residency` with that KV limit (None: as it is; at a start: the most);
        returns when it is there."""

    async def set_kv_limit(self, model: str, limit_bytes: int) -> int:
        """Set how much the KV cache of `model` may hold; what it holds now, which is more than the
        limit while calls still use it."""

    async def keep_prefix(self, model: str, call: str, seconds: float) -> int:
        """Hold the KV blocks of a call that ended for so long; the bytes that are held so."""

    async def drop_prefix(self, model: str, call: str) -> None:
        """Let go of the KV blocks that were kept for a call."""

    async def warm_prefix(
        self, model: str, call: str, messages: Sequence[dict[str, Any]], seconds: float
    ) -> int:
        """Compute the prefix of a coming call ahead and keep it under that call's id for so long;
        the bytes that are held so."""

    async def close(self) -> None:
        """Let go of the connection; workers stay as they are."""
