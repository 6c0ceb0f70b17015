"""Fetches a remote model folder file by file: resumed where it was interrupted, checked by hash."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TypeVar

from maestro_agents.protocol import BackendError, ConfigError

from ._disk_cache import DiskFullError, telling_a_full_disk
from ._origin import Body, ChangedError, MissingError, Origin, TransientError, settled

log = logging.getLogger(__name__)

PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds before another try after an error that may pass; any progress starts them afresh."""

T = TypeVar("T")

_SUMS = "SHA256SUMS"
_SUM_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
_INDEX = "model.safetensors.index.json"
_WEIGHTS = "model.safetensors"
_OPTIONAL = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_MAX_FILES = 10_000
_MAX_LIST_BYTES = 64 * 1024**2
_MAX_UNTOLD_BYTES = 64 * 1024**2
_DIGEST_BYTES = 8 * 1024**2
_TELL_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of the model: its path below the folder, SHA-256 in hex and size where known."""

    name: str
    sha256: str | None = None
    size: int | None = None


class Fetching:
    """The work of bringing `origin`'s model into the folder `partial`, which may hold a part.

    `room` sees that so many bytes more can be written. `pauses` are the seconds between tries.
    """

    def __init__(
        self,
        origin: Origin,
        partial: Path,
        progress: Callable[[str], None],
        room: Callable[[int], Awaitable[None]],
        pauses: Sequence[float],
    ) -> None:
        self._origin = origin
        self._partial = partial
        self._progress = progress
        self._room = room
        self._pauses = pauses
        self._validators = _Validators(partial / "validators.json")
        self._files: tuple[RemoteFile, ...] = ()
        self._told_at = 0.0

    @property
    def made(self) -> Path:
        """Where the whole checkpoint is once `run` has returned."""
        return self._partial / "checkpoint"

    async def run(self) -> None:
        """Fetch what is missing and check all of it.

        Raises:
            ConfigError: it is not a model folder, or its list is not to be trusted.
            DiskFullError: the disk became full; what is there is kept.
            BackendError: a file could not be fetched, or is not the listed one.
        """
        await self._find()
        await self._room(self._missing_bytes())
        try:
            with telling_a_full_disk(self._partial):
                self._drop_others()
                for at, file in enumerate(self._files, 1):
                    await self._bring(file, f"file {at} of {len(self._files)}")
        except DiskFullError as error:
            missing = f"{self._missing_bytes():,} bytes are missing"
            raise DiskFullError(f"{error}, {missing}") from error

    async def _find(self) -> None:
        """Learn which files there are, and their sizes."""
        self._progress(f"looking at {self._origin.shown}")
        names = await self._listed() or await self._guessed()
        files = [await self._sized(file) for file in names]
        self._files = tuple(file for file in files if file is not None)
        present = {file.name for file in self._files}
        if "config.json" not in present:
            raise ConfigError(f"{self._origin.shown} is not a model folder: it has no config.json")
        if not any(name.endswith((".safetensors", ".bin")) for name in present):
            raise ConfigError(f"{self._origin.shown} has no weights (*.safetensors or *.bin)")

    def _missing_bytes(self) -> int:
        """What has still to come, as far as sizes are told."""
        return sum(max(0, (file.size or 0) - self._held(file)) for file in self._files)

    async def _listed(self) -> list[RemoteFile]:
        """The files of SHA256SUMS; none where there is no such list."""
        try:
            text = await self._patiently(lambda: self._text(_SUMS))
        except MissingError:
            return []
        return parse_sums(text, f"{self._origin.shown}/{_SUMS}")

    async def _guessed(self) -> list[RemoteFile]:
        told = f"{self._origin.shown} has no {_SUMS}: what is fetched cannot be checked"
        self._progress(told)
        log.warning("%s", told)
        names = await self._origin.names()
        if names is None:
            names = ("config.json", *await self._weights(), *_OPTIONAL)
        return [RemoteFile(name) for name in names]

    async def _weights(self) -> list[str]:
        where = f"{self._origin.shown}/{_INDEX}"
        try:
            text = await self._patiently(lambda: self._text(_INDEX))
        except MissingError:
            return [_WEIGHTS]
        try:
            shards = set(json.loads(text)["weight_map"].values())
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{where} is not an index of weights") from error
        return [_INDEX, *sorted(checked_name(str(name), where) for name in shards)]

    async def _sized(self, file: RemoteFile) -> RemoteFile | None:
        """None for a file that is neither there nor needed."""
        try:
            size = await self._patiently(lambda: self._origin.size(file.name))
        except MissingError:
            if file.name in _OPTIONAL and file.sha256 is None:
                return None
            raise
        return replace(file, size=size)

    async def _text(self, name: str) -> str:
        content = bytearray()
        async with self._origin.body(name) as body:
            async for chunk in body.chunks:
                content += chunk
                if len(content) > _MAX_LIST_BYTES:
                    raise ConfigError(f"{self._origin.shown}/{name} is too long")
        return content.decode(errors="replace")

    async def _patiently(self, work: Callable[[], Awaitable[T]]) -> T:
        for pause in self._pauses:
            try:
                return await work()
            except TransientError as error:
                await self._rest(error, pause)
        return await work()

    async def _rest(self, error: TransientError, pause: float) -> None:
        self._progress(f"{error}; trying again in {pause:g} s")
        await asyncio.sleep(pause)

    def _path(self, file: RemoteFile) -> Path:
        return self.made / file.name

    def _held(self, file: RemoteFile) -> int:
        path = self._path(file)
        return path.stat().st_size if path.is_file() else 0

    def _drop_others(self) -> None:
        """What an earlier list named and this one does not is no part of the model."""
        self.made.mkdir(parents=True, exist_ok=True)
        wanted = {self._path(file) for file in self._files}
        for path in list(self.made.rglob("*")):
            if path not in wanted and not path.is_dir():
                path.unlink()

    async def _bring(self, file: RemoteFile, which: str) -> None:
        """Complete and right, or an error; a wrong file is fetched once more."""
        whole = self._path(file).is_file() and self._held(file) == file.size
        if whole and file.sha256 and await self._is_right(file):
            return
        for then in ("fetching it once more", "giving up"):
            await self._complete(file, which)
            if await self._is_right(file):
                return
            self._progress(f"{file.name} has a wrong hash: {then}")
            self._path(file).unlink()
        raise BackendError(
            f"{self._origin.shown}/{file.name} does not have the hash that {_SUMS} tells: the"
            " folder is broken or just being changed; make it whole and its list anew"
        )

    async def _complete(self, file: RemoteFile, which: str) -> None:
        pauses = iter(self._pauses)
        most = self._held(file)
        while True:
            try:
                return await self._append(file, which)
            except TransientError as error:
                if isinstance(error, ChangedError):
                    self._path(file).unlink(missing_ok=True)
                if self._held(file) > most:
                    most = self._held(file)
                    pauses = iter(self._pauses)
                pause = next(pauses, None)
                if pause is None:
                    raise
                await self._rest(error, pause)

    async def _append(self, file: RemoteFile, which: str) -> None:
        path = self._path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        validator = self._validators.get(file.name)
        async with self._origin.body(file.name, self._held(file), validator) as body:
            if file.size is None and body.size is not None:
                await self._room(body.size - body.start)
            with path.open("ab") as out:
                out.truncate(body.start)
                self._validators.set(file.name, body.validator)
                await self._copy(body, out, f"{self._origin.shown}/{file.name} ({which})")
        held, where = self._held(file), f"{self._origin.shown}/{file.name}"
        if body.size is not None and held < body.size:
            raise TransientError(f"{where} ended after {held:,} of {body.size:,} bytes")
        if body.size is not None and held > body.size:
            raise ChangedError(f"{where} changed while it was fetched")

    async def _copy(self, body: Body, out: IO[bytes], which: str) -> None:
        done = body.start
        async for chunk in body.chunks:
            await settled(out.write, chunk)
            done += len(chunk)
            if body.size is None and done > _MAX_UNTOLD_BYTES:
                raise BackendError(f"{which} is large and comes without a Content-Length")
            if time.monotonic() - self._told_at >= _TELL_EVERY_S:
                self._told_at = time.monotonic()
                of = "" if body.size is None else f" of {body.size / 1e6:,.0f}"
                self._progress(f"fetching {which}, {done / 1e6:,.0f}{of} MB")

    async def _is_right(self, file: RemoteFile) -> bool:
        """Check the hash, if there is one; see that the bytes are on the disk."""
        digest = hashlib.sha256()
        with self._path(file).open("rb") as content:
            if file.sha256:
                while chunk := await settled(content.read, _DIGEST_BYTES):
                    await settled(digest.update, chunk)
            await settled(os.fsync, content.fileno())
        return file.sha256 in (None, digest.hexdigest())


class _Validators:
    """Which state of each remote file the bytes on the disk are of; kept beside them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._known = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError):
            self._known = {}

    def get(self, name: str) -> str:
        return str(self._known.get(name, ""))

    def set(self, name: str, validator: str) -> None:
        """Written before the bytes are: a killed fetch must not mix two states of a file."""
        if self._known.get(name) != validator:
            self._known[name] = validator
            fresh = self._path.with_suffix(".new")
            fresh.write_text(json.dumps(self._known), encoding="utf-8")
            fresh.replace(self._path)


