"""Keys of learned tables as plain JSON, and back."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Any

Key = tuple[Hashable, ...]


def plain_key(key: Key) -> list[Any]:
    """A key of names and numbers as a JSON list."""
    return list(key)


def keys_from_plain(rows: Iterable[list[Any]]) -> Iterator[tuple[Key, Any]]:
    """The (key, value) pairs of a JSON list of [key, value]."""
    for key, value in rows:
        yield tuple(key), value
