"""The folder of fetched and made checkpoints: names, locks, and room by least recent use.

`models/NAME` is a whole checkpoint: it appears by a rename and vanishes by one. Beside it lie
`.partial-NAME` (work towards it), `NAME.lock` (flocked by whoever makes or deletes it) and
`NAME.use` (flocked, shared, by whoever uses it; the later time stamp of the two is its last use).
Locks end with the process that holds them, so a killed one leaves nothing held. What has no lock
file beside it was put there by a user and is never deleted.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from maestro_agents.protocol import BackendError

_DELETED = ".deleted-"
_HOLD_EVERY_S = 0.01
_HOLD_TRIES = 100
_PARTIAL = ".partial-"
_RESERVE_BYTES = 1024**3
_RESERVE_SHARE = 20  # a small disk keeps this part of itself free, not a whole GiB
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class NoRoomError(BackendError):
    """The cache cannot hold a checkpoint, whatever is deleted; the message names the bytes."""


class DiskFullError(BackendError):
    """The disk became full in the middle of the work."""


@contextmanager
def telling_a_full_disk(folder: Path) -> Iterator[None]:
    """An operating-system error becomes a DiskFullError or a BackendError that names `folder`."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise DiskFullError(f"the disk of {folder} is full") from error
        raise BackendError(f"cannot write into {folder}: {error}") from error


def lock_file(place: Path) -> Path:
    """Locked by whoever makes or deletes the checkpoint `place`."""
    return place.with_name(f"{place.name}.lock")


def use_file(place: Path) -> Path:
    """Locked, shared, by whoever uses the checkpoint `place`."""
    return place.with_name(f"{place.name}.use")


@dataclass(frozen=True, slots=True)
class _Entry:
    """A folder of the cache; `place` is the checkpoint that it is or becomes, None for waste."""

    folder: Path
    place: Path | None
    size: int
    last_use: int


