"""How far the running calls are, asked of their engines; also of calls that do not stream."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

if TYPE_CHECKING:
    from ._shell import Shell

_EVERY_S = 0.2
_PATIENCE_S = 2.0
_AHEAD = 16
"""A call that generates is told so many tokens ahead: more than it makes between two answers."""


class _Progress(BaseModel):
    """One live request of an engine. Computed tokens are those of prompt and output."""

    call: str
    computed_tokens: int
    generated_tokens: int


class _Answer(BaseModel):
    requests: list[_Progress]


_ANSWER = TypeAdapter(_Answer)


class ProgressPoll:
    """Asks each worker that runs calls, five times a second; quiet where an engine cannot tell."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._mute: set[str] = set()
        """Addresses of engines without the route."""
        self._told: dict[tuple[str, int], int] = {}
        """By call and try: tokens so far."""

    async def run(self) -> None:
        """Until it is cancelled."""
        clients: dict[str, httpx.AsyncClient] = {}
        try:
            while True:
                await asyncio.sleep(_EVERY_S)
                addresses = set(self._addresses())
                for gone in set(clients) - addresses:
                    await clients.pop(gone).aclose()
                for address in addresses - set(clients):
                    clients[address] = _client(address)
                await asyncio.gather(*(self._ask(a, clients[a]) for a in addresses))
                running = self._shell.scheduler.calls.by_id
                self._told = {key: told for key, told in self._told.items() if key[0] in running}
        finally:
            for client in clients.values():
                await client.aclose()

    def _addresses(self) -> Iterator[str]:
        core = self._shell.scheduler
        for worker, running in core.calls.running.items():
            info = core.workers.get(worker)
            if running and info is not None and info.address and info.address not in self._mute:
                yield info.address

    async def _ask(self, address: str, client: httpx.AsyncClient) -> None:
        try:
            answer = await client.get("/maestro/progress")
            if answer.status_code in (404, 405):
                self._mute.add(address)
            if answer.status_code == 200:
                self._tell(_ANSWER.validate_json(answer.content).requests)
        except (httpx.HTTPError, ValidationError):
            return  # the call itself will show what is wrong

    def _tell(self, requests: list[_Progress]) -> None:
        for request in requests:
            record = self._shell.records.calls.get(request.call)
            if record is None or record.ended is not None:
                continue
            record.output_tokens = max(record.output_tokens, request.generated_tokens)
            ahead = _AHEAD if request.generated_tokens else 0
            tokens = max(request.computed_tokens, request.generated_tokens) + ahead
            key = (request.call, record.attempts)
            if tokens > self._told.get(key, 0):
                self._told[key] = tokens
                prompt = max(0, request.computed_tokens - request.generated_tokens)
                self._shell.progress(
                    request.call, prompt, tokens - prompt, request.generated_tokens
                )


def _client(address: str) -> httpx.AsyncClient:
    transport = httpx.AsyncHTTPTransport(uds=address)
    return httpx.AsyncClient(transport=transport, base_url="http://worker", timeout=_PATIENCE_S)
