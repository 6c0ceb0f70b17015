"""What a call will still produce once it has produced so much."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestro_backend.predictor import refreshed
from maestro_backend.scheduler import Length

LENGTH = Length(100, 300, 500, 1500)
TOKENS = st.floats(0, 20_000)


def test_nothing_has_come_nothing_changes() -> None:
    assert refreshed(LENGTH, 0) == LENGTH


def test_a_call_that_goes_on_will_be_long() -> None:
    at_100 = refreshed(LENGTH, 100)
    # Half of the calls are over by 100 tokens; of the rest, half reach the 75th percentile.
    assert 100 < at_100.p50 < 300
    assert at_100.p90 == pytest.approx(500, rel=0.01), "the 95th of all is the 90th of the rest"
    assert refreshed(LENGTH, 2000).p50 > 2000


def test_few_tokens_change_little() -> None:
    soon = refreshed(LENGTH, 3)
    assert soon.p50 == pytest.approx(100, rel=0.35)
    assert soon.p90 == pytest.approx(300, rel=0.15)


def test_quantiles_that_nobody_predicted_are_no_trouble() -> None:
    later = refreshed(Length(100, 100), 150)
    assert 150 < later.p50 <= later.p90


@given(st.lists(TOKENS, min_size=4, max_size=4), TOKENS, TOKENS)
def test_quantiles_stay_in_order_and_ahead(given: list[float], first: float, then: float) -> None:
    length = Length(*sorted(given))
    earlier, later = sorted((first, then))
    for generated in (earlier, later):
        now = refreshed(length, generated)
        assert now.p99 is not None and now.p95 is not None
        assert now.p50 <= now.p90 <= now.p95 <= now.p99
        assert now.p50 >= generated + 1 or generated == 0
    assert refreshed(length, later).p90 >= refreshed(length, earlier).p90 * (1 - 1e-9)
