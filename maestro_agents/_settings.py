"""The SDK's environment variables, read when they are used.

MAESTRO_BASE_URL   the backend's OpenAI base URL; unset means: annotate nothing, send nothing
MAESTRO_API_KEY    the backend's key, when it asks for one
MAESTRO_ENABLED    `false` turns every annotation and event off
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
_BOOLEANS = {
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("0", "false", "no", "off"), False),
}

Origin = tuple[str, str, int]


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment says. `explicit`: MAESTRO_BASE_URL is set, not our default."""

    base_url: str = DEFAULT_BASE_URL
    api_key: str | None = None
    enabled: bool = True
    explicit: bool = False

    @property
    def active(self) -> bool:
        """Whether calls are annotated and events are sent."""
        return self.explicit and self.enabled

    @property
    def control_url(self) -> str:
        """Where the control routes are: `<base_url>/maestro`."""
        return f"{self.base_url}/maestro"


def settings() -> Settings:
    """The settings as the environment is now.

    Raises:
        ConfigError: a variable has a value that cannot be used; the message names the fix.
    """
    return _parse(
        os.environ.get("MAESTRO_BASE_URL", ""),
        os.environ.get("MAESTRO_API_KEY", ""),
        os.environ.get("MAESTRO_ENABLED", ""),
    )


def is_maestro(base_url: str) -> bool:
    """Whether `base_url` has the scheme, host and port of an explicit MAESTRO_BASE_URL."""
    current = settings()
    return current.explicit and origin(base_url) == origin(current.base_url)


@lru_cache(maxsize=64)
def origin(url: str) -> Origin | None:
    """Scheme, host and port of `url`; None when it is not an http(s) URL."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in _PORTS or not parts.hostname:
        return None
    return parts.scheme, parts.hostname, port or _PORTS[parts.scheme]


@lru_cache(maxsize=8)
def _parse(base_url: str, api_key: str, enabled: str) -> Settings:
    switch = _BOOLEANS.get(enabled.strip().lower() or "true")
    if switch is None:
        raise ConfigError(f"MAESTRO_ENABLED={enabled!r} is not a switch: use true or false")
    url = (base_url.strip() or DEFAULT_BASE_URL).rstrip("/")
    if origin(url) is None or not url.endswith("/v1"):
        raise ConfigError(
            f"MAESTRO_BASE_URL={base_url!r} is not an OpenAI base URL: "
            f"use http://HOST:PORT/v1, for example {DEFAULT_BASE_URL}"
        )
    return Settings(url, api_key.strip() or None, switch, explicit=bool(base_url.strip()))
