"""The guard in tests/conftest.py sees what a test leaves behind."""

import subprocess
import sys
from pathlib import Path

CONFTEST = Path(__file__).parents[1] / "conftest.py"
CHILD = """
import subprocess, sys

def test_leaves_a_process():
    subprocess.Popen({command}, start_new_session=True)
"""


def session(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text(CONFTEST.read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "test_child.py").write_text(CHILD.format(command=command), encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", folder],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_survivor_is_named_and_fails_the_session(tmp_path: Path) -> None:
    done = session(tmp_path, "['sleep', '71']")
    assert "1 passed" in done.stdout
    assert "processes left behind" in done.stdout
    assert "sleep 71" in done.stdout
    assert done.returncode == 1


def test_an_orphan_is_found_by_its_environment(tmp_path: Path) -> None:
    done = session(tmp_path, "['sh', '-c', 'sleep 72 & exit']")
    assert "sleep 72" in done.stdout
    assert done.returncode == 1


def test_a_child_that_has_ended_is_no_survivor(tmp_path: Path) -> None:
    done = session(tmp_path, "['true']")
    assert done.returncode == 0, done.stdout
