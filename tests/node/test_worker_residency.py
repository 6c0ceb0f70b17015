"""Workers moving between the tiers, and dying on the way."""

from __future__ import annotations

import asyncio

import psutil
import pytest
from node.homes import (
    DEVICE,
    DISK,
    HOST,
    KV,
    MIB,
    PARKED,
    REMOTE,
    RESIDUAL,
    WEIGHTS,
    Home,
    Liar,
    chat,
    control,
    failure,
    kill,
    pid_of,
)

from maestro_agents.protocol import UnsupportedError
from maestro_backend.node._ledger import Ledger
from maestro_backend.scheduler import DeviceInfo, Residency, WorkerState
from maestro_backend.workers import (
    DoesNotFitError,
    Worker,
)

# --- the moves ------------------------------------------------------------------------------------


async def test_every_move_claims_and_tells_what_is_true(home: Home) -> None:
    worker = home.worker()
    await worker.bring(DEVICE)
    pid = worker.info.pid
    after = {
        DEVICE: (WorkerState.READY, WEIGHTS + KV + RESIDUAL),
        HOST: (WorkerState.SUSPENDED, RESIDUAL),
        PARKED: (WorkerState.SUSPENDED, RESIDUAL),
    }
    copies = 0
    for tier in (HOST, DEVICE, HOST, PARKED, HOST, DEVICE, PARKED, DEVICE, PARKED, HOST):
        await worker.bring(tier)
        copies = {HOST: WEIGHTS, PARKED: 0}.get(tier, copies)
        state, taken = after[tier]
        told = worker.info
        assert (told.state, told.residency, told.pid) == (state, tier, pid)
        assert (await control(worker))["residency"] == tier
        assert home.held() == (taken, copies)
        assert told.host_bytes == copies
        assert told.address
    await worker.bring(DISK)
    assert (worker.info.state, worker.info.residency) == (WorkerState.STOPPED, DISK)
    assert (worker.info.pid, worker.info.address, worker.info.host_bytes) == (None, "", 0)
    assert home.held() == (0, 0)
    assert not psutil.pid_exists(pid or 0)


async def test_what_is_told_of_the_tiers_and_the_kv_cache(home: Home) -> None:
    worker = home.worker()
    stopped = worker.info
    await worker.bring(DEVICE)
    ready = worker.info
    for info in (stopped, ready):
        assert info.tiers == (DEVICE, HOST, PARKED, DISK)
        assert info.elastic
        assert (info.kv_floor_bytes, info.kv_limit_bytes, info.kv_max_bytes) == (MIB, KV, KV)
        assert (info.weights_bytes, info.host_copy_bytes) == (WEIGHTS, WEIGHTS)
    await worker.bring(HOST)
    await worker.bring(DEVICE)
    assert set(worker.info.activation_s) == {DISK, HOST}
    await worker.bring(DISK)
    assert set(worker.info.activation_s) == {DISK, HOST}


async def test_the_weights_leave_the_memory_of_the_process(home: Home) -> None:
    worker = home.worker(engine_args={"weights_bytes": 100 * MIB})
    await worker.bring(DEVICE)
    process = psutil.Process(pid_of(worker))
    full = process.memory_info().rss
    for tier in (HOST, PARKED):
        await worker.bring(tier)
        assert full - process.memory_info().rss > 90 * MIB
        await worker.bring(DEVICE)
        assert abs(full - process.memory_info().rss) < 10 * MIB


@pytest.mark.parametrize("tier", [HOST, PARKED])
async def test_from_the_disk_to_a_tier_without_being_ready(home: Home, tier: Residency) -> None:
    """A worker that told READY would be sent calls, which then wait."""
    worker = home.worker()
    await worker.bring(tier)
    states = {info.state for info in home.told}
    assert states == {WorkerState.STARTING, WorkerState.SUSPENDING, WorkerState.SUSPENDED}
    assert (worker.info.residency, home.held()[0]) == (tier, RESIDUAL)
    await worker.bring(DEVICE)
    assert (await chat(worker)).status_code == 200


