"""Unix socket paths that the kernel accepts: at most 107 bytes."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path

from maestro_agents.protocol import ConfigError

MAX_ADDRESS_BYTES = 107
_ROOM_FOR_NAME = 40


def runtime_dir() -> Path:
    """A new private folder with a path short enough for sockets; the caller removes it.

    Raises:
        ConfigError: no temporary folder has a short enough path.
    """
    candidates = [os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), "/tmp"]
    for base in candidates:
        room = MAX_ADDRESS_BYTES - len(os.fsencode(base)) - len("/maestro-12345678/")
        if base and room >= _ROOM_FOR_NAME and os.access(base, os.W_OK):
            return Path(tempfile.mkdtemp(prefix="maestro-", dir=base))
    raise ConfigError("no temporary folder with a short path; set TMPDIR to one, such as /tmp")


def socket_path(folder: Path, name: str) -> Path:
    """`folder`/`name`.sock, with `name` shortened to a hash where it does not fit as it is.

    Raises:
        ConfigError: `folder` itself is too long.
    """
    for file in (f"{file_name(name)}.sock", f"{_digest(name)}.sock"):
        path = folder / file
        if len(os.fsencode(path)) <= MAX_ADDRESS_BYTES:
            return path
    raise ConfigError(
        f"the path {folder} is too long for unix sockets (at most {MAX_ADDRESS_BYTES} bytes with"
        " the name); use a shorter folder"
    )


def file_name(name: str) -> str:
    """`name` as a file name; different names stay different."""
    safe = re.sub(r"[^\w.-]", "_", name)
    return name if safe == name else f"{safe}-{_digest(name)}"


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:8]
