"""A backend that is killed and started again in the middle of a run: the run goes on."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from e2e.served import chat, end_workers, maestro, records
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from sdk.small_graphs import State, asks

from maestro_agents import _openai_hook, workflow
from maestro_agents._control import control
from maestro_backend.defaults import SMALL


def served(stack: ExitStack, state: Path, port: int = 0) -> Any:
    arguments = ("serve", "--engine", "stub", "--port", str(port))
    return stack.enter_context(maestro(*arguments, state=state))


def test_a_run_goes_on_across_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        stack.enter_context(end_workers(tmp_path))
        stack.callback(_openai_hook.uninstall)
        first = served(stack, tmp_path)
        url = first.url
        monkeypatch.setenv("MAESTRO_BASE_URL", url)

        def restart(state: State) -> State:
            workers = {record.pid for record in records(tmp_path)}
            first.process.kill()
            again = served(stack, tmp_path, urlsplit(url).port or 0)
            assert chat(again.url, SMALL).status_code == 200
            assert {record.pid for record in records(tmp_path)} == workers, "they were adopted"
            return {"n": 1}

        model = ChatOpenAI(model=SMALL, base_url=url, api_key="x", max_retries=2)
        builder = StateGraph(State).add_node("plan", asks(model)).add_node("restart", restart)
        builder.add_node("write", asks(model)).add_node("review", asks(model, 2))
        builder.add_edge(START, "plan").add_edge("plan", "restart").add_edge("restart", "write")
        builder.add_edge("write", "review").add_edge("review", END)
        assert workflow(builder.compile(), name="team").invoke({"n": 0})["n"] == 4
        assert control.flush(30)

        (run,) = httpx.get(f"{url}/maestro/state").json()["runs"]
        assert run["workflow"].startswith("team@")
        run_url = f"{url}/maestro/runs/{run['run']}"
        view = httpx.get(run_url).json()
        calls = [(call["stage"], call["instance"]) for call in view["calls"]]
        assert calls == [("write", 0), ("review", 0), ("review", 1)]
        assert view["ended"] is not None and not view["failed"]
        told = httpx.post(f"{run_url}/events", json={"events": []})
        assert told.status_code == 200 and "x-maestro-workflow" not in told.headers
