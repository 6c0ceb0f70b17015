"""The control routes: workflows, run events, run views, state."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from maestro_agents.protocol import MAX_WORKFLOW_BYTES, PROTOCOL_VERSION, RunEvents, Workflow

from ._errors import ApiError, invalid
from ._records import ENDED, run_view
from ._shell import Shell

_SHOWN_RUNS = 50
_EXPLAINED_CALLS = 200
"""Of a run, the last ones (ours)."""

_M = TypeVar("_M", bound=BaseModel)


class Control:
    """Handlers of `/v1/maestro/...`."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell

    async def put_workflow(self, request: Request) -> Response:
        """`PUT /v1/maestro/workflows/{id}`; the id must be the content's own `name@hash`."""
        workflow = _parse(Workflow, await _body(request))
        wanted = request.path_params["id"]
        if wanted != workflow.id:
            raise invalid(f"the content's id is {workflow.id!r}, the URL says {wanted!r}", "id")
        self._shell.book.put(workflow)
        return JSONResponse({"id": workflow.id})

    async def post_events(self, request: Request) -> Response:
        """`POST /v1/maestro/runs/{run}/events`. Says whether the run's workflow is known."""
        run = request.path_params["run"]
        events = _parse(RunEvents, await _body(request)).events
        self._shell.run_events(run, events)
        state = self._shell.book.runs.get(run)
        known = state is None or not state.workflow or state.workflow in self._shell.book.workflows
        headers = {} if known else {"x-maestro-workflow": "unknown"}
        return JSONResponse({"accepted": len(events)}, headers=headers)

    async def get_run(self, request: Request) -> Response:
        """`GET /v1/maestro/runs/{run}`."""
        name = request.path_params["run"]
        run = self._shell.book.runs.get(name)
        if run is None:
            raise ApiError(404, f"no run {name!r} is known here", code="run_not_found")
        return JSONResponse(run_view(run, self._shell.records.of_run(name)))

    async def explain_run(self, request: Request) -> Response:
        """`GET /v1/maestro/runs/{run}/explain`: what was predicted of each call, and why."""
        name = request.path_params["run"]
        calls = await asyncio.to_thread(self._explained, name)
        run = self._shell.book.runs.get(name)
        if not calls:
            calls = await asyncio.to_thread(self._shell.learning.recalled, name)
        if run is None and not calls:
            raise ApiError(404, f"no run {name!r} is known here", code="run_not_found")
        forecast = [asdict(call) for call in run.forecast] if run else []
        return JSONResponse({"run": name, "calls": calls, "forecast": forecast})

    def _explained(self, name: str) -> list[dict[str, Any]]:
        """The run's last calls: ten milliseconds each."""
        return [
            {
                "call": record.call,
                "stage": record.stage,
                "role": record.role,
                "model": record.model,
                "status": record.status.value,
                "output_tokens": record.output_tokens,
                "predicted_tokens": record.predicted_tokens,
                **(self._shell.learning.explanation(record.call) or {}),
            }
            for record in self._shell.records.of_run(name)[-_EXPLAINED_CALLS:]
        ]

    async def get_state(self, request: Request) -> Response:
        """`GET /v1/maestro/state`, or its changes as server-sent events if the client asks."""
        if "text/event-stream" in request.headers.get("accept", ""):
            return StreamingResponse(self._changes(), media_type="text/event-stream")
        return JSONResponse(self.state())

    def state(self) -> dict[str, Any]:
        """Everything now: workers, devices, live calls, the last 50 runs, what was done so far.

        Sizes are bytes, `used` as measured (None: not yet); times are seconds since the
        gateway started, `now` among them.
        """
        shell, core = self._shell, self._shell.scheduler
        ledger = core.ledger
        return {
            "version": PROTOCOL_VERSION,
            "policy": core.policy.name,
            "now": shell.now(),
            "workers": [asdict(w) for w in core.workers.values()],
            "devices": {
                d: {"capacity": c, "free": ledger.free(d), "used": ledger.measured.get(d)}
                for d, c in ledger.capacity.items()
            },
            "hosts": {
                n: {
                    "capacity": c,
                    "free": ledger.host_free(n),
                    "used": ledger.measured.get(f"{n}/host"),
                }
                for n, c in ledger.host_capacity.items()
            },
            "actions": dict(core.counts),
            "calls": [asdict(r) for r in shell.records.live()],
            "ended_calls": sum(r.status in ENDED for r in shell.records.calls.values()),
            "runs": [
                {"run": r.run, "workflow": r.workflow, "started": r.started, "ended": r.ended}
                for r in shell.book.runs.values()
            ][-_SHOWN_RUNS:],
        }

    async def _changes(self) -> AsyncIterator[bytes]:
        with self._shell.feed.listening() as changes:
            yield _event({"type": "state", **self.state()})
            async for change in changes:
                yield _event(change)


def _event(change: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(change).encode() + b"\n\n"


async def _body(request: Request) -> bytes:
    """The body, read no further than the limit."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_WORKFLOW_BYTES:
            raise ApiError(413, f"the body is larger than {MAX_WORKFLOW_BYTES:,} bytes")
    return bytes(body)


def _parse(model: type[_M], body: bytes) -> _M:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise invalid(f"{where}: {first['msg']}", where) from error
