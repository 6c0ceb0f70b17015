"""The repository's own tests of the GPU code, against the vLLM and kvcached that are here."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

from ._step import Step, run

_REPOSITORY = Path(__file__).parents[4]


async def contract(step: Step) -> None:
    """All of them pass; on a GPU those on real memory are among them."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/node",
        "-o",
        "filterwarnings=default",  # other people's packages warn of their own affairs
        "-k",
        "gpu",
    ]
    tests = await asyncio.create_subprocess_exec(
        *command, cwd=_REPOSITORY, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out = (await tests.communicate())[0].decode()
    sys.stderr.write(out)
    last = out.strip().splitlines()[-1] if out.strip() else "nothing was printed"
    step.check("the tests pass", tests.returncode == 0, last)
    passed = re.search(r"(\d+) passed", last)
    step.figure("passed", int(passed[1]) if passed else 0)


if __name__ == "__main__":
    run(contract)
