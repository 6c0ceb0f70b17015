import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import maestro_agents
from maestro_agents import ConfigError, UnsupportedError, _adapters, agent, workflow
from maestro_agents._decorators import agent_of

ADAPTER = """
class Graph:
    wrapped = None

class Adapter:
    def handles(self, obj):
        return isinstance(obj, Graph)
    def wrap(self, obj, options, default_name=None):
        copy = Graph()
        copy.wrapped = (options, default_name)
        return copy

adapter = Adapter()
"""


@pytest.fixture
def framework(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A framework and its adapter, installed as another distribution would be."""
    (tmp_path / "toy_framework.py").write_text(ADAPTER)
    info = tmp_path / "toy_framework-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-framework\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[maestro_agents.adapters]\ntoy = toy_framework:adapter\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    _adapters.installed.cache_clear()
    import toy_framework

    yield toy_framework
    _adapters.installed.cache_clear()
    del sys.modules["toy_framework"]


def test_a_graph_goes_to_the_adapter_that_handles_it(framework: Any) -> None:
    graph = workflow(
        framework.Graph(), name="n", slo="batch", deadline=3, roles={"a": "b"}, tenant="acme"
    )
    assert type(graph) is framework.Graph
    options, default_name = graph.wrapped
    assert (options.name, options.roles, options.tenant) == ("n", {"a": "b"}, "acme")
    assert (options.slo.class_, options.slo.deadline_s) == ("batch", 3)
    assert default_name is None


def test_it_decorates_factories(framework: Any) -> None:
    @workflow(slo="batch")
    def make(kind: str) -> Any:
        assert kind == "x"
        return framework.Graph()

    @workflow
    async def make_async() -> Any:
        return framework.Graph()

    options, default_name = make("x").wrapped
    assert (options.slo.class_, default_name) == ("batch", "make")
    assert asyncio.run(make_async()).wrapped[1] == "make_async"


@pytest.mark.parametrize("thing", [object(), 3, "graph", object])
def test_what_nobody_handles_names_the_extra(framework: Any, thing: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"maestro-mas\[langgraph\]"):
        workflow(thing)


def test_a_factory_that_returns_no_graph_is_told_so(framework: Any) -> None:
    @workflow
    def make() -> int:
        return 3

    with pytest.raises(UnsupportedError, match=r"builtins\.int"):
        make()


@pytest.mark.parametrize(
    "wrong", [{"deadline": 0}, {"deadline": -1}, {"deadline": 1e9}, {"slo": ""}]
)
def test_wrong_arguments_are_loud(framework: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="deadline is a number of seconds"):
        workflow(framework.Graph(), **wrong)


def test_a_wrong_environment_is_loud(framework: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAESTRO_ENABLED", "perhaps")
    with pytest.raises(ConfigError, match="MAESTRO_ENABLED"):
        workflow(framework.Graph())


def test_agent_marks_a_function_and_returns_it() -> None:
    def plan(state: Any) -> None: ...

    assert agent(role="planner", model="big")(plan) is plan
    marked = agent_of(plan)
    assert marked and (marked.role, marked.model) == ("planner", "big")
    assert agent_of(test_agent_marks_a_function_and_returns_it) is None
    with pytest.raises(ConfigError):
        agent(role="")


def test_the_public_names_are_exactly_all() -> None:
    assert maestro_agents.__all__ == sorted(maestro_agents.__all__)
    public = {name for name in vars(maestro_agents) if not name.startswith("_")}
    assert public - {"adapter", "protocol", "testing"} == set(maestro_agents.__all__)


def test_the_import_is_light() -> None:
    code = "import sys, maestro_agents; print(*sys.modules)"
    path = ":".join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    heavy = {"langchain_core", "langgraph", "openai", "langchain_openai", "httpx", "starlette"}
    assert not heavy & set(done.stdout.split())


@pytest.mark.parametrize(
    "wrong",
    [{"roles": "writer"}, {"roles": {"a": 5}}, {"roles": {"a": ""}}, {"name": 5}, {"tenant": ""}],
)
def test_arguments_of_the_wrong_kind_are_loud_at_once(framework: Any, wrong: Any) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        workflow(framework.Graph(), **wrong)


def test_nothing_is_no_graph() -> None:
    with pytest.raises(UnsupportedError, match="NoneType"):
        workflow(None)


def test_agent_takes_its_role_as_it_comes() -> None:
    assert agent_of(agent("planner")(lambda: None)) is not None
    with pytest.raises(ConfigError, match="@agent needs words"):
        agent(lambda: None)  # type: ignore[arg-type]  # `@agent` without a role
