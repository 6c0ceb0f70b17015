"""The fit recovers the rates that made the measurements."""

from __future__ import annotations

from random import Random

import pytest

from maestro_agents.protocol import ConfigError
from maestro_backend.clusters import (
    DecodePoint,
    PrefillPoint,
    StepFit,
    fit_steps,
    load_geometry,
)

MODEL = load_geometry("llama-3.1-8b")
TRUTH = StepFit(
    step_s=0.002,
    bandwidth=1.6e12,
    flops=170e12,
    first_s=0.004,
    step_fixed=False,
    geometry=MODEL,
)
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
BATCHES = ((1, 80.0), (2, 80.0), (4, 80.0), (8, 80.0), (16, 80.0), (32, 80.0))


def measured(
    truth: StepFit, *, noise: float = 0.0, seed: int = 0, long: bool = True
) -> tuple[list[PrefillPoint], list[DecodePoint]]:
    """What an engine of exactly that pace would show; `long`: also with 4 requests of 8,192."""
    chance = Random(seed)
    contexts = (*BATCHES, (4, 8192.0), (16, 4096.0)) if long else BATCHES
    prefills = [PrefillPoint(tokens, 1.0) for tokens in LENGTHS]
    decodes = [DecodePoint(batch, context, 1.0) for batch, context in contexts]
    return (
        [PrefillPoint(p.tokens, truth.seconds(p) * chance.gauss(1, noise)) for p in prefills],
        [
            DecodePoint(d.batch, d.context, truth.seconds(d) * chance.gauss(1, noise))
            for d in decodes
        ],
    )


def test_a_step_by_hand() -> None:
    read = (16_060_522_496 + 2 * 100 * 131_072) / 1.6e12
    assert TRUTH.seconds(DecodePoint(2, 100, 1)) == pytest.approx(0.002 + read)
    computed = 2 * 7_504_924_672 * 4096 / 170e12
    assert TRUTH.seconds(PrefillPoint(4096, 1)) == pytest.approx(0.004 + 0.002 + computed)


def test_exact_measurements_give_the_rates_back() -> None:
    prefills, decodes = measured(TRUTH)
    fit = fit_steps(MODEL, prefills, decodes, step_s=0.01)
    assert not fit.step_fixed
    for name in ("step_s", "bandwidth", "flops", "first_s"):
        assert getattr(fit, name) == pytest.approx(getattr(TRUTH, name), rel=1e-6)
    assert fit.median_error([*prefills, *decodes]) < 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_three_percent_costs_little(seed: int) -> None:
    fit = fit_steps(MODEL, *measured(TRUTH, noise=0.03, seed=seed), step_s=0.01)
    assert fit.bandwidth == pytest.approx(TRUTH.bandwidth, rel=0.15)
    assert fit.flops == pytest.approx(TRUTH.flops, rel=0.05)
    for batch, context in BATCHES:
        point = DecodePoint(batch, context, 1.0)
        assert fit.seconds(point) == pytest.approx(TRUTH.seconds(point), rel=0.05)


def test_without_long_contexts_the_overhead_is_taken_as_given() -> None:
    prefills, decodes = measured(TRUTH, long=False)
    fit = fit_steps(MODEL, prefills, decodes, step_s=0.003)
    assert fit.step_fixed and fit.step_s == 0.003
    one = decodes[0]
    assert fit.seconds(one) == pytest.approx(one.seconds, rel=0.02)
    assert fit.flops == pytest.approx(TRUTH.flops, rel=0.02)


def test_an_overhead_that_cannot_be_is_cut() -> None:
    fit = fit_steps(MODEL, *measured(TRUTH, long=False), step_s=1.0)
    assert fit.step_s < TRUTH.seconds(DecodePoint(1, 80, 1)) and fit.bandwidth > 0


def test_batches_that_compute_more_than_they_read_are_seen_as_such() -> None:
    slow = StepFit(0.04, 20e9, 110e9, 0.01, False, load_geometry("smollm2-135m"))
    prefills, decodes = measured(slow, long=False)
    assert slow.seconds(decodes[-1]) > 1.5 * slow.seconds(decodes[0])
    fit = fit_steps(slow.geometry, prefills, decodes, step_s=0.04)
    assert fit.flops == pytest.approx(slow.flops, rel=0.02)
    assert fit.bandwidth == pytest.approx(slow.bandwidth, rel=0.1)


def test_what_every_request_costs_is_not_taken_for_reading_kv() -> None:
    """Steps that grow with the batch by more than the model knows, as on a CPU."""
    prefills, decodes = measured(TRUTH, long=False)
    grown = [DecodePoint(d.batch, d.context, d.seconds * (1 + 0.02 * d.batch)) for d in decodes]
    fit = fit_steps(MODEL, prefills, grown, step_s=0.002)
    assert fit.step_fixed and fit.step_s == 0.002
    assert fit.bandwidth == pytest.approx(TRUTH.bandwidth, rel=0.4)


def test_too_little_is_refused() -> None:
    prefills, decodes = measured(TRUTH)
    with pytest.raises(ConfigError, match="1 prompt lengths and 8 batch sizes were measured"):
        fit_steps(MODEL, prefills[:1], decodes, step_s=0.002)
    same = [PrefillPoint(tokens, 0.05) for tokens in LENGTHS]
    with pytest.raises(ConfigError, match="longer prompts took no longer"):
        fit_steps(MODEL, same, decodes, step_s=0.002)
