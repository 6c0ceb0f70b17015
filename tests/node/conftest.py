"""Stub nodes: real agent and worker processes around the stub engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from node.nodes import MakeConfig

from maestro_backend.config import Config


@pytest.fixture
def stub_config(tmp_path: Path) -> MakeConfig:
    """Make a config of stub models: `stub_config(a={}, b={"kv_memory": "1GiB"}, memory="4GiB")`."""

    def make(memory: str = "1GiB", state: str = "state", **models: dict[str, Any]) -> Config:
        stub = {"source": "random:tiny-llama", "engine": "stub"}
        return Config.parse(
            {
                "models": {name: {**stub, **settings} for name, settings in models.items()},
                "nodes": [{"name": "here", "devices": ["cpu"], "memory": memory}],
                "state_dir": str(tmp_path / state),
            }
        )

    return make
