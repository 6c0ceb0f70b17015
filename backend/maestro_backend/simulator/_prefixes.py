"""The prefix cache of an engine: what ended calls leave in its free blocks."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from heapq import heappop, heappush


@dataclass(slots=True, eq=False)
class Entry:
    """A beginning of `depth` blocks. It owns the last `blocks` of them; all others are its
    parent's. `holds`: calls that use it, entries below it that are held, its pin."""

    depth: int
    blocks: int
    parent: Entry | None
    keys: list[Hashable]
    holds: int = 0
    children: int = 0
    used: int = 0


@dataclass(slots=True)
class _Pin:
    until: float
    entry: Entry | None = None


class Prefixes:
    """Entries form a tree: a call that continues an entry leaves one below it, and one that shares
    part of it splits it there. So shared blocks are counted once, whether calls share them at
    once or one after the other.

    The least recently used block goes first, of equals the one farthest from the beginning, as in
    vLLM. What running calls use and what is pinned stays. All counts are of blocks.
    """

    __slots__ = ("_entries", "_expiries", "_leaves", "_pins", "_pushes", "_tick", "held", "total")

    def __init__(self) -> None:
        self.total = 0
        """Blocks of all entries."""
        self.held = 0
        """Those that cannot be evicted now."""
        self._entries: dict[Hashable, Entry] = {}
        self._leaves: list[tuple[int, int, Entry]] = []  # by use, with some that are none any more
        self._pins: dict[Hashable, _Pin] = {}
        self._expiries: list[tuple[float, int, Hashable]] = []
        self._tick = 0
        self._pushes = 0

    def depth(self, key: Hashable) -> int:
        """How much is cached of what was left under this key."""
        entry = self._find(key)
        return entry.depth if entry is not None else 0

    def take(self, key: Hashable, most: int) -> Entry | None:
        """Find the beginning of an entry, up to `most` blocks, and hold it."""
        entry = self._find(key)
        if entry is None or most < 1:
            return None
        if entry.depth > most:
            while entry.depth - entry.blocks >= most:
                assert entry.parent is not None
                entry = entry.parent
            if entry.depth > most:
                entry = _split(entry, most)
        self._hold(entry)
        return entry

    def release(self, entry: Entry, used: bool = True) -> None:
        node: Entry | None = entry
        while node is not None:
            node.holds -= 1
            if node.holds:
                break
            if used:
                self._tick += 1
                node.used = self._tick
            self.held -= node.blocks
            if not node.children:
                self._push(node)
            node = node.parent

    def leave(self, key: Hashable, depth: int, parent: Entry | None) -> None:
        """A call has ended that used `parent` and has filled blocks up to `depth`."""
        blocks = depth - parent.depth if parent is not None else depth
        if blocks:
            entry = Entry(depth, blocks, parent, [key])
            self._tick += 1
            entry.used = self._tick
            if parent is not None:
                parent.children += 1
            self.total += blocks
            self._push(entry)
        elif parent is not None:
            entry = parent
            entry.keys.append(key)
        else:
            return
        self._entries[key] = entry
        if self._pins:
            pin = self._pins.get(key)
            if pin is not None:
                self._unhold(pin)
                pin.entry = entry
                self._hold(entry)

    def evict(self, blocks: int) -> int:
        """Free so many blocks, or what can be; how many that was."""
        missing = blocks
        leaves = self._leaves
        while missing and leaves:
            used, _, entry = leaves[0]
            if entry.used != used or entry.holds or entry.children:
                heappop(leaves)
            elif entry.blocks > missing:
                entry.blocks -= missing
                entry.depth -= missing
                missing = 0
            else:
                heappop(leaves)
                missing -= entry.blocks
                self._forget(entry)
        self.total -= blocks - missing
        return blocks - missing

    def pin(self, key: Hashable, until: float) -> None:
        """Keep an entry, or one that is still to come under this key, until then (seconds)."""
        self.unpin(key)
        entry = self._find(key)
        if entry is not None:
            self._hold(entry)
        self._pins[key] = _Pin(until, entry)
        self._pushes += 1
        heappush(self._expiries, (until, self._pushes, key))

    def unpin(self, key: Hashable) -> None:
        pin = self._pins.pop(key, None)
        if pin is not None:
            self._unhold(pin)

    def expire(self, now: float) -> None:
        expiries = self._expiries
        while expiries and expiries[0][0] <= now:
            until, _, key = heappop(expiries)
            pin = self._pins.get(key)
            if pin is not None and pin.until <= until:
                self.unpin(key)

    def next_expiry(self) -> float | None:
        return self._expiries[0][0] if self._expiries else None

    def drop_pins(self) -> None:
        for key in list(self._pins):
            self.unpin(key)
        self._expiries.clear()

    def clear(self) -> None:
        """Drop all that no running call uses, and the pins."""
        self.drop_pins()
        self.evict(self.total)

    def _hold(self, entry: Entry) -> None:
        node: Entry | None = entry
        while node is not None:
            node.holds += 1
            if node.holds > 1:
                break
            self.held += node.blocks
            node = node.parent

    def _unhold(self, pin: _Pin) -> None:
        if pin.entry is not None:
            self.release(pin.entry, used=False)

    def _find(self, key: Hashable) -> Entry | None:
        """Where an entry is gone, its parent is what is left of the same beginning."""
        entry = self._entries.get(key)
        while entry is not None and entry.used < 0:
            entry = entry.parent
        return entry

    def _forget(self, entry: Entry) -> None:
        entry.used = -1
        parent = entry.parent
        if parent is None:
            for key in entry.keys:
                if self._find(key) is None:
                    self._entries.pop(key, None)
            return
        parent.keys += entry.keys
        entry.keys.clear()
        parent.children -= 1
        if not parent.children and not parent.holds:
            self._push(parent)

    def _push(self, entry: Entry) -> None:
        self._pushes += 1
        heappush(self._leaves, (entry.used, self._pushes, entry))


def _split(entry: Entry, depth: int) -> Entry:
    """Part an entry in two; the upper one."""
    below = entry.depth - depth
    upper = Entry(depth, entry.blocks - below, entry.parent, [], min(1, entry.holds), 1, entry.used)
    entry.parent = upper
    entry.blocks = below
    return upper
