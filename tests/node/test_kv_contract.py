"""Our KV geometry of well-known models, held against what vLLM's own classes make of them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from node.kv_models import MODELS

from maestro_backend.workers._kv_geometry import kv_geometry

_found = importlib.util.find_spec("vllm")
if _found is None or _found.origin is None:  # tests/vllm would be a namespace
    pytest.skip("vLLM is not installed (ENGINE=stub make setup)", allow_module_level=True)

LENGTHS = [1, 15, 16, 17, 128, 1000, 1024, 4095, 4096, 4097, 6000, 8192]
USUAL: dict[str, Any] = {
    "dtype": "bfloat16",
    "kv_dtype": "auto",
    "block_tokens": 16,
    "tensor_parallel": 1,
    "in_flight_tokens": 2 * 512,
    "max_model_len": 8192,
    "hybrid": True,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "usual": {},
    "as on a CPU": {"dtype": "float32", "block_tokens": 128, "in_flight_tokens": 4096},
    "fp8": {"kv_dtype": "fp8"},
    "on 4 devices": {"tensor_parallel": 4},
    "on 16 devices": {"tensor_parallel": 16},
    "not hybrid": {"hybrid": False},
    "short context": {"max_model_len": 900},
}
CASES = {
    f"{name}, {variant}": {"config": config, **USUAL, **changes}
    for name, config in MODELS.items()
    for variant, changes in VARIANTS.items()
}


def lengths(case: dict[str, Any]) -> list[int]:
    return [tokens for tokens in LENGTHS if tokens <= case["max_model_len"]]


@pytest.fixture(scope="module")
def vllm() -> dict[str, dict[str, Any]]:
    """What vLLM makes of all cases; in a process of its own, which vLLM changes as it likes."""
    script = Path(__file__).with_name("vllm_groups.py")
    asked = [{**case, "lengths": lengths(case)} for case in CASES.values()]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        input=json.dumps(asked),
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_blocks_are_those_of_vllm(vllm: dict[str, dict[str, Any]], name: str) -> None:
    case, theirs = CASES[name], vllm[name]
    ours = kv_geometry(**case)
    assert ours.block_bytes == theirs["block_bytes"]
    assert sorted(g.most_blocks or 0 for g in ours.groups) == sorted(theirs["most_blocks"])
    assert ours.bytes_of(case["max_model_len"]) <= theirs["longest_bytes"]
    counted = [ours.blocks(tokens) for tokens in lengths(case)]
    assert counted == theirs["admitted"]
    assert all(held <= count for held, count in zip(theirs["held"], counted, strict=True))
    longest = -(-case["max_model_len"] // case["block_tokens"])
    if all(group.most_blocks == longest for group in ours.groups):  # no window: not a block less
        assert counted == theirs["held"]
