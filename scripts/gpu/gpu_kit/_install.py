"""Install a bundle on a bare GPU machine without a network: run by scripts/gpu/install.

A new virtual environment gets the bundle's wheels and sees the packages of the python3 that runs
this (torch above all) behind its own. Then everything that can be tried without a model is tried.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import re
import signal
import site
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from ._parts import (
    MANIFEST,
    KitError,
    Manifest,
    join,
    one_line,
    read_manifest,
    remove,
    sha256_of,
    write_json,
)

ROOT = Path(__file__).resolve().parents[3]
# Read before every other .pth of the environment: kvcached's imports what only the machine has.
LINK = "00_machine.pth"
RECORD = "installed.json"
LOG = "pip.txt"
PIP_S = 300
KVCACHED_S = 300
CHECK_S = 300
LOADS = """
import ctypes, pathlib, sysconfig, torch
for library in sorted(pathlib.Path(sysconfig.get_path("purelib"), "vllm").rglob("*.abi3.so")):
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        print(library.name.partition(".")[0], error)
"""
SERVER = """
import vllm.entrypoints.openai.api_server, vllm.entrypoints.serve.instrumentator.metrics
import vllm.v1.engine.core, vllm.v1.worker.gpu_worker, vllm.v1.attention.backends.flash_attn
import vllm.model_executor.models.llama, vllm.model_executor.models.qwen3
"""
PLUGIN = """
from importlib.metadata import entry_points
[plugin] = entry_points(group="vllm.general_plugins", name="maestro")
plugin.load()
"""
VERSIONS = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
def found(name):
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return "none"
print(json.dumps({name: found(name) for name in sys.argv[1:]}))
"""
OK, FAILED, ABSENT = "ok", "FAILED", "absent"
STARTED = time.monotonic()


@dataclass(frozen=True)
class Check:
    """What was tried: ok, FAILED, or absent where the machine does not allow it."""

    name: str
    outcome: str
    detail: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.name}: {self.outcome}{', ' if self.detail else ''}{self.detail}"


def main() -> int:
    """Install; returns 0 if all that the machine allows works."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parser = argparse.ArgumentParser(prog="scripts/gpu/install", description=__doc__)
    gpu = ROOT / "build" / "gpu"
    parser.add_argument("--bundle", type=Path, default=gpu / "parts", help="the parts' folder")
    parser.add_argument("--into", type=Path, default=gpu / "env", help="the new environment")
    parser.add_argument("--no-kvcached", action="store_true", help="leave kvcached out")
    chosen = parser.parse_args()
    try:
        return install(chosen.bundle.resolve(), chosen.into.resolve(), not chosen.no_kvcached)
    except KitError as error:
        sys.stderr.write(f"install: {error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"install: {one_line(error)}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\ninstall: interrupted; run it again\n")
        return 130


def install(bundle: Path, into: Path, kvcached: bool) -> int:
    """Install unless it is done; whatever an earlier try has left is replaced."""
    manifest = read_manifest(bundle)
    key = fingerprint(bundle, kvcached)
    if finished(into, key):
        say(f"{into} has this bundle already")
        say_next(into)
        return 0
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    if manifest.python != running:
        raise KitError(
            f"the bundle is for Python {manifest.python}, python3 is {running}: make one with "
            f"scripts/gpu/bundle --python {running}"
        )
    make_environment(into)
    with TemporaryDirectory(dir=into) as scratch:
        files = unpacked(manifest, bundle, Path(scratch))
        say("installing the wheels")
        wheels = sorted(file for file in files if file.suffix == ".whl")
        pip_install(into, wheels, PIP_S)
        checks = [tried("versions", lambda: versions(into, manifest))]
        if kvcached:
            source = next(file for file in files if file.name.startswith("kvcached"))
            checks.append(tried("kvcached", lambda: build_kvcached(into, source)))
    checks.append(tried("libraries", lambda: libraries(into)))
    checks.append(tried("server", lambda: outcome(into, SERVER)))
    checks.append(tried("plugin", lambda: outcome(into, PLUGIN)))
    return concluded(into, manifest, checks, key)


def concluded(into: Path, manifest: Manifest, checks: list[Check], key: str) -> int:
    """Write it down and say what failed; the exit status. One step of the check needs kvcached."""
    failed = [check.name for check in checks if check.outcome == FAILED]
    usable = set(failed) <= {"kvcached"}
    record(into, manifest, checks, key if usable else "")
    if failed:
        again = f"all of it: {into / RECORD}; remove that file to try again"
        sys.stderr.write(f"install: failed: {', '.join(failed)} ({again})\n")
    say_next(into)
    return 0 if usable else 1


def fingerprint(bundle: Path, kvcached: bool) -> str:
    """Changes whenever the installation has to be done again."""
    machine = (sys.executable, sys.version, loaded_driver())
    inputs = (sha256_of(bundle / MANIFEST), *machine, kvcached)
    return hashlib.sha256(" ".join(map(str, inputs)).encode()).hexdigest()


def finished(into: Path, key: str) -> bool:
    try:
        found = json.loads((into / RECORD).read_text(encoding="utf-8"))
        return (into / "bin" / "python").exists() and bool(found["key"] == key)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def record(into: Path, manifest: Manifest, checks: list[Check], key: str) -> None:
    """Write what was installed and tried; the key says that nothing is left to do."""
    content = {
        "key": key,
        "bundle": manifest.whole.sha256,
        "commit": manifest.commit,
        "machine_python": sys.executable,
        "versions": manifest.versions,
        "checks": [asdict(check) for check in checks],
    }
    write_json(content, into / RECORD)


def make_environment(into: Path) -> None:
    """An environment of this Python, without pip, that sees this Python's packages last."""
    say(f"making {into} beside {sys.executable}")
    if into.exists() and any(into.iterdir()) and not (into / "pyvenv.cfg").is_file():
        raise KitError(f"{into} is something else: name another folder with --into")
    (into / RECORD).unlink(missing_ok=True)
    status, output = run([sys.executable, "-m", "venv", "--clear", "--without-pip", into], PIP_S)
    if status:
        raise KitError(f"cannot make {into}: {last_line(output)}")
    # This python3 may itself be a virtual environment: --system-site-packages would miss it.
    folders = [folder for folder in site.getsitepackages() if Path(folder).is_dir()]
    lines = [f"import site; site.addsitedir({folder!r})\n" for folder in folders]
    (packages(into) / LINK).write_text("".join(lines), encoding="utf-8")


