"""What `workflow()` costs a LangGraph app: two-node graphs, plain and wrapped, side by side.

    make bench NAME=adapter_overhead

Plain and wrapped runs alternate in short blocks of one process, so a noisy machine hits both.
Times are ms of one run. `plain` and `wrapped` are the lower quartile over the blocks' medians, for
a busy machine only ever adds; `more` and `ratio` compare them. `pairs` are the quartiles of the
difference between neighbouring blocks, `cpu` is the same for the processor time of all threads.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import logging
import os
import pstats
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict

DEAD = "http://127.0.0.1:9/v1"


class State(TypedDict, total=False):
    text: str


@dataclass(frozen=True, slots=True)
class Variant:
    """A graph in two copies, and how one run is made. `control` is the MAESTRO_BASE_URL."""

    name: str
    plain: Any
    wrapped: Any
    control: str
    is_async: bool


def two_nodes(model: Any) -> Any:
    """A graph whose two nodes each ask `model` once; None: they ask nobody."""
    from langgraph.graph import END, START, StateGraph

    def node(state: State) -> State:
        return {"text": model.invoke("hi").text if model else "hi"}

    async def anode(state: State) -> State:
        return {"text": (await model.ainvoke("hi")).text if model else "hi"}

    from langgraph._internal._runnable import RunnableCallable

    builder = StateGraph(State)
    for name in ("plan", "write"):
        builder.add_node(name, RunnableCallable(node, anode, name=name))
    return builder.add_edge(START, "plan").add_edge("plan", "write").add_edge("write", END)


def variants(url: str) -> Iterator[Variant]:
    """All of them, each sync and async."""
    from langchain_core.language_models import GenericFakeChatModel
    from langchain_openai import ChatOpenAI

    from maestro_agents import workflow

    served = ChatOpenAI(model="stub", base_url=url, api_key="x", max_retries=0)
    fake = GenericFakeChatModel(messages=iter(lambda: "hello", None))
    for name, model, control in (
        ("model calls", served, url),
        ("model calls in process", fake, url),
        ("no model call", None, url),
        ("in process, control plane dead", fake, DEAD),
    ):
        for is_async in (True, False):
            os.environ["MAESTRO_BASE_URL"] = control
            plain = two_nodes(model).compile()
            yield Variant(name, plain, workflow(plain), control, is_async)


async def block(variant: Variant, graph: Any, count: int) -> tuple[float, float]:
    """`count` runs in a row: the median run and the processor time of one, in ms."""
    times, cpu = [], time.process_time()
    for _ in range(count):
        began = time.perf_counter()
        if variant.is_async:
            await graph.ainvoke({"text": ""})
        else:
            graph.invoke({"text": ""})
        times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times), (time.process_time() - cpu) * 1000 / count


async def measure(variant: Variant, rounds: int, count: int) -> dict[str, Any]:
    from maestro_agents._control import control

    os.environ["MAESTRO_BASE_URL"] = variant.control
    rows: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for turn in range(rounds + 2):
        for wrapped in (False, True) if turn % 2 else (True, False):
            row = await block(variant, variant.wrapped if wrapped else variant.plain, count)
            control.flush(5)
            if turn > 1:  # the first rounds warm both up
                rows[wrapped].append(row)
    (plain, plain_cpu), (wrapped_, cpu) = (zip(*rows[name], strict=True) for name in (False, True))
    low, high = quartiles(plain)[0], quartiles(wrapped_)[0]
    return {
        "plain": low,
        "wrapped": high,
        "more": round(high - low, 3),
        "ratio": round(high / low, 3),
        "pairs": quartiles(b - a for a, b in zip(plain, wrapped_, strict=True)),
        "cpu": quartiles(b - a for a, b in zip(plain_cpu, cpu, strict=True)),
    }


def quartiles(values: Iterable[float]) -> list[float]:
    return [round(value, 3) for value in statistics.quantiles(values, n=4)]


def serve() -> None:
    """The stub engine, and beside it control routes that take everything."""
    from maestro_agents.testing._app import App
    from maestro_agents.testing._engine import Engine, Settings
    from maestro_agents.testing._server import listen, make_server

    stub: Any = App(Engine(Settings()))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if not scope["path"].startswith("/v1/maestro/"):
            return await stub(scope, receive, send)
        while (await receive()).get("more_body"):
            pass
        headers = [(b"content-type", b"application/json"), (b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        return await send({"type": "http.response.body", "body": b"{}"})

    app.cut_all = stub.cut_all  # type: ignore[attr-defined]  # all that the server asks of it
    with listen(("127.0.0.1", 0)) as sock:
        print(f"http://127.0.0.1:{sock.getsockname()[1]}/v1", flush=True)
        make_server(app, log_level="warning").run(sockets=[sock])  # type: ignore[arg-type]


@contextmanager
def server() -> Iterator[str]:
    """`serve` in its own process; yields its base URL."""
    process = subprocess.Popen(
        (sys.executable, __file__, "--serve"), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.communicate(timeout=60)


async def profile(variant: Variant, count: int) -> None:
    """Where the time of wrapped runs goes, in our functions."""
    await block(variant, variant.wrapped, 20)
    with cProfile.Profile() as profiler:
        await block(variant, variant.wrapped, count)
    pstats.Stats(profiler).sort_stats("cumulative").print_stats("maestro", 40)


async def compare(options: argparse.Namespace) -> dict[str, Any]:
    """All in one event loop: the model keeps its connections."""
    result = {}
    with server() as url:
        for variant in variants(url):
            name = f"{variant.name}, {'ainvoke' if variant.is_async else 'invoke'}"
            if options.only not in name:
                continue
            if options.profile:
                await profile(variant, options.rounds * options.count)
            else:
                result[name] = await measure(variant, options.rounds, options.count)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--count", type=int, default=20, help="runs in a block")
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve()
    logging.disable()
    for name, row in asyncio.run(compare(options)).items():
        print(f"{name:40}", json.dumps(row))
    return None


if __name__ == "__main__":
    main()
