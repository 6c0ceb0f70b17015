"""What a call announces, with a graph behind it and without."""

from __future__ import annotations

import pytest
from workflows.story import Story

from maestro_agents.protocol import END, START, Announcement, Edge, Stage, Successor, Workflow

ROUTER = Workflow(
    name="router",
    stages=tuple(Stage(path=p) for p in ("r", "x", "y", "z")),
    edges=(
        Edge(source=START, target="r"),
        *(Edge(source="r", target=t, candidate=True) for t in ("x", "y", "z", END)),
    ),
)


def said(*successors: Successor, open_ended: bool = False) -> Announcement:
    return Announcement(successors=successors, open_ended=open_ended)


def certain(stage: str) -> Successor:
    return Successor(stage=stage, certain=True)


def maybe(stage: str, probability: float | None = None) -> Successor:
    return Successor(stage=stage, probability=probability)


@pytest.mark.parametrize(
    ("announcement", "unregistered", "registered"),
    [
        (said(certain("x"), maybe("y")), {"x": 1.0, "y": 1.0}, {"x": 1.0, "y": 0.25}),
        (said(maybe("x"), maybe("y")), {"x": 0.5, "y": 0.5}, {"x": 0.25, "y": 0.25}),
        (said(maybe("x", 0.7), maybe("y")), {"x": 0.7, "y": 0.3}, {"x": 0.7, "y": 0.25}),
        (said(certain("x"), maybe("y", 0.2)), {"x": 1.0, "y": 0.2}, {"x": 1.0, "y": 0.2}),
        (said(maybe("x"), certain("x")), {"x": 1.0}, {"x": 1.0}),
        (said(certain(END)), {}, {}),
        (said(), {}, {"x": 0.25, "y": 0.25, "z": 0.25}),
        (
            said(certain("x"), maybe("y"), open_ended=True),
            {"x": 1.0},
            {"x": 1.0, "y": 0.25, "z": 0.25},
        ),
    ],
)
def test_what_is_announced_counts_and_the_graph_fills_in_the_rest(
    announcement: Announcement, unregistered: dict[str, float], registered: dict[str, float]
) -> None:
    for graph, expected in ((None, unregistered), (ROUTER, registered)):
        story = Story(graph)
        story.call("r", 0.0, announcement=announcement)
        assert story.foreseen() == pytest.approx(expected)


@pytest.mark.parametrize("graph", [None, ROUTER], ids=["unregistered", "registered"])
def test_an_announcement_outlives_the_call_that_made_it(graph: Workflow | None) -> None:
    story = Story(graph)
    story.call("r", 0.0, announcement=said(certain("x")))
    story.hang_up("r", 1.0)
    assert story.foreseen() == {"x": 1.0}
    assert story.call("x", 2.0) == 2.0
    assert story.book.runs["r"].announced_never_made == 0


@pytest.mark.parametrize("graph", [None, ROUTER], ids=["unregistered", "registered"])
def test_a_candidate_that_was_not_chosen_is_expected_no_longer(graph: Workflow | None) -> None:
    story = Story(graph)
    story.call("r", 0.0, announcement=said(maybe("x", 0.5), maybe("y", 0.5), certain("z")))
    story.hang_up("r", 1.0)
    story.call("x", 2.0)
    assert story.foreseen() == {"y": 0.5, "z": 1.0}, "several candidates may be chosen"
    story.hang_up("x", 3.0)
    assert story.foreseen() == {"z": 1.0}


def test_routing_is_believed_without_a_graph() -> None:
    story = Story(None)
    story.enter("r", 0.0)
    story.leave("r", 1.0, "x")
    assert story.foreseen() == {"x": 1.0}
    assert story.call("x", 3.0) == 2.0


def test_more_stages_than_a_workflow_may_have_can_be_announced() -> None:
    story = Story(None)
    for source in ("a", "b"):
        names = (f"{source}{number}" for number in range(600))
        story.call(source, 0.0, announcement=said(*map(certain, names)))
    assert len(story.foreseen()) == 1000
