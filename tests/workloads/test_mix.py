"""Mix files: what they may say, and how their models are found on a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
from workloads.making import mix, model

from maestro_agents.protocol import ConfigError
from maestro_backend.workloads import load_mix


def test_the_paper_mix_has_the_shares_that_it_names() -> None:
    paper = load_mix("paper")
    by_class: dict[str, float] = {}
    for source in paper.sources.values():
        by_class[source.slo] = by_class.get(source.slo, 0.0) + source.weight
    assert by_class == pytest.approx({"interactive": 0.60, "standard": 0.25, "batch": 0.15})
    assert paper.sources["agentsim"].weight <= paper.single_call_share == 0.05
    assert {"interactive"} <= {*paper.deadlines}


def test_a_model_that_a_cluster_lacks_becomes_the_nearest_in_size() -> None:
    cluster = {m.name: m for m in (model("tiny", 1), model("mid", 7), model("huge", 40))}
    assert mix().onto(cluster) == {"small": "mid", "big": "huge"}
    assert mix().onto({"small": model("small", 99), "other": model("other", 28)}) == {
        "small": "small",
        "big": "other",
    }
    with pytest.raises(ConfigError, match="has no models"):
        mix().onto({})


def test_of_several_models_each_run_keeps_one() -> None:
    several = mix(sources={"made": {"models": {"agent": ["small", "big"]}}})
    picked = [several.model_of("made", f"run {at}", "agent", "judge") for at in range(50)]
    assert {*picked} == {"small", "big"}
    assert picked == [several.model_of("made", f"run {at}", "agent", "") for at in range(50)]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("models: {a: 1GB}\nsource: {}", "did you mean sources"),
        ("models: {a: 1GB}\nsources: {x: {wieght: 1}}", "did you mean weight"),
        ("models: {alpha: 1GB}\nkinds: {judge: alhpa}", "did you mean alpha"),
        ("models: {a: 1GB}\nsources: {x: {weight: 0}}", "greater than 0"),
        ("models: {a: 1GB}\ndeadlines: {d: {batch: 9}}", "no class in deadlines.d standard"),
        ("models: {a: 1GB}\nmodels: {b: 1GB}", "stands twice"),
        ("models: [", "is not YAML"),
        ("sources: {}", "models"),
    ],
)
def test_what_is_wrong_with_a_mix_is_named(tmp_path: Path, text: str, wanted: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=wanted):
        load_mix(file)


def test_a_mix_that_is_not_there_is_told_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match="give a YAML file, or one of paper"):
        load_mix("papre")
