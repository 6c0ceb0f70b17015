"""Pinned memory and copies with torch alone: how fast, beside what limit, beside what work."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from threading import Thread
from typing import Any

import torch

from maestro_backend.workers.vllm_plugin import _transfers

from ._step import Step, run

_MIB = 1024**2
_TRIES = 5


class _HostTransfers(_transfers.Transfers):
    """Copies within host memory: for a dry run without a GPU."""

    def __init__(self) -> None:
        self._stream = type("Stream", (), {"cuda_stream": 0})()
        self._runtime = {
            "cudaGetLastError": lambda: 0,
            "cudaMemcpyAsync": lambda to, source, size, *_: _nothing(
                ctypes.memmove(to, source, size)
            ),
            "cudaHostRegister": lambda *_: 0,
            "cudaHostUnregister": lambda *_: 0,
        }

    def synchronize(self) -> None:
        """They are done."""


def _nothing(_: object) -> int:
    return 0


async def transfers(step: Step) -> None:
    """Our copies should be as fast as the fastest that torch can do, and let others through."""
    moves: _transfers.Transfers = _transfers.Transfers() if step.on_gpu else _HostTransfers()
    if not step.on_gpu:
        step.note("a dry run: copies within host memory, which say nothing of a GPU")
    size = (4096 if step.on_gpu else 64) * _MIB
    began = time.monotonic()
    block = moves.pin(size)
    step.figure("pin_gb_s", _rate(size, time.monotonic() - began))
    if step.on_gpu:
        began = time.monotonic()
        theirs = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        step.figure("torch_pin_gb_s", _rate(size, time.monotonic() - began))
        del theirs
    limit = pcie_gb_s(size, step.on_gpu)
    step.figure("limit_gb_s", limit)
    there = torch.zeros(size, dtype=torch.uint8, device="cuda" if step.on_gpu else "cpu")

    def in_() -> None:
        moves.to_device(there.data_ptr(), block, 0, size)
        moves.synchronize()

    def out() -> None:
        moves.to_host(block, 0, there.data_ptr(), size)
        moves.synchronize()

    ours = {"to_device": _best(size, in_), "to_host": _best(size, out)}
    step.figure("ours_gb_s", ours)
    share = ours["to_device"] / limit["to_device"]
    if step.on_gpu:
        step.check("to the device at 95 % of the limit", share >= 0.95, f"{share:.1%}")
    _right(step, moves, block, there)
    _beside_compute(step, in_)
    _beside_small_copies(step, in_)
    began = time.monotonic()
    moves.unpin(block)
    step.figure("unpin_s", round(time.monotonic() - began, 3))


def pcie_gb_s(size: int, on_gpu: bool) -> dict[str, float]:
    """One large copy by torch from memory that torch pinned: what the link gives."""
    device = "cuda" if on_gpu else "cpu"
    here = torch.zeros(size, dtype=torch.uint8, pin_memory=on_gpu)
    there = torch.zeros(size, dtype=torch.uint8, device=device)

    def copy(target: Any, source: Any) -> Callable[[], None]:
        def once() -> None:
            target.copy_(source, non_blocking=True)
            _wait(on_gpu)

        return once

    rates = {
        "to_device": _best(size, copy(there, here)),
        "to_host": _best(size, copy(here, there)),
    }
    del here, there
    if on_gpu:
        torch.cuda.empty_cache()
    return rates


def _wait(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def _best(size: int, copy: Callable[[], None]) -> float:
    """GB/s (10^9) of the median of some tries after a first one."""
    copy()
    return _rate(size, statistics.median(_seconds(copy) for _ in range(_TRIES)))


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _rate(size: int, seconds: float) -> float:
    return round(size / seconds / 1e9, 2)


def _right(step: Step, moves: _transfers.Transfers, block: Any, there: Any) -> None:
    """Bytes that go there and back through a buffer at odd places are the same."""
    pattern = torch.randint(0, 256, (3 * _MIB + 1,), dtype=torch.uint8).to(there.device)
    there[: len(pattern)] = pattern
    _wait(step.on_gpu)
    moves.to_host(block, 5, there.data_ptr(), len(pattern))
    moves.synchronize()
    there.zero_()
    _wait(step.on_gpu)
    moves.to_device(there.data_ptr(), block, 5, len(pattern))
    moves.synchronize()
    same = bool((there[: len(pattern)] == pattern).all())
    step.check("bytes come back as they went", same, f"{len(pattern)} bytes")


def _beside_compute(step: Step, copy: Callable[[], None]) -> None:
    """A matrix product alone, and while copies run on; both ways."""
    side, repeats = (8192, 40) if step.on_gpu else (512, 10)
    kind = torch.bfloat16 if step.on_gpu else torch.float32
    left = torch.randn(side, side, device="cuda" if step.on_gpu else "cpu").to(kind)
    stream = torch.cuda.Stream() if step.on_gpu else None

    def compute() -> None:
        if stream is None:
            for _ in range(repeats):
                left @ left
            return
        with torch.cuda.stream(stream):
            for _ in range(repeats):
                left @ left
        stream.synchronize()

    compute()
    alone, copy_alone = _seconds(compute), _seconds(copy)
    copies: list[float] = []
    going = True

    def go_on() -> None:
        while going:
            copies.append(_seconds(copy))

    thread = Thread(target=go_on)
    thread.start()
    beside = _seconds(compute)
    going = False
    thread.join()
    step.figure("compute_slower", round(beside / alone, 3))
    step.figure("copy_slower", round(statistics.median(copies) / copy_alone, 3))
    if step.on_gpu:
        told = f"{beside / alone:.2f} times its time alone"
        step.check("computing goes on beside a copy", beside < 1.5 * alone, told)


def _beside_small_copies(step: Step, copy: Callable[[], None]) -> None:
    """How long a neighbour's small copy waits for a large one."""
    here = torch.zeros(_MIB, dtype=torch.uint8, pin_memory=step.on_gpu)
    there = torch.zeros_like(here, device="cuda" if step.on_gpu else "cpu")
    stream = torch.cuda.Stream() if step.on_gpu else None

    def small() -> None:
        if stream is None:
            there.copy_(here)
            return
        with torch.cuda.stream(stream):
            there.copy_(here, non_blocking=True)
        stream.synchronize()

    small()
    alone = [_seconds(small) for _ in range(20)]
    thread = Thread(target=copy)
    thread.start()
    beside = [_seconds(small)]
    while thread.is_alive():
        beside.append(_seconds(small))
    thread.join()
    told = {"alone": statistics.median(alone), "beside": statistics.median(beside)}
    step.figure("small_copy_s", {name: round(s, 6) for name, s in told.items()})
    step.figure("small_copy_longest_s", round(max(beside), 6))


if __name__ == "__main__":
    run(transfers)
