"""The agent's HTTP API, served on a unix socket.

`GET /v1/node` -> NodeInfo. `GET /v1/node/memory` -> ledger and measurements. `GET /v1/node/changes`
-> one WorkerInfo or DeviceMeasured per line: all of them, then each change; an empty line is a
heartbeat. Posts answer when it is done:

- `/v1/node/residency` {model, residency, kv_limit_bytes?}
- `/v1/node/kv` {model, limit_bytes} -> {held_bytes}
- `/v1/node/prefix/keep` {model, call, seconds} -> {pinned_bytes}
- `/v1/node/prefix/drop` {model, call}
- `/v1/node/prefix/warm` {model, call, messages, seconds} -> {pinned_bytes}

Errors are `{"error": text}`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from maestro_agents.protocol import ConfigError, MaestroError, UnsupportedError
from maestro_backend.scheduler import DeviceMeasured, NodeInfo, Residency, WorkerInfo
from maestro_backend.workers import DoesNotFitError

from ._agent import Agent, UnknownModelError

HEARTBEAT_S = 2.0

NODE_INFO = TypeAdapter(NodeInfo)
CHANGE: TypeAdapter[WorkerInfo | DeviceMeasured] = TypeAdapter(WorkerInfo | DeviceMeasured)

_STATUS: tuple[tuple[type[MaestroError], int], ...] = (
    (UnknownModelError, 404),
    (DoesNotFitError, 422),
    (UnsupportedError, 501),
    (ConfigError, 422),
)

Bytes = Annotated[int, Field(ge=0)]
Duration = Annotated[float, Field(gt=0)]


class _Wish(BaseModel):
    """The body of a post."""

    model: str


class ResidencyRequest(_Wish):
    """Body of `POST /v1/node/residency`."""

    residency: Residency
    kv_limit_bytes: Bytes | None = None


class KvRequest(_Wish):
    """Body of `POST /v1/node/kv`."""

    limit_bytes: Bytes


class DropRequest(_Wish):
    """Body of `POST /v1/node/prefix/drop`."""

    call: str


class KeepRequest(_Wish):
    """Body of `POST /v1/node/prefix/keep`."""

    call: str
    seconds: Duration


class WarmRequest(KeepRequest):
    """Body of `POST /v1/node/prefix/warm`."""

    messages: list[dict[str, Any]]


W = TypeVar("W", bound=_Wish)


def make_app(agent: Agent) -> Starlette:
    """The ASGI app of `agent`."""

    async def node(_: Request) -> Response:
        return Response(NODE_INFO.dump_json(agent.info()), media_type="application/json")

    async def memory(_: Request) -> Response:
        return JSONResponse(agent.memory())

    async def changes(_: Request) -> Response:
        return StreamingResponse(_lines(agent), media_type="application/x-ndjson")

    async def residency(w: ResidencyRequest) -> dict[str, Any]:
        await agent.set_residency(w.model, w.residency, w.kv_limit_bytes)
        return {"model": w.model, "residency": w.residency.value}

    async def kv(w: KvRequest) -> dict[str, Any]:
        return {"held_bytes": await agent.set_kv_limit(w.model, w.limit_bytes)}

    async def keep(w: KeepRequest) -> dict[str, Any]:
        return {"pinned_bytes": await agent.keep_prefix(w.model, w.call, w.seconds)}

    async def drop(w: DropRequest) -> dict[str, Any]:
        await agent.drop_prefix(w.model, w.call)
        return {}

    async def warm(w: WarmRequest) -> dict[str, Any]:
        pinned = await agent.warm_prefix(w.model, w.call, w.messages, w.seconds)
        return {"pinned_bytes": pinned}

    return Starlette(
        routes=[
            Route("/v1/node", node),
            Route("/v1/node/memory", memory),
            Route("/v1/node/changes", changes),
            _post("/v1/node/residency", ResidencyRequest, residency),
            _post("/v1/node/kv", KvRequest, kv),
            _post("/v1/node/prefix/keep", KeepRequest, keep),
            _post("/v1/node/prefix/drop", DropRequest, drop),
            _post("/v1/node/prefix/warm", WarmRequest, warm),
        ]
    )


def _post(path: str, kind: type[W], work: Callable[[W], Awaitable[dict[str, Any]]]) -> Route:
    async def endpoint(request: Request) -> Response:
        try:
            wish = kind.model_validate_json(await request.body())
        except ValidationError as error:
            return JSONResponse({"error": str(error)}, 400)
        try:
            return JSONResponse(await work(wish))
        except MaestroError as error:
            return JSONResponse({"error": str(error)}, _status(error))

    return Route(path, endpoint, methods=["POST"])


async def _lines(agent: Agent) -> AsyncIterator[bytes]:
    async for change in agent.changes(HEARTBEAT_S):
        yield b"\n" if change is None else CHANGE.dump_json(change) + b"\n"


def _status(error: MaestroError) -> int:
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 502)
