"""The call that the current context is about to make, and what its request says about it."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

from ._log import warn_once
from .protocol import BODY_KEY, MAX_ANNOTATION_BYTES, Annotation, CallIdentity


@dataclass(frozen=True, slots=True)
class CallContext:
    """Who is calling, and what follows."""

    identity: CallIdentity
    annotation: Annotation


class Extras(NamedTuple):
    """What an annotated request has more than a plain one."""

    headers: dict[str, str]
    body: dict[str, Any]


Caller = Callable[[], CallContext | None]
"""Begins the next call of a stage; None once its run is over. Each request is one call."""

current_caller: ContextVar[Caller | None] = ContextVar("maestro_current_caller", default=None)
"""Set by an adapter just before a model call, None everywhere else."""

Finder = Callable[[], Caller | None]
"""Tells from a framework's own context who is calling, where no adapter has set it."""

_finders: list[Finder] = []


def add_finder(finder: Finder) -> None:
    """Ask `finder` too from now on. Idempotent; a finder is quick and may raise."""
    if finder not in _finders:
        _finders.append(finder)


def find_caller() -> Caller | None:
    """Who is calling in this context; None when nobody known is."""
    caller = current_caller.get()
    for finder in _finders if caller is None else ():
        caller = caller or finder()
    return caller


def begin_call() -> CallContext | None:
    """The call that the request about to be made is; None when nobody known is calling."""
    caller = find_caller()
    return caller() if caller else None


def render(call: CallContext) -> Extras:
    """The headers and body keys of `call`.

    Over the size limit the announcement is left out, and if that is not enough, all of the
    annotation; logged once.
    """
    headers = call.identity.headers()
    body, size = call.annotation.wire
    if size <= MAX_ANNOTATION_BYTES:
        return Extras(headers, {BODY_KEY: body})
    warn_once(
        "annotation-size",
        "announcement of stage %s dropped: the annotation has %d bytes, at most %d are sent",
        call.identity.stage,
        size,
        MAX_ANNOTATION_BYTES,
    )
    said = call.annotation
    rest = Annotation.model_construct(role=said.role, slo=said.slo, tenant=said.tenant)
    body, size = rest.wire
    return Extras(headers, {BODY_KEY: body} if size <= MAX_ANNOTATION_BYTES else {})