async def test_orders_are_done_one_after_the_other(home: Home) -> None:
    worker = home.worker(engine_args={"suspend_s": 0.1, "resume_s": 0.1})
    await asyncio.gather(*(worker.bring(tier) for tier in (DEVICE, HOST, PARKED, DEVICE, HOST)))
    seen = [info.residency for info in home.told if info.state is WorkerState.SUSPENDED]
    assert [tier for tier, next_ in zip(seen, [*seen[1:], None], strict=True) if tier != next_] == [
        HOST,
        PARKED,
        HOST,
    ]
    assert worker.info.residency is HOST


async def test_what_is_freed_holds_another_model(home: Home) -> None:
    home.ledger = Ledger([DeviceInfo("cpu", WEIGHTS + KV + 2 * RESIDUAL)], WEIGHTS)
    first, second = home.worker("a"), home.worker("b")
    await first.bring(DEVICE)
    await failure(second.bring(DEVICE), DoesNotFitError)
    await first.bring(HOST)
    await second.bring(DEVICE)
    told = await failure(first.bring(DEVICE), DoesNotFitError)
    assert (first.info.state, first.info.residency) == (WorkerState.SUSPENDED, HOST)
    assert first.info.detail == told
    assert home.held("a") == (RESIDUAL, WEIGHTS)
    await second.bring(PARKED)
    await first.bring(DEVICE)
    assert first.info.detail == ""


async def test_a_copy_needs_host_budget_and_survives_the_resume(home: Home) -> None:
    home.ledger = Ledger([DeviceInfo("cpu", 400 * MIB)], WEIGHTS + MIB)
    first, second = home.worker("a"), home.worker("b")
    await first.bring(HOST)
    await first.bring(DEVICE)
    await second.bring(DEVICE)
    before = home.held("b")
    await failure(second.bring(HOST), DoesNotFitError)
    assert (second.info.state, home.held("b")) == (WorkerState.READY, before)
    assert (await chat(second)).status_code == 200
    await first.drop_host_copy()
    assert (first.info.host_bytes, home.held("a")[1]) == (0, 0)
    await second.bring(HOST)
    assert home.held("b") == (RESIDUAL, WEIGHTS)
    assert "parked" in await failure(second.drop_host_copy())


async def test_a_start_for_the_host_is_refused_before_it_takes_time(home: Home) -> None:
    home.ledger = Ledger([DeviceInfo("cpu", 400 * MIB)], WEIGHTS - 1)
    worker = home.worker()
    await failure(worker.bring(HOST), DoesNotFitError)
    assert worker.info.state is WorkerState.STOPPED
    assert not (home.folder / "a.log").exists()


async def test_a_start_for_the_host_that_cannot_leave_the_device_is_ready_there(
    home: Home,
) -> None:
    home.ledger = Ledger([DeviceInfo("cpu", 400 * MIB)], WEIGHTS - MIB)
    worker = home.worker(engine=Liar())
    await failure(worker.bring(HOST), DoesNotFitError)
    assert (worker.info.state, worker.info.residency) == (WorkerState.READY, DEVICE)
    assert home.held() == (WEIGHTS + KV + RESIDUAL, 0)
    assert (await chat(worker)).status_code == 200


# --- calls ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "state", [WorkerState.SUSPENDING, WorkerState.SUSPENDED, WorkerState.RESUMING]
)
async def test_a_call_that_arrives_meanwhile_is_answered_after_the_resume(
    home: Home, state: WorkerState
) -> None:
    worker = home.worker(engine_args={"suspend_s": 0.3, "resume_s": 0.3})
    await worker.bring(DEVICE)
    if state is WorkerState.SUSPENDED:
        await worker.bring(HOST)
    away = asyncio.create_task(worker.bring(HOST))
    back = None if state is WorkerState.SUSPENDED else asyncio.create_task(worker.bring(DEVICE))
    await home.until(worker, state)
    call = asyncio.create_task(chat(worker))
    while (await control(worker))["requests"] == 0:
        assert not call.done()
    await away
    await (back or worker.bring(DEVICE))
    assert (await call).status_code == 200


