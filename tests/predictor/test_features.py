"""Rows: what is in them, and that nothing of the future is."""

from __future__ import annotations

from math import isnan

import pytest

from maestro_backend.predictor import CallShape, RunExamples
from maestro_backend.predictor._features import FEATURES, features
from maestro_backend.predictor._history import History
from maestro_backend.predictor._kinds import KINDS, OTHER, kind_of
from maestro_backend.predictor._matrix import known_of, learn_run, rows_of, training_rows
from maestro_backend.predictor._replay import remaining, replay_run
from maestro_backend.predictor._tables import Tables, keys_of

from .recorded import call, team_run, team_runs, with_tokens


def rows_by_name(run: RunExamples, tables: Tables) -> list[dict[str, float]]:
    return [
        features(seen.call.shape, seen.keys, seen.history, tables)
        for seen in replay_run(run, tables)
    ]


def test_a_rows_names_never_change_order() -> None:
    tables = Tables()
    for run in team_runs(3):
        learn_run(run, tables)
    rows = rows_by_name(team_run(9), tables)
    assert all(tuple(row) == FEATURES for row in rows)


def test_an_unknown_call_has_a_row_too() -> None:
    shape = CallShape("")
    row = features(shape, keys_of(shape, 0, 0), History(), Tables())
    assert isnan(row["own_last"]) and isnan(row["prompt_tokens"])
    assert row["calls"] == 0


def test_the_past_of_a_call_are_its_ancestors_only() -> None:
    #  0 -> 1 -> 3 ; 2 runs beside 1 and 3
    calls = (
        call("r", 0, 10),
        call("r", 1, 20, parents=(0,)),
        call("r", 2, 1000, parents=(0,)),
        call("r", 3, 30, parents=(1,)),
        call("r", 4, 40, parents=(2, 3)),
    )
    rows = rows_by_name(RunExamples("s", "r", calls), Tables())
    assert [row["calls"] for row in rows] == [0, 1, 1, 2, 4]
    assert rows[3]["all_top"] < rows[4]["all_top"], "the sibling's 1,000 tokens are not its past"


@pytest.mark.parametrize("changed", range(1, 7))
def test_what_comes_later_changes_no_earlier_row(changed: int) -> None:
    tables = Tables()
    for run in team_runs(5):
        learn_run(run, tables)
    run = team_run(7)
    before = rows_by_name(run, tables)
    after = rows_by_name(with_tokens(run, changed, 9999), tables)
    for at in range(changed + 1):
        same = [(a, b) for a, b in zip(before[at].values(), after[at].values(), strict=True)]
        assert all(a == b or (isnan(a) and isnan(b)) for a, b in same)
    assert after[changed + 1 :] != before[changed + 1 :] or changed == 6


def test_a_runs_own_calls_are_not_in_the_tables_of_its_rows() -> None:
    run = team_run(0)
    rows = rows_by_name(run, Tables())
    assert all(row["stage_n"] == 0 for row in rows)


def test_training_rows_never_saw_their_own_task() -> None:
    runs = team_runs(12)
    rows = training_rows(runs)
    other = training_rows([*runs[:5], with_tokens(runs[5], 0, 77_777), *runs[6:]])
    mine = (rows.tasks == f"made_up/{runs[5].run}") & ~rows.cold
    first = mine.nonzero()[0][0]
    mine_is_known = [name for name in FEATURES if not name.startswith("verbosity")]
    columns = [FEATURES.index(name) for name in mine_is_known]
    assert rows.x[first][columns] == pytest.approx(other.x[first][columns], nan_ok=True)


def test_the_rest_of_a_run_is_its_longest_chain() -> None:
    calls = (
        call("r", 0, 10),
        call("r", 1, 20, parents=(0,)),
        call("r", 2, 100, parents=(0,)),
        call("r", 3, 5, parents=(1, 2)),
    )
    assert remaining(RunExamples("s", "r", calls)) == [115, 25, 105, 5]


def test_what_was_added_to_tables_can_be_taken_back() -> None:
    tables, run = Tables(), team_run(1)
    learn_run(team_run(2), tables)
    row = rows_of([team_run(3)], tables).x
    known = known_of(run, tables)
    for weight in (1.0, -1.0):
        for one in known:
            tables.add(one.keys, one.tokens, one.future, one.residual, weight)
    again = rows_of([team_run(3)], tables).x
    assert row == pytest.approx(again, nan_ok=True, abs=1e-4)


@pytest.mark.parametrize(
    ("stage", "role", "kind"),
    [
        ("CodeReviewComment", "Code Reviewer", "reviewer"),
        ("graph/plan", "", "planner"),
        ("", "Programmer", "coder"),
        ("agent_turn", "user_simulator", "tool_agent"),
        ("answer_drafter", "", "writer"),
    ],
)
def test_names_tell_the_kind_of_work(stage: str, role: str, kind: str) -> None:
    assert KINDS[kind_of(stage, role)][0] == kind


def test_a_name_may_tell_nothing() -> None:
    assert kind_of("xyzzy", "") == OTHER
