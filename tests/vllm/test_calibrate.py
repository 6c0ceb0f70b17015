"""`maestro calibrate` on a real engine: SmolLM2-135M on vLLM-CPU."""

from __future__ import annotations

import httpx
import pytest
from node.nodes import worker_of

from maestro_backend.clusters import EngineClient, calibrate, load_geometry, load_profile
from maestro_backend.node import LocalNode

pytestmark = pytest.mark.vllm


async def test_a_real_engine_is_measured_and_fitted(vllm_node: LocalNode) -> None:
    worker = await worker_of(vllm_node, "smollm2")
    transport = httpx.AsyncHTTPTransport(uds=worker.address)
    geometry, like = load_geometry("smollm2-135m"), load_profile("cpu-2")
    async with EngineClient("http://worker/v1", "smollm2", transport=transport) as client:
        found = await calibrate(client, geometry, seconds=30, step_s=like.step_s)
    fit = found.fit
    assert 50 < fit.prefill_tokens_s < 5000
    assert 1e9 < fit.bandwidth < 1e12
    assert found.decodes[0].batch == 1 and 0.01 < found.decodes[0].seconds < 1
    assert len(found.decodes) >= 2 and len(found.prefills) >= 2
    assert found.median_error < 0.3
