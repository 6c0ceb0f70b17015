"""Events and commands as JSON objects: `{"type": "CallArrived", ...fields}`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, get_args

from pydantic import TypeAdapter

from ._commands import Command
from ._events import Event

_EVENTS: dict[str, TypeAdapter[Any]] = {t.__name__: TypeAdapter(t) for t in get_args(Event)}
_COMMANDS: dict[str, TypeAdapter[Any]] = {t.__name__: TypeAdapter(t) for t in get_args(Command)}


def encode(item: Event | Command) -> dict[str, Any]:
    """An event or command as a JSON-ready dict."""
    return {"type": type(item).__name__, **asdict(item)}


def decode_event(data: dict[str, Any]) -> Event:
    """The event that `encode` wrote.

    Raises:
        KeyError: an unknown type. pydantic.ValidationError: wrong fields.
    """
    event: Event = _decode(_EVENTS, data)
    return event


def decode_command(data: dict[str, Any]) -> Command:
    """The command that `encode` wrote; errors as for `decode_event`."""
    command: Command = _decode(_COMMANDS, data)
    return command


def _decode(adapters: dict[str, TypeAdapter[Any]], data: dict[str, Any]) -> Any:
    fields = {key: value for key, value in data.items() if key != "type"}
    return adapters[data["type"]].validate_python(fields)
