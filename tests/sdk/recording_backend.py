"""A loopback backend for tests: keeps what the control plane is told, forwards chats to a stub."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote

import httpx


class RecordingBackend:
    """`workflows` by id in the order of arrival, `events` by run, `chats` as (headers, body)."""

    def __init__(self, engine_url: str | None = None) -> None:
        self.engine_url = engine_url
        self.workflows: list[tuple[str, dict[str, Any]]] = []
        self.events: dict[str, list[dict[str, Any]]] = {}
        self.posts: list[tuple[str, dict[str, Any]]] = []
        self.chats: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        self.forgets_workflows = False
        self.status = 200
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

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

    def __enter__(self) -> RecordingBackend:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler(backend: RecordingBackend) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_PUT(self) -> None:
            workflow = unquote(self.path.removeprefix("/v1/maestro/workflows/"))
            backend.workflows.append((workflow, self._read()))
            self._reply(backend.status, b"{}")

        def do_POST(self) -> None:
            body = self._read()
            if not self.path.startswith("/v1/maestro/runs/"):
                return self._forward(body)
            run = unquote(self.path.split("/")[4])
            backend.headers.append({k.lower(): v for k, v in self.headers.items()})
            backend.posts.append((run, body))
            backend.events.setdefault(run, []).extend(body["events"])
            unknown = {"x-maestro-workflow": "unknown"} if backend.forgets_workflows else {}
            backend.forgets_workflows = False
            return self._reply(backend.status, b"{}", **unknown)

        def _forward(self, body: dict[str, Any]) -> None:
            backend.chats.append(({k.lower(): v for k, v in self.headers.items()}, body))
            url = f"{(backend.engine_url or '').removesuffix('/v1')}{self.path}"
            reply = httpx.post(url, json=body, timeout=30)
            self._reply(
                reply.status_code, reply.content, **{"content-type": reply.headers["content-type"]}
            )

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

    return Handler
