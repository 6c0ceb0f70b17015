"""The control API of a worker, on the same unix socket as its OpenAI API.

An endpoint plugin of vLLM's. It is added by `vllm_server` and not by an entry point: that would
make every stock server of the environment warn of it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from ._control import Control, RefusedError

Handler = Callable[[Control, dict[str, Any]], Awaitable[dict[str, Any]]]


async def _state(control: Control, body: dict[str, Any]) -> dict[str, Any]:
    return await control.state()


async def _progress(control: Control, body: dict[str, Any]) -> dict[str, Any]:
    return {"requests": await control.progress()}


async def _residency(control: Control, body: dict[str, Any]) -> dict[str, Any]:
    budget, kv_limit = body.get("host_budget_bytes"), body.get("kv_limit_bytes")
    return await control.move(body["residency"], budget, kv_limit)


async def _checksum(control: Control, body: dict[str, Any]) -> dict[str, Any]:
    return {"checksum": await control.checksum()}


async def _drop_copy(control: Control, body: dict[str, Any]) -> dict[str, Any]:
    await control.drop_copy()
    return {}


async def _kv(control: Control, body: dict[str, Any]) -> dict[str, Any]:
    return {"kv": await control.limit_kv(int(body["limit_bytes"]))}


async def _keep(control: Control, body: dict[str, Any]) -> dict[str, Any]:
    return {"pinned_bytes": await control.keep(body["call"], float(body["seconds"]))}


async def _drop(control: Control, body: dict[str, Any]) -> dict[str, Any]:
    await control.drop(body["call"])
    return {}


async def _warm(control: Control, body: dict[str, Any]) -> dict[str, Any]:
    call, messages, seconds = body["call"], body["messages"], float(body["seconds"])
    return {"pinned_bytes": await control.warm(call, messages, seconds)}


async def _lease(control: Control, body: dict[str, Any]) -> dict[str, Any]:
    control.renew_lease(float(body["seconds"]))
    return {}


ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("GET", "/maestro/worker", _state),
    ("GET", "/maestro/progress", _progress),
    ("POST", "/maestro/residency", _residency),
    ("GET", "/maestro/checksum", _checksum),
    ("DELETE", "/maestro/host-copy", _drop_copy),
    ("POST", "/maestro/kv", _kv),
    ("POST", "/maestro/prefix/keep", _keep),
    ("POST", "/maestro/prefix/drop", _drop),
    ("POST", "/maestro/prefix/warm", _warm),
    ("POST", "/maestro/lease", _lease),
)


class Endpoint:
    """vLLM's `EndpointPlugin`: routes first, the engine when it is up."""

    name = "maestro"
    required_tasks = None

    def __init__(self) -> None:
        self._control: Control | None = None

    def attach_router(self, app: Any) -> None:
        """Add the routes."""
        for method, path, handler in ROUTES:
            app.add_route(path, self._serve(handler), methods=[method])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """The engine is there: from now on the worker can be controlled."""
        control = Control(engine_client)
        await control.start()
        self._control = control

    def _serve(self, handler: Handler) -> Callable[[Any], Awaitable[Any]]:
        from starlette.responses import JSONResponse

        async def serve(request: Any) -> Any:
            if self._control is None:
                return JSONResponse({"error": "the engine is not up yet"}, 503)
            try:
                body = await request.json() if request.method == "POST" else {}
                return JSONResponse(await handler(self._control, body))
            except RefusedError as error:
                return JSONResponse({"error": str(error)}, error.status)
            except (KeyError, TypeError, ValueError) as error:
                return JSONResponse({"error": f"malformed body: {error!r}"}, 400)
            except Exception as error:
                return JSONResponse({"error": f"{type(error).__name__}: {error}"}, 500)

        return serve


def add_routes() -> bool:
    """Have vLLM's server load our endpoint plugin beside the user's; False where it has none."""
    from vllm import plugins

    load = getattr(plugins, "load_endpoint_plugins", None)
    if load is None:
        return False

    def load_endpoint_plugins(supported_tasks: Any = None) -> list[Any]:
        return [*load(supported_tasks), Endpoint()]

    plugins.load_endpoint_plugins = load_endpoint_plugins
    return True
