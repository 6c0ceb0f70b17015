"""The engine against one that walks every step: same times, same cache, same victims."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from math import inf

import pytest
from simulator.naive_engine import NaiveEngine, Op

from maestro_backend.simulator._engine import Engine
from maestro_backend.simulator._requests import Request, What
from maestro_backend.simulator._steps import StepCosts

MEMORY = StepCosts(fixed_s=2e-3, weights_s=8e-3, context_s=1e-6, token_s=2e-5, chunk_tokens=128)
CROSSING = StepCosts(fixed_s=1e-3, weights_s=1e-4, context_s=3e-6, token_s=5e-4, chunk_tokens=128)
COMPUTE = StepCosts(fixed_s=0.0, weights_s=0.0, context_s=0.0, token_s=1e-3, chunk_tokens=128)


def workload(
    seed: int, calls: int, gap_s: float, priorities: int, chains: bool, marks: bool
) -> list[Op]:
    chance = random.Random(seed)
    ops, now = [], 0.0
    for i in range(calls):
        now += gap_s * chance.uniform(0.5, 1.5)
        prompt = chance.choice([1, 15, 16, 17, chance.randint(1, 60), chance.randint(60, 400)])
        output = chance.choice([1, 2, chance.randint(1, 40), chance.randint(40, 150)])
        request = Request(f"c{i}", prompt, output, chance.randrange(priorities))
        if marks:
            request.mark = chance.randint(0, output + 1)
        if chains:
            request.leaves = i
            if i and chance.random() < 0.7:
                request.prefix = max(0, i - chance.choice([1, 1, 2, 5, 12]))
                request.prefix_tokens = chance.choice([prompt, prompt // 2, 1000])
        ops.append(Op(now, add=request))
    return ops


def drive(engine: Engine, ops: Sequence[Op]) -> list[tuple[float, str, str]]:
    """As the event loop does, with a look at the limit wherever it stops."""
    events = []
    left = sorted(ops, key=lambda op: op.at)
    while left or engine.next_at() < inf:
        now = min(engine.next_at(), left[0].at if left else inf)
        for happening in engine.advance(now):
            events.append((happening.at, happening.what.value, happening.request.call))
            assert happening.at <= now
        while left and left[0].at <= now:
            op = left.pop(0)
            if op.add is not None:
                engine.add(op.add, now)
            elif op.blocks:
                engine.set_blocks(op.blocks, now)
            elif op.remove not in {call for _, what, call in events if what == "finished"}:
                engine.remove(op.remove, now)
        if engine.running > 1 and engine.settled():
            assert engine.blocks_in_use <= engine.blocks
            assert engine.blocks_in_use + engine.cached_blocks <= engine.blocks
    assert engine.waiting == engine.running == engine.blocks_in_use == 0
    return events


def compare(ops: Sequence[Op], costs: StepCosts, blocks: int, seqs: int) -> NaiveEngine:
    naive = NaiveEngine(costs, blocks, 16, seqs, costs.chunk_tokens)
    naive.run([replace(op, add=op.add and replace(op.add)) for op in ops])
    events = drive(Engine(costs, blocks, 16, seqs, costs.chunk_tokens), ops)
    assert sorted(event[1:] for event in events) == sorted(event[1:] for event in naive.events)
    ours, theirs = (sorted(e, key=lambda e: (e[2], e[1], e[0])) for e in (events, naive.events))
    assert [e[0] for e in ours] == pytest.approx([e[0] for e in theirs], rel=1e-9)
    gone = {op.remove for op in ops}
    for request in (op.add for op in ops if op.add is not None):
        call = naive.calls[request.call]
        if request.call not in gone:
            assert request.first_at == pytest.approx(call.first, rel=1e-9)
            assert request.cached_tokens == call.cached
            assert request.recomputed_tokens == call.recomputed
            assert request.preemptions == call.preemptions
    finished = [call for _, what, call in events if what == What.FINISHED.value]
    assert len(finished) == len(set(finished))
    assert {op.add.call for op in ops if op.add is not None} - gone <= set(finished)
    return naive


@pytest.mark.parametrize(
    "costs", [MEMORY, CROSSING, COMPUTE], ids=["memory", "crossing", "compute"]
)
@pytest.mark.parametrize("seed", range(4))
def test_bursts_in_ample_memory(costs: StepCosts, seed: int) -> None:
    ops = workload(seed, 60, 0.03, priorities=1, chains=False, marks=True)
    compare(ops, costs, blocks=10_000, seqs=12)


@pytest.mark.parametrize(
    ("costs", "gap_s", "priorities"),
    [(MEMORY, 0.1, 3), (CROSSING, 0.03, 1), (COMPUTE, 0.03, 1)],
    ids=["memory", "crossing", "compute"],
)
@pytest.mark.parametrize("seed", range(6))
def test_blocks_run_out(costs: StepCosts, gap_s: float, priorities: int, seed: int) -> None:
    ops = workload(seed, 60, gap_s, priorities, chains=False, marks=True)
    naive = compare(ops, costs, blocks=30, seqs=12)
    assert sum(call.preemptions for call in naive.calls.values()) > 0


@pytest.mark.parametrize("blocks", [45, 120, 100_000])
@pytest.mark.parametrize("seed", range(6))
def test_prefixes_are_found_and_evicted(blocks: int, seed: int) -> None:
    ops = workload(seed, 80, 0.3, priorities=2, chains=True, marks=False)
    naive = compare(ops, MEMORY, blocks=blocks, seqs=12)
    assert sum(call.cached for call in naive.calls.values()) > 0


@pytest.mark.parametrize("seed", range(8))
def test_calls_are_taken_off_and_the_limit_moves(seed: int) -> None:
    chance = random.Random(seed)
    ops = workload(seed, 60, 0.3, priorities=2, chains=True, marks=True)
    for add in list(ops):
        kind = chance.random()
        if kind < 0.3 and add.add is not None:
            ops.append(Op(add.at + 0.1, remove=add.add.call))
        elif kind < 0.6:
            ops.append(Op(add.at + 0.1, blocks=chance.randint(30, 80)))
    compare(ops, MEMORY, blocks=60, seqs=10)
