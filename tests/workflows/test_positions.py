"""Where a run stands: branches, rounds, further calls, and real jumps."""

from __future__ import annotations

import pytest
from workflows.story import LOOP, Story

from maestro_agents.protocol import END, START, Edge, Join, Stage, Workflow


def workflow(*edges: tuple[str, str], joins: tuple[Join, ...] = ()) -> Workflow:
    """A target in brackets is a candidate."""
    plain = [(s, t.strip("[]"), t.startswith("[")) for s, t in edges]
    names = dict.fromkeys(n for s, t, _ in plain for n in (s, t))
    names |= dict.fromkeys(n for j in joins for n in (*j.sources, j.target))
    return Workflow(
        name="w",
        stages=tuple(Stage(path=n) for n in names if n not in (START, END)),
        edges=tuple(Edge(source=s, target=t, candidate=c) for s, t, c in plain),
        joins=joins,
    )


FORK = workflow(
    (START, "plan"),
    ("plan", "a"),
    ("plan", "b"),
    joins=(Join(sources=("a", "b"), target="write"),),
)
FAN = workflow(
    (START, "plan"),
    ("plan", "audit"),
    ("plan", "[research]"),
    joins=(Join(sources=("research", "audit"), target="write"),),
)
PAIR = workflow((START, "plan"), ("plan", "write"))


def never_made(story: Story, run: str = "r") -> int:
    return story.book.runs[run].announced_never_made


def execute(story: Story, stage: str, at: float, *chosen: str) -> float | None:
    story.enter(stage, at)
    lead_s = story.call(stage, at)
    story.hang_up(stage, at + 1)
    story.leave(stage, at + 1, *chosen)
    return lead_s


def test_parallel_branches_keep_each_others_forecast() -> None:
    story = Story(FORK)
    story.begin(0.0)
    execute(story, "plan", 0.0, "a", "b")
    story.enter("a", 1.0)
    assert story.call("a", 1.0) == 1.0
    assert story.foreseen() == {"b": 1.0, "write": 1.0}
    story.enter("b", 2.0)
    assert story.call("b", 2.0) == 2.0
    for stage in ("a", "b"):
        story.hang_up(stage, 3.0)
        story.leave(stage, 3.0)
    assert execute(story, "write", 4.0) == 4.0
    story.end(5.0)
    assert never_made(story) == 0


def test_parallel_branches_keep_each_others_forecast_with_headers_alone() -> None:
    story = Story(FORK)
    story.call("plan", 0.0)
    story.hang_up("plan", 1.0)
    assert story.call("a", 1.0) == 1.0
    story.hang_up("a", 1.5)
    assert story.foreseen() == {"b": 1.0, "write": 1.0}
    assert story.call("a", 2.0, instance=1) is None, "a second call of the branch was not foreseen"
    assert story.foreseen() == {"b": 1.0, "write": 1.0}
    assert story.call("b", 2.5) == 2.5
    assert never_made(story) == 0


@pytest.mark.parametrize("ended", [False, True], ids=["side by side", "one after another"])
def test_a_fan_out_leaves_the_branch_beside_it_alone(ended: bool) -> None:
    story = Story(FAN)
    story.begin(0.0)
    execute(story, "plan", 0.0, "research", "audit")
    for instance in range(3):
        story.enter("research", 1.0)
        story.call("research", 1.0, instance=instance)
        if ended:
            story.hang_up("research", 2.0)
            story.leave("research", 2.0)
    assert story.foreseen() == {"audit": 1.0, "write": 1.0}
    assert execute(story, "audit", 3.0) == 3.0
    assert never_made(story) == 0


def test_a_second_call_of_a_stage_is_no_jump_over_its_successor() -> None:
    story = Story(PAIR)
    story.call("plan", 0.0)
    story.hang_up("plan", 1.0)
    story.call("plan", 1.5, instance=1)
    assert story.foreseen() == {"write": 1.0}
    story.hang_up("plan", 2.0)
    assert story.foreseen() == {"write": 1.0}
    assert story.call("write", 3.0) == 3.0
    assert never_made(story) == 0


def test_a_stage_that_runs_late_is_not_still_to_come() -> None:
    story = Story(PAIR)
    story.enter("plan", 0.0)
    story.enter("write", 1.0)  # its predecessor's end is still on the way
    assert story.foreseen() == {}
    assert never_made(story) == 0


def test_every_round_of_a_loop_is_foreseen() -> None:
    story = Story()
    story.begin(0.0)
    for stage in ("plan", "tool", "write"):
        execute(story, stage, 0.0)
    for at in (10.0, 20.0, 30.0):
        assert execute(story, "judge", at, "write") is not None
        assert story.foreseen().keys() == {"write", "judge"}
        assert execute(story, "write", at + 2) is not None
        assert story.foreseen().keys() == {"judge", "write"}
    assert never_made(story) == 0


