"""Workers that outlive their agent, and checkpoints that come and go."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

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
    chat,
    control,
    failure,
    kill,
    pid_of,
)

from maestro_agents.protocol import UnsupportedError
from maestro_backend.node._adoption import TakeOver
from maestro_backend.node._ledger import Expected, Ledger
from maestro_backend.scheduler import DeviceInfo, Residency, WorkerInfo, WorkerState
from maestro_backend.workers import (
    ENGINES,
    DoesNotFitError,
    WorkerRecord,
    end_stray,
    read_records,
)

# --- lifetimes ------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def left(home: Home, tier: Residency, **given: Any) -> AsyncIterator[WorkerRecord]:
    """The record of a worker that its agent has left in that residency; ended if still there."""
    worker = home.worker(tied=False, **given)
    await worker.bring(tier)
    await worker.leave()
    home.workers.remove(worker)
    (record,) = read_records(home.folder / "workers").values()
    assert record.lives()
    try:
        yield record
    finally:
        await end_stray(record)
        for path in read_records(home.folder / "workers"):
            path.unlink()


@pytest.mark.parametrize("tier", [DEVICE, HOST, PARKED])
async def test_adoption_takes_over_without_a_reload(home: Home, tier: Residency) -> None:
    async with left(home, tier) as record:
        assert home.held() == (0, 0)
        worker = home.worker(tied=False)
        assert await worker.adopt(record)
        assert (worker.info.pid, worker.info.residency) == (record.pid, tier)
        kv_bytes = KV if tier is DEVICE else 0
        on_device = WEIGHTS + kv_bytes if tier is DEVICE else 0
        copy = WEIGHTS if tier is HOST else 0
        assert home.held() == (on_device + RESIDUAL, copy)
        assert worker.info.kv_limit_bytes == kv_bytes
        await worker.bring(DEVICE)
        assert (await chat(worker)).status_code == 200
        assert worker.info.pid == record.pid
        assert record.pid in worker.pids()
        await worker.bring(DISK)
        assert not record.lives()


async def test_an_adopted_worker_that_dies_comes_back(home: Home) -> None:
    async with left(home, DEVICE) as record:
        worker = home.worker(tied=False)
        assert await worker.adopt(record)
        kill(worker)
        await home.until(worker, WorkerState.RESTARTING)
        await home.until(worker, WorkerState.READY)
        assert worker.info.pid != record.pid
        await worker.stop()


async def test_a_move_that_the_earlier_agent_began_is_settled(home: Home) -> None:
    worker = home.worker(tied=False, engine_args={"suspend_s": 1.0})
    await worker.bring(DEVICE)
    move = asyncio.create_task(worker.bring(HOST))
    await home.until(worker, WorkerState.SUSPENDING)
    for _ in range(5):  # by then the engine has begun: it answers one after the other
        assert (await control(worker))["residency"] == DEVICE
    await worker.leave()
    await failure(move)
    home.workers.remove(worker)
    (record,) = read_records(home.folder / "workers").values()
    heir = home.worker(tied=False, engine_args={"suspend_s": 1.0})
    assert await heir.adopt(record)
    await heir.bring(DEVICE)
    truth = await control(heir)
    assert heir.info.residency == truth["residency"] == DEVICE
    assert home.held() == (WEIGHTS + KV + RESIDUAL, WEIGHTS)
    assert truth["weights"]["host_bytes"] == WEIGHTS


async def test_what_is_asked_after_an_adoption_has_no_privilege(home: Home) -> None:
    """Others that have not told yet what they take are in the way of its resume."""
    async with left(home, HOST) as record:
        heir = home.worker(tied=False)
        for model in ("a", "hung"):
            home.ledger.expect(model, Expected("cpu", 350 * MIB, 0))
        assert await heir.adopt(record)
        settled = asyncio.create_task(heir.settled(lambda: home.ledger.known("a")))
        resume = asyncio.create_task(heir.bring(DEVICE))
        await failure(resume, DoesNotFitError)
        await settled
        home.ledger.known("hung")
        await heir.bring(DEVICE)
        await heir.stop()


async def test_what_cannot_be_adopted_for_whatever_reason_is_ended(tmp_path: Path) -> None:
    class Nonsense:
        info = WorkerInfo("n/a", "n", "cpu", "a", WorkerState.STOPPED, DISK)

        async def adopt(self, record: WorkerRecord) -> bool:
            raise ValueError("its engine answers nonsense")

    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        created = psutil.Process(process.pid).create_time()
        record = WorkerRecord("a", process.pid, created, "/x", "f", "/x.log", created)
        record.write(tmp_path / "a.json")
        books = Ledger([DeviceInfo("cpu", 100)], 0)
        arrival = TakeOver(tmp_path, {"a": Nonsense()}, books, adopting=True)  # type: ignore[dict-item]
        assert list(books.expected) == ["a"]
        assert await arrival.over()
        assert process.wait(5) is not None
    assert (books.expected, read_records(tmp_path)) == ({}, {})
    assert not await arrival.over()


async def test_what_does_not_match_is_not_adopted(home: Home) -> None:
    async with left(home, DEVICE) as record:
        assert not await home.worker(tied=False, max_num_seqs=3).adopt(record)
        gone = dataclasses.replace(record, create_time=record.create_time - 1000)
        assert not await home.worker(tied=False).adopt(gone)
        home.ledger = Ledger([DeviceInfo("cpu", WEIGHTS)], 0)
        assert not await home.worker(tied=False).adopt(record)
        assert home.held() == (0, 0)
        assert record.lives()
        await end_stray(record)
        assert not record.lives()


async def test_a_recycled_pid_is_never_ended(home: Home) -> None:
    async with left(home, DEVICE) as record:
        await end_stray(dataclasses.replace(record, create_time=record.create_time - 1000))
        assert record.lives()


async def test_a_tied_worker_is_not_left(home: Home) -> None:
    worker = home.worker()
    await worker.bring(DEVICE)
    (record,) = read_records(home.folder / "workers").values()
    await worker.leave()
    assert not record.lives()


async def test_a_leased_worker_ends_when_nobody_renews(home: Home) -> None:
    """While it is supervised it outlives its lease; afterwards only for as long as that."""
    worker = home.worker(tied=False, lease_s=5)
    await worker.bring(DEVICE)
    process = psutil.Process(pid_of(worker))
    with pytest.raises(psutil.TimeoutExpired):
        await asyncio.to_thread(process.wait, 7)
    await worker.leave()
    await asyncio.to_thread(process.wait, 30)
    for path in read_records(home.folder / "workers"):
        path.unlink()


# --- the checkpoint -------------------------------------------------------------------------------


class Reader(type(ENGINES["stub"])):  # type: ignore[misc]  # a class that is only reached so
    """A stub that wants its checkpoint."""

    needs_checkpoint = True


async def test_a_move_longer_than_the_lease_does_not_end_the_worker(home: Home) -> None:
    worker = home.worker(tied=False, lease_s=4, engine_args={"suspend_s": 8.0})
    await worker.bring(DEVICE)
    pid = worker.info.pid
    await worker.bring(HOST)
    assert (worker.info.state, worker.info.pid) == (WorkerState.SUSPENDED, pid)
    await worker.stop()


async def test_a_lost_log_does_not_hide_a_live_worker(home: Home) -> None:
    async with left(home, DEVICE) as record:
        Path(record.log).unlink()
        worker = home.worker(tied=False)
        assert await worker.adopt(record)
        assert worker.info.pid == record.pid


async def test_a_checkpoint_comes_from_afar_and_goes_again(home: Home, tmp_path: Path) -> None:
    share = tmp_path / "share"
    share.mkdir()
    (share / "config.json").write_text("{}")
    (share / "model.safetensors").write_bytes(b"x" * 1000)
    worker = home.worker(source=f"file://{share}", engine=Reader())
    assert (worker.info.state, worker.info.residency) == (WorkerState.STOPPED, REMOTE)
    assert REMOTE in worker.info.tiers
    await worker.bring(DISK)
    assert (worker.info.state, worker.info.residency) == (WorkerState.STOPPED, DISK)
    fetched = list((tmp_path / "cache").rglob("model.safetensors"))
    assert len(fetched) == 1
    await worker.bring(REMOTE)
    assert (worker.info.residency, fetched[0].exists()) == (REMOTE, False)
    await worker.bring(DEVICE)
    assert (worker.info.residency, fetched[0].exists()) == (DEVICE, True)
    await worker.bring(REMOTE)
    assert (worker.info.residency, fetched[0].exists()) == (REMOTE, False)


async def test_a_folder_of_the_user_is_never_deleted(home: Home, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    worker = home.worker(source=str(tmp_path), engine=Reader())
    await worker.bring(DEVICE)
    await failure(worker.bring(REMOTE), UnsupportedError)
    assert worker.info.state is WorkerState.READY
