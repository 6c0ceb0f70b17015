"""The agent's HTTP API, served on a unix socket.

`GET /v1/node` -> NodeInfo. `POST /v1/node/residency` {model, residency} -> 200 when it is there.
`GET /v1/node/changes` -> one WorkerInfo per line: all of them, then each change; an empty line is a
heartbeat. Errors are `{"error": text}`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from maestro_agents.protocol import ConfigError, MaestroError, UnsupportedError
from maestro_backend.scheduler import NodeInfo, Residency, WorkerInfo
from maestro_backend.workers import DoesNotFitError

from ._agent import Agent, UnknownModelError

HEARTBEAT_S = 2.0

NODE_INFO = TypeAdapter(NodeInfo)
WORKER_INFO = TypeAdapter(WorkerInfo)

_STATUS: tuple[tuple[type[MaestroError], int], ...] = (
    (UnknownModelError, 404),
    (DoesNotFitError, 422),
    (UnsupportedError, 501),
    (ConfigError, 422),
)


class ResidencyRequest(BaseModel):
    """Body of `POST /v1/node/residency`."""

    model: str
    residency: Residency


def make_app(agent: Agent) -> Starlette:
    """The ASGI app of `agent`."""

    async def node(_: Request) -> Response:
        return Response(NODE_INFO.dump_json(agent.info()), media_type="application/json")

    async def residency(request: Request) -> Response:
        try:
            wanted = ResidencyRequest.model_validate_json(await request.body())
        except ValidationError as error:
            return JSONResponse({"error": str(error)}, 400)
        try:
            await agent.set_residency(wanted.model, wanted.residency)
        except MaestroError as error:
            return JSONResponse({"error": str(error)}, _status(error))
        return JSONResponse({"model": wanted.model, "residency": wanted.residency.value})

    async def changes(_: Request) -> Response:
        return StreamingResponse(_lines(agent), media_type="application/x-ndjson")

    return Starlette(
        routes=[
            Route("/v1/node", node),
            Route("/v1/node/residency", residency, methods=["POST"]),
            Route("/v1/node/changes", changes),
        ]
    )


async def _lines(agent: Agent) -> AsyncIterator[bytes]:
    async for change in agent.changes(HEARTBEAT_S):
        yield b"\n" if change is None else WORKER_INFO.dump_json(change) + b"\n"


def _status(error: MaestroError) -> int:
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 502)