def test_a_loop_with_headers_alone_meets_each_round_anew() -> None:
    story = Story()
    for at in (0.0, 10.0):
        for offset, stage in enumerate(("write", "judge")):
            story.call(stage, at + offset)
            story.hang_up(stage, at + offset + 0.5)
    assert [stage for stage, _ in story.book.runs["r"].lead_times_s] == ["write", "judge"] * 2


def test_a_run_that_jumps_back_expects_nothing_of_where_it_was() -> None:
    graph = workflow((START, "plan"), ("plan", "write"), ("write", "judge"), ("judge", "post"))
    story = Story(graph)
    for stage in ("plan", "write"):
        story.call(stage, 0.0)
        story.hang_up(stage, 1.0)
    story.call("plan", 5.0, instance=1)  # resumed from a checkpoint
    assert "judge" not in story.book.runs["r"].position.pending
    assert story.foreseen().keys() == {"write", "judge", "post"}
    story.hang_up("plan", 6.0)
    assert story.book.runs["r"].position.pending.keys() == {"write"}


def test_a_run_resumed_behind_its_first_stage_says_nothing_of_that_stage() -> None:
    story = Story()
    for run in ("r0", "r1"):
        story.call("judge", 1.0, run)
        story.hang_up("judge", 2.0, run)
        story.end(3.0, run)
    story.begin(4.0, "next")
    assert "plan" in story.foreseen("next")


def test_a_cached_node_is_skipped_but_its_neighbour_is_not() -> None:
    graph = workflow(
        (START, "plan"), ("plan", "cached"), ("plan", "b"), ("cached", "write"), ("b", END)
    )
    story = Story(graph)
    story.begin(0.0)
    execute(story, "plan", 0.0, "cached", "b")
    story.enter("write", 2.0)
    assert story.book.runs["r"].position.pending.keys() == {"b"}
    assert story.foreseen() == {"b": 1.0, "write": 1.0}
    assert never_made(story) == 1


def test_a_stage_once_skipped_is_expected_again_as_soon_as_it_has_called() -> None:
    chain = workflow((START, "plan"), ("plan", "cached"), ("cached", "write"))
    story = Story(chain)
    for run, stages in {"skips": ("plan", "write"), "calls": ("plan", "cached")}.items():
        for stage in stages:
            story.call(stage, 0.0, run)
            story.hang_up(stage, 1.0, run)
    for run in ("skips again", "and again"):
        for stage in ("plan", "write"):
            story.call(stage, 2.0, run)
            story.hang_up(stage, 3.0, run)
    story.begin(4.0, "next")
    assert "cached" in story.foreseen("next")


def test_stages_that_were_not_on_the_way_were_not_passed() -> None:
    graph = workflow(
        (START, "plan"),
        ("plan", "a"),
        ("plan", "tool"),
        ("tool", "b"),
        ("a", "write"),
        ("b", "write"),
        ("write", "[plan]"),
    )
    story = Story(graph)
    story.call("plan", 0.0)
    story.hang_up("plan", 1.0)
    story.call("b", 2.0)  # over the tool; a leads to b as well, but only through the plan
    assert story.foreseen()["a"] == 1.0
    story.begin(3.0, "next")
    assert story.foreseen("next").keys() == {"plan", "a", "b", "write"}


def test_a_skipped_candidate_was_perhaps_not_chosen() -> None:
    graph = workflow((START, "r"), ("r", "[x]"), ("r", "[y]"), ("x", "z"), ("y", "z"))
    story = Story(graph)
    for stage in ("r", "z"):
        story.call(stage, 0.0)
        story.hang_up(stage, 1.0)
    story.begin(2.0, "next")
    assert story.foreseen("next").keys() == {"r", "x", "y", "z"}


def test_a_graph_that_says_nothing_of_a_stage_keeps_it_a_jump() -> None:
    story = Story(LOOP)
    story.call("plan", 0.0)
    story.hang_up("plan", 1.0)
    story.call("elsewhere", 2.0)
    assert story.foreseen() == {}


def test_what_a_stage_calls_inside_cannot_come_after_its_end() -> None:
    host = Workflow(
        name="host",
        stages=tuple(Stage(path=path) for path in ("a", "a/inner", "write")),
        edges=(
            Edge(source=START, target="a"),
            Edge(source="a", target="a/inner", candidate=True),
            Edge(source="a/inner", target="a/inner", candidate=True),
            Edge(source="a", target="write"),
            Edge(source="a/inner", target="write"),
        ),
    )
    story = Story(host)
    story.begin(0)
    story.enter("a", 1)
    execute(story, "a/inner", 2)
    assert "a/inner" in {call.stage for call in story.book.runs["r"].forecast}
    story.leave("a", 3)
    assert [call.stage for call in story.book.runs["r"].forecast] == ["write"]
