"""The configuration file: defaults, and errors that name the fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from maestro_agents.protocol import ConfigError
from maestro_backend.config import Config

TINY = {"source": "random:tiny-llama"}


def with_model(**settings: Any) -> dict[str, Any]:
    return {"models": {"tiny": {**TINY, **settings}}}


def test_defaults() -> None:
    config = Config.parse(with_model())
    assert config.policy == "maestro"
    assert (config.listen.host, config.listen.port) == ("127.0.0.1", 8000)
    assert {name: slo.deadline for name, slo in config.slo.items()} == {
        "interactive": 20.0,
        "standard": 120.0,
        "batch": None,
    }
    assert config.tenants["default"].weight == 1
    assert config.models["tiny"].tool_call_parser == "hermes"
    assert config.nodes[0].lease == 600


def test_given_classes_add_to_the_defaults() -> None:
    config = Config.parse({**with_model(), "slo": {"interactive": {"deadline": "500ms"}}})
    assert config.slo["interactive"].deadline == 0.5
    assert config.slo["standard"].deadline == 120.0


@pytest.mark.parametrize(
    ("text", "size"),
    [("6GiB", 6 * 1024**3), ("512 MiB", 512 * 1024**2), ("1.5GB", 1_500_000_000), (1000, 1000)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert Config.parse(with_model(kv_memory=text)).models["tiny"].kv_memory == size


def test_a_parsed_config_survives_json() -> None:
    config = Config.parse({**with_model(kv_memory="1GiB"), "nodes": [{"devices": ["cpu"]}]})
    assert Config.parse(json.loads(config.model_dump_json())) == config


def test_relative_paths_start_at_the_file(tmp_path: Path) -> None:
    file = tmp_path / "maestro.yaml"
    file.write_text("models: {m: {source: models/m, python: env/bin/python}}\nstate_dir: state\n")
    config = Config.load(file)
    assert config.models["m"].source == str(tmp_path / "models/m")
    assert config.models["m"].python == tmp_path / "env/bin/python"
    assert config.state_dir == tmp_path / "state"


BAD = {
    "unknown key": (
        {**with_model(), "polcy": "fcfs"},
        ["polcy", "did you mean policy?"],
    ),
    "unknown nested key": (
        with_model(tensor_paralel=2),
        ["models.tiny.tensor_paralel", "did you mean tensor_parallel?"],
    ),
    "no models": ({}, ["models"]),
    "size": (with_model(kv_memory="6G"), ["models.tiny.kv_memory", "6GiB"]),
    "duration": (
        {**with_model(), "slo": {"fast": {"deadline": "soon"}}},
        ["slo.fast.deadline", "20s"],
    ),
    "source": (with_model(source="foo:bar"), ["models.tiny.source", "hub:"]),
    "device": ({**with_model(), "nodes": [{"devices": ["gpu"]}]}, ["nodes.0.devices", "cuda:0"]),
    "mixed": ({**with_model(), "nodes": [{"devices": ["cpu", "cuda:0"]}]}, ["nodes.0.devices"]),
    "policy": ({**with_model(), "policy": "soonest"}, ["policy", "maestro"]),
    "section": ({"models": {"tiny": None}}, ["models.tiny", "section"]),
    "two of a name": (
        {"models": {"a": TINY, "b": {**TINY, "served_names": ["a"]}}},
        ["'a'", "both served"],
    ),
    "no nodes": ({**with_model(), "nodes": []}, ["nodes", "one node"]),
    "several nodes": (
        {**with_model(), "nodes": [{"name": "n"}, {"name": "m"}]},
        ["nodes: several nodes arrive with the cluster step; keep one"],
    ),
    "not a mapping": (["models"], ["section"]),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_name_the_path_and_the_fix(case: str) -> None:
    raw, expected = BAD[case]
    with pytest.raises(ConfigError) as raised:
        Config.parse(raw)
    for words in expected:
        assert words in str(raised.value)


def test_all_errors_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        Config.parse({**with_model(kv_memory="x", tensor_parallel=0), "policy": "soonest"})
    assert len(str(raised.value).splitlines()) == 3


def test_a_missing_or_broken_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        Config.load(tmp_path / "nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("models: {a: [}")
    with pytest.raises(ConfigError, match="not YAML"):
        Config.load(broken)


def test_an_unknown_node() -> None:
    with pytest.raises(ConfigError, match="nobody"):
        Config.parse({**with_model(), "nodes": [{"name": "one"}]}).node("nobody")


def test_what_is_given_and_not_used_yet_is_told() -> None:
    given = {
        "nodes": [{"host_memory": "4GiB", "lease": "2m"}],
        "tenants": {"research": {"weight": 2}, "default": {"weight": 1}},
        "slo": {"interactive": {"deadline": "5s"}},
    }
    config = Config.parse({**with_model(), **given, "policy": "edf"})
    assert [line.split()[0] for line in config.unused()] == ["tenants.research.weight"]
    assert Config.parse({**with_model(), **given}).unused() == ()
    assert Config.parse(with_model()).unused() == ()


def test_a_key_that_stands_twice_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("models:\n  a: {source: x}\n  a: {source: y}\n")
    with pytest.raises(ConfigError, match=r"'a' stands twice(.|\n)*line 3"):
        Config.load(file)
