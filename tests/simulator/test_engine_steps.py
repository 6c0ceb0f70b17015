"""What a step costs, and the sums that stand for many steps."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from maestro_backend.simulator._engine import Engine
from maestro_backend.simulator._hardware import DeviceProfile, ModelGeometry
from maestro_backend.simulator._requests import Request
from maestro_backend.simulator._steps import StepCosts, step_costs

PROFILE = DeviceProfile(
    name="device",
    capacity_bytes=80 * 10**9,
    bandwidth=2e12,
    flops=300e12,
    memory_share=0.8,
    compute_share=0.5,
    step_s=2e-3,
    to_device=2e10,
    to_host=2e10,
    allreduce_s=1e-5,
    residual_bytes=0,
    start_s=1.0,
    wake_s=1.0,
    limit_s=0.1,
)
MODEL = ModelGeometry("m", 8 * 10**9, 16 * 10**9, layers=32, kv_heads=8, head_dim=128)
COSTS = [
    StepCosts(fixed_s=2e-3, weights_s=1e-2, context_s=8e-8, token_s=1e-4, chunk_tokens=512),
    StepCosts(fixed_s=1e-3, weights_s=1e-4, context_s=3e-6, token_s=5e-4, chunk_tokens=100),
    StepCosts(fixed_s=0.0, weights_s=0.0, context_s=0.0, token_s=1e-3, chunk_tokens=64),
    StepCosts(fixed_s=0.0, weights_s=1e-3, context_s=0.0, token_s=0.0, chunk_tokens=64),
]


def test_costs_of_an_8b_model_by_hand() -> None:
    costs = step_costs(PROFILE, MODEL)
    assert costs.fixed_s == 2e-3
    assert costs.weights_s == pytest.approx(16e9 / 1.6e12)
    assert costs.context_s == pytest.approx(131_072 / 1.6e12)
    assert costs.token_s == pytest.approx(16e9 / 150e12)
    # Ten calls that decode over 1,000 tokens each are bound by memory, a prompt by compute.
    assert costs.step_s(10, 10_000, 0) == pytest.approx(0.002 + 0.010 + 0.0008192)
    assert costs.step_s(10, 10_000, 990) == pytest.approx(0.002 + 1000 * 16e9 / 150e12)


def test_tensor_parallelism_divides_the_work_and_adds_talk() -> None:
    alone = step_costs(PROFILE, MODEL)
    spread = step_costs(PROFILE, replace(MODEL, tensor_parallel=4))
    assert spread.weights_s == pytest.approx(alone.weights_s / 4)
    assert spread.context_s == pytest.approx(alone.context_s / 4)
    assert spread.token_s == pytest.approx(alone.token_s / 4)
    assert spread.fixed_s == pytest.approx(2e-3 + 32 * 1e-5)


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize(
    ("decoding", "context"), [(1, 1), (1, 5000), (7, 100), (40, 3), (40, 9000)]
)
def test_a_sum_of_steps_is_the_steps_summed(costs: StepCosts, decoding: int, context: int) -> None:
    walked = 0.0
    for step in range(1, 401):
        before = walked
        walked += costs.step_s(decoding, context + step * decoding, 0)
        assert costs.decode_s(decoding, context, step) == pytest.approx(walked, rel=1e-12)
        if step % 37 == 1:
            inside = before + 0.3 * (walked - before)
            assert costs.steps_by(decoding, context, inside) == step
            exact = costs.decode_s(decoding, context, step)
            assert costs.steps_by(decoding, context, exact) == step


@pytest.mark.parametrize("costs", COSTS)
def test_a_call_alone_takes_what_the_engine_takes(costs: StepCosts) -> None:
    chance = random.Random(1)
    engine = Engine(costs, 10**6, 16, 8, costs.chunk_tokens)
    now = 0.0
    for i in range(200):
        prompt, output = chance.choice([1, costs.chunk_tokens, chance.randint(2, 999)]), i % 50 + 1
        request = Request(f"c{i}", prompt, output, prefix=i - 1, prefix_tokens=prompt, leaves=i)
        engine.add(request, now)
        while engine.running:
            (*_, end) = [now, *(done.at for done in engine.advance(engine.next_at()))]
        assert end - now == pytest.approx(
            costs.service_s(prompt, output, request.cached_tokens), rel=1e-9
        )
        now = end
