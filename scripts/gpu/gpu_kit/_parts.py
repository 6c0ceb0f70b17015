"""The parts of a bundle: cut to size, listed with their SHA-256, checked and joined again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MIB = 1 << 20
PART_BYTES = 60 * MIB
MANIFEST = "manifest.json"


class KitError(Exception):
    """What is wrong, and the fix, in one line."""


@dataclass(frozen=True)
class Sealed:
    """A file by name, with what it must be."""

    name: str
    bytes: int
    sha256: str

    def matches(self, file: Path) -> bool:
        """Whether the file is all there and unharmed."""
        right_size = file.is_file() and file.stat().st_size == self.bytes
        return right_size and sha256_of(file) == self.sha256


@dataclass(frozen=True)
class Manifest:
    """What a bundle is made of and for."""

    whole: Sealed
    parts: tuple[Sealed, ...]
    pieces: tuple[Sealed, ...]
    versions: dict[str, str]
    python: str
    torch: str
    commit: str


def sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def seal(file: Path) -> Sealed:
    return Sealed(file.name, file.stat().st_size, sha256_of(file))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to; the file or folder takes its place when all went well."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    remove(unfinished)
    try:
        yield unfinished
        if unfinished.is_dir():
            remove(path)
        unfinished.replace(path)
    finally:
        remove(unfinished)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def split(whole: Path, folder: Path, limit: int = PART_BYTES) -> tuple[Sealed, ...]:
    """Cut a file into part-00, part-01 and so on."""
    parts: list[Sealed] = []
    with whole.open("rb") as stream:
        while piece := stream.read(limit):
            part = folder / f"part-{len(parts):02}"
            part.write_bytes(piece)
            parts.append(seal(part))
    return tuple(parts)


def join(manifest: Manifest, folder: Path, whole: Path) -> None:
    """Put the parts together again; every one is checked first."""
    if missing := [part.name for part in manifest.parts if not (folder / part.name).is_file()]:
        raise KitError(f"{folder} lacks {', '.join(missing)}: copy the whole folder again")
    if broken := [part.name for part in manifest.parts if not part.matches(folder / part.name)]:
        raise KitError(f"damaged on its way: {', '.join(broken)}: copy it to {folder} again")
    with replacing(whole) as unfinished:
        with unfinished.open("wb") as stream:
            for part in manifest.parts:
                stream.write((folder / part.name).read_bytes())
        if not manifest.whole.matches(unfinished):
            raise KitError(f"the parts in {folder} are of different bundles: copy all of it again")


def write_manifest(manifest: Manifest, folder: Path) -> None:
    write_json(asdict(manifest), folder / MANIFEST)


def read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Manifest(
            whole=Sealed(**found["whole"]),
            parts=tuple(Sealed(**part) for part in found["parts"]),
            pieces=tuple(Sealed(**piece) for piece in found["pieces"]),
            versions=dict(found["versions"]),
            python=found["python"],
            torch=found["torch"],
            commit=found["commit"],
        )
    except FileNotFoundError:
        raise KitError(
            f"no {MANIFEST} in {folder}: make a bundle with scripts/gpu/bundle, or name it with "
            "--bundle"
        ) from None
    except (KeyError, TypeError, ValueError):
        raise KitError(f"{path} is damaged: make the bundle again, scripts/gpu/bundle") from None


def write_json(content: Any, path: Path) -> None:
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def one_line(error: OSError) -> str:
    """An error of the operating system with its fix, as far as there is one."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno == 28:
        return f"the disk is full{where}: free some space, then run this again"
    return f"{os.strerror(error.errno) if error.errno else error}{where}"
