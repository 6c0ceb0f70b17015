"""`POST /v1/chat/completions`: the life of one call (docs/architecture.md, steps 2 to 8)."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

import httpx
from starlette.types import Receive, Scope, Send

from maestro_agents.protocol import (
    HEADER_PREDICTED_TOKENS,
    HEADER_QUEUE_MS,
    HEADER_WORKER,
    HEADER_WORKFLOW,
    CallIdentity,
)
from maestro_backend.predictor import CallOutcome, CallShape, LiveCall, Prediction
from maestro_backend.scheduler import (
    CallArrived,
    CallCancelled,
    CallFailed,
    CallFinished,
)

from ._attempt import Preempted
from ._errors import ApiError
from ._foretelling import Foretold
from ._models import ModelTable
from ._prompt import output_format, tool_choice
from ._records import CallRecord, CallStatus
from ._reply import ClientGone, Reply, read_body, until_disconnected
from ._request import ChatRequest, parse_chat
from ._shell import Placement, Shell
from ._sse import StreamReader, Usage
from ._upstream import EngineError, Upstream, WorkerLost

_log = logging.getLogger("maestro.gateway")

_PATH = "/v1/chat/completions"
_PROGRESS_EVERY = 16
"""Streamed events between two progress reports."""


@dataclass(slots=True)
class _Call:
    """One call on its way through the gateway.

    `usage` or `failure` is set once the engine has said everything: a client may leave before we
    are done with it, and has had its call all the same.
    """

    request: ChatRequest
    live: LiveCall
    prompt_tokens: int
    record: CallRecord
    reply: Reply
    usage: Usage | None = None
    failure: str | None = None

    def answered(self) -> bool:
        """Whether it is too late to start it again elsewhere, unseen by the client."""
        return self.reply.begun or self.usage is not None or self.failure is not None


class ChatCompletions:
    """The ASGI endpoint. One instance serves all calls."""

    def __init__(self, shell: Shell, upstream: Upstream, models: ModelTable) -> None:
        self._shell = shell
        self._upstream = upstream
        self._models = models

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send)
        try:
            raw = await read_body(receive)
            headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
            await self._until_gone(self._serve(raw, headers, reply), receive)
        except ApiError as error:
            await reply.error(error)
        except ClientGone:
            return
        except Exception as error:
            _log.exception("a call failed in the gateway")
            await reply.error(ApiError(500, f"the gateway failed: {error}", "server_error"))

    async def _until_gone(self, work: Coroutine[Any, Any, None], receive: Receive) -> None:
        """Run `work`; cancel it when the client disconnects."""
        serving = asyncio.ensure_future(work)
        watching = asyncio.ensure_future(until_disconnected(receive))
        try:
            await asyncio.wait((serving, watching), return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                await serving
        finally:
            serving.cancel()
            watching.cancel()
            await asyncio.gather(serving, watching, return_exceptions=True)

    async def _serve(self, raw: bytes, headers: dict[str, str], reply: Reply) -> None:
        request = parse_chat(raw, headers)
        self._shell.metrics.bad_hints(request.bad_hints)
        call = self._arrive(request, self._models.resolve(request.model), reply)
        try:
            await self._attempts(call)
        except asyncio.CancelledError:
            self._settle(call, cancelled=True)
            raise
        except Exception as error:
            call.failure = str(error)
            self._settle(call)
            raise
        self._settle(call)

    def _arrive(self, request: ChatRequest, model: str, reply: Reply) -> _Call:
        """Steps 3 and 4: predict, learn where the run stands, enter the global order."""
        shell, identity = self._shell, request.identity
        name = f"call-{uuid.uuid4().hex[:16]}"
        live = shell.predictor.arrive(identity.run, _shape(request, model), shell.now())
        try:
            return self._enter(name, request, live, reply)
        except BaseException:
            shell.predictor.drop(live)
            raise

    def _enter(self, name: str, request: ChatRequest, live: LiveCall, reply: Reply) -> _Call:
        shell, identity = self._shell, request.identity
        shape, prediction = live.shape, shell.predictor.quick(live)
        lead_s = None
        with shell.surviving("a call's arrival"):
            announced, slo = request.annotation.announcement, request.annotation.slo
            events, lead_s = shell.book.call_arrived(
                identity, announced, shape, slo, shell.now(), call=name
            )
            shell.handle(*events)
        record = CallRecord(
            call=name,
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
            call=name,
            run=identity.run or name,
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
            choices=shape.n,
        )
        if identity.workflow and identity.workflow not in shell.book.workflows:
            reply.headers[HEADER_WORKFLOW] = "unknown"
        told = self._telling(identity, record, reply)
        record.predicted_tokens = prediction.length.p50
        reply.headers[HEADER_PREDICTED_TOKENS] = str(round(prediction.length.p50))
        shell.arrive(record, arrival, Foretold(name, live, prediction, told))
        return _Call(request, live, prediction.prompt_tokens, record, reply)

    def _telling(
        self, identity: CallIdentity, record: CallRecord, reply: Reply
    ) -> Callable[[Prediction], None]:
        """Writes a better prediction where the client, the run and its view find it."""

        def told(prediction: Prediction) -> None:
            record.predicted_tokens = prediction.length.p50
            reply.headers[HEADER_PREDICTED_TOKENS] = str(round(prediction.length.p50))
            with self._shell.surviving("a prediction"):
                events = self._shell.book.call_predicted(
                    identity, record.role, prediction, call=record.call
                )
                self._shell.handle(*events)

        return told

    async def _attempts(self, call: _Call) -> None:
        """Dispatch as often as the scheduler allows, until a first byte has reached the client."""
        while True:
            place = await self._shell.place(call.record)
            call.reply.headers[HEADER_WORKER] = place.worker
            call.reply.headers[HEADER_QUEUE_MS] = str(round(call.record.queued_s() * 1000))
            try:
                with self._shell.attempt(call.record, call.answered):
                    await self._forward(call, place)
                return
            except Preempted:
                continue
            except EngineError as error:
                if call.reply.begun:
                    message = f"the worker was lost in mid-stream ({error}); please try again"
                    raise ApiError(502, message, "server_error", "worker_lost") from error
                lost = isinstance(error, WorkerLost)
                self._shell.retry(call.record, str(error), worker_lost=lost)

    async def _forward(self, call: _Call, place: Placement) -> None:
        """Step 7: to the worker and back."""
        body = call.request.upstream_body(call.live.shape.model, place.priority)
        headers = {"x-request-id": call.record.call, **call.request.trace}
        async with self._upstream.post(place.address, _PATH, body, headers) as response:
            if call.request.stream and response.status_code == 200:
                await self._stream(call, response)
                return
            data = await response.aread()
            if response.status_code == 200:
                call.usage = _usage(data)
            else:
                call.failure = f"HTTP {response.status_code}: {data[:300].decode(errors='replace')}"
            content_type = response.headers.get("content-type", "application/json")
            await call.reply.whole(response.status_code, content_type, data)

    async def _stream(self, call: _Call, response: httpx.Response) -> None:
        reader = StreamReader(forward_usage=call.request.wants_usage)
        record, reply = call.record, call.reply
        reported = 0
        async for chunk in response.aiter_raw():
            data = reader.feed(chunk)
            if not data:
                continue
            if not reply.begun:
                if reader.error and not reader.events:
                    raise EngineError(reader.error)
                record.first_token = self._shell.now()
                self._shell.publish(record)
                await reply.begin(200, response.headers.get("content-type", "text/event-stream"))
            record.output_tokens = max(0, reader.events - 1)
            if reader.done:
                call.failure = reader.error
                usage = reader.usage or Usage(0, record.output_tokens)
                call.usage = replace(usage, finish=reader.finish)
            await reply.body(data, more=not reader.done)
            if reader.events >= reported:
                reported = reader.events + _PROGRESS_EVERY
                self._progress(call, reported)
        if not reader.done:
            raise WorkerLost("the stream ended before its end")

    def _progress(self, call: _Call, tokens: int) -> None:
        """Report what the next `_PROGRESS_EVERY` tokens will need, before they need it."""
        generated = call.record.output_tokens
        self._shell.progress(call.record.call, call.prompt_tokens, tokens, generated)

    def _settle(self, call: _Call, *, cancelled: bool = False) -> None:
        """Step 8. What the engine has said counts for more than how the connection ended."""
        record = call.record
        if call.failure is not None:
            record.error = call.failure
            status = CallStatus.FAILED if record.attempts else CallStatus.REJECTED
            self._end(call, status, CallFailed(record.call, call.failure))
        elif cancelled and call.usage is None:
            self._end(call, CallStatus.CANCELLED, CallCancelled(record.call))
        else:
            usage = call.usage or Usage()
            outcome = self._outcome(call, usage)
            counts = (usage.prompt_tokens, usage.output_tokens, usage.cached_tokens)
            self._end(call, CallStatus.DONE, CallFinished(record.call, *counts), outcome)

    def _outcome(self, call: _Call, usage: Usage) -> CallOutcome:
        record = call.record
        record.prompt_tokens, record.output_tokens = usage.prompt_tokens, usage.output_tokens
        record.cached_tokens = usage.cached_tokens
        sent = record.dispatched or record.arrived
        return CallOutcome(
            prompt_tokens=usage.prompt_tokens,
            output_tokens=usage.output_tokens,
            cached_tokens=usage.cached_tokens,
            first_s=None if record.first_token is None else record.first_token - sent,
            total_s=self._shell.now() - sent,
            finish=usage.finish,
        )

    def _end(
        self,
        call: _Call,
        status: CallStatus,
        event: CallFinished | CallFailed | CallCancelled,
        outcome: CallOutcome | None = None,
    ) -> None:
        shell, record = self._shell, call.record
        shell.end(record, status, event)
        shell.learn(record, call.live, outcome)
        identity, role = call.request.identity, call.live.shape.role
        with shell.surviving("a call's end"):
            shell.handle(
                *shell.book.call_ended(identity, shell.now(), outcome, role, call=record.call)
            )


def _shape(request: ChatRequest, model: str) -> CallShape:
    return CallShape(
        model=model,
        workflow=request.identity.workflow or "",
        stage=request.identity.stage or "",
        role=request.annotation.role or "",
        prompt_bytes=request.prompt_bytes,
        max_tokens=request.max_tokens,
        n=request.choices,
        messages=request.counts.messages,
        prompt_chars=request.counts.chars,
        prompt_lines=request.counts.lines,
        code_chars=request.counts.code_chars,
        tools=len(request.body.get("tools") or ()),
        tool_choice=tool_choice(request.body),
        output_format=output_format(request.body),
    )


def _usage(data: bytes) -> Usage:
    try:
        return Usage.of(json.loads(data)) or Usage()
    except ValueError:  # not JSON: the client gets it as it is, there is nothing to learn
        return Usage()
