"""Known laws of queues: M/D/1 and processor sharing."""

from __future__ import annotations

import random
from collections.abc import Callable
from math import inf
from statistics import fmean

import pytest

from maestro_backend.simulator._engine import Engine
from maestro_backend.simulator._requests import Request, What
from maestro_backend.simulator._steps import StepCosts


def sojourns(
    engine: Engine, seed: int, calls: int, rate: float, output: Callable[[random.Random], int]
) -> list[tuple[int, float]]:
    """Poisson arrivals: (output tokens, seconds from arrival to end) of each, by end."""
    chance = random.Random(seed)
    arrived: dict[str, float] = {}
    found = []
    arrival, made = chance.expovariate(rate), 0
    while made < calls or engine.next_at() < inf:
        now = min(engine.next_at(), arrival if made < calls else inf)
        for happening in engine.advance(now):
            assert happening.what is What.FINISHED
            request = happening.request
            found.append((request.output_tokens, happening.at - arrived.pop(request.call)))
        if now == arrival and made < calls:
            arrived[str(made)] = now
            engine.add(Request(str(made), 1, output(chance)), now)
            made += 1
            arrival += chance.expovariate(rate)
    assert not arrived
    return found


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_one_seat_and_equal_calls_are_an_m_d_1_queue(load: float) -> None:
    costs = StepCosts(fixed_s=0.01, weights_s=0.0, context_s=0.0, token_s=0.0)
    service = costs.service_s(1, 20)
    engine = Engine(costs, 10**6, 16, 1, 8)
    found = sojourns(engine, 7, 40_000, load / service, lambda _: 20)
    wait = fmean(seconds for _, seconds in found) - service
    # Pollaczek and Khinchine, for a service time that does not vary.
    assert wait == pytest.approx(load * service / (2 * (1 - load)), rel=0.04)


def sharing(load: float, output: Callable[[random.Random], int]) -> list[tuple[int, float]]:
    """Steps take as long as calls are in them, so each of n calls is served at 1/n of the speed."""
    costs = StepCosts(fixed_s=0.0, weights_s=0.0, context_s=0.0, token_s=1e-3)
    engine = Engine(costs, 10**9, 16, 10_000, 10_000)
    return sojourns(engine, 11, 25_000, load / 0.1, output)


def geometric(chance: random.Random) -> int:
    """Mean 100."""
    return 1 + int(chance.expovariate(1 / 99.5))


@pytest.mark.parametrize("load", [0.5, 0.7])
def test_compute_bound_decoding_is_processor_sharing(load: float) -> None:
    found = sharing(load, geometric)
    mean = fmean(tokens for tokens, _ in found) * 1e-3
    real = load * mean / 0.1
    assert fmean(seconds for _, seconds in found) == pytest.approx(mean / (1 - real), rel=0.05)


def test_slowdown_under_sharing_is_the_same_for_short_and_long() -> None:
    found = sharing(0.6, geometric)
    real = 0.6 * fmean(tokens for tokens, _ in found) / 100
    for low, high in ((50, 100), (100, 200), (200, 400)):
        inside = [(tokens, s) for tokens, s in found if low <= tokens < high]
        slowdown = sum(s for _, s in inside) / sum(tokens * 1e-3 for tokens, _ in inside)
        assert slowdown == pytest.approx(1 / (1 - real), rel=0.06)


def test_sharing_does_not_care_how_lengths_are_spread() -> None:
    found = sharing(0.6, lambda chance: 30 if chance.random() < 0.8 else 380)
    real = 0.6 * fmean(tokens for tokens, _ in found) / 100
    expected = fmean(tokens for tokens, _ in found) * 1e-3 / (1 - real)
    assert fmean(seconds for _, seconds in found) == pytest.approx(expected, rel=0.05)
