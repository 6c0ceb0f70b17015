"""`POST /v1/chat/completions`: the life of one call (docs/architecture.md, steps 2 to 8)."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import httpx
from starlette.types import Message, Receive, Scope, Send

from maestro_agents.protocol import (
    HEADER_PREDICTED_TOKENS,
    HEADER_QUEUE_MS,
    HEADER_WORKER,
    HEADER_WORKFLOW,
)
from maestro_backend.predictor import CallOutcome, CallShape, Prediction
from maestro_backend.scheduler import (
    CallArrived,
    CallCancelled,
    CallFailed,
    CallFinished,
    CallProgress,
)

from ._errors import ApiError, invalid
from ._models import ModelTable
from ._records import CallRecord, CallStatus
from ._request import MAX_BODY_BYTES, ChatRequest, parse_chat
from ._shell import Placement, Shell
from ._sse import StreamReader, Usage
from ._upstream import Upstream, WorkerLost

_log = logging.getLogger("maestro.gateway")

_PATH = "/v1/chat/completions"
_PROGRESS_EVERY = 16
"""Streamed events between two progress reports."""


class ClientGone(Exception):
    """The client closed its connection."""


@dataclass(slots=True)
class _Reply:
    """The client's side of one call: what has been sent, and how to send."""

    send: Send
    headers: dict[str, str] = field(default_factory=dict)
    begun: bool = False
    usage: Usage | None = None
    """Set when the engine has said everything: a client may leave before we are done with it."""

    async def begin(self, status: int, content_type: str) -> None:
        headers = {**self.headers, "content-type": content_type}
        encoded = [(k.encode(), v.encode()) for k, v in headers.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": encoded})
        self.begun = True

    async def body(self, data: bytes, *, more: bool) -> None:
        await self.send({"type": "http.response.body", "body": data, "more_body": more})

    async def error(self, error: ApiError) -> None:
        if self.begun:
            await self.body(error.sse(), more=False)
            return
        self.headers.update(error.headers())
        await self.begin(error.status, "application/json")
        await self.body(error.body(), more=False)


class ChatCompletions:
    """The ASGI endpoint. One instance serves all calls."""

    def __init__(self, shell: Shell, upstream: Upstream, models: ModelTable) -> None:
        self._shell = shell
        self._upstream = upstream
        self._models = models

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = _Reply(send)
        try:
            raw = await _read(receive)
            headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
            request = parse_chat(raw, headers)
            self._shell.metrics.bad_hints(request.bad_hints)
            await self._until_gone(self._serve(request, reply), receive)
        except ApiError as error:
            await reply.error(error)
        except ClientGone:
            return

    async def _until_gone(self, work: Coroutine[Any, Any, None], receive: Receive) -> None:
        """Run `work`; cancel it when the client disconnects."""
        serving = asyncio.ensure_future(work)
        watching = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((serving, watching), return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                await serving
            else:
                serving.cancel()
                await asyncio.gather(serving, return_exceptions=True)
        finally:
            serving.cancel()
            watching.cancel()
            await asyncio.gather(serving, watching, return_exceptions=True)

    async def _serve(self, request: ChatRequest, reply: _Reply) -> None:
        model = self._models.resolve(request.model)
        shape = _shape(request, model)
        prediction = self._shell.predictor.predict(shape)
        record = self._arrive(request, shape, prediction)
        reply.headers[HEADER_PREDICTED_TOKENS] = str(round(prediction.length.p50))
        if (
            request.identity.workflow
            and request.identity.workflow not in self._shell.book.workflows
        ):
            reply.headers[HEADER_WORKFLOW] = "unknown"
        try:
            await self._attempts(request, record, reply, model)
        except asyncio.CancelledError:
            if reply.usage is not None:
                self._finish(request, record, shape, reply.usage)
            else:
                self._end(request, record, CallStatus.CANCELLED, CallCancelled(record.call))
            raise
        except ApiError as error:
            self._fail(request, record, error)
            raise
        except Exception as error:
            _log.exception("serving %s failed", record.call)
            answer = ApiError(500, f"the gateway failed: {error}", "server_error")
            self._fail(request, record, answer)
            raise answer from error
        self._finish(request, record, shape, reply.usage or Usage())

    def _arrive(self, request: ChatRequest, shape: CallShape, prediction: Prediction) -> CallRecord:
        shell, identity = self._shell, request.identity
        call = f"call-{uuid.uuid4().hex[:16]}"
        events, lead_s = shell.book.call_arrived(
            identity, request.annotation.announcement, shape, request.annotation.slo, shell.now()
        )
        shell.handle(*events)
        record = CallRecord(
            call=call,
            run=identity.run or "",
            workflow=shape.workflow,
            stage=shape.stage,
            instance=identity.instance,
            role=shape.role,
            model=shape.model,
            arrived=shell.now(),
            predicted_tokens=prediction.length.p50,
            lead_s=lead_s,
        )
        arrival = CallArrived(
            call=call,
            run=identity.run or call,
            stage=shape.stage,
            model=shape.model,
            length=prediction.length,
            kv_tokens=prediction.kv_tokens,
            service_s=prediction.service_s,
            role=shape.role,
            instance=identity.instance,
            tenant=request.annotation.tenant or "default",
            prompt_tokens=prediction.prompt_tokens,
            waits_for=shell.book.waits_for(identity),
        )
        shell.arrive(record, arrival)
        return record

    async def _attempts(
        self, request: ChatRequest, record: CallRecord, reply: _Reply, model: str
    ) -> None:
        """Dispatch as often as the scheduler allows, until a first byte has reached the client."""
        while True:
            place = await self._shell.place(record)
            reply.headers[HEADER_WORKER] = place.worker
            reply.headers[HEADER_QUEUE_MS] = str(round(record.queued_s() * 1000))
            try:
                await self._forward(request, record, reply, place, model)
                return
            except WorkerLost as error:
                if reply.begun:
                    message = f"the worker was lost in mid-stream ({error}); please try again"
                    raise ApiError(502, message, "server_error", "worker_lost") from error
                self._shell.retry(record, str(error))

    async def _forward(
        self,
        request: ChatRequest,
        record: CallRecord,
        reply: _Reply,
        place: Placement,
        model: str,
    ) -> None:
        body = request.upstream_body(model, place.priority)
        headers = {"x-request-id": record.call, **request.trace}
        async with self._upstream.post(place.address, _PATH, body, headers) as response:
            if request.stream and response.status_code == 200:
                await self._stream(request, record, reply, response)
                return
            data = await response.aread()
            if response.status_code == 200:
                reply.usage = Usage.of(json.loads(data))
            content_type = response.headers.get("content-type", "application/json")
            await reply.begin(response.status_code, content_type)
            await reply.body(data, more=False)

    async def _stream(
        self, request: ChatRequest, record: CallRecord, reply: _Reply, response: httpx.Response
    ) -> None:
        reader = StreamReader(forward_usage=request.wants_usage)
        reported = 0
        async for chunk in response.aiter_raw():
            data = reader.feed(chunk)
            if not data:
                continue
            if not reply.begun:
                record.first_token = self._shell.now()
                self._shell.publish(record)
                await reply.begin(200, response.headers.get("content-type", "text/event-stream"))
            record.output_tokens = max(0, reader.events - 1)
            if reader.done:
                reply.usage = reader.usage or Usage(0, record.output_tokens)
            await reply.body(data, more=not reader.done)
            if reader.events - reported >= _PROGRESS_EVERY:
                reported = reader.events
                progress = CallProgress(record.call, record.prompt_tokens, reader.events)
                self._shell.handle(progress)
        if not reader.done:
            raise WorkerLost("the stream ended before its end")

    def _finish(
        self, request: ChatRequest, record: CallRecord, shape: CallShape, usage: Usage
    ) -> None:
        record.prompt_tokens, record.output_tokens = usage.prompt_tokens, usage.output_tokens
        record.cached_tokens = usage.cached_tokens
        now, sent = self._shell.now(), record.dispatched or record.arrived
        outcome = CallOutcome(
            prompt_tokens=usage.prompt_tokens,
            output_tokens=usage.output_tokens,
            cached_tokens=usage.cached_tokens,
            first_s=None if record.first_token is None else record.first_token - sent,
            total_s=now - sent,
        )
        self._shell.predictor.learn(shape, outcome)
        counts = (usage.prompt_tokens, usage.output_tokens, usage.cached_tokens)
        self._end(request, record, CallStatus.DONE, CallFinished(record.call, *counts))

    def _fail(self, request: ChatRequest, record: CallRecord, error: ApiError) -> None:
        record.error = error.message
        rejected = record.attempts == 0
        status = CallStatus.REJECTED if rejected else CallStatus.FAILED
        event = None if rejected else CallFailed(record.call, error.message)
        self._end(request, record, status, event)

    def _end(
        self,
        request: ChatRequest,
        record: CallRecord,
        status: CallStatus,
        event: CallFinished | CallFailed | CallCancelled | None,
    ) -> None:
        self._shell.end(record, status, event)
        self._shell.handle(*self._shell.book.call_ended(request.identity, self._shell.now()))


def _shape(request: ChatRequest, model: str) -> CallShape:
    return CallShape(
        model=model,
        workflow=request.identity.workflow or "",
        stage=request.identity.stage or "",
        role=request.annotation.role or "",
        prompt_bytes=request.prompt_bytes,
        max_tokens=request.max_tokens,
    )


async def _read(receive: Receive) -> bytes:
    """The whole body, up to 64 MiB."""
    chunks: list[bytes] = []
    size = 0
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise invalid(f"the body is larger than {MAX_BODY_BYTES // 2**20} MiB")
        chunks.append(chunk)
        if not message.get("more_body"):
            return b"".join(chunks)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