def packages(into: Path) -> Path:
    return into / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"


def unpacked(manifest: Manifest, bundle: Path, scratch: Path) -> list[Path]:
    """The wheels and sources of a bundle, all checked."""
    say(f"checking and unpacking {len(manifest.parts)} parts of {bundle}")
    whole = scratch / "bundle.tar"
    join(manifest, bundle, whole)
    extract(whole, scratch)
    for piece in scratch.glob("*.tar.xz"):
        extract(piece, scratch)
        remove(piece)
    return [file for file in scratch.iterdir() if file != whole]


def extract(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        # Not every Python 3.11 knows filters; the checksums say that these archives are ours.
        if hasattr(tarfile, "data_filter"):
            tar.extraction_filter = tarfile.data_filter
        tar.extractall(folder)


def pip_install(
    into: Path, files: list[Path], limit: float, *options: str, **environment: str
) -> None:
    """Install these files and nothing else, with the pip of this Python."""
    alone = ("--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--ignore-installed")
    pip = (sys.executable, "-m", "pip", "--python", into / "bin" / "python", "install")
    status, output = run([*pip, *alone, *options, *files], limit, **environment)
    if status:
        (into / LOG).write_text(output, encoding="utf-8")
        raise KitError(f"{reason(output)} (all of it: {into / LOG})")


def reason(output: str) -> str:
    """The line of pip's output that tells most: the compiler's, else pip's own."""
    lines = [line.strip() for line in output.splitlines()]
    told = (
        next((line for line in lines if re.search(mark, line)), "")
        for mark in ("fatal error:", r"\d: error:", "^ERROR:", "^error:")
    )
    return next(filter(None, told), last_line(output))


def build_kvcached(into: Path, source: Path) -> tuple[str, str]:
    """Build kvcached against the machine's torch, and import it."""
    with driver_to_link() as folder:
        if folder is None:
            return ABSENT, "not built: no CUDA driver and no stub of it to link with"
        say("building kvcached")
        paths = {"LIBRARY_PATH": f"{folder}:{os.environ.get('LIBRARY_PATH', '')}".rstrip(":")}
        if home := toolkit():
            paths["CUDA_HOME"] = str(home)
        try:
            pip_install(into, [source], KVCACHED_S, "--no-build-isolation", **paths)
        except KitError as error:
            return FAILED, f"not built: {error}; --no-kvcached leaves it out"
    return outcome(into, "import torch, kvcached, kvcached._C")


def toolkit() -> Path | None:
    """CUDA's headers and stubs; torch takes the folder above nvcc's, which may have neither."""
    homes = [Path(home) for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    return next((home for home in homes if (home / "include" / "cuda.h").is_file()), None)


@contextmanager
def driver_to_link() -> Iterator[Path | None]:
    """A folder with a libcuda.so: the toolkit's stub, or a link to the driver's own library."""
    home = toolkit()
    if home and (stubs := home / "lib64" / "stubs").joinpath("libcuda.so").is_file():
        yield stubs
        return
    driver = loaded_driver()
    if driver is None:
        yield None
        return
    with TemporaryDirectory() as folder:
        Path(folder, "libcuda.so").symlink_to(driver)
        yield Path(folder)


def loaded_driver() -> str | None:
    """Where the loader finds the CUDA driver's library."""
    with suppress(OSError):
        ctypes.CDLL("libcuda.so.1")
        maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        return next((line.split()[-1] for line in maps if "/libcuda.so" in line), None)
    return None


def versions(into: Path, manifest: Manifest) -> tuple[str, str]:
    """Whether each package is found in the bundle's version, and torch in the one it needs."""
    wanted = {**manifest.versions, "torch": manifest.torch}
    wanted.pop("kvcached", None)
    status, output = python(into, VERSIONS, *wanted)
    if status:
        return FAILED, last_line(output)
    found: dict[str, str] = json.loads(last_line(output))
    wrong = [f"{name} {found[name]} for {v}" for name, v in wanted.items() if found[name] != v]
    shown = ", ".join(f"{name} {found[name]}" for name in ("vllm", "maestro-mas", "torch"))
    return (FAILED, ", ".join(wrong)) if wrong else (OK, shown)


def libraries(into: Path) -> tuple[str, str]:
    """Whether vLLM's compiled libraries load."""
    status, output = python(into, LOADS)
    if status:
        return FAILED, last_line(output)
    lines = output.splitlines()
    if not lines:
        return OK, ""
    if all("libcuda.so.1" in line for line in lines):
        names = ", ".join(line.split()[0] for line in lines)
        return ABSENT, f"not loaded: no CUDA driver ({names})"
    return FAILED, next(line for line in lines if "libcuda.so.1" not in line)


def outcome(into: Path, code: str) -> tuple[str, str]:
    status, output = python(into, code)
    return (FAILED, last_line(output)) if status else (OK, "")


def tried(name: str, attempt: Callable[[], tuple[str, str]]) -> Check:
    """Try one thing, and say at once how it went."""
    began = time.monotonic()
    found, detail = attempt()
    check = Check(name, found, detail, round(time.monotonic() - began, 1))
    say(str(check))
    return check


def python(into: Path, code: str, *arguments: str) -> tuple[int, str]:
    """Run code in the environment, apart from this folder and the caller's own settings."""
    return run([into / "bin" / "python", "-I", "-c", code, *arguments], CHECK_S)


def run(command: Sequence[str | Path], limit: float, **environment: str) -> tuple[int, str]:
    """Run a program for so many seconds; none of its children outlives it."""
    quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    running = subprocess.Popen(
        list(map(str, command)),
        env={**inherited, **quiet, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = running.communicate(timeout=limit)
        return running.returncode, output
    except subprocess.TimeoutExpired:
        return 1, f"no end after {limit:.0f} s"
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
        if running.stdout:
            running.stdout.close()


def last_line(output: str) -> str:
    return (output.strip().splitlines() or ["no output"])[-1].strip()


def say_next(into: Path) -> None:
    default = ROOT / "build" / "gpu" / "env"
    prefix = "" if into == default else f"MAESTRO_GPU_PYTHON={into}/bin/python "
    say(f"next: {prefix}scripts/gpu/check")


def say(what: str) -> None:
    sys.stdout.write(f"install: {time.monotonic() - STARTED:4.0f} s  {what}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
