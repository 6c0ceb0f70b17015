"""Unix socket paths that the kernel accepts: at most 107 bytes."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from maestro_agents.protocol import ConfigError

MAX_ADDRESS_BYTES = 107


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
