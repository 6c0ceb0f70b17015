"""What `workflow()` costs a LangGraph app: two-node graphs, plain and wrapped, side by side.

    make bench NAME=adapter_overhead

Plain and wrapped runs alternate in short blocks of one process, so a noisy machine hits both.
Times are ms of one run. `plain` and `wrapped` are medians over the blocks' medians. `more`, the
difference between neighbouring blocks, and `cpu`, that of the processor time of all threads, are
[first quartile, median, third]; `ratio` is the median of wrapped to plain of neighbouring blocks,
`floor` the median difference that a LangChain callback handler makes which does nothing.
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
MODEL_MS = 100
"""How long a call takes where the model takes time."""


class State(TypedDict, total=False):
    text: str


@dataclass(frozen=True, slots=True)
class Variant:
    """A graph in three copies, and how one run is made. `control` is the MAESTRO_BASE_URL."""

    name: str
    copies: dict[str, Any]
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


def idle_handler() -> Any:
    """What any handler costs: the events that ours takes reach it, and it does nothing."""
    from langgraph.callbacks import GraphCallbackHandler

    class Idle(GraphCallbackHandler):
        run_inline = True
        ignore_llm = True

        def on_chain_start(self, *_: Any, **__: Any) -> None: ...
        def on_chain_end(self, *_: Any, **__: Any) -> None: ...
        def on_chat_model_start(self, *_: Any, **__: Any) -> None: ...

    return Idle()


def variants(url: str, slow_url: str) -> Iterator[Variant]:
    """All of them, each sync and async."""
    from langchain_core.language_models import GenericFakeChatModel
    from langchain_openai import ChatOpenAI

    from maestro_agents import workflow

    served, slow = (
        ChatOpenAI(model="stub", base_url=to, api_key="x", max_retries=0) for to in (url, slow_url)
    )
    fake = GenericFakeChatModel(messages=iter(lambda: "hello", None))
    for name, model, control in (
        (f"model calls of {MODEL_MS} ms", slow, slow_url),
        ("model calls of no time", served, url),
        ("model calls in process", fake, url),
        ("no model call", None, url),
        ("in process, control plane dead", fake, DEAD),
    ):
        for is_async in (True, False):
            os.environ["MAESTRO_BASE_URL"] = control
            plain = two_nodes(model).compile()
            idle = plain.with_config(callbacks=[idle_handler()])
            copies = {"plain": plain, "wrapped": workflow(plain), "idle": idle}
            yield Variant(name, copies, control, is_async)


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
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in variant.copies}
    for turn in range(rounds + 2):
        for name in list(rows)[:: 1 if turn % 2 else -1]:
            row = await block(variant, variant.copies[name], count)
            control.flush(5)
            if turn > 1:  # the first rounds warm all up
                rows[name].append(row)
    (plain, plain_cpu), (wrapped, cpu), (idle, _) = (
        zip(*found, strict=True) for found in rows.values()
    )
    return {
        "plain": round(statistics.median(plain), 3),
        "wrapped": round(statistics.median(wrapped), 3),
        "more": quartiles(b - a for a, b in zip(plain, wrapped, strict=True)),
        "ratio": quartiles(b / a for a, b in zip(plain, wrapped, strict=True))[1],
        "floor": quartiles(b - a for a, b in zip(plain, idle, strict=True))[1],
        "cpu": quartiles(b - a for a, b in zip(plain_cpu, cpu, strict=True)),
    }


def quartiles(values: Iterable[float]) -> list[float]:
    return [round(value, 3) for value in statistics.quantiles(values, n=4)]


def serve(model_ms: float) -> None:
    """A stub engine, and beside it control routes that take everything."""
    from maestro_agents.testing import Latency
    from maestro_agents.testing._app import App
    from maestro_agents.testing._engine import Engine, Settings
    from maestro_agents.testing._server import listen, make_server

    stub: Any = App(Engine(Settings(latency=Latency(overhead_s=model_ms / 1000))))

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
def server(model_ms: float) -> Iterator[str]:
    """`serve` in its own process; yields its base URL."""
    process = subprocess.Popen(
        (sys.executable, __file__, "--serve", str(model_ms)), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.communicate(timeout=60)


async def profile(variant: Variant, count: int) -> None:
    """Where the time of wrapped runs goes, in our functions."""
    await block(variant, variant.copies["wrapped"], 20)
    with cProfile.Profile() as profiler:
        await block(variant, variant.copies["wrapped"], count)
    pstats.Stats(profiler).sort_stats("cumulative").print_stats("maestro", 40)


async def compare(options: argparse.Namespace) -> dict[str, Any]:
    """All in one event loop: the model keeps its connections."""
    result = {}
    with server(0) as url, server(MODEL_MS) as slow_url:
        for variant in variants(url, slow_url):
            name = f"{variant.name}, {'ainvoke' if variant.is_async else 'invoke'}"
            if options.only not in name:
                continue
            if options.profile:
                await profile(variant, options.rounds * options.count)
            else:
                count = max(2, options.count // 10) if str(MODEL_MS) in name else options.count
                result[name] = await measure(variant, options.rounds, count)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--count", type=int, default=20, help="runs in a block")
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--serve", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        return serve(options.serve)
    logging.disable()
    for name, row in asyncio.run(compare(options)).items():
        print(f"{name:40}", json.dumps(row))
    return None


if __name__ == "__main__":
    main()
