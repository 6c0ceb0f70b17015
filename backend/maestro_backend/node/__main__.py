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
from maestro_backend._tied import tie_to_parent
from maestro_backend.config import Config
from maestro_backend.workers import MAX_ADDRESS_BYTES

from ._agent import Agent
from ._app import make_app
from ._lock import StateLock

_GRACE_S = 2
_ORPHANED = signal.SIGHUP


class _Server(uvicorn.Server):
    """Leaves the signals to `_serve`, which stops the workers first."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(config: Config, options: argparse.Namespace) -> None:
    asked_to_stop, orphaned = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, asked_to_stop.set)
    loop.add_signal_handler(_ORPHANED, orphaned.set)
    address: Path = options.socket
    agent = Agent(config, config.node(options.node), tied=options.tied)
    server = _Server(
        uvicorn.Config(
            make_app(agent),
            uds=str(address),
            log_level="warning",
            lifespan="off",
            timeout_graceful_shutdown=_GRACE_S,
        )
    )
    await agent.take_over()
    address.unlink(missing_ok=True)
    serving = asyncio.create_task(server.serve())
    ends = [asyncio.create_task(event.wait()) for event in (asked_to_stop, orphaned)]
    await asyncio.wait((serving, *ends), return_when=asyncio.FIRST_COMPLETED)
    try:
        if orphaned.is_set() and not asked_to_stop.is_set():
            server.force_exit = True  # whoever waits for an answer died with our starter
            await agent.leave()
        else:
            await agent.close()
    finally:
        server.should_exit = True
        await serving
        address.unlink(missing_ok=True)


def main() -> int:
    """Serve until SIGTERM or SIGINT; then stop all workers.

    When the process that started us dies, they live on under their lease, unless they are tied.
    """
    parser = argparse.ArgumentParser(prog="python -m maestro_backend.node", description=__doc__)
    parser.add_argument("--config", required=True, help="the YAML file")
    parser.add_argument("--socket", required=True, type=Path, help="unix socket to listen on")
    parser.add_argument("--node", help="which of the configured nodes this is; the first one")
    parser.add_argument("--tied", action="store_true", help="workers never outlive this process")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        tie_to_parent(signal.SIGTERM if options.tied else _ORPHANED)
        _check_address(options.socket)
        config = Config.load(options.config)
        with StateLock.take(config.state_dir):
            asyncio.run(_serve(config, options))
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
