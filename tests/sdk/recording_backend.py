"""A loopback backend for tests: keeps what the control plane is told, forwards chats to a stub.

It can also go wrong, by `status` or by one of FAULTS, on its control routes or on its chats.
"""

from __future__ import annotations

import json
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SHUT_RDWR, socket
from threading import Event, Thread
from typing import Any
from urllib.parse import unquote

import httpx

FAULTS = ("drop", "garbage", "hang")
"""Closes the connection instead of a reply, says what is no HTTP, or never says anything."""


class RecordingBackend:
    """`workflows` by id in the order of arrival, `events` by run, `chats` as (headers, body)."""

    def __init__(self, engine_url: str | None = None, port: int = 0) -> None:
        self.engine_url = engine_url
        self.fault: str | None = None
        self.chat_fault: str | None = None
        self.chat_status = 0
        self.over, self.told = Event(), Event()
        self.connections: set[socket] = set()
        self.workflows: list[tuple[str, dict[str, Any]]] = []
        self.events: dict[str, list[dict[str, Any]]] = {}
        self.posts: list[tuple[str, dict[str, Any]]] = []
        self.chats: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        self.forgets_workflows = False
        self.status = 200
        self._server = _Server(self, port)
        self._thread = Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    def types(self, run: str) -> list[str]:
        return [event["type"] for event in self.events[run]]

    def identities(self) -> list[dict[str, str]]:
        """Of each chat, our headers without their common prefix."""
        return [
            {k.removeprefix("x-maestro-"): v for k, v in head.items() if k.startswith("x-maestro")}
            for head, _ in self.chats
        ]

    def stages(self) -> list[tuple[str, str]]:
        """Of each chat, the stage and the instance."""
        return [(head["stage"], head["instance"]) for head in self.identities()]

    def announced(self) -> dict[str, Any]:
        """The latest announcement of each stage."""
        return {
            head["x-maestro-stage"]: body["maestro"]["announcement"] for head, body in self.chats
        }

    def hang_up(self) -> None:
        """Close the connections that are open."""
        for connection in tuple(self.connections):
            with suppress(OSError):
                connection.shutdown(SHUT_RDWR)

    def __enter__(self) -> RecordingBackend:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()
        self.hang_up()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, backend: RecordingBackend, port: int) -> None:
        self.backend = backend
        super().__init__(("127.0.0.1", port), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.server.backend.connections.add(self.connection)

    def finish(self) -> None:
        self.server.backend.connections.discard(self.connection)
        super().finish()

    def do_PUT(self) -> None:
        workflow = unquote(self.path.removeprefix("/v1/maestro/workflows/"))
        body = self._read()
        if self.server.backend.fault:
            return self._fail(self.server.backend.fault)
        self.server.backend.workflows.append((workflow, body))
        return self._reply(self.server.backend.status, b"{}")

    def do_POST(self) -> None:
        body = self._read()
        if not self.path.startswith("/v1/maestro/runs/"):
            return self._forward(body)
        if self.server.backend.fault:
            return self._fail(self.server.backend.fault)
        backend = self.server.backend
        run = unquote(self.path.split("/")[4])
        backend.headers.append({k.lower(): v for k, v in self.headers.items()})
        backend.posts.append((run, body))
        backend.events.setdefault(run, []).extend(body["events"])
        unknown = {"x-maestro-workflow": "unknown"} if backend.forgets_workflows else {}
        backend.forgets_workflows = False
        backend.told.set()
        return self._reply(backend.status, b"{}", **unknown)

    def _forward(self, body: dict[str, Any]) -> None:
        backend = self.server.backend
        backend.chats.append(({k.lower(): v for k, v in self.headers.items()}, body))
        if backend.chat_fault:
            return self._fail(backend.chat_fault)
        if backend.chat_status:
            return self._reply(backend.chat_status, b"{}")
        url = f"{(backend.engine_url or '').removesuffix('/v1')}{self.path}"
        reply = httpx.post(url, json=body, timeout=30)
        return self._reply(
            reply.status_code, reply.content, **{"content-type": reply.headers["content-type"]}
        )

    def _fail(self, fault: str) -> None:
        self.close_connection = True
        if fault == "garbage":
            self.wfile.write(b"\x00\xff what?\r\n\r\n")
        if fault == "hang":
            self.server.backend.over.wait(60)

    def _read(self) -> dict[str, Any]:
        return json.loads(self.rfile.read(int(self.headers["content-length"])))

    def _reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""
