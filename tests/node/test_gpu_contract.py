"""What our GPU code takes for granted of vLLM, held against the source of the installed one.

`MAESTRO_VLLM_SOURCE=FOLDER` reads an unpacked wheel's `vllm` folder instead.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from node.gpus import AllocationData

from maestro_backend.workers.vllm_plugin._sleep import _WRITERS

SOURCE = os.environ.get("MAESTRO_VLLM_SOURCE")
_found = importlib.util.find_spec("vllm")
if not SOURCE and (_found is None or _found.origin is None):  # tests/vllm would be a namespace
    pytest.skip("vLLM is not installed (ENGINE=stub make setup)", allow_module_level=True)
VLLM = Path(SOURCE or Path(_found.origin).parent)  # type: ignore[union-attr,arg-type]

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def tree(path: str) -> ast.Module:
    return ast.parse((VLLM / path).read_text(encoding="utf-8"))


def definition(path: str, *names: str) -> ast.AST:
    """A function or class by its name, or by the class's name and its own."""
    found: ast.AST = tree(path)
    for name in names:
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        [found] = [n for n in found.body if isinstance(n, kinds) and n.name == name]  # type: ignore[attr-defined]
    return found


def signature(path: str, *names: str) -> str:
    function = definition(path, *names)
    assert isinstance(function, Function)
    return ast.unparse(function.args)


CUMEM, BACKENDS = "device_allocator/cumem.py", "device_allocator/sleep_mode_backend.py"
WORKER = "v1/worker/gpu_worker.py"


@pytest.mark.parametrize(
    ("path", "names", "takes"),
    [
        (CUMEM, ("create_and_map",), "allocation_handle: HandleType"),
        (CUMEM, ("unmap_and_release",), "allocation_handle: HandleType"),
        (CUMEM, ("CuMemAllocator", "get_instance"), ""),
        (BACKENDS, ("SleepModeBackend", "__init__"), "self"),
        (BACKENDS, ("SleepModeBackend", "suspend"), "self, level: int=1"),
        (BACKENDS, ("SleepModeBackend", "resume"), "self, tags: list[str] | None=None"),
        (BACKENDS, ("SleepModeBackend", "state"), "self"),
        (BACKENDS, ("SleepModeBackend", "preserves_communicators"), "cls"),
        (
            BACKENDS,
            ("SleepModeBackendFactory", "register_backend"),
            "cls, name: str, module_path: str, class_name: str",
        ),
        (WORKER, ("Worker", "reload_weights"), "self, *args, **kwargs"),
        (WORKER, ("Worker", "get_model"), "self"),
        (WORKER, ("Worker", "get_draft_model"), "self"),
    ],
)
def test_signatures_are_those_that_this_was_written_for(
    path: str, names: tuple[str, ...], takes: str
) -> None:
    assert signature(path, *names) == takes


def test_an_allocation_has_what_the_fake_one_has() -> None:
    found = definition("device_allocator/__init__.py", "AllocationData")
    assert isinstance(found, ast.ClassDef)
    fields = [ast.unparse(n.target) for n in found.body if isinstance(n, ast.AnnAssign)]
    assert fields == [field.name for field in dataclasses.fields(AllocationData)]
    handle = "HandleType: TypeAlias = tuple[int, int, int, list[int] | int]"
    assert handle in map(ast.unparse, tree("device_allocator/__init__.py").body)


def test_the_allocator_keeps_its_table_by_pointer() -> None:
    made = ast.unparse(definition(CUMEM, "CuMemAllocator", "__init__"))
    assert "self.pointer_to_data: dict[int, AllocationData] = {}" in made
    stored = ast.unparse(definition(CUMEM, "CuMemAllocator", "_python_malloc_callback"))
    assert "py_d_mem = allocation_handle[2]" in stored
    assert "self.pointer_to_data[py_d_mem]" in stored


def test_stock_sleep_gives_memory_back_by_the_same_calls() -> None:
    asleep = ast.unparse(definition(CUMEM, "CuMemAllocator", "sleep"))
    assert "unmap_and_release(handle)" in asleep
    assert "data.is_asleep = True" in asleep
    awake = ast.unparse(definition(CUMEM, "CuMemAllocator", "wake_up"))
    assert "create_and_map(handle)" in awake


def test_a_worker_makes_its_backend_at_first_use_by_the_name_in_its_config() -> None:
    worker = ast.unparse(definition(WORKER, "Worker"))
    ways = ("@property\n    def sleep_mode_backend(self)", "def _get_sleep_mode_backend(self)")
    assert sum(way in worker for way in ways) == 1
    assert "if self._sleep_mode_backend is None" in worker
    assert "create_backend(self.vllm_config.model_config)" in worker
    assert "self._sleep_mode_backend: SleepModeBackend | None = None" in ast.unparse(tree(WORKER))
    config = ast.unparse(definition("config/model.py", "ModelConfig"))
    assert "sleep_mode_backend: str = 'cumem'" in config
    assert "enable_sleep_mode: bool = False" in config


