"""Stub nodes: real agent and worker processes around the stub engine."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from node.homes import Home, at_home
from node.nodes import MakeConfig

from maestro_backend.config import Config
from maestro_backend.workers import read_records


@pytest.fixture
def stub_config(tmp_path: Path) -> MakeConfig:
    """Make a config of stub models: `stub_config(a={}, b={"kv_memory": "1GiB"}, memory="4GiB")`.

    `node` adds to the settings of the node, or replaces them.
    """

    def make(
        memory: str = "1GiB",
        state: str = "state",
        node: dict[str, Any] | None = None,
        **models: dict[str, Any],
    ) -> Config:
        stub = {"source": "random:tiny-llama", "engine": "stub"}
        here = {"name": "here", "devices": ["cpu"], "memory": memory}
        return Config.parse(
            {
                "models": {name: {**stub, **settings} for name, settings in models.items()},
                "nodes": [{**here, **(node or {})}],
                "state_dir": str(tmp_path / state),
            }
        )

    return make


@pytest.fixture
async def home(tmp_path: Path) -> AsyncIterator[Home]:
    """Workers without an agent."""
    async with at_home(tmp_path) as home:
        yield home


@pytest.fixture
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    """A leased worker is nobody's child: it is found by its record."""
    yield
    found = [read_records(folder) for folder in tmp_path.glob("*/workers")]
    alive = [record for each in found for record in each.values() if record.lives()]
    for record in alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(record.pid, signal.SIGKILL)
    for note in tmp_path.glob("*/runtime_folder"):
        shutil.rmtree(note.read_text(), ignore_errors=True)
    assert alive == []
