"""The `predictor` section of the config file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from maestro_agents.protocol import ConfigError
from maestro_backend.config import Config, PredictorConfig

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def parse(**predictor: Any) -> Config:
    return Config.parse({"models": {"m": {"source": "random:tiny-llama"}}, "predictor": predictor})


def test_defaults_and_units() -> None:
    assert parse().predictor == PredictorConfig()
    assert parse(store_size="256MiB", store_age="90d").predictor == PredictorConfig()
    assert parse(store_age="36h").predictor.store_age == 1.5 * 86_400
    assert not parse(store=False).predictor.store


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"retrian": True}, "predictor.retrian: unknown key; did you mean retrain?"),
        ({"store_size": "10kB"}, "predictor.store_size: give it 1MiB or more"),
        ({"store_age": "soon"}, "predictor.store_age: 'soon' is not a duration"),
        ({"store_age": 0}, "predictor.store_age"),
        ({"retrain": "often"}, "predictor.retrain"),
    ],
)
def test_errors_name_the_path_and_the_fix(given: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(**given)
    assert expected in str(raised.value)


def test_retraining_without_a_store_is_told() -> None:
    assert parse(store=False).unused() == ()
    [line] = parse(store=False, retrain=True).unused()
    assert line == "predictor.retrain does nothing without predictor.store"


def test_every_key_is_explained() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"`predictor.{key}`" in page for key in PredictorConfig.model_fields)
