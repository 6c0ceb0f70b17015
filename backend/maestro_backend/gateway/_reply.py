"""The client's side of one call: what has been sent, and how to send."""

from __future__ import annotations

from dataclasses import dataclass, field

from starlette.types import Message, Receive, Send

from ._errors import ApiError, invalid
from ._request import MAX_BODY_BYTES


class ClientGone(Exception):
    """The client closed its connection."""


@dataclass(slots=True)
class Reply:
    """A response in the making. `headers` may be added to until it has begun."""

    send: Send
    headers: dict[str, str] = field(default_factory=dict)
    begun: bool = False

    async def begin(self, status: int, content_type: str) -> None:
        headers = {**self.headers, "content-type": content_type}
        encoded = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in headers.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": encoded})
        self.begun = True

    async def body(self, data: bytes, *, more: bool) -> None:
        await self.send({"type": "http.response.body", "body": data, "more_body": more})

    async def whole(self, status: int, content_type: str, data: bytes) -> None:
        """A complete response at once."""
        self.headers["content-length"] = str(len(data))
        await self.begin(status, content_type)
        await self.body(data, more=False)

    async def error(self, error: ApiError) -> None:
        """An OpenAI-shaped error; as the stream's last event if it has begun."""
        if self.begun:
            await self.body(error.sse(), more=False)
            return
        self.headers.update(error.headers())
        await self.whole(error.status, "application/json", error.body())


async def read_body(receive: Receive) -> bytes:
    """The whole body, up to 64 MiB.

    Raises:
        ClientGone: the client left before it had sent all. ApiError: too large.
    """
    body = bytearray()
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise invalid(f"the body is larger than {MAX_BODY_BYTES // 2**20} MiB")
        if not message.get("more_body"):
            return bytes(body)


async def until_disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