class DiskCache:
    """The checkpoints under `folder`, kept below `limit_bytes` (None: as far as the disk goes).

    A part of the disk stays free: 1 GiB, or 5% of a small one.
    """

    def __init__(self, folder: Path, limit_bytes: int | None = None) -> None:
        self._models = folder / "models"
        self._limit = limit_bytes

    def place(self, source: str) -> Path:
        """The folder of `source`'s checkpoint, whether it is there or not.

        An address is told apart by a hash as well: `a/b` and `a-b` are two models.
        """
        name = re.sub(r"[^\w.-]+", "-", source).strip("-")
        if "//" in source:
            name = f"{name}-{hashlib.sha256(source.encode()).hexdigest()[:8]}"
        return self._models / name

    @staticmethod
    def partial(place: Path) -> Path:
        """Where the work towards `place` is done; it outlives an interruption."""
        return place.with_name(f"{_PARTIAL}{place.name}")

    @asynccontextmanager
    async def making(self, place: Path, progress: Callable[[str], None]) -> AsyncIterator[None]:
        """Hold the inter-process lock of `place`; waits without blocking the loop."""
        self._models.mkdir(parents=True, exist_ok=True)
        with lock_file(place).open("a") as file:
            while not _locked(file, fcntl.LOCK_EX):
                progress("waiting for another process that makes this model")
                await asyncio.sleep(0.5)
            _stamp(lock_file(place))
            yield

    def make_room(self, place: Path, more: int) -> None:
        """See that the partial work of `place`, whose lock the caller holds, can grow by `more`.

        Checkpoints that nobody uses are deleted, the least recently used first, and none before
        it is known that they suffice. What other processes still have to fetch is counted.

        Raises:
            NoRoomError: the rest is in use, or the bytes go beyond the limit or the disk.
        """
        with (self._models / ".room.lock").open("a") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            with ExitStack() as claims:
                self._clear(claims, place, more)
            partial = self.partial(place)
            if partial.is_dir():
                (partial / "planned").write_text(str(_size(partial) + more), encoding="ascii")

    def _clear(self, claims: ExitStack, place: Path, more: int) -> None:
        entries = sorted(self._entries(), key=lambda entry: (entry.last_use, entry.folder.name))
        missing = self._missing(entries, place, more)
        victims: list[_Entry] = []
        for entry in entries:
            if missing <= 0:
                break
            if entry.place is None or _claimed(claims, entry.place):
                victims.append(entry)
                missing -= entry.size
        if missing > 0:
            raise NoRoomError(self._refusal(place, more, missing))
        for waste in [_put_away(entry.folder) for entry in victims]:
            shutil.rmtree(waste, ignore_errors=True)

    def _missing(self, entries: list[_Entry], place: Path, more: int) -> int:
        """Bytes to delete before `more` fit: for the limit or for the disk, whichever is more."""
        used = sum(entry.size for entry in entries)
        promised = sum(_promised(entry) for entry in entries if entry.place != place)
        disk = shutil.disk_usage(self._models)
        reserve = min(_RESERVE_BYTES, disk.total // _RESERVE_SHARE)
        over = [more + promised + reserve - disk.free if more else 0]
        if self._limit is not None:
            over.append(used + promised + more - self._limit)
        return max(over)

    def _refusal(self, place: Path, more: int, missing: int) -> str:
        size = _size(self.partial(place)) + more
        told = f"the model takes {size:,} bytes on disk and {missing:,} bytes are missing"
        if self._limit is not None and size > self._limit:
            return f"{told}: raise disk_cache_size of the node, which is {self._limit:,} bytes"
        freely = "" if self._limit is None else ", raise disk_cache_size of the node"
        return (
            f"{told} in {self._models}, where no more can be deleted: the rest is in use or not"
            f" ours. Free the disk{freely} or set disk_cache to a folder on another disk"
        )

    def _entries(self) -> Iterator[_Entry]:
        for folder in self._models.iterdir():
            if folder.is_symlink() or not folder.is_dir():
                continue
            if folder.name.startswith(_DELETED):
                yield _Entry(folder, None, _size(folder), 0)
                continue
            place = folder.with_name(folder.name.removeprefix(_PARTIAL))
            if lock_file(place).is_file():
                yield _Entry(folder, place, _size(folder), _last_use(place))

    def forget(self, place: Path) -> None:
        """Delete a checkpoint and the work towards it.

        Raises:
            BackendError: it is in use, or is just being made.
        """
        if not lock_file(place).is_file():
            return
        with ExitStack() as claims:
            if not _claimed(claims, place):
                raise BackendError(f"{place} is in use; stop the models that are served from it")
            for folder in (place, self.partial(place)):
                shutil.rmtree(_put_away(folder), ignore_errors=True)


@contextmanager
def held(place: Path) -> Iterator[int | None]:
    """Mark the checkpoint `place` as in use; yields the file descriptor that does.

    A process that inherits the descriptor goes on marking it when this one is gone. None where the
    cache is read-only: nothing is deleted there.

    Raises:
        BackendError: it was deleted meanwhile.
    """
    with ExitStack() as opened:
        try:
            file = opened.enter_context(use_file(place).open("a"))
        except OSError:
            yield None
            return
        if not _shared(file, place):
            raise BackendError(f"{place} was deleted to make room; fetch the model again")
        stamp_use(place)
        try:
            yield file.fileno()
        finally:
            stamp_use(place)


def _shared(file: IO[str], place: Path) -> bool:
    """Lock `file` beside other users; False where `place` is gone."""
    for _ in range(_HOLD_TRIES):
        if _locked(file, fcntl.LOCK_SH):
            return place.is_dir()
        if not place.is_dir():
            break
        time.sleep(_HOLD_EVERY_S)  # who looked for room lets go at once, or renames it away
    return False


def stamp_use(place: Path) -> None:
    """The checkpoint `place` is used now."""
    with suppress(OSError):  # a read-only cache
        use_file(place).touch()
        _stamp(use_file(place))


def _stamp(file: Path) -> None:
    now = time.time_ns()  # the file system's own clock stands still for milliseconds
    os.utime(file, ns=(now, now))


def _last_use(place: Path) -> int:
    files = (lock_file(place), use_file(place))
    return max((file.stat().st_mtime_ns for file in files if file.is_file()), default=0)


def _locked(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _claimed(claims: ExitStack, place: Path) -> bool:
    """Lock out makers and users of `place` until `claims` end; False where there are any."""
    with ExitStack() as mine:
        for path in (lock_file(place), use_file(place)):
            if not _locked(mine.enter_context(path.open("a")), fcntl.LOCK_EX):
                return False
        claims.push(mine.pop_all())
    return True


def _promised(entry: _Entry) -> int:
    """Bytes that somebody alive has still to put into a partial folder."""
    if entry.place is None or not entry.folder.name.startswith(_PARTIAL):
        return 0
    with ExitStack() as claims:
        if _claimed(claims, entry.place):
            return 0
    with suppress(OSError, ValueError):
        planned = int((entry.folder / "planned").read_text(encoding="ascii"))
        return max(0, planned - entry.size)
    return 0


def _size(folder: Path) -> int:
    """Bytes of the files below; what vanishes meanwhile counts nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


def _put_away(folder: Path) -> Path:
    """It is gone at once for everybody, whole; its bytes are not yet."""
    waste = folder.with_name(f"{_DELETED}{folder.name}-{time.time_ns()}")
    with suppress(FileNotFoundError):
        folder.rename(waste)
    return waste
