"""Made-up workloads: their shapes, and many calls without more memory."""

from __future__ import annotations

import time

import pytest
from workloads.making import mix, model

from maestro_agents.protocol import ConfigError
from maestro_backend.workloads import draw, prepare, read_arrivals, read_workflows

MODELS = {"small": model("small", 6, 32_768), "big": model("big", 30, 32_768)}


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("chain", 4, 12), ("fanout", 4, 8), ("loop", 2, 10), ("single", 1, 1)],
)
def test_shapes_have_the_calls_that_they_say(name: str, least: int, most: int) -> None:
    found = read_workflows([f"synthetic:{name}"])
    counts = {len(t.calls) for t in found.templates}
    assert least <= min(counts) <= max(counts) <= most
    assert len(counts) > 1 or name == "single"
    assert found == read_workflows([f"synthetic:{name}"])


def test_a_fan_out_joins_and_a_loop_grows() -> None:
    fan, *_ = read_workflows(["synthetic:fanout"]).templates
    width = len(fan.calls) - 2
    assert fan.followers[0] == tuple(range(1, width + 1))
    assert fan.calls[-1].after == tuple(range(1, width + 1))
    loops = read_workflows(["synthetic:loop"]).templates
    for before, call in ((t.calls[c.prefix_of], c) for t in loops for c in t.calls if c.prefix_of):
        assert call.prefix_tokens == before.prompt_tokens < call.prompt_tokens
        assert before.stage == call.stage


def test_mixed_has_all_and_few_single_calls() -> None:
    templates = prepare(read_workflows(["synthetic:mixed"]), mix(), MODELS)
    runs = list(draw(templates, mix(), read_arrivals("poisson"), 5.0, 20_000, 1))
    sources = [run.template.source for run in runs]
    assert {*sources} == {f"synthetic-{s}" for s in ("chain", "fanout", "loop", "single")}
    assert sources.count("synthetic-single") / len(sources) < 0.06


def test_a_million_calls_are_drawn_in_a_moment() -> None:
    templates = prepare(read_workflows(["synthetic:mixed"]), mix(), MODELS)
    begun = time.process_time()
    runs = sum(1 for _ in draw(templates, mix(), read_arrivals("gamma:3"), 5.0, 1_000_000, 1))
    assert runs > 100_000
    assert time.process_time() - begun < 6.0


def test_a_shape_that_is_not_there_is_told_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"synthetic:chain, .*synthetic:mixed"):
        read_workflows(["synthetic:chian"])
