"""Runs a command of a few seconds or minutes to its end, and leaves nothing of it behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress

from maestro_agents.protocol import BackendError

from ._telling import telling_line


async def run_tool(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run `command`, tied to this process; a cancelled caller kills it.

    Raises:
        BackendError: it failed; the message is the telling line of its output.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "maestro_backend._tied", *command),
        env=dict(environment),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if process.returncode != 0:
        text = output.decode(errors="replace")
        raise BackendError(telling_line(text) or f"exit status {process.returncode}")
