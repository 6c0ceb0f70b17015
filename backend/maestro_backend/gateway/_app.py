"""The gateway as an ASGI app."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from maestro_backend.scheduler import WorkerState

from ._chat import ChatCompletions
from ._control import Control
from ._errors import ApiError
from ._models import ModelTable
from ._shell import Shell
from ._upstream import Upstream


def build_app(shell: Shell, api_key: str | None = None) -> ASGIApp:
    """All routes around one shell.

    With `api_key`, all but `/health` ask for it. Without, only requests for a loopback host are
    answered, so that no web page can reach us under a name of its own (DNS rebinding).
    """
    upstream, models, control = Upstream(), ModelTable(shell.config), Control(shell)

    async def health(request: Request) -> Response:
        """200 while the gateway serves; says which workers are ready."""
        workers = shell.scheduler.workers.values()
        ready = [w.model for w in workers if w.state is WorkerState.READY]
        return JSONResponse({"status": "ok", "ready": ready})

    async def metrics(request: Request) -> Response:
        return PlainTextResponse(shell.metrics.text(), media_type="text/plain; version=0.0.4")

    async def list_models(request: Request) -> Response:
        return JSONResponse(models.listing(shell.scheduler))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await upstream.close()

    chat = ChatCompletions(shell, upstream, models)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", list_models),
            Route("/health", health),
            Route("/metrics", metrics),
            Route("/v1/maestro/workflows/{id:path}", control.put_workflow, methods=["PUT"]),
            Route("/v1/maestro/runs/{run:path}/events", control.post_events, methods=["POST"]),
            Route("/v1/maestro/runs/{run:path}/explain", control.explain_run),
            Route("/v1/maestro/runs/{run:path}", control.get_run),
            Route("/v1/maestro/state", control.get_state),
        ],
        exception_handlers={
            ApiError: _api_error,
            404: _no_route,
            405: _no_route,
            Exception: _defect,
        },
        lifespan=lifespan,
    )
    return _KeyCheck(app, api_key) if api_key else _LoopbackCheck(app)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return Response(error.body(), error.status, error.headers())


async def _defect(request: Request, error: Exception) -> Response:
    answer = ApiError(500, f"the gateway failed: {error}", "server_error")
    return Response(answer.body(), answer.status, answer.headers())


async def _no_route(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    path, method = request.url.path, request.method
    message = f"{path} takes no {method}" if status == 405 else f"no route {method} {path}"
    api_error = ApiError(status, message, code="not_found" if status == 404 else None)
    return Response(api_error.body(), api_error.status, api_error.headers())


class _LoopbackCheck:
    """Answers requests for a loopback host only, and bodies only as JSON.

    Both keep web pages out: a page cannot choose the Host, nor send JSON without being asked first.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._refusal(scope)):
            response = Response(error.body(), error.status, error.headers())
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    @staticmethod
    def _refusal(scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"localhost").decode("latin-1")
        if not is_loopback(urlsplit(f"//{host}").hostname or ""):
            message = f"host {host!r} is not served without an API key: set MAESTRO_API_KEY"
            return ApiError(403, message, code="host_not_allowed")
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if scope["method"] in ("POST", "PUT") and kind != b"application/json":
            return ApiError(415, "send the body as content-type: application/json")
        return None


class _KeyCheck:
    """Asks for `Authorization: Bearer KEY`; compares in constant time."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._wanted = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._wanted):
                message = "wrong or missing API key: send 'Authorization: Bearer <key>'"
                error = ApiError(401, message, code="invalid_api_key")
                response = Response(error.body(), error.status, error.headers())
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