async def test_a_running_call_freezes_and_goes_on(home: Home) -> None:
    worker = home.worker(engine_args={"decode_tokens_s": 20, "output_tokens": 20})
    await worker.bring(DEVICE)
    call = asyncio.create_task(chat(worker))
    while (await control(worker))["kv"]["used_bytes"] == 0:
        assert not call.done()
    await worker.bring(PARKED)
    assert (await control(worker))["requests"] == 1
    assert not call.done()
    await worker.bring(DEVICE)
    assert (await call).json()["usage"]["completion_tokens"] == 20


# --- death ----------------------------------------------------------------------------------------


async def died_suspended(home: Home, worker: Worker) -> None:
    told = await home.until(worker, WorkerState.STOPPED)
    assert (told.residency, told.pid, told.host_bytes, told.restarts) == (DISK, None, 0, 0)
    assert "signal 9" in told.detail
    assert home.held() == (0, 0)
    await worker.bring(DEVICE)
    assert (await chat(worker)).status_code == 200


@pytest.mark.parametrize("tier", [HOST, PARKED])
async def test_killed_while_it_is_suspended(home: Home, tier: Residency) -> None:
    worker = home.worker()
    await worker.bring(tier)
    kill(worker)
    await died_suspended(home, worker)


MOVES = [(DEVICE, HOST), (DEVICE, PARKED), (HOST, PARKED), (PARKED, HOST)]


@pytest.mark.parametrize(("start", "end"), MOVES)
async def test_killed_on_the_way_from_the_device_or_beyond(
    home: Home, start: Residency, end: Residency
) -> None:
    slow = {"suspend_s": 0.5}
    worker = home.worker(engine_args=slow)
    await worker.bring(start)
    move = asyncio.create_task(worker.bring(end))
    told = len(home.told)
    await home.changed(lambda: len(home.told) > told)
    assert home.held()[0] >= RESIDUAL + (WEIGHTS + KV if start is DEVICE else 0)
    kill(worker)
    assert "signal 9" in await failure(move)
    await died_suspended(home, worker)


@pytest.mark.parametrize("start", [HOST, PARKED])
async def test_killed_on_the_way_to_the_device(home: Home, start: Residency) -> None:
    worker = home.worker(engine_args={"resume_s": 0.5})
    await worker.bring(start)
    first = pid_of(worker)
    move = asyncio.create_task(worker.bring(DEVICE))
    await home.until(worker, WorkerState.RESUMING)
    assert home.held()[0] == WEIGHTS + KV + RESIDUAL
    kill(worker)
    await move
    assert (worker.info.state, worker.info.restarts) == (WorkerState.READY, 1)
    assert worker.info.pid != first
    assert home.held() == (WEIGHTS + KV + RESIDUAL, 0)
    assert (await chat(worker)).status_code == 200


async def test_killed_while_it_is_ready_with_a_copy(home: Home) -> None:
    """It comes back, and what it held of the host budget is given back."""
    worker = home.worker()
    await worker.bring(HOST)
    await worker.bring(DEVICE)
    kill(worker)
    await home.until(worker, WorkerState.RESTARTING)
    await home.until(worker, WorkerState.READY)
    assert worker.info.host_bytes == 0
    assert home.held() == (WEIGHTS + KV + RESIDUAL, 0)


async def test_an_order_that_waits_when_it_dies_suspended_is_carried_out(home: Home) -> None:
    worker = home.worker(engine_args={"suspend_s": 0.5})
    await worker.bring(DEVICE)
    away = asyncio.create_task(worker.bring(HOST))
    await home.until(worker, WorkerState.SUSPENDING)
    back = asyncio.create_task(worker.bring(DEVICE))
    limit = asyncio.create_task(worker.set_kv_limit(MIB))
    await asyncio.sleep(0)
    kill(worker)
    await failure(away)
    await failure(limit)
    await back
    assert worker.info.state is WorkerState.READY


