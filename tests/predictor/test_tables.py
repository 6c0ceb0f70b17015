"""The memory across runs: sketches, back-off, files."""

from __future__ import annotations

import random
from pathlib import Path
from statistics import median, quantiles

import numpy as np
import pytest

from maestro_agents.protocol import ConfigError
from maestro_backend.predictor import CLASS_DEFAULT, CallShape, Tables
from maestro_backend.predictor._matrix import learn_run, rows_of
from maestro_backend.predictor._sketch import Sketch
from maestro_backend.predictor._tables import keys_of

from .recorded import team_run, team_runs


@pytest.mark.parametrize("scale", [3, 50, 800, 20_000])
def test_a_sketch_knows_quantiles_to_a_few_percent(scale: float) -> None:
    rng = random.Random(scale)
    values = [rng.lognormvariate(0, 0.7) * scale for _ in range(2000)]
    sketch = Sketch()
    for value in values:
        sketch.add(value)
    p50, p90 = (2.0**q - 1 for q in sketch.quantiles(np.array([0.5, 0.9])))
    assert p50 == pytest.approx(median(values), rel=0.06, abs=0.5)
    assert p90 == pytest.approx(quantiles(values, n=10)[8], rel=0.06, abs=0.5)


def test_a_sketch_forgets_old_habits() -> None:
    sketch = Sketch()
    for value in [1000] * 5000 + [10] * 4000:
        sketch.follow(value)
    assert 2 ** sketch.summary().median - 1 == pytest.approx(10, rel=0.1)


def test_lengths_back_off_from_stage_to_role_to_app() -> None:
    tables = Tables()
    for run in team_runs(30):
        learn_run(run, tables)
    at = lambda stage, role, app="team": tables.length(  # noqa: E731
        keys_of(CallShape("m", app, stage, role), 0, 0)
    )
    assert at("never", "coder", "other").p50 == pytest.approx(at("code", "coder").p50, rel=0.01)
    assert at("never", "nobody") != CLASS_DEFAULT, "the app is known"
    assert at("code", "coder").p99 >= at("code", "coder").p95 >= at("code", "coder").p90


def test_many_prompts_push_no_stage_out() -> None:
    tables = Tables()
    keys = keys_of(CallShape("m", "app", "rare", "r"), 0, 0)
    tables.add(keys, 77, 0, 0.0)
    for number in range(20_500):
        shape = CallShape("m", "app", "busy", "r", prompt_chars=number)
        tables.add(keys_of(shape, 0, 0), 10, 0, 0.0)
    assert tables.length(keys).p50 == pytest.approx(77, rel=0.1)
    assert len(tables.same) == 20_000


def test_tables_come_back_from_their_file(tmp_path: Path) -> None:
    tables = Tables()
    for run in team_runs(10):
        learn_run(run, tables)
    tables.save(tmp_path / "tables.npz")
    again = Tables.load(tmp_path / "tables.npz")
    before, after = (rows_of([team_run(11)], t).x for t in (tables, again))
    same_prompt = [name.startswith("same_") for name in _names()]
    assert before[:, ~np.array(same_prompt)] == pytest.approx(
        after[:, ~np.array(same_prompt)], nan_ok=True, abs=1e-4
    )


def _names() -> tuple[str, ...]:
    from maestro_backend.predictor._features import FEATURES

    return FEATURES


@pytest.mark.parametrize("content", [b"", b"no zip", None])
def test_a_broken_file_is_one_clear_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tables.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="no usable tables"):
        Tables.load(path)


def test_a_copy_learns_alone() -> None:
    tables = Tables()
    learn_run(team_run(1), tables)
    other = tables.copy()
    learn_run(team_run(2), other)
    key = keys_of(CallShape("m", "team", "code", "coder"), 0, 0).stage
    assert tables.read(key).count < other.read(key).count
