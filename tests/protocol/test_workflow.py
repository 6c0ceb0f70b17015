"""A workflow's identity and what follows what."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from protocol.strategies import workflows
from pydantic import ValidationError

from maestro_agents.protocol import END, START, Edge, Join, Stage, Workflow

GOLDEN = Path(__file__).parent / "golden" / "workflow.json"


def workflow(*paths: str, **more: Any) -> Workflow:
    return Workflow(name="w", stages=tuple(Stage(path=path) for path in paths), **more)


def test_the_content_hash_is_stable_across_releases() -> None:
    golden = Workflow.model_validate(json.loads(GOLDEN.read_text(encoding="utf-8")))
    assert golden.id == "research-team@4cc835e75706"


@given(workflows(), st.randoms(use_true_random=False))
def test_the_hash_ignores_order(given_one: Workflow, random: Any) -> None:
    parts: dict[str, Any] = {}
    for name in ("stages", "edges", "joins", "open_ended"):
        items = list(getattr(given_one, name))
        random.shuffle(items)
        parts[name] = tuple(items)
    assert given_one.model_copy(update=parts).content_hash == given_one.content_hash


@given(workflows())
def test_the_hash_ignores_the_name_but_the_id_does_not(given_one: Workflow) -> None:
    other = Workflow.model_validate({**given_one.model_dump(), "name": "other-name", "version": 9})
    assert other.content_hash == given_one.content_hash
    assert (other.id == given_one.id) == (other.name == given_one.name)


@pytest.mark.parametrize(
    "changed",
    [
        {"edges": (Edge(source="a", target="b", candidate=True),)},
        {"edges": ()},
        {"joins": (Join(sources=("a",), target="b"),)},
        {"open_ended": ("a",)},
        {"supersteps": True},
        {"stages": (Stage(path="a", role="planner"), Stage(path="b"))},
        {"stages": (Stage(path="a", model="large"), Stage(path="b"))},
        {"stages": (Stage(path="a", calls=True), Stage(path="b"))},
        {"stages": (Stage(path="a", deferred=True), Stage(path="b"))},
    ],
)
def test_any_change_of_content_changes_the_hash(changed: dict[str, Any]) -> None:
    base = {"name": "w", "stages": (Stage(path="a"), Stage(path="b"))}
    edges = {"edges": (Edge(source="a", target="b"),)}
    first, second = Workflow(**base, **edges), Workflow(**{**base, **edges, **changed})
    assert first.content_hash != second.content_hash


@pytest.mark.parametrize(
    "more",
    [
        {"edges": (Edge(source="a", target="nowhere"),)},
        {"joins": (Join(sources=("nowhere",), target="a"),)},
        {"open_ended": ("nowhere",)},
    ],
)
def test_unknown_stages_are_refused_by_name(more: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="nowhere"):
        workflow("a", **more)


@pytest.mark.parametrize("paths", [("a", "a"), ("a", START), ("a", END)])
def test_stage_paths_are_unique_and_not_reserved(paths: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError, match="unique"):
        workflow(*paths)


def test_successors_are_certain_or_candidates_in_graph_order() -> None:
    graph = workflow(
        "a",
        "b",
        "c",
        "d",
        edges=(
            Edge(source=START, target="a"),
            Edge(source="a", target="c", candidate=True),
            Edge(source="a", target="b", candidate=True),
            Edge(source="a", target="d"),
            Edge(source="a", target="d", candidate=True),
        ),
        joins=(Join(sources=("b", "c"), target="d"),),
    )
    assert graph.successors(START) == (("a",), ())
    assert graph.successors("a") == (("d",), ("c", "b"))
    assert graph.successors("b") == (("d",), ())
    assert graph.successors("d") == graph.successors("unknown") == ((), ())


def test_join_sources_gather_every_join_of_a_target() -> None:
    joins = (Join(sources=("a", "b"), target="c"), Join(sources=("b", "d"), target="c"))
    graph = workflow("a", "b", "c", "d", joins=joins)
    assert graph.join_sources("c") == ("a", "b", "d")
    assert graph.join_sources("a") == ()
