"""Predictions before and after learning."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from maestro_backend.predictor import (
    CLASS_DEFAULT,
    CallOutcome,
    CallShape,
    Predictor,
    Recent,
)

SHAPE = CallShape("m", "w@1", "write", "writer", prompt_bytes=400)


def test_before_anything_is_known_the_class_default_holds() -> None:
    prediction = Predictor().predict(SHAPE)
    assert prediction.length == CLASS_DEFAULT
    assert prediction.prompt_tokens == 100
    assert prediction.kv_tokens == 100 + 512


def test_max_tokens_caps_every_quantile() -> None:
    prediction = Predictor().predict(CallShape("m", max_tokens=64))
    assert (prediction.length.p50, prediction.length.p90) == (64, 64)


def test_the_stage_is_predicted_by_its_own_median() -> None:
    predictor = Predictor()
    for tokens in (10, 20, 30, 40, 500):
        predictor.learn(SHAPE, CallOutcome(100, tokens))
    length = predictor.predict(SHAPE).length
    assert length.p50 == pytest.approx(30, rel=0.1)
    assert 40 < length.p90 <= 520


def test_an_unseen_stage_falls_back_to_its_role_and_an_unseen_role_to_the_default() -> None:
    predictor = Predictor()
    predictor.learn(SHAPE, CallOutcome(100, 77))
    other = CallShape("m", "other@1", "draft", "writer")
    assert predictor.predict(other).length.p50 == pytest.approx(77, rel=0.1)
    stranger = CallShape("m", "other@1", "draft", "judge")
    assert predictor.predict(stranger).length == CLASS_DEFAULT


def test_old_lengths_are_forgotten() -> None:
    predictor = Predictor()
    for tokens in [1000] * 5000 + [10] * 4000:
        predictor.learn(SHAPE, CallOutcome(100, tokens))
    assert predictor.predict(SHAPE).length.p50 == pytest.approx(10, rel=0.1)


def test_bytes_per_token_and_speed_are_learned_per_model() -> None:
    predictor = Predictor()
    outcome = CallOutcome(200, 41, first_s=0.1, total_s=4.1)  # 2 bytes a token, 10 tokens/s
    for _ in range(60):
        predictor.learn(SHAPE, outcome)
    prediction = predictor.predict(SHAPE)
    assert prediction.prompt_tokens == pytest.approx(200, rel=0.01)
    assert prediction.service_s == pytest.approx(200 / 2000 + 41 / 10, rel=0.06)
    assert predictor.predict(CallShape("other", prompt_bytes=400)).prompt_tokens == 100


def test_cached_tokens_do_not_make_prefill_look_fast() -> None:
    predictor = Predictor()
    outcome = CallOutcome(1000, 2, cached_tokens=900, first_s=1.0, total_s=1.1)
    for _ in range(60):
        predictor.learn(CallShape("m", prompt_bytes=4000), outcome)
    # 100 uncached tokens in one second.
    assert predictor.predict(CallShape("m", prompt_bytes=4000, max_tokens=1)).service_s > 9


def test_an_empty_reply_teaches_no_length() -> None:
    predictor = Predictor()
    predictor.learn(SHAPE, CallOutcome(0, 0))
    assert predictor.predict(SHAPE).length == CLASS_DEFAULT


def test_each_choice_needs_its_own_memory_and_shares_the_prompt() -> None:
    predictor = Predictor()
    one, four = predictor.predict(SHAPE), predictor.predict(replace(SHAPE, n=4))
    assert four.kv_tokens == 100 + 4 * 512
    assert (four.length, four.service_s) == (one.length, one.service_s), "side by side"


def test_lengths_and_speed_are_learned_per_choice() -> None:
    predictor = Predictor()
    outcome = CallOutcome(100, 4 * 41, first_s=0.1, total_s=4.1)
    for _ in range(60):
        predictor.learn(replace(SHAPE, n=4), outcome)
    prediction = predictor.predict(SHAPE)
    assert prediction.length.p50 == pytest.approx(41, rel=0.06)
    assert prediction.service_s == pytest.approx(100 / 1000 + 41 / 10, rel=0.06)


def test_a_prediction_for_a_name_out_of_a_graph_leaves_no_trace() -> None:
    predictor = Predictor()
    before = pickle.dumps(predictor)
    predictor.predict(CallShape("a model that nobody serves", "w", "stage", "role"))
    assert pickle.dumps(predictor) == before


def test_a_recent_mapping_drops_what_was_used_least_recently() -> None:
    recent: Recent[str, int] = Recent(2)
    recent["a"] = 1
    assert recent.use("b", lambda: 2) == 2
    assert recent.use("a", lambda: 3) == 1
    recent["c"] = 4
    assert dict(recent) == {"a": 1, "c": 4}
