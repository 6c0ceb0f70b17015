"""`NodeHandle`: how the gateway talks to a node, wherever it is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from maestro_agents.protocol import BackendError
from maestro_backend.scheduler import NodeInfo, Residency, WorkerInfo


class NodeLostError(BackendError):
    """The node agent is gone: what was asked of it may or may not have happened."""


class NodeHandle(Protocol):
    """The client side of one node agent."""

    async def join(self) -> NodeInfo:
        """Make sure that the node is there, and describe it. An agent that died is started again,
        where the handle owns it.

        Raises:
            BackendError: it is not there, and could not be started.
        """

    async def info(self) -> NodeInfo:
        """The node's devices and workers as they are now."""

    def changes(self) -> AsyncIterator[WorkerInfo]:
        """Every worker's state now, then each change as it happens.

        Raises:
            NodeLostError: the agent is gone.
        """

    async def set_residency(self, model: str, residency: Residency) -> None:
        """Bring `model` to `residency`; returns when it is there.

        Raises:
            BackendError: it could not be done; the message says why.
        """

    async def close(self) -> None:
        """Let go of the connection; workers stay as they are."""
