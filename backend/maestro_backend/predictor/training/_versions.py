"""Model versions on disk: whole, checked folders, one of them current, the last few kept."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from maestro_agents.protocol import ConfigError

_log = logging.getLogger("maestro.versions")

FORMAT = 1
KEEP = 5
_MANIFEST = "manifest.json"
_ROLLED_BACK = "rolled_back"
_CURRENT = "current"
_NAME = re.compile(r"v(\d{6,9})")
_UNFINISHED = ".new-"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a version is: `made_at` in seconds since the epoch, the number of calls it was learned
    from, how it was judged, the version that it follows ("" for none), the versions of the
    libraries that wrote it, and the SHA-256 of each file by its path in the folder."""

    made_at: float
    calls: int
    metrics: dict[str, float] = field(default_factory=dict)
    parent: str = ""
    libraries: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT


_READ = TypeAdapter(Manifest)


@dataclass(frozen=True, slots=True)
class Version:
    """A version whose files are all there and are what was written."""

    name: str
    folder: Path
    manifest: Manifest


class Versions:
    """The versions in one folder. Several processes may read and write it.

    A version is written under a temporary name and renamed, so none is ever seen half-written;
    what is broken or foreign is skipped, with one log line. Nothing is unpickled here.
    """

    def __init__(self, folder: Path, keep: int = KEEP) -> None:
        self.folder = folder
        self._keep = keep
        self._told: set[str] = set()

    def current(self) -> Version | None:
        """The version to predict with, None for the plain tables.

        The one that was installed last; if it is broken, the newest good one that was not rolled
        back. Reads every byte of it.
        """
        named = self._named()
        if named == "":
            return None
        if named is not None and (found := self._usable(named)):
            return found
        return next(filter(None, map(self._usable, reversed(self._names()))), None)

    def all(self) -> list[Version]:
        """The good ones, the oldest first, those that were rolled back too."""
        return [found for name in self._names() if (found := self._sound(name))]

    def add(
        self, save: Callable[[Path], None], manifest: Manifest, *, install: bool = True
    ) -> Version:
        """Write a version and, unless told otherwise, make it the current one.

        `save` writes the model's files into the empty folder it is given; their checksums, and the
        present version as the parent, are added to `manifest`. Old versions are then deleted,
        never the current one.

        Raises:
            ConfigError: the folder cannot be written, or the disk is full.
        """
        with self._alone():
            self._delete_unfinished()
            new = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self.folder))
            try:
                save(new)
                parent = self.current()
                whole = replace(
                    manifest, files=_checksums(new), parent=parent.name if parent else ""
                )
                _write(new / _MANIFEST, json.dumps(asdict(whole), indent=1))
                _sync_all(new)
                version = Version(name := self._next_name(), self.folder / name, whole)
                new.rename(version.folder)
            except BaseException:
                shutil.rmtree(new, ignore_errors=True)
                raise
            _sync(self.folder)
            if install:
                self._point_to(name)
            self._delete_old()
            return version

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """An empty folder until the block ends; what a killed process leaves, `add` deletes.

        Raises:
            ConfigError: it cannot be made, or the disk is full.
        """
        with (
            self._writing(),
            tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=self.folder) as folder,
        ):
            yield Path(folder)

    def install(self, name: str) -> Version:
        """Make a version the current one, also one that was rolled back.

        Raises:
            ConfigError: it is not there or broken, or the folder cannot be written.
        """
        with self._alone():
            found = self._sound(name) if name in self._names() else None
            if found is None:
                known = ", ".join(version.name for version in self.all()) or "none"
                raise ConfigError(f"there is no good version {name} in {self.folder} ({known})")
            (found.folder / _ROLLED_BACK).unlink(missing_ok=True)
            self._point_to(name)
            return found

    def rollback(self, reason: str, name: str | None = None) -> Version | None:
        """Leave the current version for the one before, for good; the one that is current then.

        With `name`, only if that one is current. None: from now on the plain tables.

        Raises:
            ConfigError: the folder cannot be written.
        """
        with self._alone():
            left = self.current()
            if left is None or name not in (None, left.name):
                return left
            _write(left.folder / _ROLLED_BACK, reason + "\n")
            earlier = [each for each in self._names() if _number(each) < _number(left.name)]
            found = next(filter(None, map(self._usable, reversed(earlier))), None)
            self._point_to(found.name if found else "")
            now = found.name if found else "the plain tables"
            _log.warning("%s is rolled back to %s: %s", left.name, now, reason)
            return found

    # --- reading --------------------------------------------------------------------------------

    def _names(self) -> list[str]:
        """Names of versions, the oldest first, whatever is behind them."""
        try:
            found = [entry.name for entry in self.folder.iterdir()]
        except OSError:
            return []
        return sorted(filter(_NAME.fullmatch, found), key=_number)

    def _named(self) -> str | None:
        """What the note says: "" for the plain tables, None if there is no note."""
        try:
            return (self.folder / _CURRENT).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None

    def _usable(self, name: str) -> Version | None:
        """The version, if it is good and was not rolled back."""
        if not _NAME.fullmatch(name) or (self.folder / name / _ROLLED_BACK).exists():
            return None
        return self._sound(name)

    def _sound(self, name: str) -> Version | None:
        folder = self.folder / name
        try:
            manifest = _READ.validate_json((folder / _MANIFEST).read_bytes())
            if manifest.format != FORMAT:
                raise ValueError(f"its format is {manifest.format}, this Maestro reads {FORMAT}")
            if _checksums(folder) != manifest.files:
                raise ValueError("its files are not those that were written")
        except (OSError, ValueError) as error:
            self._tell(name, error)
            return None
        return Version(name, folder, manifest)

    def _tell(self, name: str, error: Exception) -> None:
        if name not in self._told:
            self._told.add(name)
            invalid = isinstance(error, ValidationError)
            why = "its manifest is not one of ours" if invalid else error
            _log.warning("the model version %s is skipped: %s", self.folder / name, why)

    # --- writing --------------------------------------------------------------------------------

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process writes meanwhile."""
        with self._writing():
            lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
            finally:
                os.close(lock)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """The folder is there; what the disk refuses is one clear line."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            yield
        except OSError as error:
            raise ConfigError(
                f"cannot write model versions to {self.folder} ({error.strerror or error}):"
                " make it writable, free some space, or set another state_dir"
            ) from error

    def _point_to(self, name: str) -> None:
        new = self.folder / f"{_UNFINISHED}{_CURRENT}"
        _write(new, name + "\n")
        new.replace(self.folder / _CURRENT)
        _sync(self.folder)

    def _next_name(self) -> str:
        return f"v{max(map(_number, self._names()), default=0) + 1:06d}"

    def _delete_unfinished(self) -> None:
        for left in self.folder.glob(f"{_UNFINISHED}*"):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)

    def _delete_old(self) -> None:
        """What has no manifest is not ours to delete."""
        for name in self._names()[: -self._keep]:
            folder = self.folder / name
            if name != self._named() and (folder / _MANIFEST).is_file():
                doomed = folder.rename(self.folder / f"{_UNFINISHED}{name}")  # never seen in part
                shutil.rmtree(doomed, ignore_errors=True)


def _number(name: str) -> int:
    return int(name[1:])


def _checksums(folder: Path) -> dict[str, str]:
    """SHA-256 by path, of all files but our own notes.

    Raises:
        ValueError: something there is no plain file.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"{name} is no plain file")
        if path.is_file() and name not in (_MANIFEST, _ROLLED_BACK):
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _write(path: Path, text: str) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(file, "w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())


def _sync_all(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    """Make a file, or the entries of a folder, last through a power cut."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
