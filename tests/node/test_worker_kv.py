"""The KV limit of a worker, kept prefixes, and measured sizes."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from node.homes import (
    DEVICE,
    DISK,
    HOST,
    KV,
    MIB,
    PARKED,
    RESIDUAL,
    WEIGHTS,
    Home,
    Liar,
    chat,
    control,
    failure,
    kill,
)

from maestro_agents.protocol import UnsupportedError
from maestro_backend.node._ledger import Ledger
from maestro_backend.scheduler import DeviceInfo, WorkerState
from maestro_backend.workers import DoesNotFitError, Memory

# --- the KV limit ---------------------------------------------------------------------------------


async def test_a_start_below_what_is_built(home: Home) -> None:
    home.ledger = Ledger([DeviceInfo("cpu", WEIGHTS + 2 * MIB + RESIDUAL)], 0)
    worker = home.worker()
    await failure(worker.bring(DEVICE), DoesNotFitError)
    await worker.bring(DEVICE, 2 * MIB)
    assert (worker.info.kv_limit_bytes, worker.info.kv_max_bytes) == (2 * MIB, KV)
    assert (await control(worker))["kv"]["limit_bytes"] == 2 * MIB
    told = await failure(worker.set_kv_limit(3 * MIB), DoesNotFitError)
    assert "free" in told
    assert (worker.info.kv_limit_bytes, home.held()[0]) == (2 * MIB, WEIGHTS + 2 * MIB + RESIDUAL)
    assert (await control(worker))["kv"]["limit_bytes"] == 2 * MIB
    kill(worker)
    await home.until(worker, WorkerState.RESTARTING)
    await worker.bring(DEVICE)
    assert worker.info.kv_limit_bytes == 2 * MIB
    await worker.bring(DISK)
    assert worker.info.kv_limit_bytes == KV  # what the next start takes, unless it is told


async def test_a_shrink_gives_back_what_is_free_and_the_rest_later(home: Home) -> None:
    worker = home.worker(engine_args={"output_tokens": 1})
    await worker.bring(DEVICE)
    transport = httpx.AsyncHTTPTransport(uds=worker.info.address)
    async with httpx.AsyncClient(transport=transport, base_url="http://worker") as http:
        await http.post("/stub/fault", json={"kind": "hang", "after_tokens": 1, "times": 2})
    calls = [asyncio.create_task(chat(worker, "x" * 3600, f"c{i}")) for i in range(2)]
    while (await control(worker))["kv"]["used_bytes"] < 2 * 900 * 1024:
        assert not any(call.done() for call in calls)
    held = await worker.set_kv_limit(MIB)
    assert 2 * 900 * 1024 <= held < KV
    assert (worker.info.kv_limit_bytes, home.held()[0]) == (held, WEIGHTS + held + RESIDUAL)
    for call in calls:
        call.cancel()
    await home.changed(lambda: worker.info.kv_limit_bytes == MIB)
    assert home.held()[0] == WEIGHTS + MIB + RESIDUAL
    assert await worker.set_kv_limit(4 * MIB) == 4 * MIB
    assert home.held()[0] == WEIGHTS + 4 * MIB + RESIDUAL


async def test_the_kv_limit_moves_with_the_weights(home: Home) -> None:
    home.ledger = Ledger([DeviceInfo("cpu", WEIGHTS + 4 * MIB + RESIDUAL)], WEIGHTS)
    worker = home.worker()
    await worker.bring(DEVICE, 4 * MIB)
    await worker.bring(HOST, MIB)
    assert home.held()[0] == MIB + RESIDUAL
    await worker.set_kv_limit(2 * MIB)
    assert home.held()[0] == 2 * MIB + RESIDUAL
    await failure(worker.bring(DEVICE, 5 * MIB), DoesNotFitError)
    assert (worker.info.residency, home.held()[0]) == (HOST, 2 * MIB + RESIDUAL)
    await worker.bring(DEVICE, 3 * MIB)
    assert home.held()[0] == WEIGHTS + 3 * MIB + RESIDUAL
    assert (await control(worker))["kv"]["limit_bytes"] == 3 * MIB


@pytest.mark.parametrize("limit", [MIB - 1, KV + 1])
async def test_a_limit_that_cannot_be(home: Home, limit: int) -> None:
    worker = home.worker()
    assert "start it first" in await failure(worker.set_kv_limit(KV))
    assert "max_model_len" in await failure(worker.bring(DEVICE, limit))
    await worker.bring(DEVICE)
    assert "max_model_len" in await failure(worker.set_kv_limit(limit))
    assert worker.info.kv_limit_bytes == KV


async def test_a_cache_of_one_size(home: Home) -> None:
    worker = home.worker(engine_args={"elastic": False})
    assert not worker.info.elastic
    await worker.bring(DEVICE, KV)
    assert not worker.info.elastic
    await failure(worker.set_kv_limit(MIB), UnsupportedError)
    await worker.bring(HOST)
    assert worker.info.kv_limit_bytes == 0
    assert home.held() == (RESIDUAL, WEIGHTS)
    await worker.bring(PARKED)
    assert home.held() == (RESIDUAL, 0)
    await worker.bring(DEVICE)
    assert worker.info.kv_limit_bytes == KV
    assert home.held() == (WEIGHTS + KV + RESIDUAL, 0)


async def test_a_cache_of_one_size_stays_while_something_is_in_it(home: Home) -> None:
    slow = {"decode_tokens_s": 20, "output_tokens": 40}
    worker = home.worker(engine_args={"elastic": False, **slow})
    await worker.bring(DEVICE)
    call = asyncio.create_task(chat(worker))
    while not (await control(worker))["kv"]["used_bytes"]:
        assert not call.done()
    await worker.bring(HOST)
    assert worker.info.kv_limit_bytes == KV
    assert home.held() == (KV + RESIDUAL, WEIGHTS)
    await worker.bring(DEVICE)
    assert (await call).status_code == 200
    await worker.keep_prefix("c1", 60)
    await worker.bring(HOST)
    assert worker.info.kv_limit_bytes == KV


async def test_a_cache_of_one_size_that_cannot_come_back(home: Home) -> None:
    """Nothing of it is counted while it is away, also after a resume that failed."""
    worker = home.worker(engine_args={"elastic": False, "fail_resume": 1})
    await worker.bring(DEVICE)
    await worker.bring(HOST)
    home.ledger.hold("other", "cpu", Memory(0, 400 * MIB - RESIDUAL - WEIGHTS, 0))
    await failure(worker.bring(DEVICE), DoesNotFitError)
    home.ledger.release("other")
    await failure(worker.bring(DEVICE))
    assert (worker.info.state, worker.info.kv_limit_bytes) == (WorkerState.SUSPENDED, 0)
    assert home.held() == (RESIDUAL, WEIGHTS)
    await worker.bring(DEVICE)
    assert home.held() == (WEIGHTS + KV + RESIDUAL, WEIGHTS)


async def test_kept_and_warmed_prefixes(home: Home) -> None:
    worker = home.worker()
    assert "stopped" in await failure(worker.keep_prefix("c1", 60))
    await worker.bring(DEVICE)
    await chat(worker, "x" * 400, "c1")
    kept = await worker.keep_prefix("c1", 60)
    assert kept == (await control(worker))["kv"]["pinned_bytes"] > 0
    warmed = await worker.warm_prefix("c2", [{"role": "user", "content": "y" * 4000}], 60)
    assert (await control(worker))["kv"]["pinned_bytes"] == kept + warmed
    await worker.drop_prefix("c1")
    assert (await control(worker))["kv"]["pinned_bytes"] == warmed
    assert "nobody" in await failure(worker.keep_prefix("nobody", 60))
    await worker.bring(PARKED)
    assert "not ready" in await failure(worker.warm_prefix("c3", [], 60))


# --- what is measured -----------------------------------------------------------------------------


async def test_measured_weights_beat_the_estimate(home: Home) -> None:
    worker = home.worker(engine=Liar())
    assert worker.info.weights_bytes == WEIGHTS - 2 * MIB
    await worker.bring(DEVICE)
    assert (worker.info.weights_bytes, home.held()[0]) == (WEIGHTS, WEIGHTS + KV + RESIDUAL)
    await worker.bring(DISK)
    assert worker.info.weights_bytes == WEIGHTS
    assert home.worker(engine=Liar()).info.weights_bytes == WEIGHTS


async def test_weights_that_turn_out_larger_are_made_up_for_by_the_kv_cache(home: Home) -> None:
    room = WEIGHTS - 2 * MIB + KV + RESIDUAL
    home.ledger = Ledger([DeviceInfo("cpu", room)], 0)
    worker = home.worker(engine=Liar())
    await worker.bring(DEVICE)
    assert (worker.info.weights_bytes, worker.info.kv_limit_bytes) == (WEIGHTS, KV - 2 * MIB)
    assert (await control(worker))["kv"]["limit_bytes"] == KV - 2 * MIB
    assert home.held()[0] == room


async def test_weights_that_turn_out_too_large_are_refused(home: Home) -> None:
    home.ledger = Ledger([DeviceInfo("cpu", WEIGHTS + RESIDUAL)], 0)
    worker = home.worker(engine=Liar())
    told = await failure(worker.bring(DEVICE, 2 * MIB), DoesNotFitError)
    assert (worker.info.state, worker.info.detail) == (WorkerState.STOPPED, told)
    assert worker.info.weights_bytes == WEIGHTS
    assert home.held() == (0, 0)
