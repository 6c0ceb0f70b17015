"""Machine code for one kind of GPU: take the code for all others out of a compiled CUDA library.

A library carries "fatbins": a header, then one entry for each GPU architecture that it was built
for. A fatbin is shortened to the entries that are of use, as if it had been built for these alone;
zeros fill it up to its old length, so nothing else of the library moves, and they compress well.
Whatever is not understood stays as it is.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

HOPPER = 90
MAGIC = struct.pack("<I", 0xBA55ED50)
CONTAINER = struct.Struct("<4sHHQ")  # magic, version, bytes of this header, bytes of the entries
ENTRY = struct.Struct("<HHIQ12xI8xQ")  # kind, version, bytes of header, of code, arch, flags
PTX, ELF = 1, 2
ALIGNMENT = 8
KNOWN_VERSIONS = (1, 0x101)
# sm_90a and the like, sm_120f and the like: code that only some GPUs of the architecture run.
SPECIFIC = 0x100000 | 0x200000


@dataclass(frozen=True)
class Entry:
    """Code for one architecture: machine code (ELF), or PTX, which a driver can compile."""

    kind: int
    arch: int
    flags: int
    start: int
    end: int


def pruned(library: bytes, arch: int = HOPPER) -> bytes:
    """The library without the code that a GPU of this architecture never runs."""
    slim = bytearray(library)
    at = 0
    while (at := library.find(MAGIC, at)) >= 0:
        entries = entries_at(library, at)
        end = entries[-1].end if entries else at + len(MAGIC)
        if entries:
            slim[at:end] = shortened(library, entries, arch).ljust(end - at, b"\0")
        at = end
    return bytes(slim)


def shortened(library: bytes, entries: list[Entry], arch: int) -> bytes:
    """A fatbin with those of its entries that are of use."""
    useful = [entry for entry in entries if not is_idle(entry, entries, arch)]
    # A fatbin without any entry is nothing that a compiler makes: one stays.
    kept = useful or [min(entries, key=lambda entry: entry.end - entry.start)]
    code = b"".join(library[entry.start : entry.end] for entry in kept)
    return CONTAINER.pack(MAGIC, KNOWN_VERSIONS[0], CONTAINER.size, len(code)) + code


def entries_at(library: bytes, at: int) -> list[Entry]:
    """The entries of the fatbin there; none unless all of it is understood."""
    if at + CONTAINER.size > len(library):
        return []
    _, version, header, size = CONTAINER.unpack_from(library, at)
    start = at + header
    end = start + size
    if version != KNOWN_VERSIONS[0] or header != CONTAINER.size or end > len(library):
        return []
    entries: list[Entry] = []
    while start + ENTRY.size <= end:
        kind, version, header, code, arch, flags = ENTRY.unpack_from(library, start)
        following = start + header + code
        # An odd length would move the entries after it off their alignment.
        odd = header < ENTRY.size or (following - start) % ALIGNMENT
        if kind not in (PTX, ELF) or version != KNOWN_VERSIONS[1] or odd:
            return []
        entries.append(Entry(kind, arch, flags, start, following))
        start = following
    return entries if start == end else []


def is_idle(entry: Entry, beside: list[Entry], arch: int) -> bool:
    """Whether a GPU of this architecture has no use for an entry.

    Machine code runs on its own architecture only (code for 9.0 and for 9.0a both say 90). PTX is
    compiled for its own architecture or a newer one, and only where there is no machine code.
    """
    if entry.kind == ELF:
        return entry.arch != arch
    ready = any(e.kind == ELF and e.arch == arch and not e.flags & SPECIFIC for e in beside)
    return ready or entry.arch > arch
