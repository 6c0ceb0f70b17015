"""The SDK's environment variables, read when they are used.

MAESTRO_BASE_URL           the backend's OpenAI base URL; unset: annotate nothing, send nothing
MAESTRO_API_KEY            the backend's key, when it asks for one
MAESTRO_ENABLED            `false` turns every annotation and event off
MAESTRO_FALLBACK_BASE_URL  the OpenAI base URL that takes the calls while the backend is down
MAESTRO_FALLBACK_API_KEY   its key; the backend's own key never goes there
MAESTRO_SEND_CONTENT       `true` sends what goes into tools and comes out of them
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Final
from urllib.parse import urlsplit

from .protocol import ConfigError

DEFAULT_BASE_URL: Final = "http://127.0.0.1:8000/v1"

_PORTS = {"http": 80, "https": 443}
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_BOOLEANS = {
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("0", "false", "no", "off"), False),
}
_NAMES = (
    "MAESTRO_BASE_URL",
    "MAESTRO_API_KEY",
    "MAESTRO_ENABLED",
    "MAESTRO_FALLBACK_BASE_URL",
    "MAESTRO_FALLBACK_API_KEY",
    "MAESTRO_SEND_CONTENT",
)

Origin = tuple[str, str, int]


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment says. `explicit`: MAESTRO_BASE_URL is set, not our default."""

    base_url: str = DEFAULT_BASE_URL
    api_key: str | None = None
    enabled: bool = True
    explicit: bool = False
    fallback_base_url: str | None = None
    fallback_api_key: str | None = None
    send_content: bool = False

    @property
    def active(self) -> bool:
        """Whether calls are annotated and events are sent."""
        return self.explicit and self.enabled

    @property
    def control_url(self) -> str:
        """Where the control routes are: `<base_url>/maestro`."""
        return f"{self.base_url}/maestro"

    def serves(self, url: str) -> bool:
        """Whether `url` has the scheme, host and port of an explicit MAESTRO_BASE_URL."""
        return self.explicit and origin(url) == origin(self.base_url)


def settings() -> Settings:
    """The settings as the environment is now.

    Raises:
        ConfigError: a variable has a value that cannot be used; the message names the fix.
    """
    return _parse(*map(os.environ.get, _NAMES))


def is_maestro(base_url: str) -> bool:
    """Whether the settings' `serves(base_url)`."""
    return settings().serves(base_url)


@lru_cache(maxsize=64)
def origin(url: str) -> Origin | None:
    """Scheme, host and port of `url`; None when it is not an http(s) URL.

    The three names of the loopback host count as one.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in _PORTS or not parts.hostname:
        return None
    host = "localhost" if parts.hostname in _LOOPBACK else parts.hostname
    return parts.scheme, host, port or _PORTS[parts.scheme]


@lru_cache(maxsize=8)
def _parse(*values: str | None) -> Settings:
    given = dict(zip(_NAMES, ((value or "").strip() for value in values), strict=True))
    return Settings(
        _base_url(given["MAESTRO_BASE_URL"]),
        given["MAESTRO_API_KEY"] or None,
        _switch("MAESTRO_ENABLED", given, True),
        explicit=bool(given["MAESTRO_BASE_URL"]),
        fallback_base_url=_fallback(given),
        fallback_api_key=given["MAESTRO_FALLBACK_API_KEY"] or None,
        send_content=_switch("MAESTRO_SEND_CONTENT", given, False),
    )


def _base_url(given: str) -> str:
    url = (given or DEFAULT_BASE_URL).rstrip("/")
    if origin(url) is None or not url.endswith("/v1"):
        raise ConfigError(
            f"MAESTRO_BASE_URL={given!r} is not an OpenAI base URL: "
            f"use http://HOST:PORT/v1, for example {DEFAULT_BASE_URL}"
        )
    return url


def _fallback(given: dict[str, str]) -> str | None:
    url = given["MAESTRO_FALLBACK_BASE_URL"].rstrip("/")
    if not url:
        return None
    if origin(url) is None:
        raise ConfigError(
            f"MAESTRO_FALLBACK_BASE_URL={url!r} is not an OpenAI base URL: "
            "use one such as https://api.openai.com/v1"
        )
    if origin(url) == origin(given["MAESTRO_BASE_URL"]):
        raise ConfigError(
            f"MAESTRO_FALLBACK_BASE_URL={url!r} is MAESTRO_BASE_URL's own server: "
            "name another one, or unset it"
        )
    return url


def _switch(name: str, given: dict[str, str], default: bool) -> bool:
    value = given[name].lower()
    if value and value not in _BOOLEANS:
        raise ConfigError(f"{name}={given[name]!r} is not a switch: use true or false")
    return _BOOLEANS.get(value, default)
