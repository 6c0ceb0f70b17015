"""Models that do not fit together take turns; one that can never fit is refused with numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from e2e.served import chat, maestro

MIB = 1024**2
KV, RESIDUAL = 128 * MIB, 64 * MIB  # the stub's residual
CAPACITY = 200 * MIB
NEVER = 512 * MIB


@pytest.fixture
def config(tmp_path: Path) -> str:
    """Two models, of which the node has room for one, and a third that is larger than the node."""
    assert KV + RESIDUAL <= CAPACITY < 2 * (KV + RESIDUAL)
    fixed = {"elastic": False}  # with a KV limit that moves both would fit
    stub = {"source": "random:tiny-llama", "engine": "stub", "engine_args": fixed}
    sizes = {"a": KV, "b": KV, "c": NEVER}
    file = tmp_path / "config.yaml"
    file.write_text(
        json.dumps(
            {
                "models": {m: {**stub, "kv_memory": size} for m, size in sizes.items()},
                "nodes": [{"devices": ["cpu"], "memory": CAPACITY}],
                "state_dir": str(tmp_path / "state"),
            }
        )
    )
    return str(file)


def test_an_idle_model_makes_room_for_another(config: str, tmp_path: Path) -> None:
    with maestro("serve", "--config", config, "--port", "0", state=tmp_path) as served:
        for model in ("a", "b", "a"):
            answer = chat(served.url, model)
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == model


def test_a_model_that_can_never_fit_is_refused_with_the_numbers(
    config: str, tmp_path: Path
) -> None:
    with maestro("serve", "--config", config, "--port", "0", state=tmp_path) as served:
        answer = chat(served.url, "c")
        assert answer.status_code == 422, answer.text
        for size in (NEVER + RESIDUAL, CAPACITY):
            assert f"{size:,}" in answer.text
        assert chat(served.url, "a").status_code == 200
