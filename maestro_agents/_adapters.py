"""Finds the adapter that can read an object, among the entry points of this package's group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Final, Protocol, TypeVar

from ._log import fail_open
from .protocol import Slo, UnsupportedError

T = TypeVar("T")

GROUP: Final = "maestro_agents.adapters"

EXTRAS: Final = {"langgraph": "LangGraph graphs"}
"""The extras of this distribution that bring an adapter, and what each reads."""


@dataclass(frozen=True, slots=True)
class Options:
    """The arguments of `workflow()`, validated. `roles` maps a stage or node name to its role."""

    name: str | None = None
    slo: Slo = field(default_factory=Slo)
    roles: Mapping[str, str] = field(default_factory=dict)
    tenant: str | None = None


class Adapter(Protocol):
    """What an entry point names: it reads the objects of one framework."""

    def handles(self, obj: object) -> bool:
        """Whether `wrap` can take `obj`. Must be quick, and not import the framework."""

    def wrap(self, obj: T, options: Options, default_name: str | None = None) -> T:
        """A copy of `obj`, of the same type, whose runs Maestro follows.

        Raises:
            ConfigError: an option does not fit `obj`.
            UnsupportedError: `obj` cannot be described on the wire.
        """

    def instrument(self, options: Options) -> None:
        """Follow every object of the framework that runs from now on and is not wrapped.

        Idempotent: the last options hold. Nothing happens where the framework is not installed.
        """

    def uninstrument(self) -> None:
        """Undo `instrument`. Idempotent."""


def find_adapter(obj: object) -> Adapter | None:
    """The first adapter that handles `obj`."""
    return next((adapter for adapter in adapters() if adapter.handles(obj)), None)


def unsupported(obj: object) -> UnsupportedError:
    """The error for an object that no adapter handles; names the extras that could."""
    kind = f"{type(obj).__module__}.{type(obj).__qualname__}"
    known = ", ".join(
        f'{what} (pip install "maestro-mas[{extra}]")' for extra, what in EXTRAS.items()
    )
    return UnsupportedError(f"workflow() cannot read a {kind}; it reads {known}")


def adapters() -> tuple[Adapter, ...]:
    """Every adapter that is installed, by the name of its entry point."""
    loaded = (_load(entry) for entry in installed())
    return tuple(adapter for adapter in loaded if adapter)


@cache
def installed() -> tuple[EntryPoint, ...]:
    """The entry points of all adapters, each name once."""
    entries: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        entries.setdefault(entry.name, entry)
    return tuple(entries[name] for name in sorted(entries))


@fail_open
def _load(entry: EntryPoint) -> Adapter:
    adapter: Adapter = entry.load()
    return adapter


installed()  # now: to look through what is installed would block an event loop later
