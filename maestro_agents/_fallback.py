"""Where calls go while Maestro cannot be reached: MAESTRO_FALLBACK_BASE_URL, if it is set.

Only a connection that fails leads there: never an HTTP error, never a reply that takes long, for
then the call may be running.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from ._log import fail_open, logger, warn_once
from ._settings import Settings, origin
from .protocol import BODY_KEY

T = TypeVar("T")

RETRY_S: Final = 5.0
"""How long no call tries a Maestro that could not be reached; then one does."""

OPENAI_BASE_URL: Final = "https://api.openai.com/v1"

_UNREACHED: Final = {
    "ConnectError",
    "ConnectTimeout",
    "ReadError",
    "RemoteProtocolError",
    "WriteError",
}
"""Names, for httpx and httpx2 alike, of what is raised when no reply will come."""

_PASSING: Final = {"accept", "content-type", "idempotency-key", "traceparent", "user-agent"}
"""The client was made for Maestro's host: what else it sends may be that host's only."""

_SECRETS: Final = {"authorization", "api-key", "x-api-key"}

_down_until: dict[str, float] = {}
"""By Maestro's base URL, on the monotonic clock. Each step on it is atomic: no lock."""


@dataclass(frozen=True, slots=True)
class Detour:
    """The same request to the fallback. `options` are what the SDK's `request` takes."""

    options: Any
    backend: Settings

    def maestro_first(self) -> bool:
        """Whether this request should try Maestro: it is not known to be down."""
        now = time.monotonic()
        until = _down_until.get(self.backend.base_url)
        if until is None:
            return True
        if now < until:
            return False
        # This call looks whether Maestro is back; the others need not wait for what it finds.
        _down_until[self.backend.base_url] = now + RETRY_S
        return True

    def unused(self, reply: T) -> T:
        """Maestro answered: `reply`, as it came."""
        if _down_until.pop(self.backend.base_url, None):
            logger.info("%s is back", self.backend.base_url)
        return reply

    def is_needed(self, error: Exception) -> bool:
        """Whether `error` means that Maestro was not reached."""
        if not (_names(error.__cause__) & _UNREACHED):
            if hasattr(error, "status_code"):
                self.unused(None)
            return False
        url = self.backend.base_url
        if url not in _down_until:
            logger.warning(
                "%s cannot be reached (%s): calls go to %s, it is tried again every %g s",
                url,
                error.__cause__,
                self.backend.fallback_base_url,
                RETRY_S,
            )
        _down_until[url] = time.monotonic() + RETRY_S
        return True


@fail_open
def detour_of(client: Any, options: Any, backend: Settings) -> Detour | None:
    """The way around `backend`, which has a fallback, for one request; None where there is none.

    Args:
        client: an `openai` client whose requests go to `backend`.
        options: what its `request` was given.
        backend: the settings.
    """
    if "://" in options.url or options.files or getattr(options, "content", None):
        return None
    secrets = {backend.api_key, client.api_key} - {None, ""}
    if _authenticates(client, options, secrets):
        warn_once(
            "fallback-auth",
            "a client with credentials in its query or its http_client= cannot use "
            "MAESTRO_FALLBACK_BASE_URL",
        )
        return None
    copy = options.model_copy()
    copy.url = f"{backend.fallback_base_url}/{options.url.lstrip('/')}"
    copy.headers = _headers(client, options.headers, backend, secrets)
    copy.json_data = _without_ours(options.json_data)
    copy.extra_json = _without_ours(options.extra_json)
    return Detour(copy, backend)


def _headers(client: Any, given: Any, backend: Settings, secrets: set[Any]) -> dict[str, Any]:
    """Of all headers those that tell nothing of Maestro's host, with the fallback's key."""
    own = dict(given) if isinstance(given, Mapping) else {}
    omit = sys.modules["openai"].Omit()
    every = {**client.default_headers, **own}
    secret = {*_hidden(every, secrets)}
    hidden = {name: omit for name in every if name in secret or not _passes(name)}
    kept = {name: value for name, value in own.items() if name not in hidden}
    # "api-key": an Azure client would add it only later.
    return {**hidden, **kept, "api-key": omit, "Authorization": f"Bearer {_key(backend)}"}


def _passes(name: str) -> bool:
    return name.lower() in _PASSING or name.lower().startswith("x-stainless-")


def _hidden(headers: Mapping[str, Any], secrets: set[Any]) -> Iterator[str]:
    for name, value in headers.items():
        ours = name.lower().startswith("x-maestro-") or name.lower() in _SECRETS
        if ours or str(value).removeprefix("Bearer ") in secrets:
            yield name


def _authenticates(client: Any, options: Any, secrets: set[Any]) -> bool:
    """Whether the client adds credentials that we could not take out again."""
    http = client._client
    fixed = {**http.headers, **client.default_query, **options.params}
    return getattr(http, "auth", None) is not None or any(_hidden(fixed, secrets))


def _key(backend: Settings) -> str:
    if backend.fallback_api_key:
        return backend.fallback_api_key
    openai = os.environ.get("OPENAI_BASE_URL") or OPENAI_BASE_URL
    same = origin(openai) == origin(backend.fallback_base_url or "")
    return (same and os.environ.get("OPENAI_API_KEY")) or "EMPTY"


def _without_ours(body: Any) -> Any:
    return {k: v for k, v in body.items() if k != BODY_KEY} if isinstance(body, dict) else body


def _names(error: BaseException | None) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}
