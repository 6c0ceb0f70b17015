"""The KV limit of a worker, kept prefixes, and measured sizes."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Awaitable, Callable
from typing import Any

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

from maestro_agents.protocol import BackendError, UnsupportedError
from maestro_backend.node._ledger import Ledger
from maestro_backend.scheduler import DeviceInfo, WorkerState
from maestro_backend.workers import DoesNotFitError, Memory
from maestro_backend.workers._control import Control, WorkerStatus

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
    await worker.bring(HOST)
    assert (worker.info.kv_limit_bytes, home.held()[0]) == (0, RESIDUAL)
    await failure(worker.bring(DEVICE, 5 * MIB), DoesNotFitError)
    assert (worker.info.residency, worker.info.kv_limit_bytes) == (HOST, 0)
    assert home.held()[0] == RESIDUAL
    await worker.bring(DEVICE, 3 * MIB)
    assert home.held()[0] == WEIGHTS + 3 * MIB + RESIDUAL
    assert (await control(worker))["kv"]["limit_bytes"] == 3 * MIB


async def test_a_resume_without_a_limit_brings_the_last_one(home: Home) -> None:
    worker = home.worker()
    await worker.bring(DEVICE, 3 * MIB)
    for tier, given, then in ((HOST, None, 3), (PARKED, 2, 2), (HOST, None, 2)):
        await worker.bring(tier, given and given * MIB)
        assert (worker.info.kv_limit_bytes, home.held()[0]) == (0, RESIDUAL)
        await worker.bring(DEVICE)
        assert worker.info.kv_limit_bytes == then * MIB
        assert home.held()[0] == WEIGHTS + then * MIB + RESIDUAL
        assert (await control(worker))["kv"]["limit_bytes"] == then * MIB
    await worker.bring(HOST)
    home.ledger.hold("other", "cpu", Memory(home.ledger.free_bytes("cpu"), 0, 0))
    assert await worker.set_kv_limit(5 * MIB) == 0, "it needs no room yet"
    assert (worker.info.kv_limit_bytes, home.held()[0]) == (0, RESIDUAL)
    home.ledger.release("other")
    await worker.bring(DEVICE)
    assert worker.info.kv_limit_bytes == 5 * MIB


async def test_a_resume_that_fails_holds_nothing(home: Home) -> None:
    worker = home.worker(engine_args={"fail_resume": 1})
    await worker.bring(HOST)
    await failure(worker.bring(DEVICE, 2 * MIB))
    assert (worker.info.state, worker.info.kv_limit_bytes) == (WorkerState.SUSPENDED, 0)
    assert home.held() == (RESIDUAL, WEIGHTS)
    await worker.bring(DEVICE, 4 * MIB)
    assert home.held()[0] == WEIGHTS + 4 * MIB + RESIDUAL


async def test_a_call_that_is_paused_keeps_its_bytes(home: Home) -> None:
    """When its client goes, they are given back, though nobody moves the worker."""
    worker = home.worker(engine_args={"decode_tokens_s": 20, "output_tokens": 40})
    await worker.bring(DEVICE)
    calls = [asyncio.create_task(chat(worker, "x" * 2000, f"c{i}")) for i in range(2)]
    while (await control(worker))["kv"]["used_bytes"] < 2 * 500 * 1024:
        assert not any(call.done() for call in calls)
    await worker.bring(HOST)
    kept = worker.info.kv_limit_bytes
    assert 2 * 500 * 1024 <= (await control(worker))["kv"]["used_bytes"] <= kept < KV
    assert home.held()[0] == kept + RESIDUAL
    calls[0].cancel()
    await home.changed(lambda: worker.info.kv_limit_bytes < kept)
    assert worker.info.kv_limit_bytes == kept // 2
    assert home.held()[0] == kept // 2 + RESIDUAL
    await worker.bring(DEVICE, MIB)
    assert home.held()[0] == WEIGHTS + MIB + RESIDUAL
    assert (await calls[1]).json()["usage"]["completion_tokens"] == 40


async def test_what_a_paused_call_holds_beyond_the_limit_of_its_resume(home: Home) -> None:
    worker = home.worker(engine_args={"decode_tokens_s": 20, "output_tokens": 40})
    await worker.bring(DEVICE)
    calls = [asyncio.create_task(chat(worker, "x" * 3600, f"c{i}")) for i in range(2)]
    while (await control(worker))["kv"]["used_bytes"] < 2 * 900 * 1024:
        assert not any(call.done() for call in calls)
    await worker.bring(PARKED)
    held = worker.info.kv_limit_bytes
    assert held > MIB
    await worker.bring(DEVICE, MIB)
    assert worker.info.kv_limit_bytes == held
    [claimed] = {i.kv_limit_bytes for i in home.told if i.state is WorkerState.RESUMING}
    assert claimed == held, "before it began"
    assert home.held()[0] == WEIGHTS + worker.info.kv_limit_bytes + RESIDUAL
    await asyncio.gather(*calls)
    await home.changed(lambda: worker.info.kv_limit_bytes == MIB)


async def test_kept_prefixes_are_what_a_suspended_worker_holds(home: Home) -> None:
    worker = home.worker()
    await worker.bring(DEVICE)
    sizes = {}
    for call, seconds in (("dropped", 60), ("soon over", 1.5), ("stays", 60)):
        await chat(worker, "x" * 800, call)
        sizes[call] = await worker.keep_prefix(call, seconds)
    await chat(worker, "y" * 800, "cached")
    await worker.bring(HOST)
    assert worker.info.kv_limit_bytes == sum(sizes.values())
    assert home.held()[0] == worker.info.kv_limit_bytes + RESIDUAL
    await worker.drop_prefix("dropped")
    assert home.held()[0] == worker.info.kv_limit_bytes + RESIDUAL
    assert worker.info.kv_limit_bytes <= sizes["soon over"] + sizes["stays"]
    await home.changed(lambda: worker.info.kv_limit_bytes == sizes["stays"])
    assert home.held()[0] == sizes["stays"] + RESIDUAL
    await worker.bring(DEVICE, 2 * MIB)
    assert home.held()[0] == WEIGHTS + 2 * MIB + RESIDUAL
    assert (await control(worker))["kv"]["pinned_bytes"] == sizes["stays"]
    assert "nothing is cached" in await failure(worker.keep_prefix("cached", 60))


async def test_a_cache_that_was_not_given_back_is_told(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shrink after the suspend has failed: the worker is suspended, with all that it holds."""
    worker = home.worker()
    await worker.bring(DEVICE, 5 * MIB)
    move, status = Control.move, Control.status

    def holding(told: WorkerStatus | None) -> WorkerStatus:
        assert told is not None
        return dataclasses.replace(told, kv_held=told.kv_limit)

    async def move_only(self: Control, *arguments: Any) -> WorkerStatus:
        return holding(await move(self, *arguments))

    async def told(self: Control) -> WorkerStatus:
        return holding(await status(self))

    with monkeypatch.context() as broken:
        broken.setattr(Control, "move", move_only)
        broken.setattr(Control, "status", told)
        await worker.bring(HOST)
        assert (worker.info.state, worker.info.kv_limit_bytes) == (WorkerState.SUSPENDED, 5 * MIB)
        assert home.held() == (5 * MIB + RESIDUAL, WEIGHTS)
    await home.changed(lambda: worker.info.kv_limit_bytes == 0)  # it has been, meanwhile
    assert home.held()[0] == RESIDUAL
    await worker.bring(DEVICE)
    assert worker.info.kv_limit_bytes == 5 * MIB


