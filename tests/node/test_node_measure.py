"""What is measured of real processes and of described GPUs, and what a node concludes from it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from node.nodes import MakeConfig, worker_of

from maestro_agents.protocol import BackendError
from maestro_backend.node import LocalNode
from maestro_backend.node._meter import CpuMeter, GpuMeter, Reading, Subject, meter_of
from maestro_backend.node._nvml import GpuMemory
from maestro_backend.scheduler import DeviceInfo, DeviceMeasured, Residency, WorkerInfo

DEVICE = Residency.DEVICE
MIB = 1024**2
GIB = 1024**3

TAKES_MORE_WHEN_ASKED = """
import sys
held = []
for line in sys.stdin:
    held.append(bytearray(b"x") * int(line))
    print(len(held), flush=True)
"""

SHARES_MEMORY = f"""
import mmap, os, sys
file = os.memfd_create("weights")
os.ftruncate(file, {64 * MIB})
view = mmap.mmap(file, {64 * MIB})
view[:] = b"x" * {64 * MIB}
print(1, flush=True)
sys.stdin.read()
"""


class Process:
    """A child that does what its program says, one line at a time."""

    def __init__(self, popen: subprocess.Popen[str]) -> None:
        self._popen = popen
        self.pid = popen.pid

    def take(self, size: int) -> None:
        assert self._popen.stdin is not None
        self._popen.stdin.write(f"{size}\n")
        self._popen.stdin.flush()
        self.hear()

    def hear(self) -> None:
        assert self._popen.stdout is not None
        self._popen.stdout.readline()


@contextmanager
def running(program: str) -> Iterator[Process]:
    command = (sys.executable, "-c", program)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as popen:
        try:
            yield Process(popen)
        finally:
            popen.kill()


def read(meter: CpuMeter, *pids: int, host_bytes: int = 0) -> int:
    return meter.read({"a": Subject("cpu", pids, host_bytes, 0)}).models["a"]


def test_memory_is_measured_over_all_processes_of_a_worker() -> None:
    with running(TAKES_MORE_WHEN_ASKED) as one, running(TAKES_MORE_WHEN_ASKED) as other:
        for process in (one, other):
            process.take(0)
        meter = CpuMeter()
        before = read(meter, one.pid, other.pid)
        one.take(100 * MIB)
        other.take(50 * MIB)
        grown = read(meter, one.pid, other.pid) - before
    assert grown == pytest.approx(150 * MIB, rel=0.1)


def test_a_process_that_is_gone_takes_nothing() -> None:
    meter = CpuMeter()
    with running(TAKES_MORE_WHEN_ASKED) as process:
        process.take(MIB)
        assert read(meter, process.pid) > MIB
    assert read(meter, process.pid) == 0


def test_a_mapped_copy_in_host_memory_is_not_the_devices() -> None:
    with running(SHARES_MEMORY) as process:
        process.hear()
        whole = read(CpuMeter(), process.pid)
        without = read(CpuMeter(), process.pid, host_bytes=64 * MIB)
        more_than_is_mapped = read(CpuMeter(), process.pid, host_bytes=GIB)
    assert whole - without == pytest.approx(64 * MIB, rel=0.05)
    assert more_than_is_mapped == pytest.approx(without, rel=0.1)


def test_a_node_sums_up_its_cpu() -> None:
    with running(TAKES_MORE_WHEN_ASKED) as one, running(TAKES_MORE_WHEN_ASKED) as other:
        one.take(20 * MIB)
        other.take(30 * MIB)
        subjects = {p: Subject("cpu", (p.pid,), 0, 0) for p in (one, other)}
        reading = CpuMeter().read({str(p.pid): s for p, s in subjects.items()})
    assert reading.devices == {"cpu": sum(reading.models.values())}
    assert sum(reading.models.values()) > 50 * MIB


GPUS = (DeviceInfo("cuda:0", 60 * GIB), DeviceInfo("cuda:1", 60 * GIB))


def gpu(used: int, by_pid: dict[int, int]) -> GpuMemory:
    return GpuMemory(80 * GIB, used, 80 * GIB - used, by_pid)


def gpu_reading(*gpus: GpuMemory, **subjects: Subject) -> Reading:
    told = {device.device: memory for device, memory in zip(GPUS, gpus, strict=False)}
    return GpuMeter(GPUS, lambda: told).read(subjects)


def test_a_gpu_tells_what_each_worker_takes() -> None:
    reading = gpu_reading(
        gpu(31 * GIB, {10: 20 * GIB, 11: GIB, 12: 9 * GIB}),
        gpu(5 * GIB, {20: 4 * GIB}),
        a=Subject("cuda:0", (10, 11), 0, 25 * GIB),
        b=Subject("cuda:0", (12,), 0, 10 * GIB),
        c=Subject("cuda:1", (20,), 0, 10 * GIB),
    )
    assert reading.models == {"a": 21 * GIB, "b": 9 * GIB, "c": 4 * GIB}
    assert reading.devices == {"cuda:0": 30 * GIB, "cuda:1": 4 * GIB}
    assert reading.outside == {"cuda:0": 0, "cuda:1": 0}  # 20 GiB of each are left to others


def test_other_programs_on_a_gpu_count_beyond_what_is_left_to_them() -> None:
    reading = gpu_reading(
        gpu(50 * GIB, {10: 20 * GIB, 99: 29 * GIB}), a=Subject("cuda:0", (10,), 0, 25 * GIB)
    )
    assert reading.devices == {"cuda:0": 20 * GIB}
    assert reading.outside == {"cuda:0": 10 * GIB}


def test_a_gpu_that_hides_processes_is_taken_to_hold_the_claims() -> None:
    """As a driver does in a container: what is beyond the claims must be somebody's."""
    a = Subject("cuda:0", (10,), 0, 25 * GIB)
    within = gpu_reading(gpu(40 * GIB, {}), a=a)
    assert (within.models, within.devices) == ({}, {"cuda:0": 25 * GIB})
    assert within.outside == {"cuda:0": 0}
    assert gpu_reading(gpu(50 * GIB, {}), a=a).outside == {"cuda:0": 5 * GIB}
    assert gpu_reading(gpu(10 * GIB, {}), a=a).devices == {"cuda:0": 10 * GIB}


