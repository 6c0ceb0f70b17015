"""Calibration and correction, call by call."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from maestro_backend.predictor._corrections import Corrections
from maestro_backend.predictor._offsets import Offsets

TARGETS = (0.9, 0.99)


def test_offsets_cover_what_they_say_on_calls_not_seen() -> None:
    rng = np.random.default_rng(0)
    scores, later = rng.normal(1.0, 2.0, (2, 4000, 2))
    offsets = Offsets.fit(TARGETS, scores, np.full(4000, "app"))
    covered = (later <= offsets.of("app")).mean(axis=0)
    assert covered == pytest.approx(TARGETS, abs=0.02)
    assert offsets.of("another app") == pytest.approx(offsets.everywhere)


def test_a_small_app_leans_on_all_others() -> None:
    scores = np.concatenate([np.zeros((1000, 2)), np.full((8, 2), 5.0)])
    apps = np.array(["big"] * 1000 + ["small"] * 8)
    offsets = Offsets.fit(TARGETS, scores, apps)
    assert 0 < offsets.of("small")[0] < 1 > offsets.of("small")[1]


def test_coverage_comes_back_after_habits_change() -> None:
    rng = random.Random(1)
    offsets = Offsets(TARGETS, (0.0, 0.0))
    covered = []
    for step in range(3000):
        score = rng.gauss(0.0 if step < 1000 else 2.0, 1.0)
        covered.append(score <= offsets.of("app")[0])
        offsets.learn("app", np.array([score, score]))
    assert sum(covered[1200:]) / 1800 == pytest.approx(0.9, abs=0.05)


def test_offsets_go_through_json() -> None:
    offsets = Offsets.fit(TARGETS, np.ones((30, 2)), np.full(30, "app"))
    again = Offsets.restore(json.loads(json.dumps(offsets.state())))
    assert again.of("app") == pytest.approx(offsets.of("app"))
    assert again.targets == pytest.approx(TARGETS)


def test_a_correction_comes_only_where_it_helps() -> None:
    corrections, rng = Corrections(), random.Random(2)
    for _ in range(60):
        corrections.learn("biased", 7.0, 9.0 + rng.gauss(0, 0.1))
        corrections.learn("noise", 7.0, 7.0 + rng.gauss(0, 2.0))
    assert corrections.of("biased") == pytest.approx(2.0, rel=0.15)
    assert abs(corrections.of("noise")) < 0.5
    assert corrections.of("never seen") == 0.0


def test_one_call_corrects_nothing() -> None:
    corrections = Corrections()
    corrections.learn("stage", 7.0, 9.0)
    assert corrections.of("stage") == 0.0
