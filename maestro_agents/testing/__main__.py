"""The stub engine as a process: `python -m maestro_agents.testing --port 8001 --model small`."""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from math import inf
from typing import TypeVar

from maestro_agents.protocol import ConfigError

from ._app import App
from ._engine import Engine, Settings
from ._latency import Latency
from ._lease import Lease
from ._server import listen, make_server

_PR_SET_PDEATHSIG = 1

T = TypeVar("T")


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
    app = App(
        Engine(_settings(options)),
        Lease(_from_environment("MAESTRO_LEASE_S", float)),
        control=options.control,
    )
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
        kv_bytes_per_token=options.kv_bytes_per_token,
        kv_limit_bytes=_from_environment("MAESTRO_KV_LIMIT", int),
        elastic=options.elastic,
        weights_bytes=options.weights_bytes,
        suspend_s=options.suspend_s,
        resume_s=options.resume_s,
        fail_resume=options.fail_resume,
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
    parser.add_argument("--kv-bytes-per-token", type=int, default=default.kv_bytes_per_token)
    parser.add_argument("--prefill-tokens-s", type=float, default=inf)
    parser.add_argument("--decode-tokens-s", type=float, default=inf)
    parser.add_argument("--batch-slowdown", type=float, default=0.0)
    parser.add_argument("--output-tokens", type=int, help="length of plain text")
    parser.add_argument(
        "--reasoning-tokens", type=int, help="length of the reasoning before each chat reply"
    )
    parser.add_argument("--auto-tools", action="store_true", help="call offered tools unforced")
    parser.add_argument("--startup-delay-s", type=float, default=0.0)
    worker = parser.add_argument_group("as a Maestro worker")
    either = argparse.BooleanOptionalAction
    worker.add_argument("--control", action=either, default=True, help="serve its control API")
    worker.add_argument("--elastic", action=either, default=True, help="its KV limit moves")
    worker.add_argument("--weights-bytes", type=int, default=0, help="really taken of memory")
    worker.add_argument("--suspend-s", type=float, default=0.0)
    worker.add_argument("--resume-s", type=float, default=0.0)
    worker.add_argument("--fail-resume", type=int, default=0, help="so many first resumes fail")
    return parser


def _from_environment(name: str, kind: Callable[[str], T]) -> T | None:
    """Errors are the starter's: they are told as Python tells them."""
    value = os.environ.get(name)
    return None if value is None else kind(value)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
