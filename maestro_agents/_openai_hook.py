"""Annotates chat completions of the stock `openai` package, from 1.93 to 3.x.

The one hook that is stable across those majors is the SDK's own `_prepare_options`: it runs for
sync and async, plain, streamed and parsed requests, and again for each retry.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from threading import Lock
from typing import Any

from ._context import current_call, render
from ._log import fail_open
from ._settings import is_maestro
from .protocol import BODY_KEY, HEADER_RUN, HEADER_STAGE

_HOOK = "_prepare_options"
_ORIGINAL = "__maestro_original__"
_lock = Lock()


def install() -> None:
    """Patch the client classes of `openai`, if it is imported. Idempotent."""
    with _lock:
        for client, wrap in _clients():
            original = getattr(client, _HOOK)
            if not hasattr(original, _ORIGINAL):
                setattr(client, _HOOK, wrap(original))


def uninstall() -> None:
    """Undo `install`."""
    with _lock:
        for client, _ in _clients():
            if original := getattr(getattr(client, _HOOK), _ORIGINAL, None):
                setattr(client, _HOOK, original)


def _clients() -> Iterator[tuple[type, Callable[[Any], Any]]]:
    module = sys.modules.get("openai")
    for name, wrap in (("OpenAI", _wrap_sync), ("AsyncOpenAI", _wrap_async)):
        client = getattr(module, name, None)
        if isinstance(client, type) and hasattr(client, _HOOK):
            yield client, wrap


def _wrap_sync(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def prepare(self: Any, options: Any) -> Any:
        prepared = original(self, options)
        _annotate(self, prepared)
        return prepared

    setattr(prepare, _ORIGINAL, original)
    return prepare


def _wrap_async(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    async def prepare(self: Any, options: Any) -> Any:
        prepared = await original(self, options)
        _annotate(self, prepared)
        return prepared

    setattr(prepare, _ORIGINAL, original)
    return prepare


@fail_open
def _annotate(client: Any, options: Any) -> None:
    call = current_call.get()
    if call is None or not _is_chat(options) or not is_maestro(str(client.base_url)):
        return
    given = dict(options.headers) if isinstance(options.headers, Mapping) else {}
    if {HEADER_RUN, HEADER_STAGE} & {name.lower() for name in given}:
        return
    headers, body = render(call)
    # The SDK shares both dicts with the request's later retries: replace them, never edit them.
    options.headers = {**given, **headers}
    options.json_data = {**body, **options.json_data}


def _is_chat(options: Any) -> bool:
    body = options.json_data
    return (
        options.method.lower() == "post"
        and options.url.endswith("/chat/completions")
        and isinstance(body, dict)
        and BODY_KEY not in (getattr(options, "extra_json", None) or {})
    )
