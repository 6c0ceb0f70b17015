"""One agent per state folder: the lock, and the folder of its sockets."""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from maestro_agents.protocol import ConfigError
from maestro_backend.workers import MAX_ADDRESS_BYTES

_LEAVING_S = 3.0
"""An agent that has just lost its gateway needs a moment to leave."""

_POLL_S = 0.05
_ROOM_FOR_NAME = 40


class StateLock:
    """The right to run workers from one state folder. The kernel frees it with the process."""

    def __init__(self, file: int) -> None:
        self._file = file

    @classmethod
    def take(cls, folder: Path, patience_s: float = _LEAVING_S) -> Self:
        """Take the lock of `folder`, waiting at most `patience_s` seconds for another's end.

        Raises:
            ConfigError: another agent has it; the text names its pid.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "node.lock"
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        deadline = time.monotonic() + patience_s
        while not _locked(file):
            if time.monotonic() >= deadline:
                os.close(file)
                raise ConfigError(_taken(folder, path))
            time.sleep(_POLL_S)
        os.truncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)
        return cls(file)

    def release(self) -> None:
        """Let the next one in."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _taken(folder: Path, path: Path) -> str:
    pid = path.read_text().strip() or "unknown"
    return (
        f"another node agent (pid {pid}) runs workers from the state folder {folder}: stop it,"
        " or set another state_dir for this one"
    )


def runtime_folder(state_dir: Path) -> Path:
    """The private folder for the sockets of `state_dir`: short, and always the same one.

    It is noted in the state folder: another TMPDIR must not part an agent from its workers.

    Raises:
        ConfigError: no temporary folder has a short enough path, or somebody else has taken it.
    """
    note = state_dir / "runtime_folder"
    with suppress(OSError):
        noted = Path(note.read_text(encoding="utf-8"))
        if noted.is_absolute() and _is_ours(noted):
            return noted
    digest = hashlib.sha256(os.fsencode(state_dir.resolve())).hexdigest()[:8]
    name = f"maestro-{os.getuid()}-{digest}"
    for base in (os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), "/tmp"):
        room = MAX_ADDRESS_BYTES - len(os.fsencode(base)) - len(f"/{name}/")
        if base and room >= _ROOM_FOR_NAME and _is_ours(Path(base) / name):
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(f"{base}/{name}", encoding="utf-8")
            return Path(base) / name
    raise ConfigError("no temporary folder with a short path; set TMPDIR to one, such as /tmp")


def _is_ours(folder: Path) -> bool:
    """Whether `folder`, made if need be, is a folder that only we can enter."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return False
    private = stat.S_IMODE(found.st_mode) & 0o077 == 0
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and private
