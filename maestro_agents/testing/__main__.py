"""The stub engine as a process: `python -m maestro_agents.testing --port 8001 --model small`."""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
import time
from math import inf

from maestro_agents.protocol import ConfigError

from ._app import App
from ._engine import Engine, Settings
from ._latency import Latency
from ._server import listen, make_server

_PR_SET_PDEATHSIG = 1


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status."""
    options = _parser().parse_args(argv)
    if os.environ.get("MAESTRO_TIED") == "1":
        _die_with_parent()
    try:
        _serve(options)
    except ConfigError as error:
        sys.stderr.write(f"stub: {error}\n")
        return 2
    return 0


def _serve(options: argparse.Namespace) -> None:
    app = App(Engine(_settings(options)))
    server = make_server(app, log_level="warning")

    def stop(*_: object) -> None:
        # A flag, not an exception: raised inside a destructor, an exception would be lost.
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    ready_at = time.monotonic() + options.startup_delay_s
    while time.monotonic() < ready_at and not server.should_exit:
        time.sleep(0.02)
    with listen(options.uds or (options.host, options.port)) as sock:
        where = options.uds or "http://{}:{}".format(*sock.getsockname()[:2])
        sys.stdout.write(f"stub: serving {', '.join(app.engine.settings.models)} on {where}\n")
        sys.stdout.flush()
        server.run(sockets=[sock])
    if options.uds and os.path.exists(options.uds):
        os.unlink(options.uds)


def _settings(options: argparse.Namespace) -> Settings:
    return Settings(
        models=tuple(options.model or ["stub"]),
        latency=Latency(
            prefill_tokens_s=options.prefill_tokens_s,
            decode_tokens_s=options.decode_tokens_s,
            batch_slowdown=options.batch_slowdown,
        ),
        output_tokens=options.output_tokens,
        reasoning_tokens=options.reasoning_tokens,
        max_num_seqs=options.max_num_seqs,
        max_model_len=options.max_model_len,
        kv_blocks=options.kv_blocks,
        block_size=options.block_size,
        auto_tools=options.auto_tools,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m maestro_agents.testing", description=__doc__)
    default = Settings()
    parser.add_argument("--uds", help="listen on this Unix socket instead of TCP")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8001, help="0 takes a free one")
    parser.add_argument("--model", action="append", help="a served model; may be repeated")
    parser.add_argument("--max-num-seqs", type=int, default=default.max_num_seqs)
    parser.add_argument("--max-model-len", type=int, default=default.max_model_len)
    parser.add_argument("--kv-blocks", type=int, default=default.kv_blocks)
    parser.add_argument("--block-size", type=int, default=default.block_size)
    parser.add_argument("--prefill-tokens-s", type=float, default=inf)
    parser.add_argument("--decode-tokens-s", type=float, default=inf)
    parser.add_argument("--batch-slowdown", type=float, default=0.0)
    parser.add_argument("--output-tokens", type=int, help="length of plain text")
    parser.add_argument(
        "--reasoning-tokens", type=int, help="length of the reasoning before each chat reply"
    )
    parser.add_argument("--auto-tools", action="store_true", help="call offered tools unforced")
    parser.add_argument("--startup-delay-s", type=float, default=0.0)
    return parser


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
