"""Recorded runs become templates: order, pauses, prefixes, models, and what a context can hold."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from workloads.making import mix, model, parquet, row

from maestro_agents.protocol import ConfigError
from maestro_backend.predictor import read_traces
from maestro_backend.simulator import Template
from maestro_backend.workloads import Recorded, load_mix, prepare, read_workflows

SHARED = Path(__file__).parents[3] / "shared" / "data"
MODELS = {"small": model("small", 6), "big": model("big", 30)}


def read(tmp_path: Path, rows: list[dict[str, object]]) -> Recorded:
    return read_workflows([parquet(tmp_path / "made.parquet", rows)])


def one(tmp_path: Path, rows: list[dict[str, object]]) -> Template:
    (template,) = read(tmp_path, rows).templates
    return template


def test_templates_and_examples_are_the_same_runs_call_by_call(tmp_path: Path) -> None:
    rows = [row("a", 10), row("b", 0), row("a", 12, [10, 11]), row("a", 11, [10])]
    found = read(tmp_path, rows)
    again = read_traces([tmp_path / "made.parquet"])
    assert [t.key for t in found.templates] == [(r.source, r.run) for r in again]
    assert list(found.runs) == again
    assert [c.after for c in found.templates[0].calls] == [(), (0,), (0, 1)]
    assert found.templates[0].workflow == "desk"


def test_a_gap_stands_before_the_follower_and_a_person_fills_it_after_end_turn(
    tmp_path: Path,
) -> None:
    calls = one(
        tmp_path,
        [
            row("a", 0, finish="end_turn", gap_s=900.0),
            row("a", 1, [0], finish="tool_use", gap_s=500.0),
            row("a", 2, [1], finish="end_turn", gap_s=0.0),
            row("a", 3, [2]),
        ],
    ).calls
    assert [(c.gap_s, c.human) for c in calls] == [
        (0.0, False),
        (900.0, True),
        (500.0, False),
        (0.0, False),
    ]


def test_pauses_and_gaps_have_an_end_of_their_own(tmp_path: Path) -> None:
    rows = [
        row("a", 0, finish="end_turn", gap_s=900.0),
        row("a", 1, [0], finish="tool_use", gap_s=500.0),
        row("a", 2, [1]),
    ]
    (made,) = prepare(read(tmp_path, rows), mix(max_pause_s=100, max_gap_s="3m"), MODELS)
    assert [(c.gap_s, c.human) for c in made.calls] == [(0.0, False), (100.0, True), (180.0, False)]


def test_a_prompt_begins_like_the_latest_ancestor_of_its_stage_and_role(tmp_path: Path) -> None:
    calls = one(
        tmp_path,
        [
            row("a", 0, prompt_tokens=100, output_tokens=50),
            row("a", 1, [0], prompt_tokens=300, role="user"),
            row("a", 2, [1], prompt_tokens=150, output_tokens=90),  # grown by the answer
            row("a", 3, [2], prompt_tokens=151),  # other content under the same instructions
            row("a", 4, [3], prompt_tokens=151),  # the same again
            row("a", 5, [4], prompt_tokens=120),  # shorter than all but the first
            row("a", 6, prompt_tokens=500),  # no ancestor
        ],
    ).calls
    assert [(c.prefix_of, c.prefix_tokens) for c in calls] == [
        (None, 0),
        (None, 0),
        (0, 100),
        (2, 75),
        (3, 151),
        (0, 50),
        (None, 0),
    ]


def test_siblings_share_nothing(tmp_path: Path) -> None:
    calls = one(tmp_path, [row("a", 0, stage="plan"), row("a", 1, [0]), row("a", 2, [0])]).calls
    assert [c.prefix_of for c in calls] == [None, None, None]


def test_counted_prefixes_are_believed_as_far_as_the_parent_goes(tmp_path: Path) -> None:
    calls = one(
        tmp_path,
        [
            row("a", 0, cached_prefix_tokens=0, prompt_tokens=100, output_tokens=20),
            row("a", 1, [0], cached_prefix_tokens=110, prompt_tokens=200),
            row("a", 2, [1], cached_prefix_tokens=999, prompt_tokens=205),
        ],
    ).calls
    assert [(c.prefix_of, c.prefix_tokens) for c in calls] == [(None, 0), (0, 110), (1, 205)]


def test_models_go_by_role_then_kind_then_the_mix_and_classes_by_source(tmp_path: Path) -> None:
    rows = [
        row("a", 0),
        row("a", 1, role="caller", role_kind="user_sim"),
        row("a", 2, role="boss", role_kind="judge"),
    ]
    (made,) = prepare(read(tmp_path, rows), mix(), MODELS)
    assert [c.model for c in made.calls] == ["big", "small", "big"]
    assert (made.slo, made.tenant) == ("interactive", "desk")


def test_a_source_that_the_mix_does_not_know_is_served_all_the_same(tmp_path: Path) -> None:
    rows = [
        row("a", 0, source="new", role=f"role {at}", role_kind="oracle") | {"call_idx": at}
        for at in range(20)
    ]
    found = read(tmp_path, rows)
    (made,) = prepare(found, mix(), MODELS)
    assert (made.slo, made.tenant) == ("standard", "default")
    assert {c.model for c in made.calls} == {"small", "big"}
    assert prepare(found, mix(), MODELS) == (made,)


def test_the_prompt_is_cut_first_and_its_prefix_with_it(tmp_path: Path) -> None:
    rows = [
        row("a", 0, prompt_tokens=8000, output_tokens=96, cached_prefix_tokens=0),
        row("a", 1, [0], prompt_tokens=8000, output_tokens=96, cached_prefix_tokens=6000),
        row("a", 2, [1], prompt_tokens=8000, output_tokens=3000, cached_prefix_tokens=8000),
        row("a", 3, [2], prompt_tokens=0, output_tokens=0, cached_prefix_tokens=0),
    ]
    (made,) = prepare(read(tmp_path, rows), mix(), MODELS)
    assert [(c.prompt_tokens, c.output_tokens) for c in made.calls] == [
        (4000, 96),
        (4000, 96),
        (2048, 2048),
        (1, 1),
    ]
    assert [c.prefix_tokens for c in made.calls] == [0, 3000, 2048, 0]


def test_nothing_is_shared_with_another_models_prompt(tmp_path: Path) -> None:
    rows = [
        row("a", 0, cached_prefix_tokens=0),
        row("a", 1, [0], cached_prefix_tokens=90, role="caller", role_kind="user_sim"),
    ]
    (made,) = prepare(read(tmp_path, rows), mix(), MODELS)
    assert (made.calls[1].prefix_of, made.calls[1].prefix_tokens) == (None, 0)


@pytest.mark.parametrize(
    ("paths", "wanted"),
    [([], "name at least one"), (["nowhere"], "there is no file or folder nowhere")],
)
def test_what_cannot_be_read_is_said(paths: list[str], wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        read_workflows(paths)


def test_a_run_that_is_there_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="is there twice"):
        read_workflows(["synthetic:chain", "synthetic:chain"])


def test_the_recorded_sources_fit_the_paper_mix_in_seconds() -> None:
    pytest.importorskip("pyarrow", reason="traces are parquet files")
    if not (SHARED / "tau1.parquet").is_file():
        pytest.skip("there are no recorded runs beside the repository")
    paper = load_mix("paper")
    begun = time.process_time()
    found = read_workflows([SHARED / "tau1.parquet", SHARED / "whowhen_captain.parquet"])
    models = {name: model(name, size / 1e9, 32_768) for name, size in paper.models.items()}
    made = prepare(found, paper, models)
    assert time.process_time() - begun < 5.0
    assert {t.slo for t in made} == {"interactive"}
    assert all(c.prompt_tokens + c.output_tokens <= 32_768 for t in made for c in t.calls)
    chats = [t for t in made if t.source == "tau1"]
    assert {c.model for t in chats for c in t.calls} == {"qwen2.5-14b", "llama-3.2-3b"}
    prompts = sum(c.prompt_tokens for t in chats for c in t.calls)
    assert 0.8 < sum(c.prefix_tokens for t in chats for c in t.calls) / prompts < 0.95


def test_a_run_is_cut_after_so_many_calls_for_predictors_too(tmp_path: Path) -> None:
    rows = [row("a", 0), row("a", 1, [0]), row("a", 2, [1]), row("b", 0)]
    cut = read(tmp_path, rows).cut(2)
    assert [len(one.calls) for one in cut.templates] == [2, 1]
    assert [len(one.calls) for one in cut.runs] == [2, 1]
    assert cut.templates[0].followers == ((1,), ())
