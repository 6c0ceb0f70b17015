"""`maestro bench`: its arguments and its output."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from maestro_agents.protocol import ConfigError
from maestro_backend.scheduler.policies import POLICIES

from ._colocation import SYSTEMS, Plan, bench_colocation, trading
from ._engines import say
from ._kv import STEP_S, bench_kv
from ._residency import CYCLES, STARTS, bench_residency
from ._scheduler import Grid, bench_scheduler, scheduler_table

Run = Callable[[Callable[[asyncio.Event], Coroutine[Any, Any, int]]], int]
"""Runs work on an event loop; a signal sets the event."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `maestro bench` takes."""
    parser.add_argument("name", choices=("residency", "kv", "colocation", "scheduler"))
    parser.add_argument("--engine", choices=("vllm-cpu", "vllm", "stub"), default="vllm-cpu")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON on stdout")
    parser.add_argument("--cycles", type=int, default=CYCLES, help="residency: cycles per tier")
    parser.add_argument("--starts", type=int, default=STARTS, help="residency: process starts")
    parser.add_argument("--step-s", type=float, default=STEP_S, help="kv: seconds at each limit")
    parser.add_argument("--runs", type=int, default=6, help="colocation: recorded runs per system")
    parser.add_argument("--at-once", type=int, default=1, help="colocation: runs at any time")
    parser.add_argument(
        "--systems", nargs="+", choices=tuple(SYSTEMS), default=tuple(SYSTEMS), metavar="SYSTEM"
    )
    _add_grid(parser.add_argument_group("scheduler (no engine)"))


def _add_grid(group: Any) -> None:
    add, grid = group.add_argument, Grid()
    add("--calls", type=_counts, default=grid.calls, metavar="N,N", help="queued calls")
    add("--workers", type=_counts, default=grid.workers, metavar="N,N", help="ready workers")
    add("--models", type=int, default=grid.models, help="models, if there are as many workers")
    add("--policy", choices=tuple(POLICIES), default=grid.policy, help="order of calls (maestro)")
    add("--events", type=int, default=grid.events, help="timed events, for each of both")
    add("--seed", type=int, default=grid.seed)


def _counts(text: str) -> tuple[int, ...]:
    """`10,100` as numbers."""
    try:
        counts = tuple(map(int, text.split(",")))
    except ValueError:
        counts = (0,)
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers of at least 1, with commas between")
    return counts


def run_bench(options: argparse.Namespace, run: Run) -> int:
    """Run one benchmark; its figures on stdout, its progress on stderr."""
    for name in ("cycles", "starts", "runs", "at_once", "models", "events"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1")
    if options.name == "scheduler":
        return _run_scheduler(options)
    return run(lambda stop: _until_done(options, stop))


def _run_scheduler(options: argparse.Namespace) -> int:
    names = ("calls", "workers", "models", "policy", "events", "seed")
    result = bench_scheduler(Grid(*(getattr(options, name) for name in names)))
    lines = [json.dumps(result)] if options.json else scheduler_table(result)
    sys.stdout.writelines(f"{line}\n" for line in lines)
    return 0


async def _until_done(options: argparse.Namespace, stop: asyncio.Event) -> int:
    work = asyncio.create_task(_bench(options))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((work, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not work.done():
        say("stopping the engines ...")
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        return 130
    result = await work
    indent = None if options.json else 1
    sys.stdout.write(json.dumps(result, indent=indent) + "\n")
    return 0


async def _bench(options: argparse.Namespace) -> dict[str, Any]:
    if options.name == "residency":
        return await bench_residency(options.engine, options.cycles, options.starts)
    if options.name == "kv":
        return await bench_kv(options.engine, options.step_s)
    plan = Plan(options.engine, options.at_once, tuple(options.systems))
    return await bench_colocation(plan, trading(options.engine, options.runs))
