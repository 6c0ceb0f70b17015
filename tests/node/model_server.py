"""A web server with one model folder and every fault that a test asks for."""

from __future__ import annotations

import hashlib
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

CONFIG = b'{"num_hidden_layers": 2, "max_position_embeddings": 64}'


def sums(files: Mapping[str, bytes]) -> bytes:
    """What `sha256sum *` prints."""
    lines = (f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items())
    return "".join(lines).encode()


def model(weights: bytes = b"w" * 1000, **others: bytes) -> dict[str, bytes]:
    """The files of a model with its list."""
    files = {"config.json": CONFIG, "model.safetensors": weights, **others}
    return {**files, "SHA256SUMS": sums(files)}


@dataclass
class ModelServer:
    """`files` by path below the root. A range is answered with `span` bytes at most, and goes with
    the header `validator` (`ETag`, `Last-Modified` or `weak`, an ETag that is none).

    Faults are used up one by one, per file. `cut`: bytes after which a GET is cut off; `status`:
    answers instead of the file; `redirect`: where a path has moved to; `told`: status and headers
    instead of a file, whatever the method. `halfway` is called with the path in the middle of a
    body.
    """

    files: dict[str, bytes]
    ranges: bool = True
    span: int = 10**9
    validator: str = "ETag"
    scheme: str = "http"
    heads: bool = True
    lengths: bool = True
    cut: dict[str, list[int]] = field(default_factory=dict)
    status: dict[str, list[int]] = field(default_factory=dict)
    redirect: dict[str, str] = field(default_factory=dict)
    told: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    halfway: Callable[[str], None] = lambda path: None
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    address: str = ""

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.address}"

    def asked(self, path: str) -> list[dict[str, str]]:
        """The headers of each GET of `path`."""
        return [headers for method, at, headers in self.requests if (method, at) == ("GET", path)]

    @property
    def gets(self) -> list[str]:
        return [path for method, path, _ in self.requests if method == "GET"]


@contextmanager
def serving(files: Mapping[str, bytes], tls: ssl.SSLContext | None = None) -> Iterator[ModelServer]:
    """Serve until the exit, whatever the clients do."""
    server = ModelServer(dict(files))

    class Handler(_Handler):
        state = server

    http = _Http(("127.0.0.1", 0), Handler)
    server.address = f"127.0.0.1:{http.server_address[1]}"
    if tls is not None:
        server.scheme = "https"
        http.socket = tls.wrap_socket(http.socket, server_side=True)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: ModelServer

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  its name there
        """Nothing is printed."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        state, path = self.state, unquote(self.path.lstrip("/"))
        headers = {name.lower(): value for name, value in self.headers.items()}
        state.requests.append((self.command, path, headers))
        if path in state.redirect:
            self._head(302, {"Location": state.redirect[path]}, 0)
            return
        if path in state.told:
            self._head(*state.told[path], 0)
            return
        data = state.files.get(path)
        status = 200 if data is not None else 404
        if self.command == "GET" and state.status.get(path):
            status = state.status[path].pop(0)
        if self.command == "HEAD" and not state.heads:
            status = 405
        if status != 200 or data is None:
            self._head(status, {}, 0)
            return
        self._file(path, data, headers)

    def _file(self, path: str, data: bytes, headers: dict[str, str]) -> None:
        told = self._validator(data)
        start, end, asked = 0, len(data), headers.get("range")
        if asked and self.state.ranges and headers.get("if-range") in told.values():
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(data):
                self._head(416, {**told, "Content-Range": f"bytes */{len(data)}"}, 0)
                return
            end = min(end, start + self.state.span)
            told["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        self._head(206 if start else 200, told, end - start)
        if self.command == "GET":
            self._body(path, data[start:end])

    def _validator(self, data: bytes) -> dict[str, str]:
        mark = hashlib.sha256(data).digest()[0] % 60
        if self.state.validator == "Last-Modified":
            return {"Last-Modified": f"Mon, 06 Jan 2025 10:00:{mark:02} GMT"}
        return {"ETag": f'"{mark}"' if self.state.validator == "ETag" else f'W/"{mark}"'}

    def _head(self, status: int, headers: Mapping[str, str], length: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.state.lengths:
            self.send_header("Content-Length", str(length))
        else:
            self.send_header("Connection", "close")  # the end of the body is that of the connection
        self.end_headers()

    def _body(self, path: str, data: bytes) -> None:
        cuts = self.state.cut.get(path)
        if cuts:
            self.wfile.write(data[: cuts.pop(0)])
            self.close_connection = True
            return
        half = len(data) // 2
        with suppress(OSError):  # the client went away
            self.wfile.write(data[:half])
            self.wfile.flush()
            self.state.halfway(path)
            self.wfile.write(data[half:])
