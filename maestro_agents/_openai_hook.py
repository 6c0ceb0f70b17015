"""Annotates chat completions of the stock `openai` package, from 1.93 to 3.x.

The one place that is stable across those majors is the SDK's own `request`: sync and async, plain,
streamed and parsed requests all pass it, once each. The SDK's retries happen inside, on what went
in: they repeat the identity.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any

from ._context import begin_call, find_caller, render
from ._fallback import Detour, detour_of
from ._log import fail_open, tell_once
from ._settings import origin, settings
from .protocol import BODY_KEY, HEADER_RUN, HEADER_STAGE

_HOOK = "request"
_ORIGINAL = "__maestro_original__"
_OURS = "__maestro_itself__"
"""Wrappers by others copy our attributes; this one then names another function."""


def install() -> None:
    """Patch the client classes of `openai`, if it is imported. Idempotent, and then quick."""
    module = sys.modules.get("openai")
    last = getattr(module, "AsyncOpenAI", None)  # of those below; openai may be half imported
    if last is None or hasattr(getattr(last, _HOOK, None), _ORIGINAL):
        return
    for client, wrap in _clients():
        original = getattr(client, _HOOK)
        if not hasattr(original, _ORIGINAL):
            setattr(client, _HOOK, wrap(original))


def uninstall() -> None:
    """Undo `install`, but where others have put something around it since."""
    for client, _ in _clients():
        current = getattr(client, _HOOK)
        if getattr(current, _OURS, None) is current:
            setattr(client, _HOOK, getattr(current, _ORIGINAL))


def _clients() -> Iterator[tuple[type, Callable[[Any], Any]]]:
    module = sys.modules.get("openai")
    for name, wrap in (("OpenAI", _wrap_sync), ("AsyncOpenAI", _wrap_async)):
        client = getattr(module, name, None)
        if isinstance(client, type) and hasattr(client, _HOOK):
            yield client, wrap


def _wrap_sync(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def request(self: Any, cast_to: Any, options: Any, **kwargs: Any) -> Any:
        told, detour = _prepared(self, options) or (options, None)
        first = None
        if detour is None or detour.maestro_first():
            try:
                reply = original(self, cast_to, told, **kwargs)
                return detour.unused(reply) if detour else reply
            except Exception as error:
                if detour is None or not detour.is_needed(error):
                    raise
                first = error
        try:
            return original(self, cast_to, detour.options, **kwargs)
        except Exception as error:
            raise error from first or error.__cause__

    setattr(request, _ORIGINAL, original)
    setattr(request, _OURS, request)
    return request


def _wrap_async(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    async def request(self: Any, cast_to: Any, options: Any, **kwargs: Any) -> Any:
        told, detour = _prepared(self, options) or (options, None)
        first = None
        if detour is None or detour.maestro_first():
            try:
                reply = await original(self, cast_to, told, **kwargs)
                return detour.unused(reply) if detour else reply
            except Exception as error:
                if detour is None or not detour.is_needed(error):
                    raise
                first = error
        try:
            return await original(self, cast_to, detour.options, **kwargs)
        except Exception as error:
            raise error from first or error.__cause__

    setattr(request, _ORIGINAL, original)
    setattr(request, _OURS, request)
    return request


@fail_open
def _prepared(client: Any, options: Any) -> tuple[Any, Detour | None]:
    """What goes to the client's own server, and the way around it, if there is one."""
    backend = settings()
    if not backend.active:
        return options, None
    url = str(options.url if "://" in options.url else client.base_url)
    if backend.serves(url):
        detour = detour_of(client, options, backend) if backend.fallback_base_url else None
        return _annotated(options) or options, detour
    if _is_chat(options) and find_caller():
        tell_once(
            f"elsewhere:{origin(url)}",
            "calls of a workflow go to %s, not to MAESTRO_BASE_URL=%s: they are not annotated",
            url,
            backend.base_url,
        )
    return options, None


@fail_open
def _annotated(options: Any) -> Any:
    """A copy of `options` that says who is calling; None when there is nothing to say.

    The SDK shares headers and body with the caller and with retries: they are never edited.
    """
    if not _is_chat(options):
        return None
    given = dict(options.headers) if isinstance(options.headers, Mapping) else {}
    if {HEADER_RUN, HEADER_STAGE} & {name.lower() for name in given}:
        return None
    if (call := begin_call()) is None:
        return None
    headers, body = render(call)
    copy = options.model_copy()
    copy.headers = {**given, **headers}
    copy.json_data = {**body, **options.json_data}
    return copy


def _is_chat(options: Any) -> bool:
    body = options.json_data
    return (
        options.method.lower() == "post"
        and options.url.endswith("/chat/completions")
        and isinstance(body, dict)
        and BODY_KEY not in (getattr(options, "extra_json", None) or {})
    )
