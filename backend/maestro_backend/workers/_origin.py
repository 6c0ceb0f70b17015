"""Where a remote model folder is read from: a web server, or a folder that is mounted."""

from __future__ import annotations

import asyncio
import os
import re
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, Self, TypeVar
from urllib.parse import quote, unquote, urlsplit

import httpx

from maestro_agents.protocol import BackendError, ConfigError

TOKEN_VARIABLE = "MAESTRO_SOURCE_TOKEN"

_CHUNK_BYTES = 1024**2
_MISSING = (403, 404, 410)  # an object store that may not be listed answers 403
_TIMEOUT = httpx.Timeout(30, connect=10)
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)


T = TypeVar("T")


class MissingError(ConfigError):
    """The remote folder lacks a file."""


class TransientError(BackendError):
    """It may work in a moment."""


class ChangedError(TransientError):
    """What is held of a file is not the beginning of what the origin has now."""


@dataclass(frozen=True, slots=True)
class Body:
    """The bytes of a file from `start` on. `size` is that of the whole file, None if not told.

    `validator` names this state of the file, "" where the server tells none.
    """

    start: int
    size: int | None
    validator: str
    chunks: AsyncIterator[bytes]


class Origin(Protocol):
    """A remote folder; `shown` names it without any secret. Errors are those of this module."""

    shown: str

    async def names(self) -> Sequence[str] | None:
        """The files in it, None where it cannot be listed."""

    async def size(self, name: str) -> int | None:
        """Bytes of a file, None where they are not told."""

    def body(
        self, name: str, start: int = 0, validator: str = ""
    ) -> AbstractAsyncContextManager[Body]:
        """A file from `start` on; from its beginning if `validator` is no longer its state."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *error: object) -> None: ...


def origin(source: str) -> Origin:
    """The origin of an `https://`, `http://` or `file:///` source.

    Raises:
        ConfigError: it is not an address of a folder.
    """
    address = urlsplit(source)
    if address.scheme == "file":
        if address.netloc not in ("", "localhost") or not address.path.startswith("/"):
            raise ConfigError(f"{source}: write file:///folder, an absolute path on this host")
        return MountedFolder(Path(unquote(address.path)))
    return WebFolder(source)


class WebFolder:
    """A folder on a web server. `user:password@` in the address is sent to that server only, as is
    the bearer token of `$MAESTRO_SOURCE_TOKEN`, and this only over https.
    """

    def __init__(self, source: str) -> None:
        address = urlsplit(source)
        place = address.netloc.rpartition("@")[2]
        self.shown = f"{address.scheme}://{place}{address.path.rstrip('/')}"
        if not address.hostname or address.query or address.fragment:
            raise ConfigError(f"{self.shown}: write https://host/folder, without ? and #")
        self._secure = address.scheme == "https"
        auth, headers = None, {"accept-encoding": "identity"}
        token = os.environ.get(TOKEN_VARIABLE, "")
        if address.username is not None:
            auth = httpx.BasicAuth(unquote(address.username), unquote(address.password or ""))
        elif token and self._secure:
            headers["authorization"] = f"Bearer {token}"
        self._client = httpx.AsyncClient(
            headers=headers, auth=auth, follow_redirects=True, timeout=_TIMEOUT
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._client.aclose()

    async def names(self) -> None:
        """A web server's folder cannot be listed."""

    async def size(self, name: str) -> int | None:
        """By a HEAD request; a server that knows none tells nothing."""
        async with self._answer("HEAD", name, {}) as response:
            if response.status_code in (405, 501):
                return None
            self._check(response, name)
            return _whole(response.headers.get("content-length"))

    @asynccontextmanager
    async def body(self, name: str, start: int = 0, validator: str = "") -> AsyncIterator[Body]:
        """By a range request, if there is a `validator` (an ETag or a date of last change)."""
        headers = {}
        if start and validator:
            headers = {"range": f"bytes={start}-", "if-range": validator}
        async with self._answer("GET", name, headers) as response:
            self._check(response, name)
            yield self._body(response, name, start if headers else 0)

    def _body(self, response: httpx.Response, name: str, start: int) -> Body:
        told = response.headers
        validator = told.get("etag", "")
        if not validator or validator.startswith("W/"):  # a weak one is no promise about bytes
            validator = told.get("last-modified", "")
        if response.status_code == 416:
            size = _whole(told.get("content-range", "").removeprefix("bytes */"))
            if not start or size != start:
                raise ChangedError(f"{self.shown}/{name} has changed on the server")
            return Body(start, size, validator, _nothing())
        if response.status_code == 206:
            begin, size = _content_range(told.get("content-range", ""))
            if begin != start:
                raise ChangedError(f"{self.shown}/{name}: the server sent another range")
            return Body(start, size, validator, response.aiter_raw())
        return Body(0, _whole(told.get("content-length")), validator, response.aiter_raw())

    @asynccontextmanager
    async def _answer(
        self, method: str, name: str, headers: dict[str, str]
    ) -> AsyncIterator[httpx.Response]:
        url = f"{self.shown}/{quote(name)}"
        try:
            async with self._client.stream(method, url, headers=headers) as response:
                yield response
        except httpx.HTTPError as error:
            raise self._failure(error) from error
        except httpx.InvalidURL as error:
            raise ConfigError(f"{self.shown} is not an address: {error}") from None

    def _failure(self, error: httpx.HTTPError) -> BackendError:
        told = f"cannot fetch from {self.shown}: {str(error) or type(error).__name__}"
        if isinstance(error.__cause__, ssl.SSLError) or "[SSL" in str(error):
            return BackendError(
                f"{told}. TLS fails: is it an https server? A certificate authority of your own is"
                " given as SSL_CERT_FILE"
            )
        if isinstance(error, httpx.TooManyRedirects | httpx.UnsupportedProtocol):
            return BackendError(told)
        if isinstance(error, httpx.ConnectError):
            return TransientError(f"{told}. Is the address right, and the server up?")
        return TransientError(told)

    def _check(self, response: httpx.Response, name: str) -> None:
        status, url = response.status_code, f"{self.shown}/{name}"
        if self._secure and response.url.scheme != "https":
            raise BackendError(f"{url} redirects from https to http; use its final address")
        if status in (200, 206, 416):
            if response.headers.get("content-encoding", "identity") != "identity":
                raise BackendError(f"{url} comes compressed; have the server send files as are")
            return
        if status == 401:
            raise BackendError(
                f"{url} asks for a login (401): set {TOKEN_VARIABLE} (sent over https only), or"
                " write https://user:password@host/..."
            )
        if status in _MISSING:
            raise MissingError(f"{url} is not there (status {status}); is the address right?")
        if status in _TRANSIENT:
            raise TransientError(f"the server answers {status} for {url}")
        raise BackendError(f"the server answers {status} for {url}")


