"""Training, files, prediction and online learning on made-up apps with known rules."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from maestro_agents.protocol import ConfigError
from maestro_backend.predictor import (
    CLASS_DEFAULT,
    CallOutcome,
    CallShape,
    Estimator,
    Model,
    Predictor,
    base_model,
    explain,
    fit,
    load_model,
)
from maestro_backend.predictor._boosters import RECIPES
from maestro_backend.predictor._fit import judge

from .recorded import team_runs, with_tokens

TINY = {
    name: replace(recipe, leaves=15, rounds=60, rate=0.1, least=5)
    for name, recipe in RECIPES.items()
}


@pytest.fixture(scope="module")
def model() -> Model:
    return fit([*team_runs(60), *team_runs(60, app="other", source="else")], recipes=TINY)


def test_the_runs_own_past_beats_the_stages_median(model: Model) -> None:
    """A run writes long or short as a whole: only its first call is a surprise."""
    estimator = Estimator(model)
    later, usual = [], []
    for run in team_runs(80)[60:]:
        for call, (keys, estimate) in zip(run.calls, estimator.replayed(run), strict=True):
            if call.index >= 2:
                later.append(abs(call.length - estimate.p50))
                usual.append(abs(call.length - estimator.tables.length(keys).p50))
    assert fmean(later) < 0.4 * fmean(usual)


def test_quantiles_are_in_order_and_cover(model: Model) -> None:
    estimator = Estimator(model)
    below = []
    for run in team_runs(100)[60:]:
        for call, (_, e) in zip(run.calls, estimator.replayed(run), strict=True):
            assert e.p50 <= e.p90 <= e.p95 <= e.p99
            assert e.rest_p90 >= e.rest_p50 >= e.p50 * (1 - 1e-9)
            below.append(call.length <= e.p90)
    assert fmean(below) == pytest.approx(0.9, abs=0.08)


def test_the_rest_of_a_run_shrinks_as_it_goes_on(model: Model) -> None:
    [run] = team_runs(61)[60:]
    rests = [e.rest_p50 for _, e in Estimator(model).replayed(run)]
    assert rests[1] > rests[3] > rests[5]


def test_a_new_app_is_learned_run_by_run(model: Model) -> None:
    runs = team_runs(30, app="stranger", source="afar", scale=20.0)
    cold, warm = Estimator(model), Estimator(model)
    for run in runs[:20]:
        warm.follow(run)
    before, after = (
        fmean(
            abs(call.length - estimate.p50)
            for run in runs[20:]
            for call, (_, estimate) in zip(run.calls, e.replayed(run), strict=True)
        )
        for e in (cold, warm)
    )
    assert after < 0.7 * before


def test_learning_changes_neither_the_model_nor_what_came_before(model: Model) -> None:
    run, other = team_runs(2)
    frozen = [e.p50 for _, e in Estimator(model).replayed(run)]
    estimator = Estimator(model)
    estimator.follow(other)
    assert [e.p50 for _, e in Estimator(model).replayed(run)] == frozen


@pytest.mark.parametrize("online", [False, True])
def test_no_later_length_is_known_earlier(model: Model, online: bool) -> None:
    runs = team_runs(8)

    def predictions(changed: int) -> list[list[float]]:
        estimator = Estimator(model)
        told = [with_tokens(run, changed, 5_000) if at == 4 else run for at, run in enumerate(runs)]
        return [
            [e.p90 for e in estimator.follow(run)]
            if online
            else [e.p90 for _, e in estimator.replayed(run)]
            for run in told
        ]

    one, two = predictions(3), predictions(5)
    assert one[:4] == two[:4]
    assert one[4][:4] == two[4][:4]
    assert one[4][4:] != two[4][4:]


def test_a_model_comes_back_from_its_folder(model: Model, tmp_path: Path) -> None:
    model.save(tmp_path / "model")
    again = load_model(tmp_path / "model")
    run = team_runs(70)[69]
    before, after = (
        [(e.p50, e.p99, e.rest_p90) for _, e in Estimator(m).replayed(run)] for m in (model, again)
    )
    assert np.array(before) == pytest.approx(np.array(after), rel=0.05)


@pytest.mark.parametrize("broken", ["model.json", "tables.npz", "boosters/p50.txt.xz"])
def test_a_broken_folder_is_one_clear_line(model: Model, tmp_path: Path, broken: str) -> None:
    model.save(tmp_path)
    (tmp_path / broken).write_bytes(b"{}")
    with pytest.raises(ConfigError, match=r"maestro train|no usable"):
        load_model(tmp_path)
    (tmp_path / broken).unlink()
    with pytest.raises(ConfigError, match=r"no (usable )?(model|tables)"):
        load_model(tmp_path)


def test_a_model_of_another_version_is_refused(model: Model, tmp_path: Path) -> None:
    model.save(tmp_path)
    path = tmp_path / "model.json"
    path.write_text(path.read_text().replace('"own_last"', '"something_else"'))
    with pytest.raises(ConfigError, match="another version of Maestro"):
        load_model(tmp_path)


def test_a_few_calls_are_no_basis() -> None:
    with pytest.raises(ConfigError, match="too few"):
        fit(team_runs(2))


def test_without_lightgbm_the_error_names_the_mend(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save(tmp_path)
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(ConfigError, match="pip install"):
        load_model(tmp_path)


def test_training_is_deterministic() -> None:
    runs = team_runs(30)
    one, two = (fit(runs, seed=3, recipes=TINY) for _ in range(2))
    a, b = ([e.p99 for _, e in Estimator(m).replayed(runs[0])] for m in (one, two))
    assert a == b


def test_judging_tells_errors_in_tokens(model: Model) -> None:
    judged = judge(model, team_runs(70)[60:], [])
    assert judged.calls == 70
    assert 0 < judged.median_error <= judged.mae < 200
    assert 0.8 <= judged.p90_coverage <= 1.0


def test_an_explanation_leads_from_the_usual_to_the_predicted(model: Model) -> None:
    estimator = Estimator(model)
    _, estimate = estimator.replayed(team_runs(70)[69])[4]
    why = explain(estimator, estimate)
    product = np.prod([reason.factor for reason in why.reasons]) * why.others
    assert (why.usual + 1) * product == pytest.approx(estimate.p50 + 1, rel=1e-3)
    assert why.reasons and why.reasons[0].factor != 1.0


# --- the shipped model --------------------------------------------------------------------------


def test_the_base_model_is_small_and_says_where_it_is_from() -> None:
    folder = Path(sys.modules[Model.__module__].__file__ or "").parent / "base"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5_000_000
    notice = (folder / "NOTICE.md").read_text(encoding="utf-8")
    sources = base_model().about["sources"]
    assert all(f"| {source} |" in notice for source in sources)
    assert "agentsim" not in sources


def test_a_fresh_install_is_useful_from_the_first_call() -> None:
    predictor = Predictor(base_model(), "base")
    shapes = {
        role: CallShape("m", "new@1", stage, role, prompt_bytes=6000, prompt_chars=6000)
        for role, stage in (("coder", "write_code"), ("router", "route"))
    }
    lengths = {
        role: predictor.foretell([predictor.arrive(None, shape, 0.0)])[0]
        for role, shape in shapes.items()
    }
    assert lengths["coder"].length.p50 > lengths["router"].length.p50
    assert lengths["coder"].length != CLASS_DEFAULT
    assert lengths["coder"].version == "base"
    assert lengths["coder"].rest is not None


# --- live ---------------------------------------------------------------------------------------


def test_calls_of_one_moment_are_predicted_together(model: Model) -> None:
    predictor = Predictor(model, "v1")
    calls = [
        predictor.arrive(f"r{n}", CallShape("m", "team", "code", "coder", 4000), 0.0)
        for n in range(20)
    ]
    together = predictor.foretell(calls)
    assert together == [predictor.foretell([call])[0] for call in calls]


def test_a_model_that_fails_costs_its_predictions_only(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    predictor = Predictor(model, "v1")
    assert predictor.estimator is not None
    predictor.estimator.model.boosters.models.pop("p50", None)
    try:
        call = predictor.arrive("r", CallShape("m", "team", "code", "coder", 4000), 0.0)
        for _ in range(2):
            [prediction] = predictor.foretell([call])
            assert prediction == predictor.quick(call)
        assert caplog.text.count("plain tables predict") == 1
    finally:
        model.boosters.models.update(fit(team_runs(30), recipes=TINY).boosters.models)


def test_a_run_is_learned_from_when_it_is_over() -> None:
    predictor = Predictor()
    shape = CallShape("m", "w@1", "write", "writer", prompt_bytes=400)
    for _ in range(3):
        predictor.finish(predictor.arrive("r", shape, 0.0), CallOutcome(100, 700), 1.0)
    assert predictor.predict(shape).length == CLASS_DEFAULT
    predictor.end_run("r")
    assert predictor.predict(shape).length.p50 == pytest.approx(700, rel=0.06)


def test_a_silent_run_is_over_too_and_an_open_call_holds_it() -> None:
    predictor = Predictor()
    shape = CallShape("m", "w@1", "write", "writer", prompt_bytes=400)
    predictor.finish(predictor.arrive("r", shape, 0.0), CallOutcome(100, 700), 1.0)
    live = predictor.arrive("r", shape, 2.0)
    predictor.sweep(5000.0)
    assert predictor.predict(shape).length == CLASS_DEFAULT
    predictor.drop(live)
    predictor.sweep(5000.0)
    assert predictor.predict(shape).length.p50 == pytest.approx(700, rel=0.06)


def test_a_run_that_starts_again_after_its_end_has_no_past() -> None:
    predictor = Predictor()
    shape = CallShape("m", "w@1", "write", "writer", prompt_bytes=400)
    predictor.finish(predictor.arrive("r", shape, 0.0), CallOutcome(100, 700), 1.0)
    open_call = predictor.arrive("r", shape, 2.0)
    predictor.end_run("r")
    again = predictor.arrive("r", shape, 3.0)
    assert (open_call.history.all.count, again.history.all.count) == (1, 0)
    for call in (open_call, again):
        predictor.finish(call, CallOutcome(100, 700), 4.0)
    predictor.end_run("r")
    assert predictor.predict(shape).length.p50 == pytest.approx(700, rel=0.06)


def test_siblings_are_no_past_of_each_other() -> None:
    predictor = Predictor()
    shape = CallShape("m", "w@1", "search", "searcher", prompt_bytes=400)
    first = predictor.finish(predictor.arrive("r", shape, 0.0), CallOutcome(100, 50), 1.0)
    side = [predictor.arrive("r", shape, 2.0) for _ in range(3)]
    for call in side:
        assert call.parents == (first.index,)
        predictor.finish(call, CallOutcome(100, 50), 3.0)
    assert predictor.arrive("r", shape, 7.0).parents == (1, 2, 3)
    assert predictor.arrive("r", shape, 7.0).shape.gap_s == pytest.approx(4.0)


def test_one_impossible_call_does_not_cost_the_others_their_model(model: Model) -> None:
    predictor = Predictor(model, "v1")
    good = predictor.arrive(None, CallShape("m", "team", "code", "coder", 4000), 0.0)
    bad = predictor.arrive(None, replace(good.shape, max_tokens=10**400), 0.0)
    first, second = predictor.foretell([good, bad])
    assert (first.version, second.version) == ("v1", "")


def test_a_reply_that_was_cut_off_says_nothing_of_the_models_error(model: Model) -> None:
    predictor = Predictor(model, "v1")
    assert predictor.estimator is not None
    shape = CallShape("m", "team", "code", "coder", 4000, max_tokens=8)
    before = predictor.estimator.offsets.of("team").copy()
    for _ in range(50):
        call = predictor.arrive(None, shape, 0.0)
        predictor.foretell([call])
        predictor.finish(call, CallOutcome(1000, 8, finish="length"), 1.0)
    assert (predictor.estimator.offsets.of("team") == before).all()


def test_a_wide_run_stays_cheap() -> None:
    """Where many strands run side by side, a call looks back at its last 200 ancestors."""
    predictor = Predictor()
    shape = CallShape("m", "w@1", "search", "searcher", prompt_bytes=400)
    for _ in range(300):
        for call in [predictor.arrive("r", shape, 0.0) for _ in range(2)]:
            predictor.finish(call, CallOutcome(100, 50), 1.0)
    assert predictor.arrive("r", shape, 2.0).history.all.count == 200
