"""No test may leave a process behind: a survivor is named, ended, and fails the session."""

import os
from uuid import uuid4

import psutil
import pytest
from hypothesis import HealthCheck, settings

# A busy machine is no bug: properties have no time limit of their own.
settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")

MARKER = "MAESTRO_TEST_SESSION"
GRACE_S = 5
STRAYS = pytest.StashKey[list[str]]()


def pytest_sessionstart() -> None:
    os.environ[MARKER] = uuid4().hex


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    _, alive = psutil.wait_procs(survivors(), timeout=GRACE_S)
    session.config.stash[STRAYS] = [describe(process) for process in alive]
    for process in alive:
        process.kill()
    if alive:
        psutil.wait_procs(alive, timeout=GRACE_S)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if strays := config.stash.get(STRAYS, []):
        terminalreporter.section("processes left behind", red=True)
        for stray in strays:
            terminalreporter.line(stray)


def survivors() -> list[psutil.Process]:
    """Our children, and whoever inherited this session's marker before its parent died."""
    mine = psutil.Process()
    found = {process.pid: process for process in mine.children(recursive=True)}
    for process in psutil.process_iter():
        if process.pid != mine.pid and environment(process).get(MARKER) == os.environ[MARKER]:
            found[process.pid] = process
    return [process for process in found.values() if counts(process)]


def counts(process: psutil.Process) -> bool:
    """Not what ends by itself: a zombie, or Python's own tracker, which lives as long as we do."""
    try:
        tracker = "multiprocessing.resource_tracker" in " ".join(process.cmdline())
        return not tracker and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid}: {' '.join(process.cmdline())}"
    except psutil.Error:
        return f"{process.pid}: gone meanwhile"