def test_what_a_wake_does_beside_the_memory_is_what_we_do() -> None:
    """Buffers after level 2; in 0.26 also `post_kv_cache_wake_up`, which later versions lack."""
    awake = definition(WORKER, "Worker", "wake_up")
    called = {ast.unparse(n.func) for n in ast.walk(awake) if isinstance(n, ast.Call)}
    assert {name for name in called if name.startswith(("self", "inner"))} <= {
        "self._get_sleep_mode_backend",
        "self._get_sleep_mode_backend().resume",
        "self._sleep_saved_buffers[name].data",
        "self.get_draft_model",
        "self.model_runner.post_kv_cache_wake_up",
        "self.sleep_mode_backend.resume",
        "self.synchronize_device",
        "inner._build_fused_kv_buffers",
    }


def test_a_reload_loads_the_model_and_no_draft_model() -> None:
    reload = definition("v1/worker/gpu_model_runner.py", "GPUModelRunner", "reload_weights")
    assert "model = self.get_model()" in ast.unparse(reload)
    assert "draft" not in ast.unparse(reload)


def test_a_load_is_tagged_as_weights_and_the_kv_cache_as_such() -> None:
    assert "_maybe_get_memory_pool_context(tag='weights')" in ast.unparse(
        definition(WORKER, "Worker", "load_model")
    )
    assert "_maybe_get_memory_pool_context(tag='kv_cache')" in ast.unparse(
        definition(WORKER, "Worker", "initialize_from_config")
    )


def test_level_2_keeps_buffers_and_gives_them_back_before_the_reload() -> None:
    asleep = ast.unparse(definition(WORKER, "Worker", "sleep"))
    assert "name: buffer.cpu().clone() for name, buffer in model.named_buffers()" in asleep
    awake = ast.unparse(definition(WORKER, "Worker", "wake_up"))
    assert "buffer.data.copy_(self._sleep_saved_buffers[name].data)" in awake


def test_a_reload_that_broke_off_can_be_ended() -> None:
    assert "initialize_layerwise_reload(model)" in ast.unparse(
        definition("v1/worker/gpu_model_runner.py", "GPUModelRunner", "reload_weights")
    )
    reload = "model_executor/model_loader/reload/"
    assert "finalize_layerwise_reload" in ast.unparse(tree(f"{reload}__init__.py"))
    assert signature(f"{reload}layerwise.py", "finalize_layerwise_processing") == (
        "model: torch.nn.Module, model_config: ModelConfig"
    )


def test_every_method_that_writes_weights_is_there_to_be_watched() -> None:
    worker = definition(WORKER, "Worker")
    assert isinstance(worker, ast.ClassDef)
    methods = {node.name for node in worker.body if isinstance(node, Function)}
    assert set(_WRITERS) <= methods
    writing = {name for name in methods if "weight" in name and not name.startswith("_")}
    starts = {
        "init_weight_transfer_engine",
        "start_weight_update",
        "start_draft_weight_update",
        "supports_draft_weight_updates",
    }
    assert writing - starts <= set(_WRITERS), "a new way to write weights: is the copy dropped?"


REAL = """
import logging
from maestro_backend.workers.vllm_plugin._sleep import missing_internals, register_sleep_backend
from vllm.device_allocator.sleep_mode_backend import SleepModeBackend, SleepModeBackendFactory

assert register_sleep_backend() and register_sleep_backend()
print("missing:", missing_internals())
stock = SleepModeBackendFactory.get_backend_class("maestro")
assert issubclass(stock, SleepModeBackend) and stock.is_supported()
from maestro_backend.workers.vllm_plugin._cumem import MaestroSleepBackend
assert issubclass(MaestroSleepBackend, SleepModeBackend)
assert not MaestroSleepBackend.__abstractmethods__
assert MaestroSleepBackend.preserves_communicators()
print("class:", stock.__name__)
"""


@pytest.mark.skipif(bool(SOURCE), reason="MAESTRO_VLLM_SOURCE: that vLLM is not installed")
def test_the_real_factory_takes_our_backend() -> None:
    done = subprocess.run(
        (sys.executable, "-c", REAL), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    missing, chosen = [line for line in done.stdout.splitlines() if line.startswith(("mi", "cl"))]
    expected = "MaestroSleepBackend" if missing == "missing: " else "StockSleepBackend"
    assert chosen == f"class: {expected}"