def test_a_gpu_that_cannot_be_read_is_left_out() -> None:
    assert gpu_reading(a=Subject("cuda:0", (10,), 0, GIB)) == Reading({}, {}, {})


def test_the_meter_follows_the_devices() -> None:
    assert isinstance(meter_of((DeviceInfo("cpu", GIB),)), CpuMeter)
    assert isinstance(meter_of(GPUS), GpuMeter)


async def measured(node: LocalNode, device: str, at_least: int) -> DeviceMeasured:
    """The first measurement of `device`, now or later, of so many bytes."""
    async for change in node.changes():
        told = isinstance(change, DeviceMeasured) and change.device == device
        if told and change.used_bytes >= at_least:
            return change
    raise AssertionError("the stream of changes ended")


async def test_followers_are_told_what_is_measured(stub_config: MakeConfig) -> None:
    weights = {"engine_args": {"weights_bytes": 100 * MIB}}
    async with LocalNode(stub_config(a=weights)) as node:
        await node.set_residency("a", Residency.HOST)
        host = await measured(node, "host", at_least=1)
        assert host.used_bytes == (await worker_of(node, "a")).host_bytes == 100 * MIB
        await node.set_residency("a", DEVICE)
        device = await measured(node, "cpu", at_least=100 * MIB)
        report = await node.memory()
    assert report["devices"]["cpu"]["measured_bytes"] == device.used_bytes
    assert report["workers"]["a"]["measured_bytes"] == pytest.approx(device.used_bytes, abs=8 * MIB)
    assert report["host"]["measured_bytes"] == 100 * MIB


async def grow(worker: WorkerInfo, size: int) -> None:
    """The stub remembers what it was sent."""
    transport = httpx.AsyncHTTPTransport(uds=worker.address)
    async with httpx.AsyncClient(transport=transport, base_url="http://w", timeout=60) as http:
        body = {"model": worker.model, "messages": [{"role": "user", "content": "Hi"}]}
        answer = await http.post("/v1/chat/completions", json={**body, "ballast": "x" * size})
        assert answer.status_code == 200


async def test_a_worker_over_its_promise_is_measured_refused_and_remembered(
    stub_config: MakeConfig,
) -> None:
    """Promised are 96 MiB; it takes over 250."""
    config = stub_config(memory="500MiB", a={"kv_memory": "32MiB"}, b={"kv_memory": "300MiB"})
    async with LocalNode(config) as node:
        await node.set_residency("a", DEVICE)
        worker = await worker_of(node, "a")
        await grow(worker, 200 * MIB)
        await measured(node, "cpu", at_least=200 * MIB)
        with pytest.raises(BackendError, match=r"a 0\.09 GiB \(measured 0\.\d+ GiB\)") as raised:
            await node.set_residency("b", DEVICE)
        assert "b needs 0.36 GiB" in str(raised.value)
        assert "of 0.49 GiB" in str(raised.value)
        await node.set_residency("a", Residency.DISK)
        assert (await worker_of(node, "a")).residual_bytes > worker.residual_bytes + 100 * MIB
        await node.set_residency("b", DEVICE)
    async with LocalNode(config) as node:
        assert (await worker_of(node, "a")).residual_bytes > worker.residual_bytes + 100 * MIB
