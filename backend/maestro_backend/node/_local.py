"""`LocalNode`: a node agent on this host, started and stopped by its client."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from pydantic import ValidationError

from maestro_agents.protocol import BackendError, ConfigError
from maestro_backend._tied import tied_environment
from maestro_backend.config import Config
from maestro_backend.scheduler import DeviceMeasured, NodeInfo, Residency, WorkerInfo
from maestro_backend.workers import end_stray, file_name, read_records

from ._app import CHANGE, HEARTBEAT_S, NODE_INFO
from ._handle import NodeLostError
from ._lock import StateLock, runtime_folder

_POLL_S = 0.05
_START_LIMIT_S = 60.0
_STOP_LIMIT_S = 60.0
_USAGE_ERROR = 2


class LocalNode:
    """A `NodeHandle` whose agent lives and dies with it. Use it as an async context manager.

    `tied` workers end with their agent, however it ends. The others outlive a crash of the agent or
    of ours under a lease, and the next agent of the same state folder adopts them; `close` ends
    them like any.

    The agent is tied to the *thread* that starts it (the kernel's rule): start it from a thread
    that outlives it, such as the main one. Requests may come from any event loop.
    """

    def __init__(
        self,
        config: Config,
        node: str | None = None,
        *,
        tied: bool = True,
        patience_s: float = 5 * HEARTBEAT_S,
    ) -> None:
        self._config = config
        self._node = config.node(node)
        self._tied = tied
        self._process: subprocess.Popen[bytes] | None = None
        self._address: Path | None = None
        self._patience_s = patience_s
        self._log = config.state_dir / "logs" / f"node-{file_name(self._node.name)}.log"
        self._log_start = 0

    @property
    def pid(self) -> int | None:
        """Process id of the agent, None while there is none."""
        return None if self._process is None else self._process.pid

    async def start(self) -> Self:
        """Start the agent. It adopts workers that an earlier one has left; the others stay stopped
        until `set_residency`.

        Raises:
            ConfigError: the agent refused the configuration.
            BackendError: the agent did not come up.
        """
        if self._process is None:
            try:
                self._spawn()
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

    async def changes(self) -> AsyncIterator[WorkerInfo | DeviceMeasured]:
        """Every worker's state and each device's measured use now, then each change as it happens.

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
                        yield CHANGE.validate_json(line)
        except httpx.TransportError as error:
            raise self._gone(error) from error
        raise self._gone(None)

    async def memory(self) -> dict[str, Any]:
        """The agent's ledger beside its last measurements, in bytes."""
        async with self._http(self._patience_s) as http:
            return dict((await self._call(http, "GET", "/v1/node/memory")).json())

    async def set_residency(
        self, model: str, residency: Residency, kv_limit_bytes: int | None = None
    ) -> None:
        """Bring `model` to `residency` with that KV limit (None: as it is; at a start: the most);
        returns when it is there.

        Raises:
            BackendError: it could not be done; the message says why.
        """
        wish = {"residency": residency.value, "kv_limit_bytes": kv_limit_bytes}
        await self._post("residency", model, wish)

    async def set_kv_limit(self, model: str, limit_bytes: int) -> int:
        """Set how much the KV cache of `model` may hold; what it holds now, in bytes.

        Raises:
            BackendError: it could not be done; the message says why.
        """
        return int((await self._post("kv", model, {"limit_bytes": limit_bytes}))["held_bytes"])

    async def keep_prefix(self, model: str, call: str, seconds: float) -> int:
        """Hold the KV blocks of a call that ended; the bytes that are held so.

        Raises:
            BackendError: it could not be done; the message says why.
        """
        wish = {"call": call, "seconds": seconds}
        return int((await self._post("prefix/keep", model, wish))["pinned_bytes"])

    async def drop_prefix(self, model: str, call: str) -> None:
        """Let go of the KV blocks that were kept for a call.

        Raises:
            BackendError: it could not be done; the message says why.
        """
        await self._post("prefix/drop", model, {"call": call})

    async def warm_prefix(
        self, model: str, call: str, messages: Sequence[dict[str, Any]], seconds: float
    ) -> int:
        """Compute the prefix of a coming call ahead and keep it; the bytes that are held so.

        Raises:
            BackendError: it could not be done; the message says why.
        """
        wish = {"call": call, "messages": list(messages), "seconds": seconds}
        return int((await self._post("prefix/warm", model, wish))["pinned_bytes"])

    async def close(self) -> None:
        """Stop the agent and with it all its workers; after a minute they are killed."""
        started = self._process is not None
        try:
            if self._process is not None:
                self._process.terminate()
                self._process.send_signal(signal.SIGCONT)  # a stopped process hears nothing else
                with suppress(subprocess.TimeoutExpired):
                    await asyncio.to_thread(self._process.wait, _STOP_LIMIT_S)
        finally:
            self._kill()
            if started:
                await self._clean_up()

    async def leave(self) -> None:
        """End the agent and leave its workers, under their lease, to the next one.

        Raises:
            BackendError: they are tied to it.
        """
        if self._tied:
            raise BackendError("tied workers end with their agent: close it, or start it untied")
        if self._process is not None:
            self._process.send_signal(signal.SIGHUP)
            with suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.wait, _STOP_LIMIT_S)
        self._kill()

    def _kill(self) -> None:
        """Whatever is left of the agent ends at once."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
        self._address = None

    async def _clean_up(self) -> None:
        """End what an agent that was killed has left, unless another agent has come meanwhile."""
        with suppress(ConfigError, OSError), StateLock.take(self._config.state_dir, patience_s=0):
            for file, record in read_records(self._config.state_dir / "workers").items():
                await end_stray(record)
                file.unlink(missing_ok=True)
            shutil.rmtree(runtime_folder(self._config.state_dir), ignore_errors=True)

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def _spawn(self) -> None:
        # A name of its own: that the agent of somebody else is up must not look like ours.
        name = f"agent-{secrets.token_hex(4)}.sock"
        address = runtime_folder(self._config.state_dir) / name
        agent = (sys.executable, "-m", "maestro_backend.node", "--config", "/dev/stdin")
        options = ("--socket", str(address), "--node", self._node.name)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log, tempfile.TemporaryFile() as config:
            config.write(self._config.model_dump_json().encode())  # JSON is YAML
            config.flush()
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                (*agent, *options, *(["--tied"] if self._tied else [])),
                env=tied_environment(),
                stdin=config,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us: we stop it when we are done
            )
        self._address = address

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

    def _http(self, silence_s: float | None = None) -> httpx.AsyncClient:
        """A fresh client, for whichever event loop is running."""
        if self._address is None:
            raise BackendError("the node agent is not running")
        transport = httpx.AsyncHTTPTransport(uds=str(self._address))
        timeout = httpx.Timeout(silence_s, connect=self._patience_s)
        return httpx.AsyncClient(transport=transport, base_url="http://node", timeout=timeout)

    async def _post(self, path: str, model: str, wish: dict[str, Any]) -> dict[str, Any]:
        async with self._http() as http:
            body = {"model": model, **wish}
            return dict((await self._call(http, "POST", f"/v1/node/{path}", body)).json())

    async def _call(
        self, http: httpx.AsyncClient, method: str, path: str, body: dict[str, Any] | None = None
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
