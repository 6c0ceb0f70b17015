"""The stub as a raw ASGI application: no framework, so that it is never the bottleneck."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, MutableMapping
from dataclasses import asdict
from typing import Any
from uuid import uuid4

from ._call import Body, Call, parse_chat, parse_completion
from ._control import Control
from ._engine import ConnectionDropped, Engine, RecordedRequest
from ._errors import ApiError, RefusedError
from ._faults import Fault
from ._lease import Lease
from ._metrics import metrics_text
from ._reply import compose
from ._wire import Wire

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_JSON = b"application/json"
_TEXT = b"text/plain; version=0.0.4; charset=utf-8"
_EVENTS = b"text/event-stream; charset=utf-8"


class App:
    """The ASGI application over one `Engine`. `lease` is the watchdog of its process; `control`
    False leaves out the control API of a worker, as other servers do."""

    def __init__(self, engine: Engine, lease: Lease | None = None, *, control: bool = True) -> None:
        self.engine = engine
        self._control = Control(engine, lease).routes if control else {}
        self._controlling: set[asyncio.Task[Body]] = set()
        self._in_flight: set[Receive] = set()
        self._routes = {
            "/v1/chat/completions": ("POST", self._complete),
            "/v1/completions": ("POST", self._complete),
            "/v1/models": ("GET", self._models),
            "/health": ("GET", self._health),
            "/metrics": ("GET", self._metrics),
            "/stub/fault": ("POST", self._fault),
            "/stub/paused": ("POST", self._pause),
            "/stub/requests": ("GET", self._requests),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            if (asked := self._control.get((scope["method"], scope["path"]))) is not None:
                body = await _read_json(receive) if scope["method"] == "POST" else {}
                await self._controlled(asked(body), send)
                return
            method, handler = self._routes.get(scope["path"], ("", None))
            if handler is None:
                raise ApiError(404, f"There is no {scope['path']}.")
            if scope["method"] != method:
                raise ApiError(405, f"{scope['path']} takes {method} only.")
            await handler(scope, receive, send)
        except ApiError as error:
            await _send_whole(send, error.body(), status=error.status)
        except ConnectionDropped:
            _cut(receive)

    def cut_all(self) -> None:
        """Cut the connection of every request in flight, and give up what the control API does."""
        for receive in list(self._in_flight):
            _cut(receive)
        for work in self._controlling:
            work.cancel()

    async def _controlled(self, asked: Coroutine[Any, Any, Body], send: Send) -> None:
        """A move goes on when the one who asked for it has gone."""
        work = asyncio.create_task(asked)
        self._controlling.add(work)
        try:
            await asyncio.wait({work})
        finally:
            self._controlling.discard(work)
        if work.cancelled():
            raise RefusedError(503, "the worker ends")
        try:
            await _send_whole(send, json.dumps(work.result()).encode())
        except (KeyError, TypeError, ValueError) as error:
            raise RefusedError(400, f"malformed body: {error!r}") from None

    async def _complete(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read_json(receive)
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        self.engine.requests.append(RecordedRequest(scope["path"], headers, body))
        settings = self.engine.settings
        if scope["path"] == "/v1/completions":
            call = parse_completion(body, settings.models)
        else:
            call = parse_chat(body, settings.models, settings.auto_tools)
        call = self.engine.checked(call)
        fault = self.engine.next_fault()
        name = headers.get("x-request-id") or uuid4().hex
        await self._watched(receive, _Answer(self.engine, call, fault, send, name))

    async def _watched(self, receive: Receive, answer: _Answer) -> None:
        """Answer until done, or until the client has gone."""
        work = asyncio.ensure_future(answer.run())
        gone = asyncio.ensure_future(receive())
        self._in_flight.add(receive)
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not answer.computed:
                work.cancel()
                self.engine.finished["abort"] += 1
                await asyncio.wait({work})
            else:
                await work
        finally:
            self._in_flight.discard(receive)
            work.cancel()
            gone.cancel()

    async def _models(self, scope: Scope, receive: Receive, send: Send) -> None:
        settings = self.engine.settings
        shared = {"object": "model", "created": 0, "owned_by": "maestro-stub"}
        length = {"max_model_len": settings.max_model_len}
        models = [{"id": model, **shared, **length} for model in settings.models]
        await _send_whole(send, json.dumps({"object": "list", "data": models}).encode())

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _send_whole(send, b"", kind=_TEXT)

    async def _metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _send_whole(send, metrics_text(self.engine).encode(), kind=_TEXT)

    async def _fault(self, scope: Scope, receive: Receive, send: Send) -> None:
        faults = Fault.parse(await _read_json(receive))
        self.engine.faults.extend(faults)
        await _send_whole(send, json.dumps({"planned": len(self.engine.faults)}).encode())

    async def _pause(self, scope: Scope, receive: Receive, send: Send) -> None:
        paused = (await _read_json(receive)).get("paused")
        if not isinstance(paused, bool):
            raise ApiError(400, "paused: expected true or false", param="paused")
        (self.engine.open.clear if paused else self.engine.open.set)()
        told = {"paused": paused, "moving": self.engine.moving}
        await _send_whole(send, json.dumps(told).encode())

    async def _requests(self, scope: Scope, receive: Receive, send: Send) -> None:
        seen = [asdict(request) for request in self.engine.requests]
        await _send_whole(send, json.dumps({"requests": seen}).encode())


class _Answer:
    """One call being answered. `computed` turns True before the last byte is sent."""

    def __init__(
        self, engine: Engine, call: Call, fault: Fault | None, send: Send, name: str
    ) -> None:
        self._engine = engine
        self._call = call
        self._fault = fault
        self._send = send
        self._name = name
        settings = engine.settings
        self._replies = compose(call, settings.output_tokens, settings.reasoning_tokens)
        self._wire = Wire(call, self._replies, reasons=settings.reasoning_tokens is not None)
        self.computed = False

    async def run(self) -> None:
        computing = self._engine.computing(self._call, self._replies, self._name, self._fault)
        async with computing as steps:
            if self._call.stream:
                await self._stream(steps)
            else:
                async for _ in steps:
                    pass
            for reply in self._replies:
                self._engine.finished[reply.finish] += 1
            self.computed = True
        if self._call.stream:
            await self._send(_part(self._wire.closing(), more=False))
        else:
            await _send_whole(self._send, self._wire.whole())

    async def _stream(self, steps: AsyncIterator[int]) -> None:
        pending: Message = _start(200, [(b"content-type", _EVENTS)])
        async for at in steps:
            if at == 0:
                await self._send(pending)
                await self._send(_part(self._wire.opening() + self._wire.step(at), more=True))
            else:
                await self._send(_part(self._wire.step(at), more=True))


def _cut(receive: Receive) -> None:
    # ASGI has no word for "cut the connection", so this reaches for uvicorn's transport.
    receive.__self__.transport.abort()  # type: ignore[attr-defined]  # a bound method of uvicorn's


async def _read_json(receive: Receive) -> Body:
    raw = bytearray()
    while True:
        message = await receive()
        raw += message.get("body", b"")
        if not message.get("more_body"):
            break
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise ApiError(400, f"body: not JSON ({error})", param="body") from None
    if not isinstance(body, dict):
        raise ApiError(400, "body: expected a JSON object", param="body")
    return body


def _start(status: int, headers: list[tuple[bytes, bytes]]) -> Message:
    return {"type": "http.response.start", "status": status, "headers": headers}


def _part(body: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


async def _send_whole(send: Send, body: bytes, *, status: int = 200, kind: bytes = _JSON) -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send(_start(status, headers))
    await send(_part(body, more=False))
