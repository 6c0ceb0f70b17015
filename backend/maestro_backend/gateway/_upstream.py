"""Bytes between the gateway and the workers' unix sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

_HEADERS = {"content-type": "application/json"}


class EngineError(Exception):
    """The engine answered this call with an error; another try may help."""


class WorkerLost(EngineError):
    """The worker broke the connection, or says itself that it is unwell."""


class Upstream:
    """One connection pool per worker socket. No read timeout: a call may decode for minutes."""

    def __init__(self) -> None:
        self._clients: dict[str, httpx.AsyncClient] = {}

    @asynccontextmanager
    async def post(
        self, address: str, path: str, body: bytes, headers: dict[str, str]
    ) -> AsyncIterator[httpx.Response]:
        """Open a request; leaving the block early closes it, which aborts it in the engine.

        Raises:
            WorkerLost: no connection, or a 5xx answer of an engine that is not healthy.
            EngineError: a 5xx answer of a healthy one.
        """
        headers = {**_HEADERS, **headers}
        client = self._client(address)
        try:
            async with client.stream("POST", path, content=body, headers=headers) as response:
                if response.status_code >= 500:
                    text = (await response.aread()).decode(errors="replace")
                    broken = EngineError if await self._healthy(address) else WorkerLost
                    raise broken(f"HTTP {response.status_code}: {text[:300]}")
                yield response
        except httpx.TransportError as error:
            raise WorkerLost(f"{type(error).__name__}: {error}".rstrip(": ")) from error

    async def _healthy(self, address: str) -> bool:
        try:
            return (await self._client(address).get("/health", timeout=5.0)).is_success
        except httpx.TransportError:
            return False

    def _client(self, address: str) -> httpx.AsyncClient:
        if address not in self._clients:
            self._clients[address] = httpx.AsyncClient(
                transport=httpx.AsyncHTTPTransport(uds=address, limits=_LIMITS),
                base_url="http://worker",
                timeout=httpx.Timeout(None, connect=5.0),
            )
        return self._clients[address]

    async def close(self) -> None:
        for client in self._clients.values():
            await client.aclose()
        self._clients.clear()


_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=64)
