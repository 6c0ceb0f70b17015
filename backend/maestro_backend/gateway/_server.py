"""Serving the gateway over TCP: bind, run, drain, stop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from maestro_agents.protocol import ConfigError
from maestro_backend.config import Config
from maestro_backend.node import NodeHandle
from maestro_backend.scheduler import Settings

from ._app import build_app, is_loopback
from ._shell import Shell

_DRAIN_S = 5
"""Open calls get so long to finish after the order to stop."""


@dataclass(frozen=True, slots=True)
class Serving:
    """A gateway that is up. `url` ends in /v1."""

    url: str
    shell: Shell


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling: whoever serves decides when to stop."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def serving(
    config: Config,
    node: NodeHandle,
    *,
    host: str,
    port: int,
    api_key: str | None = None,
    recording: Path | None = None,
    settings: Settings | None = None,
    preload: tuple[str, ...] | None = None,
) -> AsyncIterator[Serving]:
    """Serve until the block ends; then open calls get 5 seconds to finish.

    `settings` are the scheduler's bounds; which models are pinned comes from `config`.
    `preload` are the models to bring in when the node joins, None for all of them.

    Raises:
        ConfigError: the port is taken, or a non-loopback bind lacks an API key.
    """
    if not api_key and not is_loopback(host):
        raise ConfigError(f"{host} is open to others: set MAESTRO_API_KEY, or use --host 127.0.0.1")
    sock = _bind(host, port)
    async with Shell(config, node, recording, settings, preload).running() as shell:
        options = uvicorn.Config(
            build_app(shell, api_key),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=_DRAIN_S,
        )
        server = _Server(options)
        task = asyncio.create_task(server.serve(sockets=[sock]))
        try:
            bound = sock.getsockname()[1]
            shown = f"[{host}]" if ":" in host else host
            yield Serving(f"http://{shown}:{bound}/v1", shell)
        finally:
            shell.feed.close()
            server.should_exit = True
            await task
            sock.close()


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        why = error.strerror if isinstance(error, OSError) else "a port is 0 to 65535"
        raise ConfigError(
            f"cannot listen on {host}:{port} ({why}): stop what uses the port, "
            f"or choose another with --port"
        ) from error
    sock.listen(2048)
    sock.setblocking(False)
    return sock