def parse_sums(text: str, where: str) -> list[RemoteFile]:
    """The files of a list as `sha256sum *` writes it, but the list itself.

    Raises:
        ConfigError: it is not such a list, or names a file outside the folder.
    """
    files: dict[str, RemoteFile] = {}
    for file in _parsed(text, where):
        if files.setdefault(file.name, file) != file:
            raise ConfigError(f"{where} names {file.name!r} twice with different hashes")
    files.pop(_SUMS, None)
    if not files or len(files) > _MAX_FILES:
        raise ConfigError(f"{where} names {len(files)} files; it is not the list of a model")
    return list(files.values())


def _parsed(text: str, where: str) -> Iterator[RemoteFile]:
    for number, line in enumerate(text.splitlines(), 1):
        match = _SUM_LINE.fullmatch(line)
        if match:
            name = checked_name(match[2].removeprefix("./"), where)
            yield RemoteFile(name, match[1].lower())
        elif line.strip():
            raise ConfigError(f"{where}, line {number}: not what `sha256sum *` writes")


def checked_name(name: str, where: str) -> str:
    """`name`, a path below the folder; ConfigError for one that leads elsewhere."""
    parts = name.split("/")
    if "\\" in name or not name.isprintable() or any(part in ("", ".", "..") for part in parts):
        raise ConfigError(f"{where} names {name[:80]!r}, which is no file in the folder")
    return name
