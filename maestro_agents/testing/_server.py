"""The stub behind a socket: in a thread of the test, or as its own process."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from maestro_agents.protocol import ConfigError, UnsupportedError

from ._app import App
from ._engine import Engine, RecordedRequest, Settings
from ._faults import Fault, FaultKind
from ._latency import Latency
from ._reply import OutputTokens, ReasoningTokens

if TYPE_CHECKING:
    import uvicorn

_LOOPBACK = "127.0.0.1"


class StubEngine:
    """An OpenAI-compatible engine in a thread, for tests. Use it as a context manager.

    `output_tokens` fixes the length of plain text, or computes it from the body. `reasoning_tokens`
    likewise makes a model with a reasoning parser, as vLLM serves it: every chat reply thinks that
    long first, in the field `reasoning`, which counts towards `max_tokens` and the usage.
    `auto_tools` calls a tool whenever some are offered and the user spoke last, as a model may with
    `tool_choice` "auto". `port` 0 takes a free one; with `uds` it listens on that Unix socket
    instead.

    Raises:
        ConfigError: uvicorn is not installed, or the address is taken.
    """

    def __init__(
        self,
        models: tuple[str, ...] = ("stub",),
        *,
        latency: Latency | None = None,
        output_tokens: OutputTokens = None,
        reasoning_tokens: ReasoningTokens = None,
        max_num_seqs: int = 256,
        max_model_len: int = 32_768,
        auto_tools: bool = False,
        host: str = _LOOPBACK,
        port: int = 0,
        uds: str | os.PathLike[str] | None = None,
    ) -> None:
        settings = Settings(
            models=models,
            latency=latency or Latency(),
            output_tokens=output_tokens,
            reasoning_tokens=reasoning_tokens,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            auto_tools=auto_tools,
        )
        self._engine = Engine(settings)
        self._app = App(self._engine)
        self._address = (host, port)
        self.uds = None if uds is None else os.fspath(uds)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._server: uvicorn.Server | None = None

    def __enter__(self) -> Self:
        self._server = make_server(self._app, log_level="critical")
        sock = listen(self.uds or self._address)
        self._address = self._address if self.uds else sock.getsockname()[:2]
        self._thread = threading.Thread(target=self._run, args=(sock,), name="maestro-stub")
        self._thread.start()
        self.wait(lambda: self._server is not None and self._server.started)
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is None or self._thread is None:
            return
        self._server.should_exit = True
        self._thread.join()
        if self.uds and os.path.exists(self.uds):
            os.unlink(self.uds)

    def _run(self, sock: socket.socket) -> None:
        async def serve(server: uvicorn.Server) -> None:
            self._loop = asyncio.get_running_loop()
            await server.serve(sockets=[sock])

        assert self._server is not None
        with asyncio.Runner(loop_factory=self._server.config.get_loop_factory()) as runner:
            runner.run(serve(self._server))

    @property
    def url(self) -> str:
        """The server's origin; on a Unix socket only the `Host` it answers to."""
        host, port = self._address
        return "http://localhost" if self.uds else f"http://{host}:{port}"

    @property
    def base_url(self) -> str:
        """What OpenAI clients take as `base_url`: the origin and `/v1`."""
        return f"{self.url}/v1"

    @property
    def requests(self) -> list[RecordedRequest]:
        """The completion requests so far, in order of arrival; the last 10 000 are kept."""
        return list(self._engine.requests)

    @property
    def running(self) -> int:
        """Requests being computed now."""
        return self._engine.slots.running

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot now."""
        return self._engine.slots.waiting

    @property
    def aborted(self) -> int:
        """Requests whose client went away before the reply was computed."""
        return self._engine.finished["abort"]

    def fail_next(
        self, kind: FaultKind, *, after_tokens: int = 0, status: int = 500, times: int = 1
    ) -> None:
        """Plan a fault for the next request, or the next `times`; see `Fault`."""
        if kind == "die":
            raise UnsupportedError(
                "a StubEngine in this process cannot die without it; "
                "run `python -m maestro_agents.testing` or use `drop`"
            )
        self._engine.faults.extend([Fault(kind, after_tokens, status)] * times)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, requests are accepted and queued but nothing is computed and moved."""
        self._set_open(False)
        try:
            yield
        finally:
            self._set_open(True)

    def _set_open(self, value: bool) -> None:
        assert self._loop is not None, "enter the StubEngine first"
        event = self._engine.open
        self._loop.call_soon_threadsafe(event.set if value else event.clear)

    def wait(self, until: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Block until a condition on this stub holds.

        Raises:
            TimeoutError: it did not within `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        while not until():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the condition did not hold within {timeout_s} s")
            time.sleep(0.002)


def make_server(app: App, *, log_level: str) -> uvicorn.Server:
    """A uvicorn server for the stub, not yet listening."""
    try:
        import uvicorn
    except ModuleNotFoundError:
        raise ConfigError(
            'the stub engine needs uvicorn: pip install "maestro-mas[backend]"'
        ) from None

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            app.cut_all()  # else a hanging request would hold the server
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app,
        log_level=log_level,
        access_log=False,
        lifespan="off",
        timeout_keep_alive=75,
    )
    return Server(config)


def listen(address: str | tuple[str, int]) -> socket.socket:
    """A listening socket: a path is a Unix socket, a host and port are TCP.

    A stale socket file is replaced; one that a server still answers on is not.
    """
    if isinstance(address, tuple):
        sock = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    else:
        _remove_stale(address)
        sock = socket.socket(socket.AF_UNIX)
    try:
        sock.bind(address)
        sock.listen(2048)
    except OSError as error:
        sock.close()
        raise ConfigError(f"cannot listen on {address}: {error.strerror}") from None
    return sock


def _remove_stale(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise ConfigError(f"cannot listen on {path}: a server is running there")