@pytest.mark.parametrize("move", [HOST, DEVICE])
async def test_a_stop_interrupts_a_move(home: Home, move: Residency) -> None:
    worker = home.worker(engine_args={"suspend_s": 0.0, "resume_s": 30})
    if move is HOST:
        worker = home.worker("b", engine_args={"suspend_s": 30})
    await worker.bring(DEVICE if move is HOST else HOST)
    going = asyncio.create_task(worker.bring(move))
    await home.until(worker, WorkerState.SUSPENDING if move is HOST else WorkerState.RESUMING)
    waiting = asyncio.create_task(worker.bring(PARKED))
    await asyncio.sleep(0)
    await worker.stop()
    assert worker.info.state is WorkerState.STOPPED
    assert home.ledger.held == {}
    for asked in (going, waiting):
        assert "was stopped" in await failure(asked)


# --- failed moves ---------------------------------------------------------------------------------


async def test_a_failed_resume_leaves_it_suspended(home: Home) -> None:
    worker = home.worker(engine_args={"fail_resume": 1})
    await worker.bring(HOST)
    pid, held = worker.info.pid, home.held()
    told = await failure(worker.bring(DEVICE))
    assert "planned failure" in told
    assert (worker.info.state, worker.info.residency) == (WorkerState.SUSPENDED, HOST)
    assert (worker.info.pid, home.held()) == (pid, held)
    assert "planned failure" in worker.info.detail
    await worker.bring(DEVICE)
    assert (worker.info.pid, worker.info.detail) == (pid, "")
    assert (await chat(worker)).status_code == 200


async def test_resumes_that_keep_failing_end_in_a_restart(home: Home) -> None:
    worker = home.worker(engine_args={"fail_resume": 100})
    await worker.bring(HOST)
    first = pid_of(worker)
    for _ in range(2):
        await failure(worker.bring(DEVICE))
    await worker.bring(DEVICE)
    assert (worker.info.state, worker.info.restarts) == (WorkerState.READY, 1)
    assert worker.info.pid != first
    assert home.held() == (WEIGHTS + KV + RESIDUAL, 0)
    restarting = next(i for i in home.told if i.state is WorkerState.RESTARTING)
    assert "3 times" in restarting.detail


async def test_an_engine_without_the_control_api(home: Home) -> None:
    worker = home.worker(engine_args={"control": False})
    await worker.bring(DEVICE)
    assert worker.info.tiers == (DEVICE, DISK)
    assert not worker.info.elastic
    for tier in (HOST, PARKED, REMOTE):
        await failure(worker.bring(tier), UnsupportedError)
    await failure(worker.set_kv_limit(MIB), UnsupportedError)
    await failure(worker.keep_prefix("c1", 60))
    assert (await chat(worker)).status_code == 200
    await worker.bring(DEVICE, KV)


async def test_an_order_that_cannot_be_is_refused_alone(home: Home) -> None:
    """Another that waits behind it is carried out all the same."""
    home.ledger = Ledger([DeviceInfo("cpu", 400 * MIB)], 0)
    worker = home.worker()
    aside, here = await asyncio.gather(
        worker.bring(HOST), worker.bring(DEVICE), return_exceptions=True
    )
    assert isinstance(aside, DoesNotFitError)
    assert here is None
    assert worker.info.state is WorkerState.READY


async def test_a_start_with_an_impossible_limit_fails_nothing_but_the_order(home: Home) -> None:
    worker = home.worker()
    assert "max_model_len" in str(await failure(worker.bring(DEVICE, 1)))
    assert worker.info.state is WorkerState.STOPPED
    await worker.bring(DEVICE)
    assert worker.info.state is WorkerState.READY
