"""What every process of a worker needs: it dies with its parent, and broken imports are hidden."""

from __future__ import annotations

import functools
import os
import signal
import sys
from importlib import metadata

from maestro_backend._tied import LEASE_VARIABLE, PARENT_VARIABLE, tie_to_parent

_BUILT_FOR_TORCH = ("torchvision", "torchaudio", "torchcodec")


_SERVER = "MAESTRO_SERVER_PID"


@functools.cache
def join_worker() -> None:
    """Tie this process, and those it forks, to their parents; hide mismatched torch packages.

    The server of a leased worker outlives its parent, so that another agent can adopt it.
    """
    hide_mismatched_packages()
    server = os.environ.setdefault(_SERVER, str(os.getpid()))
    if LEASE_VARIABLE in os.environ and server == str(os.getpid()):
        os.environ.pop(PARENT_VARIABLE, None)
    else:
        _die_with_parent()
    # A forked child inherits vLLM's "plugins are loaded" and would never call us again.
    os.register_at_fork(after_in_child=_die_with_parent)


def hide_mismatched_packages() -> None:
    """Make CUDA builds of torch's companions look absent beside a CPU build of torch.

    PyPI has only their CUDA builds, and with one of them present `transformers` fails to import.
    `None` in `sys.modules` is Python's own way to say so: `find_spec` finds nothing, `import`
    raises `ModuleNotFoundError`.
    """
    if not _version("torch").endswith("+cpu"):
        return
    for name in _BUILT_FOR_TORCH:
        if name not in sys.modules and "+cpu" not in _version(name):
            sys.modules[name] = None  # type: ignore[assignment]  # documented, typed as ModuleType


def _die_with_parent() -> None:
    tie_to_parent(signal.SIGKILL)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
