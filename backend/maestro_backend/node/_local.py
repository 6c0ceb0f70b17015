"""`LocalNode`: a node agent on this host, started and stopped by its client."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
from pydantic import ValidationError

from maestro_agents.protocol import BackendError, ConfigError
from maestro_backend._tied import tied_environment
from maestro_backend.config import Config
from maestro_backend.scheduler import NodeInfo, Residency, WorkerInfo
from maestro_backend.workers import file_name, runtime_dir, socket_path

from ._app import HEARTBEAT_S, NODE_INFO, WORKER_INFO
from ._handle import NodeLostError

_POLL_S = 0.05
_START_LIMIT_S = 60.0
_STOP_LIMIT_S = 60.0
_USAGE_ERROR = 2


class LocalNode:
    """A `NodeHandle` whose agent lives and dies with it. Use it as an async context manager.

    The agent is tied to the *thread* that starts it (the kernel's rule): start it from a thread
    that outlives it, such as the main one. Requests may come from any event loop.
    """

    def __init__(
        self, config: Config, node: str | None = None, *, patience_s: float = 5 * HEARTBEAT_S
    ) -> None:
        self._config = config
        self._node = config.node(node)
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._patience_s = patience_s
        self._log = config.state_dir / "logs" / f"node-{file_name(self._node.name)}.log"
        self._log_start = 0

    @property
    def pid(self) -> int | None:
        """Process id of the agent, None while there is none."""
        return None if self._process is None else self._process.pid

    async def start(self) -> Self:
        """Start the agent; its workers stay stopped until `set_residency`.

        Raises:
            ConfigError: the agent refused the configuration.
            BackendError: the agent did not come up.
        """
        if self._process is None:
            self._folder = runtime_dir()
            try:
                self._spawn(self._folder)
                await self._wait_until_up()
            except BaseException:
                await self.close()
                raise
        return self

    async def join(self) -> NodeInfo:
        """The node as it is now; an agent that died, or is silent for `patience_s` seconds, is
        replaced by another first.

        Raises:
            BackendError: the agent did not come up.
        """
        try:
            if self._process is not None:
                with suppress(NodeLostError):
                    return await self.info()
                self._kill()
            await self.start()
            return await self.info()
        except (ConfigError, OSError, ValidationError) as error:
            raise BackendError(f"the node agent cannot be joined: {error}") from error

    async def info(self) -> NodeInfo:
        """The node's devices and workers as they are now.

        Raises:
            NodeLostError: the agent is gone, or silent for `patience_s` seconds.
        """
        async with self._http(self._patience_s) as http:
            return NODE_INFO.validate_json((await self._call(http, "GET", "/v1/node")).content)

    async def changes(self) -> AsyncIterator[WorkerInfo]:
        """Every worker's state now, then each change as it happens.

        Raises:
            NodeLostError: the agent is gone, or silent for `patience_s` seconds.
        """
        try:
            async with (
                self._http(self._patience_s) as http,
                http.stream("GET", "/v1/node/changes") as r,
            ):
                async for line in r.aiter_lines():
                    if line:
                        yield WORKER_INFO.validate_json(line)
        except httpx.TransportError as error:
            raise self._gone(error) from error
        raise self._gone(None)

    async def set_residency(self, model: str, residency: Residency) -> None:
        """Bring `model` to `residency`; returns when it is there.

        Raises:
            BackendError: it could not be done; the message says why.
        """
        wanted = {"model": model, "residency": residency.value}
        async with self._http() as http:
            await self._call(http, "POST", "/v1/node/residency", wanted)

    async def close(self) -> None:
        """Stop the agent and with it all its workers; after a minute they are killed."""
        try:
            if self._process is not None:
                self._process.terminate()
                self._process.send_signal(signal.SIGCONT)  # a stopped process hears nothing else
                with suppress(subprocess.TimeoutExpired):
                    await asyncio.to_thread(self._process.wait, _STOP_LIMIT_S)
        finally:
            self._kill()

    def _kill(self) -> None:
        """Whatever is left of the agent ends at once; its workers are tied to it."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def _spawn(self, folder: Path) -> None:
        config = folder / "config.yaml"  # JSON is YAML
        config.write_text(self._config.model_dump_json(), encoding="utf-8")
        tied = (sys.executable, "-m", "maestro_backend._tied")
        agent = (sys.executable, "-m", "maestro_backend.node")
        options = ("--config", str(config), "--socket", str(self._address), "--node")
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                (*tied, *agent, *options, self._node.name),
                env=tied_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us: we stop it when we are done
            )

    async def _wait_until_up(self) -> None:
        deadline = time.monotonic() + _START_LIMIT_S
        while not await self._is_up():
            if time.monotonic() > deadline:
                raise BackendError(f"the node agent did not come up; its log is {self._log}")
            await asyncio.sleep(_POLL_S)

    async def _is_up(self) -> bool:
        status = None if self._process is None else self._process.poll()
        if status == _USAGE_ERROR:
            raise ConfigError(self._last_words())
        if status is not None:
            raise BackendError(f"the node agent ended: {self._last_words()}")
        try:
            await self.info()
        except BackendError:
            return False
        return True

    @property
    def _address(self) -> Path:
        if self._folder is None:
            raise BackendError("the node agent is not running")
        return socket_path(self._folder, "agent")

    def _http(self, silence_s: float | None = None) -> httpx.AsyncClient:
        """A fresh client, for whichever event loop is running."""
        transport = httpx.AsyncHTTPTransport(uds=str(self._address))
        timeout = httpx.Timeout(silence_s, connect=self._patience_s)
        return httpx.AsyncClient(transport=transport, base_url="http://node", timeout=timeout)

    async def _call(
        self, http: httpx.AsyncClient, method: str, path: str, body: dict[str, str] | None = None
    ) -> httpx.Response:
        try:
            answer = await http.request(method, path, json=body)
        except httpx.TransportError as error:
            raise self._gone(error) from error
        if not answer.is_success:
            raise BackendError(_error_text(answer))
        return answer

    def _gone(self, error: Exception | None) -> NodeLostError:
        cause = f" ({error!r})" if error else ""
        return NodeLostError(f"the node agent is gone{cause}; its log is {self._log}")

    def _last_words(self) -> str:
        with self._log.open("rb") as log:
            log.seek(self._log_start)
            text = log.read().decode(errors="replace").strip()
        return text.removeprefix("error: ").rpartition("\nerror: ")[2]


def _error_text(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"])
    except (ValueError, KeyError):
        return f"the node agent answered {answer.status_code}: {answer.text[:300]}"
