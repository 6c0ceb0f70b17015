"""What is foreseen: lengths, what is left, what comes next, and what routing confirms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from foresight.worlds import (
    GAP_S,
    chain,
    foreseen,
    fork,
    models,
    of,
    service_s,
    small_model,
    team_history,
)

from maestro_agents.protocol import CallIdentity, ConfigError
from maestro_backend.evaluation import predict
from maestro_backend.foresight import foresee, overlap
from maestro_backend.predictor import (
    CLASS_DEFAULT,
    CallOutcome,
    Estimator,
    Predictor,
    RunExamples,
    base_model,
)
from maestro_backend.scheduler import ForecastCall, Length
from maestro_backend.workflows import WorkflowBook

USUAL = chain("now", "plan", "code", "review", "code", "review")


def test_each_call_has_lengths_in_order_and_no_more_left_than_itself() -> None:
    runs = [USUAL, fork("wide", 100, 200)]
    found = foreseen(*runs)
    assert [len(found[run.source, run.run]) for run in runs] == [5, 4]
    for calls in found.values():
        for one in calls:
            assert one.length.p95 is not None and one.length.p99 is not None
            assert one.length.p50 <= one.length.p90 <= one.length.p95 <= one.length.p99
            assert one.rest is not None and one.rest.p50 <= one.rest.p90


def test_lengths_are_those_of_the_model_over_tables_that_history_taught() -> None:
    estimator = Estimator(small_model().model)
    for run in team_history():
        estimator.learn_run(run)
    expected = [estimate.p90 for _, estimate in estimator.replayed(USUAL)]
    assert [one.length.p90 for one in of(USUAL)] == pytest.approx(expected)


def test_what_is_left_is_said_as_the_evaluation_says_it() -> None:
    expected = predict(small_model(), [USUAL])
    found = of(USUAL, history=[])
    assert [one.rest.p50 for one in found if one.rest] == pytest.approx(list(expected.rest_p50))
    assert [one.rest.p90 for one in found if one.rest] == pytest.approx(list(expected.rest_p90))


def test_the_median_is_that_of_past_calls_of_the_role() -> None:
    history = team_history()
    plans = [run.calls[0].length for run in history]
    table = of(USUAL)[0].median
    assert table.p50 == pytest.approx(float(np.median(plans)), rel=0.15)
    assert table.p95 is None
    assert of(USUAL)[1].median == of(USUAL)[3].median


def test_what_history_always_did_next_is_expected() -> None:
    after_plan = of(USUAL)[0].ahead
    code = after_plan[0]
    assert (code.stage, code.role, code.model) == ("code", "coder", "large")
    assert code.probability > 0.8
    assert code.earliest_start_s == pytest.approx(GAP_S)
    review = next(call for call in after_plan if call.stage == "review")
    assert review.model == "small"
    assert review.earliest_start_s > 2 * GAP_S
    assert review.service_s == service_s("small", review.prompt_tokens, review.length.p50)


def test_a_prompt_is_expected_to_grow_as_it_did() -> None:
    after_review = of(USUAL)[2].ahead
    code = next(call for call in after_review if call.stage == "code")
    assert code.prompt_tokens == USUAL.calls[1].outcome.prompt_tokens + 200


def test_a_forecast_holds_few_calls_none_improbable_the_first_first() -> None:
    for one in of(USUAL):
        assert len(one.ahead) <= 8
        assert all(call.probability >= 0.05 for call in one.ahead)
        starts = [call.earliest_start_s for call in one.ahead]
        assert starts == sorted(starts)


def test_rounds_of_a_loop_push_no_stage_out_of_a_forecast() -> None:
    history = [
        chain(f"long-{n}", "plan", *("code", "review") * (3 + n % 9), "deploy") for n in range(18)
    ]
    stages = [call.stage for call in of(USUAL, history)[1].ahead]
    assert len(stages) == 8
    assert "deploy" in stages


def test_the_forecast_is_what_the_gateway_believes() -> None:
    """A book with the same journeys, told the same run call by call."""
    book = WorkflowBook(Predictor(), {"standard": None})
    history = team_history()
    for run in history:
        book.outlook.journeys.learn(run)
    for call, ours in zip(USUAL.calls, of(USUAL, history), strict=True):
        identity = CallIdentity(run="live", workflow="team", stage=call.shape.stage)
        book.call_arrived(identity, None, call.shape, None, 10.0 * call.index)
        believed = chances(book.runs["live"].forecast)
        found = chances(ours.ahead)
        assert found.keys() == believed.keys()
        assert all(abs(found[stage] - believed[stage]) < 0.04 for stage in found)
        outcome = CallOutcome(call.outcome.prompt_tokens, call.outcome.output_tokens)
        outcome = replace(outcome, finish=call.outcome.finish)
        book.call_ended(identity, 10.0 * call.index + 5, outcome)


def chances(calls: tuple[ForecastCall, ...]) -> dict[str, float]:
    found: dict[str, float] = {}
    for call in calls:
        found[call.stage] = max(call.probability, found.get(call.stage, 0.0))
    return found


def test_routing_confirms_all_followers_and_no_more() -> None:
    plan, *reviews, code = of(fork("wide", 100, 900, 100))
    assert [(call.stage, call.probability) for call in plan.confirmed] == [("review", 1.0)] * 3
    assert len({call.length for call in plan.confirmed}) == 1
    for review in reviews:
        assert [(call.stage, call.model) for call in review.confirmed] == [("code", "large")]
    assert code.confirmed == ()


def test_a_new_app_has_no_forecast_and_defaults_once_routing_is_known() -> None:
    calls = (
        replace(one, shape=replace(one.shape, workflow="new", stage=f"new {one.shape.stage}"))
        for one in USUAL.calls
    )
    run = RunExamples("new", "r", tuple(calls))
    found = of(run)
    assert all(one.ahead == () for one in found)
    [told] = found[1].confirmed
    assert (told.stage, told.model, told.length) == ("new review", "small", CLASS_DEFAULT)
    ended = run.calls[1].outcome
    assert told.prompt_tokens == ended.prompt_tokens + ended.output_tokens
    assert told.earliest_start_s == 0.0


def test_a_run_that_is_past_cannot_be_replayed() -> None:
    with pytest.raises(ConfigError, match=r"past-3.*split the runs by task"):
        foreseen(USUAL, team_history()[3])


def test_without_history_the_model_alone_speaks() -> None:
    found = foresee([USUAL], trained=None, history=(), models=models, service_s=service_s)
    first = found[USUAL.source, USUAL.run][0]
    assert first.ahead == ()
    assert isinstance(first.length, Length)
    assert first.rest is not None and first.rest.calls == 0.0


def test_calibration_follows_history_that_the_model_was_not_trained_on() -> None:
    lines: list[str] = []

    def high(source: str) -> float:
        calls = foresee(
            [USUAL],
            trained=small_model(),
            history=team_history(source=source),
            models=models,
            service_s=service_s,
            say=lines.append,
        )
        return calls[USUAL.source, USUAL.run][1].length.p99 or 0.0

    known = high("made_up")
    assert not any("new to the model" in line for line in lines)
    assert high("fresh") != known
    assert any("new to the model" in line and "fresh" in line for line in lines)


def test_the_sources_that_a_model_was_trained_on_are_told() -> None:
    assert overlap([USUAL, chain("x", "plan", source="fresh")], small_model()) == ("made_up",)
    shipped = base_model().about["sources"][0]
    assert overlap([USUAL, chain("x", "plan", source=shipped)]) == (shipped,)
