"""The node agent: `python -m maestro_backend.node --config FILE --socket PATH [--node NAME]`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from maestro_agents.protocol import ConfigError, MaestroError
from maestro_backend.config import Config
from maestro_backend.workers import MAX_ADDRESS_BYTES

from ._agent import Agent
from ._app import make_app

_GRACE_S = 2


class _Server(uvicorn.Server):
    """Leaves the signals to `_serve`, which stops the workers first."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(config: Config, node: str | None, address: Path) -> None:
    asked_to_stop = asyncio.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, asked_to_stop.set)
    agent = Agent(config, config.node(node), address.parent)
    address.unlink(missing_ok=True)
    server = _Server(
        uvicorn.Config(
            make_app(agent),
            uds=str(address),
            log_level="warning",
            lifespan="off",
            timeout_graceful_shutdown=_GRACE_S,
        )
    )
    serving = asyncio.create_task(server.serve())
    stop = asyncio.create_task(asked_to_stop.wait())
    await asyncio.wait((serving, stop), return_when=asyncio.FIRST_COMPLETED)
    try:
        await agent.close()
    finally:
        server.should_exit = True
        await serving
        address.unlink(missing_ok=True)


def main() -> int:
    """Serve until SIGTERM or SIGINT; then stop all workers."""
    parser = argparse.ArgumentParser(prog="python -m maestro_backend.node", description=__doc__)
    parser.add_argument("--config", required=True, help="the YAML file")
    parser.add_argument("--socket", required=True, type=Path, help="unix socket to listen on")
    parser.add_argument("--node", help="which of the configured nodes this is; the first one")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        _check_address(options.socket)
        asyncio.run(_serve(Config.load(options.config), options.node, options.socket))
    except MaestroError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _check_address(address: Path) -> None:
    if len(str(address).encode()) > MAX_ADDRESS_BYTES:
        raise ConfigError(
            f"--socket {address} is too long: the system takes at most {MAX_ADDRESS_BYTES} bytes"
        )


if __name__ == "__main__":
    sys.exit(main())
