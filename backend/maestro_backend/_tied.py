"""Ties a process to its parent: when the parent dies, so does the process (Linux only).

`python -m maestro_backend._tied CMD...` runs CMD so tied to whoever started it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PARENT_VARIABLE = "MAESTRO_PARENT"
"""Process id of the starter: lets a child notice that it was orphaned before it was tied."""

LEASE_VARIABLE = "MAESTRO_LEASE_S"
"""Seconds that a child may live without being told that it is wanted: then it is not tied."""

_PR_SET_PDEATHSIG = 1


def tied_environment() -> dict[str, str]:
    """This process's environment for a child that will call `tie_to_parent`."""
    inherited = {name: value for name, value in os.environ.items() if name != LEASE_VARIABLE}
    return {**inherited, PARENT_VARIABLE: str(os.getpid())}


def tie_to_parent(signum: int = signal.SIGTERM) -> None:
    """Have the kernel send us `signum` when our parent dies. Does nothing outside Linux.

    The kernel watches the *thread* that started us: a parent should start us from its main thread.
    """
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signum), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if parent is not None and os.getppid() != int(parent):
        os.kill(os.getpid(), signum)


def main(argv: list[str]) -> int:
    """Tie, unless it has a lease, then become CMD."""
    if not argv:
        sys.stderr.write("usage: python -m maestro_backend._tied CMD...\n")
        return 2
    if LEASE_VARIABLE in os.environ:
        os.environ.pop(PARENT_VARIABLE, None)
    else:
        tie_to_parent()
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        sys.stderr.write(f"cannot run {argv[0]}: {error.strerror}\n")
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
