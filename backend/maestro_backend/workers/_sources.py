"""Model sources: from a config's `source` to a checkpoint folder on the local disk."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from maestro_agents.protocol import BackendError, ConfigError, UnsupportedError

from ._disk_cache import DiskCache, DiskFullError, NoRoomError, held, stamp_use, telling_a_full_disk
from ._kv_layers import text_config
from ._made import RANDOM_BYTES, check_hub, make
from ._origin import origin
from ._remote import PAUSES_S, Fetching

Progress = Callable[[str], None]
"""Told in words what is being done."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_MADE = ("package", "random")
_REMOTE = ("http", "https", "file")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model as an engine can open it.

    `path` is a folder, or `org/name` where the engine fetches it from a hub. `stored_bytes` is the
    size of the weight files (0 while unknown) and `geometry` the content of `config.json`. A
    `cached` one was fetched or made by this package and may be deleted while nobody holds it.
    """

    path: str
    local: bool = True
    stored_bytes: int = 0
    geometry: Mapping[str, Any] = field(default_factory=dict)
    cached: bool = False

    @property
    def stored_dtype(self) -> str:
        """The data type the weights are stored in, as the checkpoint says."""
        name = self.geometry.get("dtype") or self.geometry.get("torch_dtype")
        return name if name in DTYPE_BYTES else "bfloat16"

    @property
    def max_model_len(self) -> int | None:
        """The longest context the model was made for, in tokens."""
        return _whole(self.geometry, "max_position_embeddings") or None

    def weights_bytes(self, dtype: str) -> int:
        """Bytes of the weights when served as `dtype`: the file size times the dtypes' ratio.

        Quantised checkpoints are served as they are stored.
        """
        if "quantization_config" in self.geometry:
            return self.stored_bytes
        return self.stored_bytes * DTYPE_BYTES[dtype] // DTYPE_BYTES[self.stored_dtype]


def _whole(shape: Mapping[str, Any], key: str) -> int:
    """A number of `config.json`; 0 where it is missing or, as in some models, one per layer."""
    value = shape.get(key)
    return value if isinstance(value, int) else 0


def cache_dir(disk_cache: Path | None = None) -> Path:
    """Where models are fetched and made: `disk_cache`, `$MAESTRO_CACHE`, or the user's cache."""
    if disk_cache is not None:
        return disk_cache
    if "MAESTRO_CACHE" in os.environ:
        return Path(os.environ["MAESTRO_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maestro"


async def fetch(
    source: str,
    *,
    cache: Path,
    python: str = sys.executable,
    progress: Progress = lambda _: None,
    limit_bytes: int | None = None,
    pauses: Sequence[float] = PAUSES_S,
) -> Checkpoint:
    """Bring `source` to the local disk, once; `python` is the engine's interpreter.

    The cache is kept below `limit_bytes` by deleting what nobody holds, the least recently used
    first; `hold` what is returned before anything else is awaited. A remote folder is fetched where
    an earlier call was interrupted, and not looked at again once it is here. `pauses` are the
    seconds between tries after errors that may pass.

    Raises:
        ConfigError: there is no such model.
        BackendError: it could not be downloaded or converted; the message says why.
    """
    scheme, colon, name = source.partition(":")
    if not colon:
        return read_checkpoint(Path(source))
    if scheme == "hub":
        return await _from_hub(name, python)
    if scheme == "random" and name not in RANDOM_BYTES:
        known = ", ".join(RANDOM_BYTES)
        raise ConfigError(f"no random model is called {name!r}; there are {known}")
    disk = DiskCache(cache, limit_bytes)
    place = disk.place(_identity(source))
    if not place.is_dir():
        with telling_a_full_disk(place.parent):
            async with disk.making(place, progress):
                if not place.is_dir():
                    await _Bringing(source, disk, place, python, progress, pauses).run()
    stamp_use(place)
    return _read_cached(place)


def known_checkpoint(source: str, cache: Path) -> Checkpoint | None:
    """What the local disk tells of `source` now; nothing is fetched. None while it tells nothing,
    whatever the reason: `fetch` says it better.
    """
    scheme, colon, name = source.partition(":")
    try:
        if scheme == "hub":
            return _on_hub(name)
        if colon:
            return _read_cached(DiskCache(cache).place(_identity(source)))
        return read_checkpoint(Path(source))
    except (ConfigError, OSError):
        return None


def is_cached(source: str, cache: Path) -> bool:
    """Whether `source` is on the local disk, whole: `fetch` would neither download nor make it."""
    known = known_checkpoint(source, cache)
    return known is not None and known.stored_bytes > 0


def forget(source: str, cache: Path) -> None:
    """Delete the checkpoint of `source` from the cache, and what an interrupted fetch left.

    Raises:
        UnsupportedError: this package has not put it there: a folder, or a model of a hub.
        BackendError: it is in use.
    """
    if source.partition(":")[0] not in (*_MADE, *_REMOTE):
        raise UnsupportedError(
            f"{source} is not in the disk cache: only what was fetched or made is deleted from it"
        )
    disk = DiskCache(cache)
    disk.forget(disk.place(_identity(source)))


@contextmanager
def hold(checkpoint: Checkpoint) -> Iterator[int | None]:
    """Keep `checkpoint` from being deleted to make room; does nothing for a folder of the user.

    Yields the file descriptor that holds it (None: nothing has to): a process that inherits it
    holds on when this one is gone.

    Raises:
        BackendError: it has been deleted meanwhile; fetch it again.
    """
    if not checkpoint.cached:
        yield None
        return
    with held(Path(checkpoint.path)) as descriptor:
        yield descriptor


@dataclass(frozen=True, slots=True)
class _Bringing:
    """One source on its way into the cache; the caller holds the lock of `place`."""

    source: str
    disk: DiskCache
    place: Path
    python: str
    progress: Progress
    pauses: Sequence[float]

    async def run(self) -> None:
        """The checkpoint appears at `place` by a rename: whoever sees it sees it whole.

        On a full disk room is made for the rest, once; if that fails the partial work goes too.
        """
        work = self.disk.partial(self.place)
        try:
            try:
                made = await self._try(work)
            except DiskFullError as error:
                self.progress(f"{error}; looking for models to delete")
                made = await self._try(work)
        except (DiskFullError, NoRoomError):
            await asyncio.to_thread(shutil.rmtree, work, ignore_errors=True)
            raise
        made.rename(self.place)
        shutil.rmtree(work, ignore_errors=True)

    async def _try(self, work: Path) -> Path:
        scheme, _, name = self.source.partition(":")
        with telling_a_full_disk(work):
            if scheme in _MADE:
                return await self._make(scheme, name, work)
            return await self._fetch(work)

    async def _make(self, scheme: str, name: str, work: Path) -> Path:
        try:
            return await make(scheme, name, work, self.python, self.progress, self._room)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise

    async def _fetch(self, work: Path) -> Path:
        work.mkdir(exist_ok=True)
        async with origin(self.source) as remote:
            fetching = Fetching(remote, work, self.progress, self._room, self.pauses)
            await fetching.run()
        read_checkpoint(fetching.made)
        return fetching.made

    async def _room(self, more: int) -> None:
        await asyncio.to_thread(self.disk.make_room, self.place, more)


def _identity(source: str) -> str:
    """What names `source` in the cache: an address without its login or a last slash."""
    scheme, _, rest = source.partition("://")
    if scheme not in _REMOTE or not rest:
        return source
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}".rstrip("/")


def _read_cached(folder: Path) -> Checkpoint:
    return replace(read_checkpoint(folder), cached=True)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the geometry and size of a checkpoint folder.

    Raises:
        ConfigError: it is not one; the message names the other ways to write a source.
    """
    try:
        geometry = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{folder} is not a model folder (it needs a config.json); a model on a hub is written"
            " hub:org/name"
        ) from error
    weights = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    return Checkpoint(
        path=str(folder),
        stored_bytes=sum(file.stat().st_size for file in weights if file.is_file()),
        geometry=text_config(geometry),
    )


async def _from_hub(name: str, python: str) -> Checkpoint:
    known = _on_hub(name)
    elsewhere = os.environ.get("VLLM_USE_MODELSCOPE", "").lower() in ("1", "true")
    if not known.geometry and not elsewhere:
        try:
            await check_hub(name, python)
        except BackendError as error:
            raise BackendError(f"hub:{name}: {error}") from error
    return known


def _on_hub(name: str) -> Checkpoint:
    """The engine downloads it; where it already did, its size and geometry are known."""
    if not _HUB_NAME.fullmatch(name):
        raise ConfigError(f"hub:{name} is no name of a model; write hub:org/name")
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    for folder in sorted((hub / f"models--{name.replace('/', '--')}" / "snapshots").glob("*")):
        if (folder / "config.json").is_file():
            known = read_checkpoint(folder)
            return Checkpoint(name, False, known.stored_bytes, known.geometry)
    return Checkpoint(path=name, local=False)
