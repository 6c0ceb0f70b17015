"""What a node learns of its models, and keeps across restarts and faults."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from maestro_backend.config import ModelConfig
from maestro_backend.node._learned import LearnedState, settings_fingerprint
from maestro_backend.scheduler import Residency
from maestro_backend.workers import Learned

DEVICE, HOST, DISK = Residency.DEVICE, Residency.HOST, Residency.DISK
MIB = 1024**2
DAY_S = 24 * 3600


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "learned.json"


def state(file: Path, fingerprint: str = "one") -> LearnedState:
    return LearnedState(file, {"a": fingerprint, "b": "b"}, {"a": 64 * MIB, "b": 0})


def test_nothing_is_known_at_first(file: Path) -> None:
    learned: Learned = state(file)
    assert dict(learned.activation_s("a")) == {}
    assert learned.weights_bytes("a") is None
    assert learned.residual_bytes("a") is None


def test_the_median_of_the_last_activations_outlives_a_restart(file: Path) -> None:
    learned = state(file)
    for seconds in (100.0, 1.0, 2.0, 9.0, 3.0, 2.0):
        learned.moved("a", HOST, DEVICE, seconds)
    learned.moved("a", DISK, DEVICE, 40.0)
    learned.moved("a", DEVICE, HOST, 7.0)
    for known in (learned, state(file)):
        assert known.activation_s("a") == {HOST: 2.0, DISK: 40.0}
        assert known.activation_s("b") == {}


def test_measured_weights_outlive_a_restart(file: Path) -> None:
    state(file).weighed("a", 270 * MIB)
    assert state(file).weights_bytes("a") == 270 * MIB


def test_a_residual_that_was_exceeded_becomes_headroom(file: Path) -> None:
    learned = state(file)
    learned.residual_measured("a", 60 * MIB)
    learned.residual_measured("a", 65 * MIB)  # a page more is no news
    assert learned.residual_bytes("a") is None
    learned.residual_measured("a", 100 * MIB)
    learned.residual_measured("a", 70 * MIB)
    for known in (learned, state(file)):
        assert known.residual_bytes("a") == pytest.approx(100 * MIB, rel=0.01)
        assert known.headroom_bytes("a") == pytest.approx(36 * MIB, rel=0.01)


def test_headroom_that_is_not_needed_decays(file: Path) -> None:
    state(file).residual_measured("a", 128 * MIB)
    written = json.loads(file.read_text())
    written["models"]["a"]["headroom_at"] -= DAY_S
    file.write_text(json.dumps(written))
    assert state(file).headroom_bytes("a") == pytest.approx(32 * MIB, rel=0.01)
    written["models"]["a"]["headroom_at"] -= 30 * DAY_S
    file.write_text(json.dumps(written))
    assert state(file).residual_bytes("a") is None


def test_a_changed_model_starts_anew(file: Path) -> None:
    learned = state(file)
    learned.weighed("a", MIB)
    learned.weighed("b", 2 * MIB)
    changed = state(file, fingerprint="two")
    assert changed.weights_bytes("a") is None
    assert changed.weights_bytes("b") == 2 * MIB


def test_a_fingerprint_follows_the_settings() -> None:
    first, other = (ModelConfig(source="random:tiny-llama", max_num_seqs=n) for n in (1, 2))
    prints = {
        settings_fingerprint(settings, engine)
        for settings in (first, first.model_copy(), other)
        for engine in ("stub", "vllm-cpu")
    }
    assert len(prints) == 4


@pytest.mark.parametrize("text", ["", "{", "[]", '{"models": {"a": 1}}', "\x00\xff"])
def test_a_broken_file_is_set_aside(
    file: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    file.parent.mkdir()
    file.write_text(text)
    with caplog.at_level(logging.WARNING):
        learned = state(file)
    assert "set aside" in caplog.text
    assert file.with_name("learned.json.broken").read_text() == text
    learned.weighed("a", MIB)
    assert state(file).weights_bytes("a") == MIB


def test_a_disk_that_takes_nothing_is_no_fault(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file.parent.write_text("a file where the folder should be")
    learned = state(file)
    learned.weighed("a", MIB)
    assert learned.weights_bytes("a") == MIB
    assert "could not be written" in caplog.text