async def test_the_books_are_true_whatever_is_asked(home: Home) -> None:
    """Two workers on a device with room for one and a half, in an order that nobody planned."""
    room = WEIGHTS + KV + 2 * RESIDUAL + WEIGHTS // 2
    home.ledger = Ledger([DeviceInfo("cpu", room)], WEIGHTS + MIB)
    workers = {name: home.worker(name) for name in "ab"}
    chance, refused = random.Random(7), 0
    for step in range(60):
        name = chance.choice("ab")
        worker, limit = workers[name], chance.choice([None, 1, 2, 5, 8])
        work: list[Callable[[], Awaitable[Any]]] = [
            lambda w=worker, n=limit: w.bring(DEVICE, n and n * MIB),
            lambda w=worker: w.bring(HOST),
            lambda w=worker: w.bring(PARKED),
            lambda w=worker, n=limit: w.set_kv_limit((n or 3) * MIB),
            lambda w=worker, c=f"{step - 1}": w.keep_prefix(c, 60),
            lambda w=worker, c=f"{step - 2}": w.drop_prefix(c),
        ]
        if worker.info.state is WorkerState.READY:
            await chat(worker, "x" * chance.choice([400, 1600]), f"{step}")
        try:
            await chance.choice(work)()
        except BackendError:
            refused += 1
        assert home.ledger.free_bytes("cpu") >= 0
        for told in workers.values():
            if told.info.pid is None:
                continue
            kv = (await control(told))["kv"]
            away = told.info.state is WorkerState.SUSPENDED
            assert told.info.kv_limit_bytes == kv["held_bytes"] >= 0
            assert kv["held_bytes"] == kv["pinned_bytes"] if away else kv["held_bytes"] >= MIB
            weights = 0 if away else WEIGHTS
            assert home.held(told.info.model)[0] == weights + kv["held_bytes"] + RESIDUAL
    assert 5 < refused < 50


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