class MountedFolder:
    """A folder in the file system, a network share for instance."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.shown = f"file://{folder}"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        return None

    async def names(self) -> Sequence[str]:
        """All regular files below it but hidden ones."""
        return await asyncio.to_thread(self._list)

    def _list(self) -> list[str]:
        found: list[str] = []
        for parent, folders, files in os.walk(self._folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            below = Path(parent).relative_to(self._folder)
            whole = (name for name in files if os.path.isfile(os.path.join(parent, name)))
            found += [(below / name).as_posix() for name in whole if not name.startswith(".")]
        return sorted(found)

    async def size(self, name: str) -> int:
        """As the file system tells it."""
        with self._telling(name):
            return (await asyncio.to_thread((self._folder / name).stat)).st_size

    @asynccontextmanager
    async def body(self, name: str, start: int = 0, validator: str = "") -> AsyncIterator[Body]:
        """Size and time of the last change are the validator."""
        with ExitStack() as opened:
            with self._telling(name):
                path = self._folder / name
                file = opened.enter_context(await asyncio.to_thread(path.open, "rb"))
                found = os.fstat(file.fileno())
            state = f"{found.st_size}-{found.st_mtime_ns}"
            begin = min(start, found.st_size) if validator == state else 0
            file.seek(begin)
            yield Body(begin, found.st_size, state, self._chunks(file, name))

    async def _chunks(self, file: IO[bytes], name: str) -> AsyncIterator[bytes]:
        while True:
            with self._telling(name):
                chunk = await settled(file.read, _CHUNK_BYTES)
            if not chunk:
                return
            yield chunk

    @contextmanager
    def _telling(self, name: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingError(f"there is no {self.shown}/{name}") from error
        except OSError as error:
            raise BackendError(f"cannot read {self.shown}/{name}: {error}") from error


async def settled(work: Callable[..., T], *arguments: Any) -> T:
    """`work` in a thread; a cancelled caller waits for it, as it has a file in use."""
    task = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


def _content_range(text: str) -> tuple[int | None, int | None]:
    """The first byte and the size of the whole file in a `Content-Range` header."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", text)
    return (int(match[1]), _whole(match[2])) if match else (None, None)


async def _nothing() -> AsyncIterator[bytes]:
    for chunk in tuple[bytes, ...]():
        yield chunk
