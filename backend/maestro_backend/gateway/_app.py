"""The gateway as an ASGI app."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

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
    """All routes around one shell. With `api_key`, all but `/health` ask for it."""
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
            Route("/v1/maestro/runs/{run}/events", control.post_events, methods=["POST"]),
            Route("/v1/maestro/runs/{run}", control.get_run),
            Route("/v1/maestro/state", control.get_state),
        ],
        exception_handlers={ApiError: _api_error, 404: _no_route, 405: _no_route},
        lifespan=lifespan,
    )
    return _KeyCheck(app, api_key) if api_key else app


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return Response(error.body(), error.status, error.headers())


async def _no_route(request: Request, error: Exception) -> Response:
    message = f"no route {request.method} {request.url.path}"
    api_error = ApiError(getattr(error, "status_code", 404), message, code="not_found")
    return Response(api_error.body(), api_error.status, api_error.headers())


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
